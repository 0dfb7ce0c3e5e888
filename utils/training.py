"""Training: legs over the same model, which a kill, a time limit or a crash only delays.

`train` compiles, fits, keeps the best epoch by validation QWK and saves the model. All state stands
in one checkpoint (`utils.checkpoints`); run the same thing again and it goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
import pandas as pd
import tensorflow as tf

from utils import checkpoints, models, runs

# A phase has collapsed when it names one class almost always and orders nothing.
COLLAPSED_SHARE, COLLAPSED_QWK = 0.95, 0.05


@dataclass(frozen=True)
class Leg:
    """Epochs that share what trains and how fast.

    Attributes:
        name: shown in the history.
        part: what trains: "head", "tail" (the last `unfreeze` of the backbone too) or "all".
        epochs: how many.
        learning_rate: the peak rate of AdamW.
        pretrained: whether the backbone came with weights; else everything trains always.
        unfreeze: share of the backbone's layers that "tail" trains.
        warmup_epochs: epochs of linear warm-up, at most half of the leg.
        restarts: how often the cosine starts anew (Loshchilov & Hutter 2017); 0 for a single one.
        weight_decay: AdamW's, on kernels only.
        accumulation: batches whose gradients are added up before a step (one device only).
    """

    name: str
    part: str
    epochs: int
    learning_rate: float
    pretrained: bool
    unfreeze: float = 0.3
    warmup_epochs: int = 0
    restarts: int = 0
    weight_decay: float = 1e-4
    accumulation: int = 1


@dataclass(frozen=True)
class Recipe:
    """Legs, data, loss and metrics of one training; `utils.recipes` makes them.

    Attributes:
        legs: what trains, for how long and how fast, in order.
        batches: first epoch (from 0, over all legs) -> training batches from there on, and steps an
            epoch.
        validation: (x, y) batches of the val split, not augmented.
        loss: on logits.
        metrics: makes new metrics: "accuracy" and "qwk".
    """

    legs: Sequence[Leg]
    batches: Callable[[int], tuple[tf.data.Dataset, int]]
    validation: tf.data.Dataset
    loss: keras.losses.Loss
    metrics: Callable[[], list[keras.metrics.Metric]]


class LossNotFinite(RuntimeError):
    """The loss became NaN or infinite."""


@keras.saving.register_keras_serializable("knee_distillation")
class WarmUpCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then cosine decay to 1 % of the peak, started anew `restarts` times.

    All cycles are equally long and the peak shrinks by 0.8 with each (Loshchilov & Hutter 2017,
    "SGDR"). Takes the step number, gives a float32 rate.
    """

    def __init__(self, peak: float, steps: int, warmup_steps: int = 0, restarts: int = 0):
        self.peak, self.steps = peak, steps
        self.warmup_steps, self.restarts = warmup_steps, restarts

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        cycle_steps = max(1.0, (self.steps - self.warmup_steps) / (self.restarts + 1))
        position = keras.ops.maximum(step - self.warmup_steps, 0.0) / cycle_steps
        cycle = keras.ops.minimum(keras.ops.floor(position), float(self.restarts))
        part = keras.ops.minimum(position - cycle, 1.0)
        cosine = 0.5 * (1.0 + keras.ops.cos(np.pi * part))
        rate = self.peak * keras.ops.power(0.8, cycle) * (0.01 + 0.99 * cosine)
        warm = self.peak * (step + 1.0) / max(1, self.warmup_steps)
        return keras.ops.where(step < self.warmup_steps, warm, rate)

    def get_config(self):
        return {n: getattr(self, n) for n in ("peak", "steps", "warmup_steps", "restarts")}


def strategy(devices: int = 0, names: Sequence[str] | None = None) -> tf.distribute.Strategy:
    """Where to build and train: all GPUs by `MirroredStrategy`, or the one device there is.

    Args:
        devices: how many to use at most; 0 for all.
        names: logical devices, such as ["CPU:0", "CPU:1"]; by default the GPUs.

    Returns:
        A strategy whose `scope()` the model must be built or loaded in. When several devices cannot
        be set up, that is said and one is used.
    """
    names = list(names or [d.name for d in tf.config.list_logical_devices("GPU")])
    names = names[:devices] if devices else names
    if len(names) > 1:
        try:
            mirrored = tf.distribute.MirroredStrategy(names)
            mirrored.run(lambda: tf.constant(1.0))
            return mirrored
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            print(f"{len(names)} devices cannot be used together ({str(error)[:120]}): one is.")
    return tf.distribute.get_strategy()


def resolve_jit(jit_compile: bool | str, replicas: int) -> bool | str:
    """What to hand to `compile`: "auto" means off with several devices, where XLA fails.

    Raises:
        ValueError: XLA asked for by True with several devices.
    """
    if replicas == 1:
        return jit_compile
    if jit_compile is True:
        raise ValueError(
            f"JIT_COMPILE = True does not work with {replicas} devices (TensorFlow's "
            'MirroredStrategy fails in the first step): use "auto", or DEVICES = 1 with XLA.'
        )
    return False


def make_schedule(leg: Leg, steps: int) -> WarmUpCosine:
    """The learning rate of a leg of `steps` batches an epoch."""
    updates = max(1, steps // leg.accumulation)
    warmup = min(leg.warmup_epochs, leg.epochs / 2) * updates
    return WarmUpCosine(leg.learning_rate, leg.epochs * updates, int(warmup), leg.restarts)


def make_optimizer(leg: Leg, steps: int) -> keras.optimizers.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) for one leg of `steps` batches an epoch."""
    accumulation = leg.accumulation if leg.accumulation > 1 else None
    optimizer = keras.optimizers.AdamW(
        make_schedule(leg, steps),
        weight_decay=leg.weight_decay,
        global_clipnorm=1.0,
        gradient_accumulation_steps=accumulation,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return optimizer


def compile_leg(model, leg: Leg, steps: int, recipe: Recipe, jit_compile) -> None:
    """Set what trains and compile, with the optimizer built, so that nothing is traced twice.

    Under float16 the loss is scaled by Keras's own `LossScaleOptimizer`.
    """
    models.set_trainable(model, leg.part, pretrained=leg.pretrained, unfreeze=leg.unfreeze)
    optimizer = make_optimizer(leg, steps)
    if any(layer.compute_dtype == "float16" for layer in model.layers):
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer)
    model.compile(
        optimizer,
        recipe.loss,
        metrics=recipe.metrics(),
        jit_compile=jit_compile,
        auto_scale_loss=False,
    )
    optimizer.build(model.trainable_variables)


def synchronize_head(model, on: bool) -> None:
    """Let the trained BatchNorm layers share their statistics between devices, or no longer."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = on


class Keeper(keras.callbacks.Callback):
    """Keeps history, best weights and checkpoint; stops at a loss not finite or when time is up."""

    def __init__(self, stage, path: Path, progress, best: list, span: tuple[int, int], leg: Leg):
        super().__init__()
        self.stage, self.path, self.progress, self.best = stage, path, progress, best
        self.span, self.leg = span, leg
        self.began_at, self.out_of_time = progress.epoch, False

    def on_epoch_begin(self, epoch, logs=None):
        self.began, self.batches = time.time(), 0

    def on_train_batch_end(self, batch, logs=None):
        self.batches += 1  # Keras's own number is the first of a step, or the last, by version
        loss = float(logs["loss"])
        if not np.isfinite(loss):
            raise LossNotFinite(
                f"The loss is {loss} in epoch {self.progress.epoch + 1}, batch {self.batches}."
            )

    def on_epoch_end(self, epoch, logs=None):
        progress, seconds = self.progress, time.time() - self.began
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": progress.epoch + 1, "leg": self.leg.name}
        row |= {name: round(float(value), 6) for name, value in logs.items()}
        progress.history.append(row | {"learning_rate": rate, "seconds": round(seconds, 2)})
        progress.epoch += 1
        if row["val_qwk"] > progress.best_qwk:
            progress.best_qwk, progress.best_epoch = row["val_qwk"], progress.epoch
            self.best[:] = checkpoints.arrays_of(self.model.weights)
        save_progress(self.path, self.model, progress, self.best)
        self.report(row)
        if progress.epoch < self.span[1] and self.stops_now():
            self.model.stop_training = True

    def report(self, row: dict) -> None:
        """Say how it goes, when nobody watches a bar, and when it will end, while that is news."""
        seconds = self.seconds_an_epoch()
        left = (self.span[1] - self.progress.epoch) * seconds
        if runs.batch_mode():
            print(
                f"{self.leg.name}, epoch {row['epoch']} of {self.span[1]}: "
                f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}, "
                f"val_accuracy {row['val_accuracy']:.3f}, val_qwk {row['val_qwk']:.3f}, "
                f"{left / 60:.1f} min left",
                flush=True,
            )
        if np.isfinite(self.stage.deadline) and self.progress.epoch - self.began_at <= 2:
            end, limit = time.localtime(time.time() + left), time.localtime(self.stage.deadline)
            print(
                f"{self.leg.name} ends about {time.strftime('%H:%M', end)}, the session's limit "
                f"is {time.strftime('%H:%M', limit)}. {self.stage.outlook(left, seconds)}"
            )

    def seconds_an_epoch(self) -> float:
        """Median of this session's last epochs; 0 before the first."""
        rows = self.progress.history[self.began_at :][-5:]
        return float(np.median([r["seconds"] for r in rows])) if rows else 0.0

    def stops_now(self) -> bool:
        """Whether another epoch would pass the deadline."""
        self.out_of_time = time.time() + 1.1 * self.seconds_an_epoch() > self.stage.deadline
        return self.out_of_time


def save_progress(path: Path, model, progress: checkpoints.Progress, best: list) -> None:
    """Write all of a training's state as one checkpoint."""
    groups = {
        "model": checkpoints.arrays_of(model.variables),
        "optimizer": checkpoints.arrays_of(model.optimizer.variables),
        "best": best,
    }
    checkpoints.save(path, progress, groups)


@dataclass
class Training:
    """What `train` returns.

    Attributes:
        history: a row an epoch: epoch (from 1), leg, losses and metrics, learning_rate, seconds.
        complete: False when the time limit ended it: run again to go on.
        best_epoch: the epoch whose weights the model now has; 0 for those it started from.
        notes: what a reader must know: a collapse, a loss that was not finite.
    """

    history: pd.DataFrame
    complete: bool
    best_epoch: int
    notes: list[str]


def train(
    stage: runs.Stage,
    name: str,
    model: keras.Model,
    recipe: Recipe,
) -> Training:
    """Train `model` through the legs of `recipe`; save it as `<name>.keras` in the stage's folder.

    Args:
        stage: whose folder holds checkpoint, history and model, and whose deadline counts.
        name: "teacher", "student" or "student_labels_only".
        model: logits (B, K) from images (B, S, S, 1); built or loaded in the strategy's scope.
        recipe: a `recipes.Recipe`. Its batches are asked for after the checkpoint has been read;
            the best weights so far are where each leg starts; `metrics` holds one named "qwk".

    Returns:
        A `Training`; the model has the weights of the best epoch by `val_qwk`. One that was
        complete before is only loaded. After a collapse into one class, or when the loss was not
        finite in the first epoch, the model has the weights that it came with.

    Raises:
        runs.StageError: the checkpoint is another run's.
        MemoryError: the device's memory is full; the message names what to change.
    """
    target, path = stage.folder / f"{name}.keras", stage.folder / f"{name}.checkpoint.npz"
    suffix = name.removeprefix("teacher").removeprefix("student")
    csv = stage.folder / f"history{suffix}.csv"
    if (done := stage.saved["facts"].get(name)) and target.exists():
        model.set_weights(models.load(target).get_weights())
        return Training(pd.read_csv(csv), True, done["best_epoch"], done["notes"])

    start, replicas = checkpoints.arrays_of(model.weights), replicas_of(model)
    progress, groups = checkpoints.load(path, stage.key) or (checkpoints.Progress(stage.key), {})
    if progress.epoch:
        print(f"{name} goes on after epoch {progress.epoch}.")
        checkpoints.assign(model.variables, groups["model"], "model")
    best, out_of_time = list(groups.get("best", start)), stage.paused
    synchronize_head(model, replicas > 1)
    first = 0
    for leg in recipe.legs:
        last = first + leg.epochs
        if progress.epoch < last and not (out_of_time or progress.stopped):
            keeper = Keeper(stage, path, progress, best, (first, last), leg)
            run_leg(keeper, model, recipe, groups.get("optimizer"))
            out_of_time = keeper.out_of_time
        first = last
    synchronize_head(model, False)
    history = pd.DataFrame(progress.history)
    if len(history):
        runs.write_atomic(csv, lambda temporary: history.to_csv(temporary, index=False))
    if stage.paused:
        return Training(history, False, progress.best_epoch, [])
    if out_of_time:
        stage.pause(f"{name}: {progress.epoch} of {first} epochs fitted into the time limit.")
        return Training(history, False, progress.best_epoch, [])

    notes = [progress.stopped] if progress.stopped else []
    checkpoints.assign(model.weights, best, "best weights")
    if collapsed(model, recipe.validation, progress.best_qwk):
        notes.append("It ended in one class: the weights that it started from are handed on.")
        checkpoints.assign(model.weights, start, "first weights")
        progress.best_epoch = 0
    models.save(model, target)
    facts = {"best_epoch": progress.best_epoch, "notes": notes, "replicas": replicas}
    stage.write(facts=stage.saved["facts"] | {name: facts})
    checkpoints.remove(path)
    for note in notes:
        print(note)
    return Training(history, True, progress.best_epoch, notes)


def run_leg(keeper: Keeper, model, recipe: Recipe, optimizer_state) -> None:
    """Compile and fit one leg, from its start or from where the checkpoint left it."""
    progress, leg, (first, last) = keeper.progress, keeper.leg, keeper.span
    if keeper.stops_now():
        return
    data, steps = recipe.batches(progress.epoch)
    with model.distribute_strategy.scope() if model.distribute_strategy else nullcontext():
        if progress.epoch == first:
            checkpoints.assign(model.weights, keeper.best, "best weights")
        jit_compile = resolve_jit(keeper.stage.settings["JIT_COMPILE"], replicas_of(model))
        compile_leg(model, leg, steps, recipe, jit_compile)
        if progress.epoch > first:
            checkpoints.assign(model.optimizer.variables, optimizer_state, "optimizer")
    try:
        model.fit(
            data,
            initial_epoch=progress.epoch,
            epochs=last,
            steps_per_epoch=steps,
            validation_data=recipe.validation,
            callbacks=[keeper],
            shuffle=False,  # the batches come in their order already
            verbose=0 if runs.batch_mode() else 1,
        )
    except LossNotFinite as error:
        progress.stopped = f"{error} Training stopped there; the best weights before are handed on."
    except tf.errors.ResourceExhaustedError as error:
        raise MemoryError(out_of_memory(leg)) from error


def replicas_of(model) -> int:
    """Over how many devices a model trains."""
    return model.distribute_strategy.num_replicas_in_sync if model.distribute_strategy else 1


def out_of_memory(leg: Leg) -> str:
    """What to change when the device's memory is full, with the peak where the device tells it."""
    peaks = [
        f"{tf.config.experimental.get_memory_info(d.name)['peak'] / 2**30:.1f} GiB on {d.name}"
        for d in tf.config.list_logical_devices("GPU")
    ]
    peak = f" (peak {', '.join(peaks)})" if peaks else ""
    return (
        f"The device's memory is full in leg {leg.name!r}{peak}. Lower BATCH_SIZE (on one device "
        "with ACCUMULATION raised by the same factor, which keeps the recipe) or the image size, "
        'or set TEACHER_PRECISION / STUDENT_PRECISION = "mixed_float16". What was trained is kept.'
    )


def collapsed(model, validation, best_qwk: float) -> bool:
    """Whether over 95 % of the predictions are one class and the best val QWK is under 0.05."""
    if best_qwk >= COLLAPSED_QWK:
        return False
    predicted = model.predict(validation, verbose=0).argmax(axis=1)
    return bool(np.bincount(predicted).max() > COLLAPSED_SHARE * len(predicted))


def rates(leg: Leg, steps: int) -> np.ndarray:
    """The learning rate at every update of a leg of `steps` batches an epoch: float (updates,)."""
    schedule = make_schedule(leg, steps)
    return keras.ops.convert_to_numpy(schedule(np.arange(schedule.steps)))
