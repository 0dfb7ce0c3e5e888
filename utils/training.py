"""What `compile` and `fit` need beside Keras: a schedule, callbacks that lose no finished epoch.

A killed training goes on from the last finished epoch and ends as an undisturbed one would: data,
dropout and schedule depend on (seed, epoch) alone.
"""

import contextlib
import re
import time
from pathlib import Path
from types import SimpleNamespace

import keras
import numpy as np
import pandas as pd

from utils import kaggle, models, runs


def optimizer(
    learning_rate: float, steps: int, epochs: int, warmup_epochs: float = 1, clip: bool = True
) -> keras.optimizers.AdamW:
    """AdamW whose rate rises to `learning_rate`, then falls along a cosine to a hundredth of it.

    learning_rate: above 0. steps: batches an epoch. warmup_epochs: at most half of `epochs` count.
    clip: the gradient's global norm to 1; off under several devices, which clip their shares.
    Weight decay (1e-4; Loshchilov & Hutter 2019) leaves biases and normalization alone.
    """
    warmup = int(min(warmup_epochs, epochs / 2) * steps)
    rate = keras.optimizers.schedules.CosineDecay(
        learning_rate / 10,
        max(steps * epochs - warmup, 1),
        alpha=0.01,
        warmup_target=learning_rate,
        warmup_steps=warmup,
    )
    adamw = keras.optimizers.AdamW(rate, weight_decay=1e-4, global_clipnorm=1.0 if clip else None)
    adamw.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    return adamw


def strategy(devices: int = 1):
    """Something with a `scope()` in which to build and compile a model for this many GPUs.

    Several GPUs share each batch through `MirroredStrategy`, without XLA and without clipping.
    ValueError: more devices than there are, or several on another backend than TensorFlow.
    """
    if devices == 1:
        return SimpleNamespace(scope=contextlib.nullcontext)
    if keras.backend.backend() != "tensorflow":
        raise ValueError("DEVICES above 1 needs KERAS_BACKEND=tensorflow: set DEVICES = 1.")
    import tensorflow as tf

    there = tf.config.list_logical_devices("GPU") or tf.config.list_logical_devices("CPU")
    if devices > len(there):
        raise ValueError(f"DEVICES = {devices}, but this machine has {len(there)}.")
    return tf.distribute.MirroredStrategy([device.name for device in there[:devices]])


class EpochClock(keras.callbacks.Callback):
    """Tells the data which epoch it is, and draws dropout from (seed, epoch).

    seed: of the training. first: epochs of the phases before, so that no view comes twice.
    """

    async_safe = True  # nothing happens per batch, so JAX need not wait for each step

    def __init__(self, seed: int, first: int = 0):
        super().__init__()
        self.seed, self.first, self.epoch = seed, first, first

    def on_epoch_begin(self, epoch, logs=None):
        self.epoch = self.first + epoch
        rng = np.random.default_rng([self.seed, self.epoch, 2])
        for state in self.model.non_trainable_variables:
            if state.path.endswith("seed_generator_state"):
                state.assign(rng.integers(0, 2**31, size=state.shape, dtype="uint32"))


class Resume(keras.callbacks.Callback):
    """Keeps what a training earned, stops it in time, and goes on with it.

    At the end of an epoch it writes, each under a temporary name first: the weights, if they are
    the best so far; the history; the state (weights and optimizer, the epoch in its name). The two
    newest states stay until `finish`, so that a kill at any moment costs at most the epoch in hand.
    Compile the model before: the state holds its optimizer.

    `epoch`: how many are finished. `history`: a row an epoch: epoch (from 1), `fit`'s logs, time.
    StageError: on Kaggle without a GPU. FloatingPointError, from `fit`: the loss is not finite.
    """

    async_safe = True

    def __init__(self, stage: runs.Stage, model, epochs, name="teacher", monitor="val_qwk"):
        """epochs: of the whole training. name: of its files. monitor: the larger, the better."""
        super().__init__()
        self.stage, self.trained, self.name, self.monitor = stage, model, name, monitor
        self.epochs, self.epoch, self.longest = epochs, 0, 0.0
        self.history = pd.DataFrame(columns=["epoch", "loss", "val_loss", monitor], dtype=float)
        csv = self._path("history.csv")
        history = pd.read_csv(csv) if csv.exists() else self.history
        if self._path("keras").exists() and len(history) == epochs:
            self.epoch, self.history = epochs, history
            return
        kaggle.preflight({"TEACHER_IMAGE_SIZE": model.input_shape[1]})  # no hours without a GPU
        model.optimizer.build(model.trainable_variables)
        before = [keras.ops.convert_to_numpy(v) for v in model.variables]
        for epoch, path in self._files("state").items():
            try:
                model.load_weights(path)
            except Exception as error:  # of HDF5 or Keras; the one before will do
                aside = path.rename(path.with_suffix(".unreadable"))
                print(f"{path.name} cannot be read ({str(error)[:100]}): kept as {aside.name}.")
                continue
            self.epoch, self.history = epoch, history[:epoch]
            print(f"{name} goes on after epoch {self.epoch} of {epochs}.")
            return
        for variable, value in zip(model.variables, before, strict=True):
            variable.assign(value)

    @property
    def until(self) -> int:
        """The epoch to fit to: all of them, or none more when the time is up."""
        return self.epochs if time.time() < self.stage.deadline else self.epoch

    @property
    def done(self) -> bool:
        """Whether all epochs are finished."""
        return self.epoch >= self.epochs

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.time()

    def on_epoch_end(self, epoch, logs=None):
        if not np.isfinite([logs["loss"], logs["val_loss"]]).all():
            raise FloatingPointError(
                f"The loss is not finite in epoch {epoch + 1}: lower the learning rate, or set the"
                " precision to float32. What was reached before is kept."
            )
        row = {"epoch": epoch + 1} | {n: round(float(v), 6) for n, v in logs.items()}
        row["seconds"] = round(time.time() - self.began, 2)
        history = pd.DataFrame([*self.history[:epoch].to_dict("records"), row])
        if self._best(history) == epoch + 1:
            runs.write_atomic(self._path("best", epoch + 1), self._bare().save_weights)
        runs.write_atomic(self._path("history.csv"), lambda p: history.to_csv(p, index=False))
        runs.write_atomic(self._path("state", epoch + 1), self.trained.save_weights)
        self.epoch, self.history = epoch + 1, history
        needed = {self._best(history), self._best(history[:-1])}  # of the two newest states
        stale = [path for number, path in self._files("best").items() if number not in needed]
        for path in (*list(self._files("state").values())[2:], *stale):
            path.unlink()
        self.longest = max(self.longest, time.time() - self.began)
        if time.time() + 1.1 * self.longest > self.stage.deadline:
            self.trained.stop_training = True

    def finish(self) -> int:
        """Give the model its best epoch's weights and write `<name>.keras`; return that epoch."""
        epoch, path = self._best(self.history), self._path("keras")
        if path.exists():
            self.trained.set_weights(keras.saving.load_model(path, compile=False).get_weights())
        else:
            self._bare().load_weights(self._path("best", epoch))
            models.save(self.trained, path)
        for left in self.stage.folder.glob(f"{self.name}.*.weights.h5"):
            left.unlink()
        return epoch

    def _path(self, kind: str, epoch: int | None = None) -> Path:
        ending = kind if epoch is None else f"{kind}_{epoch:04d}.weights.h5"
        return self.stage.folder / f"{self.name}.{ending}"

    def _files(self, kind: str) -> dict[int, Path]:
        """Those of one kind by their epoch, the newest first."""
        paths = sorted(self.stage.folder.glob(f"{self.name}.{kind}_*.weights.h5"), reverse=True)
        return {int(re.search(r"_(\d+)\.weights", path.name)[1]): path for path in paths}

    def _bare(self) -> keras.Model:
        """The same layers without the optimizer."""
        return keras.Model(self.trained.input, self.trained.output)

    def _best(self, history: pd.DataFrame) -> int:
        """The epoch, from 1, that validates best; ties: lower loss; 0: none."""
        order = history.sort_values([self.monitor, "val_loss"], ascending=[False, True])
        return int(order["epoch"].iloc[0]) if len(order) else 0
