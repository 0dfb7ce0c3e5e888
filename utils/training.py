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

from utils import checkpoints, devices, models, runs
from utils.devices import gpus, strategy
from utils.schedules import Leg, make_optimizer, rates

__all__ = ["Leg", "LossNotFinite", "Recipe", "Training", "gpus", "rates", "strategy", "train"]

# A phase has collapsed when it names one class almost always and orders nothing.
COLLAPSED_SHARE, COLLAPSED_QWK = 0.95, 0.05
MEASURED = ("accuracy", "loss", "qwk", "val_accuracy", "val_loss", "val_qwk")
COLUMNS = ["epoch", "leg", *MEASURED, "learning_rate", "seconds"]


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
        batch_size: images a batch, over all devices.
    """

    legs: Sequence[Leg]
    batches: Callable[[int], tuple[tf.data.Dataset, int]]
    validation: tf.data.Dataset
    loss: keras.losses.Loss
    metrics: Callable[[], list[keras.metrics.Metric]]
    batch_size: int


class LossNotFinite(RuntimeError):
    """The loss became NaN or infinite."""


def compile_leg(model, leg: Leg, steps: int, recipe: Recipe, jit_compile) -> None:
    """Set what trains and compile, with the optimizer built, so that nothing is traced twice.

    Under float16 the loss is scaled by Keras's own `LossScaleOptimizer`.
    """
    models.set_trainable(model, leg.part, pretrained=leg.pretrained, unfreeze=leg.unfreeze)
    float16 = any(layer.compute_dtype == "float16" for layer in model.layers)
    replicas = devices.replicas_of(model)
    optimizer = make_optimizer(leg, steps, float16=float16, replicas=replicas)
    model.compile(
        optimizer,
        recipe.loss,
        metrics=recipe.metrics(),
        jit_compile=jit_compile,
        auto_scale_loss=False,
    )
    optimizer.build(model.trainable_variables)


class Keeper(keras.callbacks.Callback):
    """Keeps history, best weights and checkpoint; stops at a loss not finite or when time is up.

    `span` is the leg's first epoch and the one after its last, `total` the epochs of all legs.
    """

    def __init__(self, stage, path: Path, progress, best: list, leg: Leg, span, total: int):
        super().__init__()
        self.stage, self.path, self.progress, self.best = stage, path, progress, best
        self.leg, self.span, self.total = leg, span, total
        self.began_at, self.out_of_time, self.saving = progress.epoch, False, 0.0

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
        progress, ended = self.progress, time.time()
        if not np.isfinite(logs["val_loss"]):  # the last batch spoilt the weights
            raise LossNotFinite(
                f"The validation loss is {logs['val_loss']} after epoch {progress.epoch + 1}."
            )
        rate = float(keras.ops.convert_to_numpy(self.model.optimizer.learning_rate))
        row = {"epoch": progress.epoch + 1, "leg": self.leg.name}
        row |= {name: round(float(value), 6) for name, value in logs.items()}
        row |= {"learning_rate": rate, "seconds": round(ended - self.began, 2)}
        progress.history.append(row)
        progress.epoch += 1
        best = max(progress.history, key=lambda r: (r["val_qwk"], -r["val_loss"]))
        if best["epoch"] == progress.epoch:
            progress.best_qwk, progress.best_epoch = row["val_qwk"], progress.epoch
            self.best[:] = checkpoints.arrays_of(self.model.weights)
        save_progress(self.path, self.model, progress, self.best)
        self.saving = time.time() - ended
        self.report(row)
        if progress.epoch < self.span[1] and self.stops_now():
            self.model.stop_training = True

    def report(self, row: dict) -> None:
        """Say how it goes, when nobody watches a bar, and when it will end, once that is known."""
        seconds, (_, last) = self.seconds_an_epoch(), self.span
        left = (last - self.progress.epoch) * seconds
        if runs.batch_mode():
            print(
                f"{self.leg.name}, epoch {row['epoch']} of {last}: "
                f"loss {row['loss']:.4f}, val_loss {row['val_loss']:.4f}, "
                f"val_accuracy {row['val_accuracy']:.3f}, val_qwk {row['val_qwk']:.3f}, "
                f"{left / 60:.1f} min left",
                flush=True,
            )
        if self.progress.epoch == min(self.began_at + 2, last):
            legs = left + (self.total - last) * seconds
            print(self.stage.outlook(self.leg.name, left, legs, seconds), flush=True)

    def seconds_an_epoch(self) -> float:
        """Median of this leg's last epochs, without the first, which compiles; else of any before.

        0 where there is none.
        """
        rows = self.progress.history[self.began_at :][-5:] or self.progress.history[-5:]
        rows = rows[1:] if 1 < len(rows) < 5 else rows
        return self.saving + float(np.median([r["seconds"] for r in rows])) if rows else 0.0

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
        finite in the first epoch, the model has the weights that it came with, unless those name
        one class too, as random ones do.

    Raises:
        ValueError: model, data and devices do not fit each other.
        runs.StageError: the checkpoint is another run's.
        OSError: the disk has no room, or cannot be written.
        MemoryError: the device's memory is full; the message names what to change.
    """
    target, path = stage.folder / f"{name}.keras", stage.folder / f"{name}.checkpoint.npz"
    suffix = name.removeprefix("teacher").removeprefix("student")
    csv = stage.folder / f"history{suffix}.csv"
    if (done := stage.saved["facts"].get(name)) and target.exists() and csv.exists():
        checkpoints.remove(path)
        model.set_weights(models.load(target).get_weights())
        return Training(pd.read_csv(csv), True, done["best_epoch"], done["notes"])

    replicas = devices.replicas_of(model)
    check(model, recipe, name, replicas)
    checkpoints.check_room(stage.folder, model)
    start = checkpoints.arrays_of(model.variables)
    try:
        progress, best = run_legs(stage, name, path, model, recipe)
    except BaseException:
        checkpoints.assign(model.variables, start, "first weights")  # for a next try in this kernel
        raise
    history = pd.DataFrame(progress.history, columns=None if progress.history else COLUMNS)
    runs.write_atomic(csv, lambda temporary: history.to_csv(temporary, index=False))
    if stage.paused:
        return Training(history, False, progress.best_epoch, [])

    notes = [progress.stopped] if progress.stopped else []
    checkpoints.assign(model.weights, best, "best weights")
    validation = devices.shared(recipe.validation, recipe.batch_size, replicas)
    if progress.best_epoch and progress.best_qwk < COLLAPSED_QWK and one_class(model, validation):
        learned = checkpoints.arrays_of(model.variables)
        checkpoints.assign(model.variables, start, "first weights")
        if one_class(model, validation):
            notes.append("It ended in one class, as it began: what it learned is handed on.")
            checkpoints.assign(model.variables, learned, "best weights")
        else:
            notes.append("It ended in one class: the weights that it started from are handed on.")
            progress.best_epoch = 0
    models.save(model, target)
    facts = {"best_epoch": progress.best_epoch, "notes": notes, "devices": replicas}
    facts |= {"batch": recipe.batch_size, "batch_per_device": recipe.batch_size // replicas}
    stage.write(facts=stage.saved["facts"] | {name: facts})
    checkpoints.remove(path)
    for note in notes:
        print(note)
    return Training(history, True, progress.best_epoch, notes)


def check(model: keras.Model, recipe: Recipe, name: str, replicas: int) -> None:
    """Whether model, data and devices fit each other, before anything runs.

    Raises:
        ValueError: another image size or class count than the data's; a batch that the devices
            cannot share.
    """
    images, targets = (tuple(spec.shape[1:]) for spec in recipe.validation.element_spec)
    takes, gives = tuple(model.input_shape[1:]), model.output_shape[-1]
    if images != takes:
        raise ValueError(
            f"{name} takes images of {takes}, the data are {images}: it belongs to another run. "
            "Build it with this run's image size, or run the notebooks before this one again."
        )
    if targets[0] not in (gives, 2 * gives):
        raise ValueError(
            f"{name} tells {gives} classes apart, the targets have {targets[0]} columns: it "
            "belongs to data with other classes. Run notebooks 02 to 04 on these data."
        )
    parameter = "BATCH_SIZE" if name == "teacher" else "STUDENT_BATCH_SIZE"
    for leg in recipe.legs:
        devices.check_shares(parameter, recipe.batch_size, leg.accumulation, replicas)
    print(
        f"{name}: batches of {recipe.batch_size} images on {replicas} "
        f"device{'s' * (replicas > 1)}, {recipe.batch_size // replicas} on each."
    )


def run_legs(stage, name: str, path: Path, model, recipe: Recipe):
    """Train from the checkpoint at `path`, or the start, as far as time allows.

    Returns:
        progress and best weights; the stage is paused when time ended it.
    """
    best, total = checkpoints.arrays_of(model.weights), sum(leg.epochs for leg in recipe.legs)
    progress, groups = checkpoints.load(path, stage.key) or (checkpoints.Progress(stage.key), {})
    if progress.epoch:
        print(f"{name} goes on after epoch {progress.epoch}.")
        checkpoints.assign(model.variables, groups["model"], "model")
        best = groups["best"]
    replicas, first = devices.replicas_of(model), 0
    devices.synchronize_norms(model, replicas > 1)
    for leg in recipe.legs:
        last = first + leg.epochs
        if progress.epoch < last and not (stage.paused or progress.stopped):
            keeper = Keeper(stage, path, progress, best, leg, (first, last), total)
            run_leg(keeper, model, recipe, groups.get("optimizer"))
            if keeper.out_of_time:
                stage.pause(
                    f"{name}: {progress.epoch} of {total} epochs fitted into the time limit."
                )
        first = last
    devices.synchronize_norms(model, False)
    return progress, best


def run_leg(keeper: Keeper, model, recipe: Recipe, optimizer_state) -> None:
    """Compile and fit one leg, from its start or from where the checkpoint left it."""
    progress, leg, (first, last) = keeper.progress, keeper.leg, keeper.span
    replicas = devices.replicas_of(model)
    if keeper.stops_now():
        return
    data, steps = recipe.batches(progress.epoch)
    with model.distribute_strategy.scope() if model.distribute_strategy else nullcontext():
        if progress.epoch == first:
            checkpoints.assign(model.weights, keeper.best, "best weights")
        jit_compile = devices.resolve_jit(keeper.stage.settings["JIT_COMPILE"], replicas)
        compile_leg(model, leg, steps, recipe, jit_compile)
        if progress.epoch > first:
            checkpoints.assign(model.optimizer.variables, optimizer_state, "optimizer")
    try:
        with devices.memory_advice(f"leg {leg.name!r}"):
            model.fit(
                data,
                initial_epoch=progress.epoch,
                epochs=last,
                steps_per_epoch=steps,
                validation_data=devices.shared(recipe.validation, recipe.batch_size, replicas),
                callbacks=[keeper],
                shuffle=False,  # the data come shuffled
                verbose=0 if runs.batch_mode() else 1,
            )
    except LossNotFinite as error:
        progress.stopped = f"{error} Training stopped there; the best weights before are handed on."


def one_class(model, validation) -> bool:
    """Whether over 95 % of the predictions are one class."""
    predicted = model.predict(validation, verbose=0).argmax(axis=1)
    return bool(np.bincount(predicted).max() > COLLAPSED_SHARE * len(predicted))
