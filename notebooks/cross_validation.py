"""Five-fold cross-validation over patients: what a recipe is worth, on patients it never saw.

    python notebooks/cross_validation.py VERB ... --help

    pack FOLDER knees.npz                  train and val of one folder, with folds
    check knees.npz                        is the augmentation here that of `utils.views`?
    teachers knees.npz WEIGHTS OUT --name A --size 384 --smoothing 0.1
    students knees.npz WEIGHTS OUT --arms labels,1,1e-4 A,0,2e-4
    gather knees.npz OUT TABLE.csv         out-of-fold answers of everything in OUT
    table results/cross_validation.csv     figures and differences, with intervals

Models, losses, optimizer, schedule and views are the project's own. For speed, steps run in
compiled scans on JAX with all images on the GPU; all students are lanes of one program.
The last epoch counts and the number of epochs is fixed beforehand: judged patients choose nothing.
Two things differ from the series: the frozen part of a teacher keeps its stochastic depth, and all
folds start from the same head.
"""

import argparse
import io
import os
import re
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "jax")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import pandas as pd

from utils import images, metrics

CLASSES, FOLDS, BATCH = 5, 5, 32
CALL = 33  # training steps in one call of the compiled program
VIEW_SEED = 0  # of the views that students train on, whatever the teacher's seed
AUGMENTATION = {"flip": True, "rotation": 7.0, "shift": 0.05, "zoom": 0.1, "brightness": 0.1}
AUGMENTATION |= {"contrast": 0.1, "cutout": 0.15625}
PHASES = (("head", 8e-4), ("tail", 1.5e-4), ("all", 1.5e-4))  # the teacher's, with their rates
TEMPERATURE = 4.0
BEGAN = time.time()


def say(*words):
    """Print with the seconds since the start."""
    print(f"[{time.time() - BEGAN:4.0f} s]", *words, flush=True)


def pack(folder: Path, out: Path):
    """Keep the image files of train and val in one file, with grades, patients and folds.

    Patients are dealt to the folds group by group, a group being those with equal grades, so every
    fold has its share of each grade and both knees of a patient lie in one fold.
    """
    files = [f for split in ("train", "val") for f in (folder / split).rglob("*.jpg")]
    files = sorted(files, key=lambda f: (int(f.stem[:-1]), f.stem[-1]))  # names such as 9000099L
    patients = np.array([int(f.stem[:-1]) for f in files])
    labels = np.array([int(f.parent.name) for f in files], "int8")
    groups, fold_of, rng = {}, {}, np.random.default_rng(0)
    for patient in np.unique(patients):
        groups.setdefault(tuple(sorted(labels[patients == patient])), []).append(patient)
    for grades in sorted(groups):
        for patient in rng.permutation(groups[grades]):
            fold_of[patient] = len(fold_of) % FOLDS
    data = [f.read_bytes() for f in files]
    facts = {"sizes": [len(d) for d in data], "labels": labels, "patients": patients}
    facts["folds"] = np.array([fold_of[p] for p in patients], "int8")
    np.savez(out, bytes=np.frombuffer(b"".join(data), "uint8"), **facts)


def unpack(path: Path, size: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Images uint8 (n, size, size, 1) as notebook 01 would store them, labels and folds (n,)."""
    with np.load(path) as file:
        ends, data = np.cumsum(file["sizes"]), file["bytes"].tobytes()
        labels, folds = file["labels"].astype(int), file["folds"].astype(int)

    def one(place):
        start, end = ends[place - 1] if place else 0, ends[place]
        return images.square(images.read_image(io.BytesIO(data[start:end])), size)

    with ThreadPoolExecutor() as pool:
        pixels = np.stack(list(pool.map(one, range(len(ends)))))
    return pixels[..., None], labels, folds


def augment(pixels, drawn):
    """`utils.views.augment` in JAX: pixels (B, S, S, 1), drawn (B, 12) to float32, 0 to 255."""
    import jax.numpy as jnp

    size, count = pixels.shape[1], len(pixels)
    centre, at = (size - 1) / 2, jnp.arange(size, dtype="float32")
    column = [drawn[:, i, None, None] for i in range(12)]

    def source(across, down, shift):
        start = size * shift + centre * (1 - across - down)
        place = across * at[None, None, :] + down * at[None, :, None] + start
        place = jnp.clip(place, 0, size - 1)
        whole = jnp.clip(jnp.floor(place), 0, size - 2)
        return whole.astype("int32"), place - whole

    (left, right_share), (top, low_share) = source(*column[:3]), source(*column[3:6])
    flat = pixels.reshape(count, size * size)

    def pixel(down, right):
        index = ((top + down) * size + left + right).reshape(count, -1)
        found = jnp.take_along_axis(flat, index, axis=1).reshape(count, size, size)
        return found.astype("float32")

    high = pixel(0, 0) * (1 - right_share) + pixel(0, 1) * right_share
    low = pixel(1, 0) * (1 - right_share) + pixel(1, 1) * right_share
    gray = high * (1 - low_share) + low * low_share
    gray = jnp.clip(gray * column[6] + column[7], 0, 255)
    share = (at + 0.5) / size
    inside_x = (share >= drawn[:, 8, None]) & (share < drawn[:, 10, None])
    inside_y = (share >= drawn[:, 9, None]) & (share < drawn[:, 11, None])
    return jnp.where(inside_y[:, :, None] & inside_x[:, None, :], 127.5, gray)[..., None]


def check(path: Path):
    """Compare `augment` with TensorFlow's in `utils.views`, on 8 images and 4 views."""
    from utils import views

    pixels = unpack(path, 224)[0][:8]
    for view in range(4):
        drawn = views.parameters(VIEW_SEED, 8, view, AUGMENTATION)
        gap = np.abs(np.asarray(augment(pixels, drawn)) - views.augment(pixels, drawn).numpy())
        # A border of the cutout may fall on the other side of a pixel's centre; nothing else may.
        say(f"view {view}: largest difference {gap.max():.4f} of 255")
        assert np.quantile(gap, 0.9999) < 0.05 and (gap > 0.05).mean() < 1e-4


def fast(model, depthwise: bool):
    """The same model with 1x1 convolutions as matrix products, which XLA runs several times faster.

    depthwise: also depthwise ones as sums of shifted images; pays in bfloat16 and without lanes.
    """
    import keras
    from keras import ops

    class Pointwise(keras.layers.Conv2D):
        def call(self, inputs):
            outputs = ops.matmul(inputs, self.kernel[0, 0])
            return self.activation(outputs + self.bias if self.use_bias else outputs)

    class Shifted(keras.layers.DepthwiseConv2D):
        def call(self, inputs):
            side, stride, size = self.kernel_size[0], self.strides[0], inputs.shape[1]
            after = (size - side) // stride + 1
            if self.padding == "same":
                after = -(-size // stride)
                lacking = max((after - 1) * stride + side - size, 0)
                around = (lacking // 2, lacking - lacking // 2)
                inputs = ops.pad(inputs, ((0, 0), around, around, (0, 0)))
            reach, outputs = (after - 1) * stride + 1, 0
            for i in range(side):
                for j in range(side):
                    moved = inputs[:, i : i + reach : stride, j : j + reach : stride, :]
                    outputs = outputs + moved * self.kernel[i, j, :, 0]
            return self.activation(outputs + self.bias if self.use_bias else outputs)

    def clone(layer):
        kind = type(layer)
        if kind is keras.layers.Conv2D and layer.kernel_size == layer.strides == (1, 1):
            kind = Pointwise
        if depthwise and kind is keras.layers.DepthwiseConv2D and layer.depth_multiplier == 1:
            kind = Shifted
        return kind.from_config(layer.get_config())

    copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy


def rates(peak: float, steps: int, epochs: int) -> np.ndarray:
    """The rate of every step by the project's schedule: float32 (steps * epochs,)."""
    import jax
    import keras

    from utils import training

    config = training.optimizer(peak, steps, epochs).get_config()
    schedule = keras.optimizers.schedules.deserialize(config["learning_rate"])
    return np.asarray(jax.vmap(schedule)(np.arange(steps * epochs)), "float32")


class Programs:
    """A model, its optimizer, and what is compiled of both: `train` and `look`.

    lanes: 0 for one model at a time; else so many of one architecture, side by side, each with its
    own weights, order of images, targets and rate. `train` takes (state, images, drawn, targets,
    hard_weight, active, order, rate, share) and runs CALL steps; `look` gives the logits of views.
    share: of each image in a step; the rest is another's (mixup, Zhang et al. 2018; 1: no mixup).
    decay: of the moving average of the weights, state["average"].
    """

    def __init__(self, model, loss, lanes: int = 0, decay: float = 0.0):
        import jax
        import keras

        from utils import models, training

        self.model, self.lanes, self.jax = model, lanes, jax
        phase_of = {}
        for number, (part, _) in reversed(list(enumerate(PHASES))):
            models.set_trainable(model, part)
            phase_of |= {id(v): number for v in model.trainable_variables}
        models.set_trainable(model, "all")
        phase_of = [phase_of[id(v)] for v in model.trainable_variables]
        # The project's AdamW, but its rate is a number given to each step: it differs by lane.
        config = training.optimizer(1.0, 1, 1).get_config() | {"learning_rate": 1.0}
        optimizer = keras.optimizers.AdamW.from_config(config)
        optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
        optimizer.build(model.trainable_variables)
        place = next(i for i, v in enumerate(optimizer.variables) if v is optimizer.learning_rate)
        self.start = {
            "weights": [np.asarray(v.value) for v in model.trainable_variables],
            "average": [np.asarray(v.value) for v in model.trainable_variables],
            "rest": [np.asarray(v.value) for v in model.non_trainable_variables],
            "optimizer": [np.asarray(v.value) for v in optimizer.variables],
        }

        def step(state, pixels, drawn, targets, hard_weight, active, order, rate, share):
            x, y = augment(pixels[order], drawn[order]), targets[order]
            x = share * x + (1 - share) * x[::-1]

            def cost(weights):
                call = model.stateless_call(weights, state["rest"], x, training=True)
                own, other = (loss(to, call[0], hard_weight) for to in (y, y[::-1]))
                return share * own + (1 - share) * other, call[1]

            (value, rest), slopes = jax.value_and_grad(cost, has_aux=True)(state["weights"])
            slopes = [s * active[p] for s, p in zip(slopes, phase_of, strict=True)]
            settings = [*state["optimizer"]]
            settings[place] = rate
            after, settings = optimizer.stateless_apply(settings, slopes, state["weights"])
            pairs = zip(phase_of, after, state["weights"], strict=True)
            after = [jax.numpy.where(active[p] > 0, new, old) for p, new, old in pairs]
            means = zip(state["average"], after, strict=True)
            new = {"average": [decay * mean + (1 - decay) * own for mean, own in means]}
            return new | {"weights": after, "rest": rest, "optimizer": settings}, value

        if lanes:
            step = jax.vmap(step, in_axes=(0, None, 0, 0, 0, None, 0, 0, None))

        def train(state, pixels, drawn, targets, hard_weight, active, order, rate, share):
            # All arrays are arguments: closed over, they would be constants, compiled in.
            def body(state, now):
                return step(state, pixels, drawn, targets, hard_weight, active, *now)

            return jax.lax.scan(body, state, (order, rate, share))

        def look(weights, rest, pixels, drawn, rows):
            def chunk(part):
                x = augment(pixels[part], drawn[part])
                return model.stateless_call(weights, rest, x, training=False)[0]

            return jax.lax.map(chunk, rows)

        self.train = jax.jit(train, donate_argnums=0)
        self.look = jax.jit(jax.vmap(look, (0, 0, None, None, 0)) if lanes else look)

    def compile(self, pixels, targets, capacity: int):
        """Compile both programs at once; `capacity` rows, a multiple of 64, are looked at."""
        shape, lead = self.jax.ShapeDtypeStruct, (self.lanes,) if self.lanes else ()
        state = self.jax.tree.map(lambda a: shape(lead + a.shape, a.dtype), self.start)
        drawn, self.rows_shape = shape((len(pixels), 12), "float32"), (*lead, capacity // 64, 64)
        own = [shape(lead + a.shape, "float32") for a in (drawn, targets)]
        own += [shape(lead, "float32"), shape((len(PHASES),), "float32")]
        own += [shape((CALL, *lead, BATCH), "int32"), shape((CALL, *lead), "float32")]
        own += [shape((CALL,), "float32")]
        rows = shape(self.rows_shape, "int32")
        parts = [
            self.train.lower(state, pixels, *own),
            self.look.lower(state["weights"], state["rest"], pixels, drawn, rows),
        ]
        say("traced")
        with ThreadPoolExecutor() as pool:
            self.train, self.look = pool.map(lambda part: part.compile(), parts)
        say("compiled")

    def logits(self, state, pixels, drawn, rows: list[np.ndarray], weights="weights"):
        """What each lane says of its rows (one array a lane), before it is waited for."""
        filled = np.stack([np.resize(r, self.rows_shape[-2] * 64) for r in rows])
        filled = filled.reshape(self.rows_shape).astype("int32")
        return self.look(state[weights], state["rest"], pixels, drawn, filled)


def both_views(count: int) -> list[np.ndarray]:
    """Parameters of the images as they are, and mirrored."""
    from utils import views

    plain = views.parameters(0, count, 0, None)
    mirrored = plain.copy()
    mirrored[:, 0] = -1
    return [plain, mirrored]


def order_of(rows: np.ndarray, seed: int, epoch: int, steps: int) -> np.ndarray:
    """The rows in an epoch's order: int32 (steps, BATCH)."""
    order = np.random.default_rng([seed, epoch, 1]).permutation(rows)
    return order[: steps * BATCH].reshape(steps, BATCH).astype("int32")


def shares_of(mixup: float, seed: int, epoch: int, steps: int) -> np.ndarray:
    """The share of its own image in each step of an epoch: float32 (steps,), 1 without mixup."""
    drawn = np.random.default_rng([seed, epoch, 2]).beta(mixup or 1, mixup or 1, steps)
    return np.where(mixup > 0, drawn, 1).astype("float32")


def split_rows(folds: np.ndarray, judged: list[int]):
    """Rows of training and of judging for each judged fold, and the steps of an epoch."""
    train = {k: np.flatnonzero(folds != k) for k in judged}
    steps = min(map(len, train.values())) // (BATCH * CALL) * CALL
    return train, {k: np.flatnonzero(folds == k) for k in judged}, steps


def teachers(a):
    """Train a teacher for each judged fold; judge it; let it look at the students' views."""
    import jax

    from utils import losses, models, runs, views

    pixels, labels, folds = unpack(a.pack, a.size)
    train, judged, steps = split_rows(folds, a.folds)
    count = len(labels)
    targets = losses.hard_targets(labels, CLASSES, a.softening, a.smoothing)
    options = {"classes": CLASSES, "weights": str(a.weights), "seed": a.seed}
    model = models.build_teacher(a.backbone, a.size, dropout=0.4, precision=a.precision, **options)
    cost = losses.teacher_loss()
    programs = Programs(fast(model, depthwise=True), lambda y, logits, _: cost(y, logits))
    pixels, targets = jax.device_put((pixels, targets))
    say(f"{count} images, {model.count_params():,} parameters, {steps} steps an epoch")
    programs.compile(pixels, targets, -(-max(map(len, train.values())) // 64) * 64)
    found, whole = np.full((count, 2, CLASSES), np.nan, "float32"), np.ones(CALL, "float32")
    for fold in a.folds:
        state, epoch, began = jax.device_put(programs.start), 0, time.time()
        for number, (phase, epochs) in enumerate(zip(PHASES, a.epochs, strict=True)):
            state["optimizer"] = jax.device_put(programs.start["optimizer"])
            active = (np.arange(len(PHASES)) <= number).astype("float32")
            curve = rates(phase[1], steps, epochs).reshape(epochs, -1, CALL)
            for of_epoch in curve:
                drawn = jax.device_put(views.parameters(a.seed, count, epoch, AUGMENTATION))
                order = order_of(train[fold], a.seed, epoch, steps).reshape(-1, CALL, BATCH)
                for part, rate in zip(order, of_epoch, strict=True):
                    rest = (drawn, targets, np.float32(1), active, part, rate)
                    state, cost_now = programs.train(state, pixels, *rest, whole)
                cost_now.block_until_ready()
                epoch += 1
        for side, drawn in enumerate(both_views(count)):
            said = programs.logits(state, pixels, drawn, [judged[fold]])
            found[judged[fold], side] = np.reshape(said, (-1, CLASSES))[: len(judged[fold])]
        right = (found[judged[fold], 0].argmax(1) == labels[judged[fold]]).mean()
        seconds = f"{time.time() - began:.0f} s"
        say(f"{a.name} fold {fold}: loss {cost_now.mean():.3f}, accuracy {right:.3f}, {seconds}")
        runs.write_atomic(a.out / f"teacher_{a.name}.npz", partial(np.savez, logits=found))
        looked, began = [], time.time()
        for view in range(a.views):
            drawn = views.parameters(VIEW_SEED, count, view, AUGMENTATION)
            looked.append(programs.logits(state, pixels, drawn, [train[fold]]))
        if looked:
            looked = np.stack(looked).reshape(a.views, -1, CLASSES)[:, : len(train[fold])]
            path = a.out / f"views_{a.name}_{fold}.npy"
            runs.write_atomic(path, partial(np.save, arr=looked.astype("float16")))
            say(f"{a.name} fold {fold}: {a.views} views, {time.time() - began:.0f} s")
    say("teachers done")


@dataclass(frozen=True)
class Arm:
    """A way to train students: teachers (none: labels alone), hard weight, rate, stored views."""

    teachers: tuple[str, ...]
    hard_weight: float
    rate: float
    stored: int = 0  # 0: a new view in every epoch

    @classmethod
    def read(cls, text: str) -> "Arm":
        """As "labels,1,1e-4", "A,0,2e-4", "A+C,0.3,1e-4" or, with 8 stored views, "A,0,2e-4,8"."""
        who, weight, rate, *stored = text.split(",")
        names = () if who == "labels" else tuple(who.split("+"))
        return cls(names, float(weight), float(rate), *map(int, stored))

    @property
    def name(self) -> str:
        """As in the tables, such as "A w0 2e-4"."""
        who = f"{'+'.join(self.teachers)} w{self.hard_weight:g}" if self.teachers else "labels"
        return f"{who}{f' V{self.stored}' if self.stored else ''} {self.rate * 1e4:g}e-4"


def students(a):
    """Train the students of all arms and folds, side by side or one by one, then judge them."""
    import jax

    from utils import losses, models, runs, views

    pixels, labels, folds = unpack(a.pack, a.size)
    train, judged, steps = split_rows(folds, a.folds)
    count, lanes = len(labels), [(arm, fold) for arm in a.arms for fold in a.folds]
    files = {(n, k): a.out / f"views_{n}_{k}.npy" for arm, k in lanes for n in arm.teachers}
    if missing := sorted({path.name for path in files.values() if not path.exists()}):
        raise SystemExit(f"{a.out} has no {', '.join(missing)}: run `teachers` for them first.")
    looked = {key: np.load(path) for key, path in files.items()}
    hard = losses.hard_targets(labels, CLASSES)
    options = {"weights": str(a.weights), "seed": a.seed, "precision": a.precision}
    model = models.build_student(a.backbone, a.size, CLASSES, **options)
    of_labels, of_teacher = losses.teacher_loss(), losses.DistillationLoss(TEMPERATURE, 0, CLASSES)

    def loss(y, logits, hard_weight):  # DistillationLoss, but the weight differs by lane
        soft = (1 - hard_weight) * of_teacher(y, logits)
        return soft + hard_weight * of_labels(y[:, :CLASSES], logits)

    lanes_of = 0 if a.one_by_one else len(lanes)
    programs = Programs(fast(model, a.one_by_one), loss, lanes_of, a.average)
    pixels = jax.device_put(pixels)
    say(f"{len(lanes)} trainings, {model.count_params():,} parameters, {steps} steps an epoch")
    blank = np.zeros((count, 2 * CLASSES), "float32")
    programs.compile(pixels, blank, -(-max(map(len, judged.values())) // 64) * 64)
    kinds = {"": "weights"} | ({"EMA ": "average"} if a.average else {})
    names = [kind + arm.name for kind in kinds for arm in a.arms]
    found = {name: np.full((count, 2, CLASSES), np.nan, "float32") for name in names}

    def epoch_inputs(lanes, epoch):
        """What these lanes need in an epoch: parameters of views, targets, orders."""
        drawn, targets, order = [], [], []
        view_of = {arm: epoch % arm.stored if arm.stored else epoch for arm, _ in lanes}
        made = {v: views.parameters(VIEW_SEED, count, v, AUGMENTATION) for v in view_of.values()}
        for arm, fold in lanes:
            y = np.concatenate([hard, np.zeros_like(hard)], axis=1)
            if arm.teachers:
                said = [looked[name, fold][view_of[arm]] for name in arm.teachers]
                y[train[fold], CLASSES:] = np.mean(said, axis=0, dtype="float32")
            drawn.append(made[view_of[arm]])
            targets.append(y)
            order.append(order_of(train[fold], a.seed, epoch, steps).reshape(-1, CALL, BATCH))
        return stacked(drawn), stacked(targets), stacked(order, 2)

    def stacked(values, axis=0):
        return values[0] if a.one_by_one else np.stack(values, axis)

    for group in [[lane] for lane in lanes] if a.one_by_one else [lanes]:
        copies = [programs.start] * len(group)
        state = jax.device_put(jax.tree.map(lambda *same: stacked(same), *copies))
        hard_weight = stacked([np.float32(arm.hard_weight) for arm, _ in group])
        curves = [rates(arm.rate, steps, a.epochs).reshape(a.epochs, -1, CALL) for arm, _ in group]
        curves = stacked(curves, 3)
        with ThreadPoolExecutor(1) as pool:
            ahead = pool.submit(epoch_inputs, group, 0)
            for epoch in range(a.epochs):
                drawn, targets, order = jax.device_put(ahead.result())
                ahead = pool.submit(epoch_inputs, group, min(epoch + 1, a.epochs - 1))
                rest = (drawn, targets, hard_weight, np.ones(len(PHASES), "float32"))
                shares = shares_of(a.mixup, a.seed, epoch, steps).reshape(-1, CALL)
                for now in zip(order, curves[epoch], shares, strict=True):
                    state, cost = programs.train(state, pixels, *rest, *now)
                cost = np.asarray(cost).reshape(CALL, -1).mean(0)
                if epoch % 12 == 11 or epoch < 2:
                    lane_costs = zip(group, cost, strict=True)
                    shown = {f"{arm.name}, {fold}": f"{c:.3f}" for (arm, fold), c in lane_costs}
                    say(f"epoch {epoch + 1} of {a.epochs}:", shown)
        rows = [judged[fold] for _, fold in group]
        for kind, weights in kinds.items():
            for side, drawn in enumerate(both_views(count)):
                said = np.asarray(programs.logits(state, pixels, drawn, rows, weights))
                said = said.reshape(len(group), -1, CLASSES)
                for (arm, _), own, of_lane in zip(group, rows, said, strict=True):
                    found[kind + arm.name][own, side] = of_lane[: len(own)]
            for (arm, fold), own in zip(group, rows, strict=True):
                right = (found[kind + arm.name][own, 0].argmax(1) == labels[own]).mean()
                say(f"{kind}{arm.name} fold {fold}: accuracy {right:.3f}")
        path = a.out / f"students_{a.label or a.size}.npz"
        runs.write_atomic(path, lambda p: np.savez(p, **found))
    say(f"students done after {a.epochs} epochs")


def gather(a):
    """Out-of-fold answers of everything in OUT as one small table, patients renumbered at random.

    Teachers: logits, rounded. Students: the grade that the plain view, and both views, get.
    """
    with np.load(a.pack) as file:
        facts = {name: file[name] for name in ("patients", "folds", "labels")}
    names, patient = np.unique(facts["patients"], return_inverse=True)
    renumbered = np.random.default_rng().permutation(len(names))[patient]
    columns = {"patient": renumbered, "fold": facts["folds"], "label": facts["labels"]}
    for path in sorted([*a.out.glob("teacher_*.npz"), *a.out.glob("students_[A-Z].npz")]):
        with np.load(path) as file:
            (logits,) = file.values()
        logits = logits - logits.max(axis=-1, keepdims=True)
        for side, view in enumerate(("plain", "mirrored")):
            name = path.stem.split("_", 1)[1].replace("_", " ")
            columns |= {f"{name}|{view}|{k}": logits[:, side, k].round(2) for k in range(CLASSES)}
    for path in sorted(a.out.glob("students_??*.npz")):
        label = path.stem.split("_", 1)[1]
        with np.load(path) as file:
            for name, logits in file.items():
                said = {"plain": logits[:, 0], "both": logits.mean(axis=1)}
                for view, scores in said.items():
                    grades = pd.Series(scores.argmax(1)).where(np.isfinite(scores[:, 0]))
                    columns[f"{label} {name}|{view}"] = grades.astype("Int8")
    frame = pd.DataFrame(columns).dropna().sort_values(["patient", "label"])
    frame.to_csv(a.csv, index=False)
    say(f"{len(frame)} images, {frame['patient'].nunique()} patients, {frame.shape[1]} columns")


FIGURES = ("accuracy", "QWK", "macro F1")


def figures(labels, grades, weights=None) -> np.ndarray:
    """Accuracy, QWK and macro F1 on all images, (3,), or on each draw of the bootstrap, (R, 3)."""
    pairs = np.eye(CLASSES**2, dtype="float32")[labels * CLASSES + grades]
    drawn = np.ones((1, len(labels)), "float32") if weights is None else weights
    confusion = (drawn @ pairs).reshape(-1, CLASSES, CLASSES)
    hits = np.diagonal(confusion, axis1=1, axis2=2)
    f1 = 2 * hits / (confusion.sum(1) + confusion.sum(2))
    accuracy = hits.sum(1) / drawn.sum(1)
    found = np.stack([accuracy, metrics.qwk(labels, grades, drawn), f1.mean(1)], axis=1)
    return found[0] if weights is None else found


def answers(frame: pd.DataFrame) -> dict[str, np.ndarray]:
    """Grades by name: teachers, averages of their logits, students, and students of tuned rate.

    A tuned rate is chosen for each fold by QWK on the other judged folds, whose models are others.
    """
    logits, grades = {}, {}
    for column in frame.columns[3:]:
        name, view, *k = column.split("|")
        if k:
            logits.setdefault((name, view), []).append(frame[column].to_numpy())
        else:
            grades[name if view == "plain" else f"{name} + mirrored"] = frame[column].to_numpy(int)
    single = {name: np.stack([*zip(*logits[name, "plain"], strict=True)]) for name, _ in logits}
    other = {name: np.stack([*zip(*logits[name, "mirrored"], strict=True)]) for name, _ in logits}
    means = [(name,) for name in single]
    means += [("A", "A earlier"), ("A", "C earlier"), ("A", "D"), ("A", "C", "D")]
    means += [("A", "A earlier", "C earlier", "D"), ("A", "B"), ("A", "A earlier", "B")]
    found = {}
    for names in (m for m in means if set(m) <= set(single)):
        title = " and ".join(names)
        plain = sum(single[name] for name in names)
        found[title] = plain.argmax(1)
        found[f"{title} + mirrored"] = (plain + sum(other[name] for name in names)).argmax(1)
    families, fold = {}, frame["fold"].to_numpy()
    labels = frame["label"].to_numpy()
    for name in grades:
        if not name.endswith("mirrored"):
            families.setdefault(name.rsplit(" ", 1)[0], []).append(name)
    found |= grades
    for family, members in families.items():
        if len(members) < 2:
            continue
        for end in ("", " + mirrored"):
            found[f"{family} tuned{end}"] = np.empty(len(labels), int)
        for k in np.unique(fold):
            apart = fold != k
            best = max(members, key=lambda m: figures(labels[apart], grades[m][apart])[1])
            print(f"{family}: fold {k} takes {best.rsplit(' ', 1)[1]}")
            for end in ("", " + mirrored"):
                found[f"{family} tuned{end}"][fold == k] = grades[best + end][fold == k]
    return found


DIFFERENCES = """A - D; D - C; D - C earlier; A - C earlier; A - A earlier; C - C earlier
A + mirrored - A; A earlier + mirrored - A earlier; D + mirrored - D; C + mirrored - C
A and A earlier - A; A and A earlier - A earlier; A and C earlier - A; A and D - A
A and C and D - A; A and C and D - A and A earlier; A and A earlier and C earlier and D - A
A and A earlier and C earlier and D - A and A earlier
A and A earlier + mirrored - A + mirrored; A and C and D + mirrored - A + mirrored
A and A earlier and C earlier and D + mirrored - A + mirrored
224 A w0 tuned - 224 labels tuned; 224 A w0 tuned + mirrored - 224 labels tuned + mirrored
224 A w0 1e-4 - 224 labels 1e-4; 224 A w0 2e-4 - 224 labels 1e-4
224 A+C+D w0 tuned - 224 labels tuned; 224 A w0.3 tuned - 224 labels tuned
224 A w0.3 1e-4 - 224 labels 1e-4; 224 A w0 V8 2e-4 - 224 labels V8 1e-4
224 A w0.3 tuned - 224 A w0 tuned; 224 A w0.3 1e-4 - 224 A w0 1e-4
224 A w0.3 2e-4 - 224 A w0 2e-4; 224 A+C+D w0 tuned - 224 A w0 tuned
224 A+C+D w0 1e-4 - 224 A w0 1e-4; 224 A+C+D w0 2e-4 - 224 A w0 2e-4
224 A w0 tuned - A; 224 A w0 tuned + mirrored - A + mirrored; 224 A+C+D w0 tuned - A
224 A w0.3 1e-4 - A; 224 A w0 2e-4 - 224 A w0 1e-4; 224 A w0 4e-4 - 224 A w0 2e-4
224 labels 1e-4 - 224 labels 0.5e-4; 224 labels 2e-4 - 224 labels 1e-4
224 A+C+D w0 2e-4 - 224 A+C+D w0 1e-4; 224 A w0 V8 2e-4 - 224 A w0 2e-4
224 labels V8 1e-4 - 224 labels 1e-4; 224 A w0 tuned + mirrored - 224 A w0 tuned
224 labels tuned + mirrored - 224 labels tuned
224 A+C+D w0 tuned + mirrored - 224 A+C+D w0 tuned
384 A w0 tuned - 384 labels tuned; 384 A w0 1e-4 - 384 labels 0.5e-4
384 A w0 tuned + mirrored - 384 labels tuned + mirrored
384 A w0 2e-4 - 224 alone A w0 2e-4; 384 A w0 tuned - 224 A w0 tuned
384 labels tuned - 224 labels tuned; 384 A w0 1e-4 - 384 A w0 2e-4
384 A w0 tuned - A; 384 A w0 tuned + mirrored - A + mirrored; 384 A w0 1e-4 - A
384 A w0 tuned + mirrored - 384 A w0 tuned; 384 long A w0 V40 2e-4 - 384 A w0 2e-4
224 long A w0 V40 2e-4 - 224 alone A w0 2e-4; 224 alone A w0 2e-4 - 224 A w0 2e-4
384 again A w0 1e-4 - 384 A w0 1e-4; 384 again EMA A w0 1e-4 - 384 again A w0 1e-4
384 mixup A w0 1e-4 - 384 A w0 1e-4; 384 mixup labels 0.5e-4 - 384 labels 0.5e-4
384 mixup long A w0 V40 1e-4 - 384 A w0 1e-4; 384 mixup A w0 1e-4 - 384 mixup labels 0.5e-4
384 A w0 1e-4, 3 seeds - 384 labels 0.5e-4, 3 seeds; 384 A w0 1e-4, 3 seeds - A
384 A w0 1e-4 + mirrored, 3 seeds - 384 labels 0.5e-4 + mirrored, 3 seeds
384 A w0 1e-4 + mirrored, 3 seeds - A + mirrored
384 A w0 1e-4 + mirrored, 3 seeds - 384 A w0 1e-4, 3 seeds
384 seed 1 A w0 1e-4 - 384 seed 1 labels 0.5e-4; 384 seed 2 A w0 1e-4 - 384 seed 2 labels 0.5e-4
384 stored A w0 V8 1e-4 - 384 stored labels V8 0.5e-4
384 stored A w0 V8 1e-4 - 384 A w0 1e-4, 3 seeds
384 stored labels V8 0.5e-4 - 384 labels 0.5e-4, 3 seeds
F - E; G - F; H - F; 160 E w0 V4 1e-4 - 160 E w0.3 V4 1e-4; 160 E w0 V4 2e-4 - 160 E w0 V4 1e-4
160 short E w0 V4 2e-4 - 160 E w0 V4 2e-4; 160 E w0 V4 2e-4 - 160 labels V4 1e-4
160 short E w0 V4 2e-4 - 160 E w0.3 V4 1e-4; 160 short E w0 V4 2e-4 - 160 short labels V4 1e-4
160 F w0 V4 2e-4 - 160 E w0 V4 2e-4
192 E w0 V4 2e-4 - 160 short E w0 V4 2e-4; 192 F w0 V4 2e-4 - 192 E w0 V4 2e-4
B - A; B + mirrored - A + mirrored; A and B - A; A and A earlier and B - A
A and B + mirrored - A + mirrored; A and A earlier and B + mirrored - A + mirrored"""


def over_seeds(names) -> dict[str, list[str]]:
    """Arms that were trained with several seeds: title to names, all with as many in one order."""
    arms = {}
    for name in names:
        arms.setdefault(re.sub(r" seed \d+", "", name), []).append(name)
    return {f"{arm}, {len(own)} seeds": own for arm, own in arms.items() if len(own) > 1}


def table(path: Path, draws: int, folds: list[int]):
    """Print every figure and difference with its 95 % interval over patients, as Markdown.

    Of an arm with several seeds also the mean; its interval draws patients and seeds. A seed gives
    all arms the same order of images, so that a difference draws the same seeds on both sides.
    """
    frame = pd.read_csv(path)
    frame = frame[frame["fold"].isin(folds)].reset_index(drop=True)
    labels, bootstrap = frame["label"].to_numpy(), metrics.Bootstrap(frame["patient"], draws)
    found = answers(frame)
    point = {name: figures(labels, grades) for name, grades in found.items()}
    drawn = {name: figures(labels, grades, bootstrap.weights) for name, grades in found.items()}
    for title, own in over_seeds(found).items():
        picked = np.random.default_rng(0).integers(len(own), size=(len(own), draws, 1))
        samples = np.take_along_axis(np.stack([drawn[name] for name in own]), picked, axis=0)
        point[title], drawn[title] = np.mean([point[n] for n in own], axis=0), samples.mean(axis=0)
    print(f"\n{len(labels)} images, {bootstrap.patients} patients\n")
    print("| | " + " | ".join(FIGURES) + " | accuracy by fold |\n|---|---|---|---|---|")
    for name in point:
        ends = np.quantile(drawn[name], [0.025, 0.975], axis=0).T
        pairs = zip(point[name], ends, strict=True)
        cells = [f"{value:.3f} ({low:.3f} to {high:.3f})" for value, (low, high) in pairs]
        of_fold = ()
        if name in found:
            of_fold = pd.Series(found[name] == labels).groupby(frame["fold"]).mean()
        print(f"| {name} | {' | '.join(cells)} | {' '.join(f'{v:.3f}' for v in of_fold)} |")
    print("\nPaired differences, in hundredths:\n")
    print("| | " + " | ".join(FIGURES) + " |\n|---|---|---|---|")
    for line in DIFFERENCES.replace("\n", "; ").split("; "):
        first, second = line.split(" - ")
        if first in point and second in point:
            gap = 100 * (point[first] - point[second])
            ends = np.quantile(100 * (drawn[first] - drawn[second]), [0.025, 0.975], axis=0).T
            pairs = zip(gap, ends, strict=True)
            cells = [f"{value:+.1f} ({low:+.1f} to {high:+.1f})" for value, (low, high) in pairs]
            print(f"| {first} minus {second} | {' | '.join(cells)} |")


def arguments() -> argparse.ArgumentParser:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    verbs = parser.add_subparsers(dest="verb", required=True)
    verb = verbs.add_parser("pack")
    verb.add_argument("folder", type=Path)
    verb.add_argument("out", type=Path)
    verbs.add_parser("check").add_argument("pack", type=Path)
    training = argparse.ArgumentParser(add_help=False)
    training.add_argument("pack", type=Path)
    training.add_argument("weights", type=Path, help="of the backbone without its top")
    training.add_argument("out", type=Path, help="folder of all results")
    training.add_argument("--seed", type=int, default=0)
    training.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    verb = verbs.add_parser("teachers", parents=[training])
    verb.add_argument("--name", required=True)
    verb.add_argument("--backbone", default="EfficientNetV2B0")
    verb.add_argument("--size", type=int, default=384)
    verb.add_argument("--smoothing", type=float, default=0.0)
    verb.add_argument("--softening", type=float, default=0.0)
    verb.add_argument("--epochs", type=int, nargs=3, default=[2, 3, 20])
    verb.add_argument("--precision", default="mixed_bfloat16")
    verb.add_argument("--views", type=int, default=40, help="one for each epoch of the students")
    verb = verbs.add_parser("students", parents=[training])
    verb.add_argument("--backbone", default="MobileNetV3Small")
    verb.add_argument("--size", type=int, default=224)
    verb.add_argument("--arms", type=Arm.read, nargs="+", required=True, help=Arm.read.__doc__)
    verb.add_argument("--epochs", type=int, default=40)
    verb.add_argument("--precision", default="float32")
    verb.add_argument("--mixup", type=float, default=0.0, help="both parameters of its Beta")
    verb.add_argument("--average", type=float, default=0.0, help="decay of an EMA of the weights")
    verb.add_argument("--one-by-one", action="store_true", help="not as lanes of one program")
    verb.add_argument(
        "--label", default="", help="in the table (default: size); one capital letter: a teacher"
    )
    verb = verbs.add_parser("gather")
    verb.add_argument("pack", type=Path)
    verb.add_argument("out", type=Path)
    verb.add_argument("csv", type=Path)
    verb = verbs.add_parser("table")
    verb.add_argument("csv", type=Path)
    verb.add_argument("--draws", type=int, default=2000)
    verb.add_argument("--folds", type=int, nargs="+", default=list(range(FOLDS)))
    return parser


def main():
    """Run what the command line names."""
    a = arguments().parse_args()
    if a.verb in ("teachers", "students", "gather"):
        a.out.mkdir(parents=True, exist_ok=True)
        {"teachers": teachers, "students": students, "gather": gather}[a.verb](a)
    elif a.verb == "pack":
        pack(a.folder, a.out)
    elif a.verb == "check":
        check(a.pack)
    else:
        table(a.csv, a.draws, a.folds)


if __name__ == "__main__":
    main()
