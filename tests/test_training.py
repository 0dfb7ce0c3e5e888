"""Training: resume, time limit, collapse, losses that are not finite, several devices."""

import dataclasses
import time

import keras
import numpy as np
import pytest
import tensorflow as tf

from utils import checkpoints, devices, models, objectives, runs, training, views

CLASSES, SIZE, COUNT = 3, 16, 24
AUGMENTATION = {"flip": True, "shift": 0.1, "brightness": 0.1}


def make_images(seed=0):
    """Images whose brightness is their class, noisy: uint8 (n, S, S, 1), and labels (n,)."""
    rng = np.random.default_rng(seed)
    labels = np.arange(COUNT) % CLASSES
    pixels = 60 + 60 * labels[:, None, None, None] + rng.normal(0, 20, (COUNT, SIZE, SIZE, 1))
    return pixels.clip(0, 255).astype("uint8"), labels


def make_model(dropout=0.3, seed=1):
    """A backbone of two convolutions inside the series' naming, quick to compile."""
    keras.utils.set_random_seed(seed)
    inside = keras.Input((SIZE, SIZE, 3))
    x = keras.layers.Rescaling(1 / 255)(inside)
    x = keras.layers.Conv2D(4, 3, strides=2, name="block1a_conv")(x)
    x = keras.layers.BatchNormalization(name="block1a_bn")(x)
    x = keras.layers.Conv2D(8, 3, strides=2, activation="relu", name="block2a_conv")(x)
    backbone = keras.Model(inside, x, name="backbone")
    image = keras.Input((SIZE, SIZE, 1))
    y = backbone(keras.layers.Concatenate()([image, image, image]))
    y = keras.layers.GlobalAveragePooling2D(name="pool")(y)
    y = keras.layers.Dropout(dropout, seed=seed)(y)
    return keras.Model(image, keras.layers.Dense(CLASSES, name="logits")(y))


def make_recipe(legs, pixels_and_labels=None, batch_size=8, drawing=None):
    pixels, labels = pixels_and_labels or make_images()
    targets = objectives.hard_targets(labels, CLASSES)
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
        lambda: [objectives.Accuracy(CLASSES), objectives.QuadraticWeightedKappa(CLASSES)],
        batch_size,
    )


def make_legs(head=2, whole=3, rate=0.01):
    return [
        training.Leg("head", "head", head, rate, pretrained=True, warmup_epochs=1),
        training.Leg("all", "all", whole, rate, pretrained=False, restarts=1),
    ]


@pytest.fixture
def make_stage(tmp_path):
    def make(name="run", key="k", deadline=float("inf")):
        run = tmp_path / name
        saved = {"id": key, "finished": False, "stopped": None, "seconds": 0.0, "facts": {}}
        if not (run / "teacher/phase_1/stage.json").exists():
            runs.write_json(run / "teacher/phase_1/stage.json", saved)
        saved = runs.read_json(run / "teacher/phase_1/stage.json")
        settings = {"JIT_COMPILE": "auto"}
        return runs.Stage("02_teacher_phase_1", run, settings, saved, deadline, planned={})

    return make


class StopAfter(training.Keeper):
    """A keeper whose process dies right after it saved its n-th epoch."""

    left = 10**9

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        StopAfter.left -= 1
        if StopAfter.left == 0:
            raise KeyboardInterrupt


def run_with_stops(monkeypatch, make_stage, name, stops, before_each=lambda folder: None):
    """Train to the end, dying after each number of epochs in `stops`."""
    monkeypatch.setattr(training, "Keeper", StopAfter)
    for left in [*stops, 10**9]:
        StopAfter.left = left
        stage = make_stage(name)
        before_each(stage.folder)
        model = make_model()
        try:
            result = training.train(stage, "teacher", model, make_recipe(make_legs()))
        except KeyboardInterrupt:
            continue
        return result, model.get_weights(), stage
    raise AssertionError("it never ended")


def without_times(history):
    return history.drop(columns="seconds").round(6)


@pytest.fixture(scope="module")
def deterministic():
    tf.config.experimental.enable_op_determinism()


@pytest.mark.parametrize("stops", [[1], [2], [3, 1], [1, 1, 1, 1]])
def test_a_training_that_was_killed_ends_like_one_that_was_not(
    monkeypatch, make_stage, deterministic, stops
):
    whole, weights, _ = run_with_stops(monkeypatch, make_stage, "whole", [])
    pieces, weights_again, _ = run_with_stops(monkeypatch, make_stage, "pieces", stops)
    assert list(pieces.history["epoch"]) == [1, 2, 3, 4, 5]
    assert without_times(whole.history).equals(without_times(pieces.history))
    for one, other in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_damaged_checkpoint_is_passed_over(monkeypatch, make_stage, deterministic, capsys):
    whole, weights, _ = run_with_stops(monkeypatch, make_stage, "whole", [])

    def truncate(folder):
        path = folder / "teacher.checkpoint.npz"
        if path.exists():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    pieces, weights_again, _ = run_with_stops(monkeypatch, make_stage, "torn", [3], truncate)
    assert "passed over" in capsys.readouterr().out
    assert without_times(whole.history).equals(without_times(pieces.history))
    for one, other in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_another_runs_checkpoint_is_refused_and_left(monkeypatch, make_stage):
    monkeypatch.setattr(training, "Keeper", StopAfter)
    StopAfter.left = 1
    stage = make_stage("mine")
    with pytest.raises(KeyboardInterrupt):
        training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    path = stage.folder / "teacher.checkpoint.npz"
    before = path.read_bytes()
    stage.saved["id"] = "another"
    with pytest.raises(runs.StageError, match="another run"):
        training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert path.read_bytes() == before


def test_a_finished_training_is_loaded_not_repeated(monkeypatch, make_stage):
    result, weights, stage = run_with_stops(monkeypatch, make_stage, "run", [])
    assert not list(stage.folder.glob("*.npz")), "the model holds what the checkpoint held"
    StopAfter.left = 1  # an epoch trained again would end in KeyboardInterrupt
    model = make_model(seed=2)
    again = training.train(make_stage("run"), "teacher", model, make_recipe(make_legs()))
    assert again.best_epoch == result.best_epoch
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


class OutOfTime(training.Keeper):
    """A keeper whose time is up after two epochs."""

    def on_epoch_end(self, epoch, logs=None):
        if self.progress.epoch == 1:
            self.stage.deadline = 0.0
        super().on_epoch_end(epoch, logs)


def test_time_limit_stops_at_an_epochs_end_and_a_new_session_goes_on(
    monkeypatch, make_stage, deterministic, capsys
):
    whole, weights, _ = run_with_stops(monkeypatch, make_stage, "whole", [])
    stage = make_stage("run", deadline=time.time() + 3600)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Keeper", OutOfTime)
        result = training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert not result.complete and list(result.history["epoch"]) == [1, 2]
    assert stage.paused and "2 of 5 epochs fitted into the time" in stage.saved["stopped"]
    assert "go on when run again" in capsys.readouterr().out
    assert not (stage.folder / "teacher.keras").exists()
    result, weights_again, _ = run_with_stops(monkeypatch, make_stage, "run", [])
    assert result.complete
    assert without_times(whole.history).equals(without_times(result.history))
    for one, other in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(one, other)


def test_out_of_time_before_the_first_epoch_trains_nothing(make_stage):
    stage = make_stage("run", deadline=time.time() - 1)
    result = training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert not result.complete and result.history.empty


def test_the_best_epoch_is_handed_on(monkeypatch, make_stage):
    result, _, stage = run_with_stops(monkeypatch, make_stage, "run", [])
    best = result.history.loc[result.history["val_qwk"].idxmax()]
    assert result.best_epoch == best["epoch"]
    model = models.load(stage.folder / "teacher.keras")
    recipe = make_recipe(make_legs())
    metric = objectives.QuadraticWeightedKappa(CLASSES)
    for x, y in recipe.validation:
        metric.update_state(y, model(x))
    assert float(metric.result()) == pytest.approx(best["val_qwk"], abs=1e-5)


def test_a_loss_that_is_not_finite_stops_at_once_and_keeps_the_best(make_stage):
    model = make_model()
    recipe = make_recipe([training.Leg("all", "all", 3, 0.01, pretrained=False)])
    real = recipe.batches

    def poisoned(first_epoch):
        data, steps = real(first_epoch)
        bad = steps + 1  # the second batch of the second epoch
        poison = lambda i, xy: (xy[0], tf.where(i == bad, np.nan, 1.0) * xy[1])  # noqa: E731
        return data.enumerate().map(poison), steps

    recipe = dataclasses.replace(recipe, batches=poisoned)
    result = training.train(make_stage("run"), "teacher", model, recipe)
    assert result.complete and len(result.history) == 1
    assert "epoch 2, batch 2" in result.notes[0]
    assert all(np.isfinite(w).all() for w in model.get_weights())


def test_a_collapse_hands_on_the_weights_it_started_from(make_stage):
    model = make_model()
    start = model.get_weights()
    pixels, labels = make_images()
    recipe = make_recipe(
        [training.Leg("all", "all", 2, 0.9, pretrained=False)],
        (np.full_like(pixels, 100), labels),  # nothing to tell the classes by
    )
    result = training.train(make_stage("run"), "teacher", model, recipe)
    assert result.best_epoch == 0 and "one class" in result.notes[0]
    for one, other in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_out_of_memory_names_what_to_change(monkeypatch, make_stage):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    model = make_model()
    monkeypatch.setattr(model, "fit", full)
    with pytest.raises(MemoryError, match=r"BATCH_SIZE.*ACCUMULATION.*mixed_float16"):
        training.train(make_stage("run"), "teacher", model, make_recipe(make_legs()))


def test_frozen_parts_do_not_move(make_stage):
    model = make_model()
    before = [w.numpy() for w in model.get_layer("backbone").weights]
    legs = [training.Leg("head", "head", 2, 0.01, pretrained=True)]
    training.train(make_stage("run"), "teacher", model, make_recipe(legs))
    for one, other in zip(before, model.get_layer("backbone").weights, strict=True):
        np.testing.assert_array_equal(one, other.numpy())


def test_schedule_warms_up_decays_and_restarts():
    leg = training.Leg("all", "all", 10, 1.0, pretrained=True, warmup_epochs=2, restarts=1)
    rates = training.rates(leg, steps=10)
    assert len(rates) == 100
    assert np.all(np.diff(rates[:20]) > 0) and rates[19] == pytest.approx(1.0)
    assert rates[59] < 0.02 and rates[60] == pytest.approx(0.8, rel=0.01)
    assert rates[99] < 0.02


def test_accumulation_lengthens_the_schedule_not_the_epochs():
    leg = training.Leg("all", "all", 4, 1.0, pretrained=True, accumulation=4)
    assert len(training.rates(leg, steps=8)) == 8


def test_checkpoint_keeps_the_one_before(tmp_path):
    path = tmp_path / "teacher.checkpoint.npz"
    for epoch in (1, 2):
        progress = checkpoints.Progress("k", epoch=epoch)
        checkpoints.save(path, progress, {"best": [np.arange(3)], "model": []})
    assert checkpoints.load(path, "k")[0].epoch == 2
    path.write_bytes(b"no archive")
    progress, groups = checkpoints.load(path, "k")
    assert progress.epoch == 1
    np.testing.assert_array_equal(groups["best"][0], np.arange(3))
    checkpoints.previous(path).write_bytes(b"")
    assert checkpoints.load(path, "k") is None


def test_checkpoint_that_cannot_be_written_leaves_the_old_one(tmp_path, monkeypatch):
    path = tmp_path / "teacher.checkpoint.npz"
    checkpoints.save(path, checkpoints.Progress("k", epoch=1), {"best": []})

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="No space left"):
        checkpoints.save(path, checkpoints.Progress("k", epoch=2), {"best": []})
    assert checkpoints.load(path, "k")[0].epoch == 1
    assert [p.name for p in tmp_path.iterdir()] == [path.name]


def test_xla_with_several_devices_is_refused():
    assert devices.resolve_jit("auto", 1) == "auto"
    assert devices.resolve_jit("auto", 2) is False
    with pytest.raises(ValueError, match="DEVICES = 1"):
        devices.resolve_jit(True, 2)
