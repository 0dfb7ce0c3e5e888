"""A dataset, a model and a recipe that train in seconds, for the tests of training."""

import keras
import numpy as np

from utils import objectives, runs, training, views

CLASSES, SIZE, COUNT = 3, 16, 24
AUGMENTATION = {"flip": True, "shift": 0.1, "brightness": 0.1}


def make_images(seed=0, count=COUNT):
    """Images whose brightness is their class, noisy: uint8 (n, S, S, 1), and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(count) % CLASSES
    pixels = 60 + 60 * labels[:, None, None, None] + rng.normal(0, 20, (count, SIZE, SIZE, 1))
    return pixels.clip(0, 255).astype("uint8"), labels


def make_model(dropout=0.3, seed=1):
    """A backbone of two convolutions inside the series' naming, quick to compile."""
    keras.utils.set_random_seed(seed)
    inside = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(inside)
    x = keras.layers.Conv2D(4, 3, strides=2, use_bias=False, name="block1a_conv")(x)
    x = keras.layers.BatchNormalization(name="block1a_bn")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="block2a_conv")(x)
    backbone = keras.Model(inside, x, name="backbone")
    image = keras.Input((SIZE, SIZE, 1))
    y = backbone(keras.layers.Concatenate()([image, image, image]))
    y = keras.layers.GlobalAveragePooling2D(name="pool")(y)
    y = keras.layers.Dropout(dropout, seed=seed)(y)
    return keras.Model(image, keras.layers.Dense(CLASSES, name="logits")(y))


def make_recipe(legs, pixels_and_labels=None, batch_size=8, drawing=None, classes=CLASSES):
    """The legs on the stand-in images, which also validate."""
    pixels, labels = pixels_and_labels or make_images()
    targets = objectives.hard_targets(labels, classes)
    last = sum(leg.epochs for leg in legs)

    def batches(first_epoch):
        return views.training_batches(
            pixels,
            targets,
            batch_size=batch_size,
            epochs=last,
            first_epoch=first_epoch,
            seed=3,
            augmentation=AUGMENTATION if drawing is None else drawing,
        )

    return training.Recipe(
        legs,
        batches,
        views.evaluation_batches(pixels, targets, batch_size),
        objectives.HardLoss(),
        lambda: [objectives.Accuracy(classes), objectives.QuadraticWeightedKappa(classes)],
        batch_size,
    )


def make_legs(head=2, whole=3, rate=0.01):
    """The head first, then everything: what trains changes on the way."""
    return [
        training.Leg("head", "head", head, rate, pretrained=True, warmup_epochs=1),
        training.Leg("all", "all", whole, rate, pretrained=False, restarts=1),
    ]


def make_stage(run, key="k", deadline=float("inf"), notebook="02_teacher_phase_1", **settings):
    """A stage that is open in the folder `run`, or was before."""
    folder = run / runs.FOLDERS[notebook]
    if not (folder / "stage.json").exists():
        saved = {"id": key, "finished": False, "stopped": None, "seconds": 0.0, "facts": {}}
        runs.write_json(folder / "stage.json", saved)
    saved = runs.read_json(folder / "stage.json")
    settings = {"JIT_COMPILE": "auto"} | settings
    return runs.Stage(notebook, run, settings, saved, deadline, planned=settings)


def without_times(history):
    """A history without what differs from run to run."""
    return history.drop(columns="seconds").round(6)
