"""Training: what `fit` is given, and what a killed one goes on from. Frozen parts rest."""

import contextlib
import os
import subprocess
import sys
import textwrap
from types import SimpleNamespace

import keras
import numpy as np
import pytest

from utils import losses, settings, training, views

PIXELS = np.random.default_rng(0).integers(0, 256, (48, 32, 32, 1), dtype="uint8")
LABELS = np.arange(48) % 3
AUGMENTATION = {"rotation": 7.0, "shift": 0.1, "flip": True}


def a_stage(folder, deadline=float("inf")):
    return SimpleNamespace(folder=folder, deadline=deadline)


def small_model(dropout=0.3):
    keras.utils.set_random_seed(1)
    image = keras.Input((32, 32, 1))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(8)(image))
    x = keras.layers.Dropout(dropout)(keras.layers.Dense(8, activation="relu")(x))
    return keras.Model(image, keras.layers.Dense(3)(x))


def cross_entropy():
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def fit(stage, epochs, stop_after=None, model=None, name="teacher"):
    """Fit a small model for `epochs`, as the notebooks do; raise after `stop_after`."""
    model = model or small_model()
    model.compile(
        training.optimizer(1e-2, steps=6, epochs=4), cross_entropy(), metrics=losses.metrics(3)
    )
    clock = training.EpochClock(seed=5)
    resume = training.Resume(stage, model, epochs, name=name)
    targets = losses.hard_targets(LABELS, 3)
    batches = views.training_batches(
        PIXELS, targets, batch_size=8, seed=5, augmentation=AUGMENTATION, epoch=lambda: clock.epoch
    )

    def die(epoch, logs):
        if stop_after is not None and epoch + 1 == stop_after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt) if stop_after else contextlib.nullcontext():
        model.fit(
            batches,
            initial_epoch=resume.epoch,
            epochs=resume.until,
            validation_data=views.evaluation_batches(PIXELS, targets),
            callbacks=[clock, resume, keras.callbacks.LambdaCallback(on_epoch_end=die)],
            shuffle=False,
            verbose=0,
        )
    return model, resume


def same(first, second):
    return all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_a_resumed_training_equals_an_undisturbed_one(tmp_path):
    whole, undisturbed = fit(a_stage(tmp_path / "whole"), 4)
    fit(a_stage(tmp_path / "cut"), 4, stop_after=2)
    resumed, going_on = fit(a_stage(tmp_path / "cut"), 4)
    columns = [c for c in undisturbed.history if c != "seconds"]
    assert going_on.history[columns].equals(undisturbed.history[columns])
    assert same(whole.get_weights(), resumed.get_weights())
    assert undisturbed.finish() == going_on.finish()
    assert same(whole.get_weights(), resumed.get_weights())


@pytest.mark.parametrize("damaged", [1, 2])
def test_a_damaged_state_costs_one_epoch_and_is_kept_aside(damaged, tmp_path):
    stage = a_stage(tmp_path / "a")
    fit(stage, 4, stop_after=3)
    for state in sorted(stage.folder.glob("teacher.state_*"))[-damaged:]:
        state.write_bytes(state.read_bytes()[:1000])
    _, resume = fit(stage, 4)
    whole, undisturbed = fit(a_stage(tmp_path / "b"), 4)
    aside = [*stage.folder.glob("*.unreadable")]
    assert [*resume.history["epoch"]] == [1, 2, 3, 4] and len(aside) == damaged
    assert resume.finish() == undisturbed.finish()
    assert same(resume.trained.get_weights(), whole.get_weights())


def test_a_finished_training_is_only_loaded(tmp_path):
    stage = a_stage(tmp_path)
    model, resume = fit(stage, 3)
    resume.finish()
    assert not list(tmp_path.glob("*.weights.h5"))
    again, second = fit(stage, 3)
    assert second.done and second.epoch == 3
    second.finish()
    assert same(model.get_weights(), again.get_weights())


def test_the_deadline_stops_at_an_epochs_end_and_then_nothing_trains(tmp_path):
    class UpInTheSecondEpoch:
        folder = tmp_path
        deadline = property(lambda self: 0 if list(tmp_path.glob("*.state_0001*")) else np.inf)

    _, resume = fit(UpInTheSecondEpoch(), 4)
    assert resume.epoch == 1
    _, late = fit(UpInTheSecondEpoch(), 4)
    assert late.epoch == 1 and not late.done


def test_a_loss_that_is_not_finite_ends_with_a_remedy(tmp_path):
    model = small_model()
    model.layers[-1].set_weights([np.full((8, 3), np.nan), np.zeros(3)])
    with pytest.raises(FloatingPointError, match="learning rate"):
        fit(a_stage(tmp_path), 2, model=model)
    assert not list(tmp_path.glob("*.h5"))


def test_the_rate_rises_then_falls_to_a_hundredth():
    adamw = training.optimizer(1e-3, steps=10, epochs=5, warmup_epochs=1)
    rates = []
    for step in range(51):
        adamw.iterations.assign(step)
        rates.append(float(adamw.learning_rate))
    assert rates[0] == pytest.approx(1e-4) and rates[10] == pytest.approx(1e-3, rel=1e-3)
    assert rates[50] == pytest.approx(1e-5, rel=1e-2) and max(rates) < 1.001e-3


FROZEN = """
    import os, sys
    import keras, numpy as np
    from utils import losses, models, settings, training, views

    pixels = np.random.default_rng(0).integers(0, 256, (32, 32, 32, 1), dtype="uint8")
    targets = losses.hard_targets(np.arange(32) % 3, 3)
    model = models.build_teacher("EfficientNetV2B0", 32, 3, "none", dropout=0.0)

    def passes(part):
        models.set_trainable(model, part)
        for norm in ("fuse_8_norm", "fuse_4_norm", "fuse_1_norm", "head_1_norm", "head_2_norm"):
            model.get_layer(norm).trainable = False
        model.compile(keras.optimizers.SGD(0.0), "mse")
        fit = lambda: model.fit(pixels.astype("float32"), targets, shuffle=False, verbose=0)
        return [fit().history["loss"][0] for _ in range(2)]

    first, second = passes("head")
    assert first == second, (first, second)
    first, second = passes("all")
    assert first != second, (first, second)
    print("rests")
"""


@pytest.mark.parametrize("backend", ["tensorflow", pytest.param("jax", marks=pytest.mark.slow)])
def test_a_frozen_part_runs_as_in_inference(backend):
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(FROZEN)],
        cwd=settings.ROOT,
        env={**os.environ, "KERAS_BACKEND": backend},
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("rests"), done.stderr[-2000:]


def test_two_devices_equal_one():
    code = """
        import numpy as np, tensorflow as tf
        tf.config.set_logical_device_configuration(
            tf.config.list_physical_devices("CPU")[0], [tf.config.LogicalDeviceConfiguration()] * 2
        )
        from tests.test_training import (
            LABELS, PIXELS, cross_entropy, losses, small_model, training, views)
        def weights(devices):
            with training.strategy(devices).scope():
                model = small_model(dropout=0.0)
                model.compile(training.optimizer(1e-2, 6, 3, clip=False), cross_entropy(),
                              metrics=losses.metrics(3), jit_compile=False)
            batches = views.training_batches(
                PIXELS, losses.hard_targets(LABELS, 3), batch_size=8, seed=0, augmentation=None,
                epoch=lambda: 0)
            model.fit(batches, epochs=3, verbose=0)
            return model.get_weights()
        for one, two in zip(weights(1), weights(2)):
            np.testing.assert_allclose(one, two, atol=2e-6)
        print("equal")
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)],
        cwd=settings.ROOT,
        capture_output=True,
        text=True,
    )
    assert done.stdout.strip().endswith("equal"), done.stderr[-2000:]


def test_more_devices_than_there_are_is_refused():
    with pytest.raises(ValueError, match="DEVICES = 64"):
        training.strategy(64)
