"""Training: resume, time limit, collapse, losses that are not finite, several devices."""

import dataclasses
import errno
import re
import shutil
import time

import numpy as np
import pytest
import standins
import tensorflow as tf
from standins import CLASSES, make_images, make_legs, make_model, make_recipe, without_times

from utils import checkpoints, devices, models, objectives, runs, training


@pytest.fixture
def make_stage(tmp_path):
    def make(name="run", **changes):
        return standins.make_stage(tmp_path / name, **changes)

    return make


class StopAfter(training.Keeper):
    """A keeper whose process dies right after it saved its n-th epoch."""

    left = 10**9

    def on_epoch_end(self, epoch, logs=None):
        super().on_epoch_end(epoch, logs)
        StopAfter.left -= 1
        if StopAfter.left == 0:
            raise KeyboardInterrupt


def run_with_stops(make_stage, name, stops, before_each=lambda folder: None):
    """Train to the end, dying after each number of epochs in `stops`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Keeper", StopAfter)
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


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Result, weights and stage of a training that nothing disturbs; everything deterministic."""
    tf.config.experimental.enable_op_determinism()
    folder = tmp_path_factory.mktemp("undisturbed")
    return run_with_stops(lambda name: standins.make_stage(folder / name), "run", [])


def assert_same_end(one, other):
    (result, weights, _), (result_again, weights_again, _) = one, other
    assert list(result_again.history["epoch"]) == [1, 2, 3, 4, 5]
    assert without_times(result.history).equals(without_times(result_again.history))
    for array, again in zip(weights, weights_again, strict=True):
        np.testing.assert_array_equal(array, again)


@pytest.mark.parametrize("stops", [[2], [1, 1, 1, 1]])
def test_a_training_that_was_killed_ends_like_one_that_was_not(make_stage, undisturbed, stops):
    assert_same_end(undisturbed, run_with_stops(make_stage, "pieces", stops))


def test_a_damaged_checkpoint_is_passed_over(make_stage, undisturbed, capsys):
    def truncate(folder):
        path = folder / "teacher.checkpoint.npz"
        if path.exists():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    assert_same_end(undisturbed, run_with_stops(make_stage, "torn", [3], truncate))
    assert "passed over" in capsys.readouterr().out


def test_another_runs_checkpoint_is_refused_and_left(make_stage):
    stage = make_stage()
    path = stage.folder / "teacher.checkpoint.npz"
    checkpoints.save(path, checkpoints.Progress("another"), {"best": [np.arange(3)]})
    before = path.read_bytes()
    with pytest.raises(runs.StageError, match=r"another run.*left where it is"):
        training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert path.read_bytes() == before


def test_a_finished_training_is_loaded_not_repeated(undisturbed, monkeypatch):
    result, weights, stage = undisturbed
    assert not list(stage.folder.glob("*.npz")), "the model holds what the checkpoint held"
    left = stage.folder / "teacher.checkpoint.npz"
    left.write_bytes(b"")  # killed before it was removed
    model = make_model(seed=2)
    monkeypatch.setattr(model, "fit", None)
    again = training.train(stage, "teacher", model, make_recipe(make_legs()))
    assert again.best_epoch == result.best_epoch and not left.exists()
    for one, other in zip(weights, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


class OutOfTime(training.Keeper):
    """A keeper whose time is up after two epochs."""

    def on_epoch_end(self, epoch, logs=None):
        if self.progress.epoch == 1:
            self.stage.deadline = 0.0
        super().on_epoch_end(epoch, logs)


def test_time_limit_stops_at_an_epochs_end_and_a_new_session_goes_on(
    monkeypatch, make_stage, undisturbed, capsys
):
    stage = make_stage("run", deadline=time.time() + 3600)
    with monkeypatch.context() as patch:
        patch.setattr(training, "Keeper", OutOfTime)
        result = training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert not result.complete and list(result.history["epoch"]) == [1, 2]
    assert stage.paused and "2 of 5 epochs fitted into the time" in stage.saved["stopped"]
    out = capsys.readouterr().out
    assert re.search(r"^head, epoch 1 of 2: loss .* val_qwk .*, \d+\.\d min left$", out, re.M)
    assert re.search(r"^head ends about .*, the series not before .*; the time limit is", out, re.M)
    assert "does not fit: it will stop at an epoch's end, to go on when run again" in out
    assert not (stage.folder / "teacher.keras").exists()
    assert_same_end(undisturbed, run_with_stops(make_stage, "run", []))


def test_out_of_time_before_the_first_epoch_trains_nothing(make_stage):
    stage = make_stage("run", deadline=time.time() - 1)
    result = training.train(stage, "teacher", make_model(), make_recipe(make_legs()))
    assert not result.complete and result.history.empty


def test_the_best_epoch_is_handed_on(undisturbed):
    result, _, stage = undisturbed
    best = result.history.sort_values(["val_qwk", "val_loss"], ascending=[False, True]).iloc[0]
    assert result.best_epoch == best["epoch"]
    model = models.load(stage.folder / "teacher.keras")
    metric = objectives.QuadraticWeightedKappa(CLASSES)
    for x, y in make_recipe(make_legs()).validation:
        metric.update_state(y, model(x))
    assert float(metric.result()) == pytest.approx(best["val_qwk"], abs=1e-5)


def test_a_try_that_failed_leaves_the_model_as_it_came(make_stage):
    model = make_model()
    start = model.get_weights()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "Keeper", StopAfter)
        StopAfter.left = 1
        legs = [training.Leg("all", "all", 3, 0.05, pretrained=False)]
        with pytest.raises(KeyboardInterrupt):
            training.train(make_stage(), "teacher", model, make_recipe(legs))
    for one, other in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


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


def test_weights_that_the_last_batch_spoilt_are_never_the_best(make_stage):
    model = make_model()
    start = model.get_weights()
    recipe = make_recipe([training.Leg("all", "all", 3, 0.01, pretrained=False)])
    x, y = next(iter(recipe.validation))
    validation = tf.data.Dataset.from_tensors((x, y * np.nan))
    recipe = dataclasses.replace(recipe, validation=validation)
    result = training.train(make_stage(), "teacher", model, recipe)
    assert result.complete and result.best_epoch == 0 and result.history.empty
    [note] = result.notes
    assert "validation loss is nan after epoch 1" in note
    for one, other in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)
    again = training.train(make_stage(), "teacher", model, recipe)
    assert list(again.history.columns) == training.COLUMNS and again.history.empty


def collapsing_recipe():
    """Training images that tell nothing and a rate that ruins, judged on images that tell all."""
    pixels, labels = make_images()
    legs = [training.Leg("all", "all", 1, 0.9, pretrained=False)]
    blind = make_recipe(legs, (np.full_like(pixels, 100), np.zeros_like(labels)))
    return dataclasses.replace(blind, validation=make_recipe(legs).validation)


def test_a_collapse_hands_on_the_weights_it_started_from(make_stage):
    model, good = make_model(), [training.Leg("head", "head", 9, 0.1, pretrained=True)]
    learned = training.train(make_stage("before"), "teacher", model, make_recipe(good))
    assert learned.history["val_qwk"].max() > 0.5, "it tells classes apart"
    start = model.get_weights()
    result = training.train(make_stage("run"), "teacher", model, collapsing_recipe())
    assert result.best_epoch == 0 and "started from are handed on" in result.notes[0]
    for one, other in zip(start, model.get_weights(), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_collapse_from_nothing_better_keeps_what_was_learned(make_stage):
    model = make_model()
    logits = model.get_layer("logits")
    logits.set_weights([logits.get_weights()[0] * 0, np.array([1.0, 0, 0])])  # says one class
    start = model.get_weights()
    result = training.train(make_stage("run"), "teacher", model, collapsing_recipe())
    assert result.best_epoch == 1 and "as it began" in result.notes[0]
    moved = [np.abs(a - b).max() for a, b in zip(start, model.get_weights(), strict=True)]
    assert max(moved) > 0


def test_out_of_memory_names_what_to_change(monkeypatch, make_stage):
    def full(*_, **__):
        raise tf.errors.ResourceExhaustedError(None, None, "OOM")

    model = make_model()
    monkeypatch.setattr(model, "fit", full)
    with pytest.raises(MemoryError, match=r"leg 'head'.*BATCH_SIZE.*ACCUMULATION.*mixed_float16"):
        training.train(make_stage("run"), "teacher", model, make_recipe(make_legs()))


def test_only_errors_about_memory_become_memory_errors():
    with pytest.raises(tf.errors.InternalError), devices.memory_advice("a leg"):
        raise tf.errors.InternalError(None, None, "a bug")
    with pytest.raises(MemoryError, match="a leg"), devices.memory_advice("a leg"):
        raise tf.errors.InternalError(None, None, "Failed to allocate memory")


def test_out_of_memory_tells_the_peak_where_the_device_does(monkeypatch):
    gpu = tf.config.LogicalDevice("/device:GPU:0", "GPU")
    monkeypatch.setattr(tf.config, "list_logical_devices", lambda kind: [gpu])
    peak = {"current": 0, "peak": 14.5 * 2**30}
    monkeypatch.setattr(tf.config.experimental, "get_memory_info", lambda name: peak)
    with (
        pytest.raises(MemoryError, match=r"\(peak 14\.5 GiB on /device:GPU:0\).*says: OOM when"),
        devices.memory_advice("a leg"),
    ):
        raise tf.errors.ResourceExhaustedError(None, None, "Graph:\nOOM when allocating\n")


def test_a_disk_without_room_is_said_before_the_first_epoch(make_stage, monkeypatch):
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=1000))
    model = make_model()
    monkeypatch.setattr(model, "fit", None)
    with pytest.raises(OSError, match=r"No room to train.*0.0 GB are free") as caught:
        training.train(make_stage(), "teacher", model, make_recipe(make_legs()))
    assert caught.value.errno == errno.ENOSPC


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
    checkpoints.save(path, checkpoints.Progress("k", epoch=2), {})
    path.write_bytes(b"no archive")
    assert checkpoints.load(path, "k")[0].epoch == 1, "the damaged one took the whole one's place"
    checkpoints.previous(path).write_bytes(b"")
    assert checkpoints.load(path, "k") is None
    checkpoints.remove(path)
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_damaged_anywhere_is_passed_over_or_right(tmp_path):
    path = tmp_path / "teacher.checkpoint.npz"
    arrays = {"model": [np.arange(500.0), np.ones((3, 4), "float32")], "best": [np.zeros(2)]}
    checkpoints.save(path, checkpoints.Progress("k", epoch=1), arrays)
    whole, rng = path.read_bytes(), np.random.default_rng(0)
    for _ in range(300):
        torn = bytearray(whole)
        for at in rng.integers(0, len(torn), rng.integers(1, 4)):
            torn[at] ^= 1 << rng.integers(8)
        path.write_bytes(torn[: rng.integers(1, 2 * len(torn))])
        try:
            found = checkpoints.load(path, "k")
        except runs.StageError:
            continue  # a key that does not match
        if found:
            for group, expected in arrays.items():
                for array, other in zip(found[1][group], expected, strict=True):
                    np.testing.assert_array_equal(array, other)


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
