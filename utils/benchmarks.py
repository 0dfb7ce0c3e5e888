"""Side-by-side measurements for notebook A2: each peer does the same work on the same machine.

Compilation is left out for both sides alike: whatever is timed has run once before.
"""

from __future__ import annotations

import contextlib
import ctypes
import io
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from utils import (
    checkpoints,
    data,
    evaluation,
    folders,
    objectives,
    phantoms,
    recipes,
    runs,
    training,
    views,
)
from utils.schedules import Leg, make_optimizer

# What every input pipeline draws. Ours draws contrast and cutout on top.
AUGMENTATION = {"flip": True, "rotation": 7.0, "shift": 0.05, "zoom": 0.1, "brightness": 0.1}
# Of GNU's mallopt: from how many bytes on memory is borrowed, and freed memory given back.
BORROW_FROM, GIVE_BACK_FROM, NEVER = -3, -1, 2**30


def keep_memory() -> bool:
    """Have this process keep the memory that it frees; returns whether the C library does so.

    Where a virtual machine must fetch memory anew, one pass of a network now and then takes twice
    as long as the next, which is no property of either side of a comparison. Only GNU's C library
    can be told; elsewhere nothing changes.
    """
    try:
        tell = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):
        return False
    return bool(tell(BORROW_FROM, NEVER) and tell(GIVE_BACK_FROM, NEVER))


def make_dataset(folder: Path, patients: int, size: int, seed: int = 0) -> data.Dataset:
    """Phantoms drawn at `size` px, stored in `folder` as notebook 01 stores images."""
    source = phantoms.write(folder / "phantoms", patients, size=size, seed=seed)
    table, found = folders.scan(source)
    images, facts = folders.decode(source, table, size)
    how = {"seed": seed, "augmentation": AUGMENTATION, "balance": "none"}
    data.save(folder, facts, images, source=source, found=found, **how)
    return data.load(folder)


def fit_teacher(model: keras.Model, dataset: data.Dataset, epochs: int, batch_size: int, rate):
    """Train all of `model` on labels for some epochs at a peak learning rate; returns the model."""
    targets = objectives.hard_targets(dataset.labels("train"), len(dataset.class_names), 0.4)
    pixels = dataset.pixels("train", model.input_shape[1])
    batches, steps = views.training_batches(
        pixels, targets, batch_size=batch_size, epochs=epochs, **recipes.drawing(dataset)
    )
    leg = Leg("teacher", "all", epochs, rate, pretrained=False, warmup_epochs=1)
    model.compile(make_optimizer(leg, steps), objectives.HardLoss(), auto_scale_loss=False)
    model.fit(batches, epochs=epochs, steps_per_epoch=steps, shuffle=False, verbose=0)
    return model


def scores(model: keras.Model, dataset: data.Dataset) -> dict[str, float]:
    """Accuracy and quadratic weighted kappa on the val split, at the model's own image size."""
    pixels, truth = dataset.pixels("val", model.input_shape[1]), dataset.labels("val")
    answers = model.predict(views.evaluation_batches(pixels), verbose=0).argmax(axis=1)
    kappa = cohen_kappa_score(truth, answers, weights="quadratic")
    return {"accuracy": float((answers == truth).mean()), "qwk": float(kappa)}


# --- input -------------------------------------------------------------------------------------


def rate(batches: Iterator, seconds: float, warm_up: int = 3) -> float:
    """Images a second that an endless iterator of (images, labels) gives."""
    for _ in range(warm_up):
        next(batches)
    images, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        images += len(next(batches)[0])
    return images / spent


def input_ways(pixels, labels, folder: Path, batch_size: int = 32) -> dict[str, Iterator]:
    """Endless augmented batches made in four ways; the two that read files find them in `folder`.

    pixels: uint8 (n, S, S, 1); labels: integers (n,). "ours" is `views.training_batches`;
    "image_data_generator" is what the original used, decoding files to RGB in every epoch, and with
    "_in_memory" the same at its best; "image_dataset_from_directory" is followed by Keras's layers.
    """
    one_hot = keras.utils.to_categorical(labels)
    for index, (image, label) in enumerate(zip(pixels[..., 0], labels, strict=True)):
        (folder / str(label)).mkdir(exist_ok=True)
        Image.fromarray(image).save(folder / str(label) / f"{index}.jpg", quality=88)
    drawn = {**AUGMENTATION, "contrast": 0.1, "cutout": 60 / 384}
    how = {"batch_size": batch_size, "epochs": 100_000, "seed": 0}
    ours, _ = views.training_batches(pixels, one_hot, augmentation=drawn, **how)
    generator = tf.keras.preprocessing.image.ImageDataGenerator(
        horizontal_flip=True,
        rotation_range=7,
        width_shift_range=0.05,
        height_shift_range=0.05,
        zoom_range=0.1,
        brightness_range=(0.9, 1.1),
    )
    side = pixels.shape[1:3]
    with contextlib.redirect_stdout(io.StringIO()):  # it prints how many files there are
        from_files = generator.flow_from_directory(folder, target_size=side, batch_size=batch_size)
    return {
        "ours": iter(ours),
        "image_data_generator": from_files,
        "image_data_generator_in_memory": generator.flow(
            pixels.astype("float32"), one_hot, batch_size=batch_size
        ),
        "image_dataset_from_directory": iter(_keras_layers(folder, side, batch_size)),
    }


def _keras_layers(folder: Path, side, batch_size: int) -> tf.data.Dataset:
    nearest = {"fill_mode": "nearest"}
    layers = [
        keras.layers.RandomFlip("horizontal"),
        keras.layers.RandomRotation(7 / 360, **nearest),
        keras.layers.RandomTranslation(0.05, 0.05, **nearest),
        keras.layers.RandomZoom(0.1, **nearest),
        keras.layers.RandomBrightness(0.1),
    ]
    files = keras.utils.image_dataset_from_directory(
        folder,
        label_mode="categorical",
        color_mode="grayscale",
        batch_size=batch_size,
        image_size=side,
        verbose=False,
    )

    def change(x, y):
        for layer in layers:
            x = layer(x, training=True)
        return x, y

    return files.repeat().map(change, tf.data.AUTOTUNE).prefetch(tf.data.AUTOTUNE)


def input_rates(pixels, labels, seconds: float, rounds: int = 2) -> dict[str, float]:
    """Images a second of each of `input_ways`: medians of rounds in which they take turns."""
    with tempfile.TemporaryDirectory() as folder:
        ways = input_ways(pixels, labels, Path(folder))
        found = {name: [] for name in ways}
        for _ in range(rounds):
            for name, batches in ways.items():
                found[name].append(rate(batches, seconds))
        ways.clear()  # they read ahead, and the files go now
        del batches
    return {name: round(float(np.median(values)), 1) for name, values in found.items()}


# --- test-time views ---------------------------------------------------------------------------


def test_time(model: keras.Model, pixels, count: int = 7, rounds: int = 3, few: int = 2) -> dict:
    """Averaged test-time views: one compiled pass, against `predict` for each image and view.

    pixels: uint8 (n, S, S, 1). Both make their views as they go, the slow way one by one with the
    same function, compiled; it gets `few` of the images a round. Seconds an image, medians over the
    rounds; `max_difference` is the largest between the averaged logits, `spread` their standard
    deviation over the images: a comparison of logits that are all alike would mean nothing.
    """
    parameters = evaluation.test_time_parameters(count, AUGMENTATION)
    change = tf.function(views.augment)

    def ours():
        return evaluation.predict_views(model, pixels, count, augmentation=AUGMENTATION)

    def usual():
        each = [
            [model.predict(change(image[None], row[None]), verbose=0)[0] for row in parameters]
            for image in pixels[:few]
        ]
        return np.mean(each, axis=1)

    found, expected, times = ours(), usual(), []  # both are compiled now
    for _ in range(rounds):
        start = time.perf_counter()
        usual()
        middle = time.perf_counter()
        ours()
        times.append(((middle - start) / few, (time.perf_counter() - middle) / len(pixels)))
    slow, fast = (float(value) for value in np.median(times, axis=0))
    return {
        "ours_seconds": fast,
        "predict_seconds": slow,
        "ratio": float(np.median([a / b for a, b in times])),
        "max_difference": float(np.abs(found[:few] - expected).max()),
        "spread": float(found.std(axis=0).max()),
    }


# --- checkpoints -------------------------------------------------------------------------------


class TimedKeeper(training.Keeper):
    """The series' own callback, which notes how long it takes, in seconds an epoch."""

    def on_epoch_begin(self, epoch, logs=None):
        self.spent = 0.0
        self._timed(super().on_epoch_begin, epoch, logs)

    def on_train_batch_end(self, batch, logs=None):
        self._timed(super().on_train_batch_end, batch, logs)

    def on_epoch_end(self, epoch, logs=None):
        self._timed(super().on_epoch_end, epoch, logs)

    def _timed(self, call, *arguments):
        began = time.perf_counter()
        call(*arguments)
        self.spent += time.perf_counter() - began


def checkpoint_overhead(
    model: keras.Model, dataset: data.Dataset, run: Path, batch_size: int, rounds: int = 3
) -> dict:
    """What checkpoint and callback add to an epoch of phase 3, beside an epoch without.

    Returns:
        `{epoch_seconds, overhead_seconds, share, difference_seconds, images}`: the epoch without
        them; the time that they take, and over that epoch; for comparison, the difference between
        epochs with and without, which also holds the noise of two epochs; images an epoch.
    """
    settings = {f"PHASE_{phase}_EPOCHS": 2 * rounds + 1 for phase in (1, 2, 3)}
    settings |= {"PHASE_3_LEARNING_RATE": 1e-5, "TEACHER_WEIGHTS": "imagenet"}  # norms frozen
    settings |= {"TEACHER_IMAGE_SIZE": model.input_shape[1], "BATCH_SIZE": batch_size}
    settings |= {"WARMUP_EPOCHS": 0, "RESTARTS": 0, "ACCUMULATION": 1, "FOCAL_GAMMA": 0.0}
    settings |= {"LABEL_SOFTENING": 0.4, "LABEL_SMOOTHING": 0.0}
    saved = {"id": "benchmark", "facts": {}}
    stage = runs.Stage("04_teacher_phase_3", run, settings, saved, float("inf"), settings)
    recipe = recipes.teacher(stage, dataset, phase=3)
    leg, steps = recipe.legs[0], recipe.batches(0)[1]
    training.compile_leg(model, leg, steps, recipe, "auto")
    progress, best = checkpoints.Progress(stage.key), checkpoints.arrays_of(model.weights)
    path = stage.folder / "benchmark.checkpoint.npz"
    keeper = TimedKeeper(stage, path, progress, best, leg, (0, leg.epochs), leg.epochs)

    def epoch(callbacks) -> float:
        fixed = {"steps_per_epoch": steps, "validation_data": recipe.validation, "verbose": 0}
        batches, began = recipe.batches(0)[0], time.perf_counter()
        with contextlib.redirect_stdout(io.StringIO()):  # the keeper's line an epoch
            model.fit(batches, epochs=1, shuffle=False, callbacks=callbacks, **fixed)
        return time.perf_counter() - began

    epoch([keeper])
    bare, kept, spent = [], [], []
    for _ in range(rounds):
        bare.append(epoch([]))
        kept.append(epoch([keeper]))
        spent.append(keeper.spent)
    checkpoints.remove(path)
    seconds, overhead = float(np.median(bare)), float(np.median(spent))
    return {
        "epoch_seconds": seconds,
        "overhead_seconds": overhead,
        "share": overhead / seconds,
        "difference_seconds": float(np.median(np.subtract(kept, bare))),
        "images": steps * batch_size,
    }
