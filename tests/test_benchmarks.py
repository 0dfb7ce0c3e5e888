"""Notebook A2's measurements do what they say; nothing here is timed."""

import dataclasses

import keras
import numpy as np
import pytest
import standins

from utils import benchmarks, checkpoints, distillation, distillation_cost, objectives, runs

SIDE = 32  # of the teacher; the stand-in student has 16


def small_model(side, classes=5, seed=0):
    keras.utils.set_random_seed(seed)
    image = keras.Input((side, side, 1))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, strides=2, activation="relu")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(classes)(x))


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return benchmarks.make_dataset(tmp_path_factory.mktemp("data"), 40, SIDE)


@pytest.fixture(scope="module")
def setting(dataset):
    teacher = small_model(SIDE, seed=1)
    return distillation_cost.Setting(
        dataset, teacher, lambda: small_model(16), epochs=4, views=2, batch_size=8
    )


@pytest.fixture(scope="module")
def ours(setting, tmp_path_factory):
    return distillation_cost.StoredViews(setting, tmp_path_factory.mktemp("views"))


@pytest.fixture(scope="module")
def online(setting):
    return distillation_cost.Online(setting)


def test_memory_is_kept_where_the_c_library_can_be_told(monkeypatch):
    asked = []

    class Library:
        def mallopt(self, parameter, value):
            asked.append((parameter, value))
            return 1

    monkeypatch.setattr(benchmarks.ctypes, "CDLL", lambda name: Library())
    assert benchmarks.keep_memory()
    assert asked == [(-3, 2**30), (-1, 2**30)]
    monkeypatch.setattr(benchmarks.ctypes, "CDLL", lambda name: object())
    assert not benchmarks.keep_memory()


def test_the_formula_at_full_size_and_for_three_students():
    full = {"epochs": 90, "views": 8, "teacher_pass": 30, "student_epoch": 1}
    assert distillation_cost.cost_ratio(**full) == pytest.approx(90 * 31 / (8 * 30 + 90))
    three = distillation_cost.cost_ratio(**full, students=3)
    assert three == pytest.approx(3 * 90 * 31 / (8 * 30 + 3 * 90))


def test_as_many_views_as_epochs_cost_what_online_costs():
    assert distillation_cost.cost_ratio(5, 5, 3.0, 1.0) == 1


def test_a_rest_of_images_is_refused_for_it_would_flatter_the_peer(setting):
    with pytest.raises(ValueError, match="do not fill batches of 9"):
        dataclasses.replace(setting, batch_size=9)


def test_a_warm_up_leaves_no_trace(setting, ours, online):
    fresh = setting.student().get_weights()
    for way in (ours, online):
        way.reset()
        for found, expected in zip(way.student.get_weights(), fresh, strict=True):
            np.testing.assert_array_equal(found, expected)
        assert int(way.model.optimizer.iterations) == 0


def test_both_ways_minimise_the_same_loss(setting, ours, online):
    """On the same images, with the teacher asked about them in both."""
    online.reset()
    x = setting.dataset.pixels("train", SIDE)[:8].astype("float32")
    hard, teacher = setting.hard[:8], setting.teacher.predict(x, verbose=0)
    logits = online.student.predict(x, verbose=0)
    loss = objectives.DistillationLoss(setting.temperature, setting.hard_weight, 5)
    expected = float(loss(np.concatenate([hard, teacher], axis=1), logits))
    found = float(online.model.compute_loss(x=x, y=hard, y_pred=logits))
    assert found == pytest.approx(expected, rel=1e-4)
    assert expected > 0.1  # or the comparison would mean nothing


def test_our_way_stores_what_the_teacher_says_to_each_view(setting, ours):
    found = ours.run()
    whole = found.pop("whole")
    assert whole == pytest.approx(sum(found.values())) and min(found.values()) > 0
    pixels = setting.dataset.pixels("train", SIDE)
    for view in range(setting.views):
        said = distillation.look(setting.teacher, pixels, (view, setting.dataset), 8)
        np.testing.assert_allclose(ours.store.logits(view), said, atol=1e-5)
    assert not np.array_equal(ours.store.logits(0), ours.store.logits(1))
    assert int(ours.model.optimizer.iterations) == setting.epochs * ours.steps


def test_measuring_the_pace_leaves_no_trace(ours):
    ours.reset()
    ours.fit(ours.batches()[0], 1)
    trained = ours.student.get_weights()
    assert all(seconds > 0 for seconds in ours.pace(1))
    for found, expected in zip(ours.student.get_weights(), trained, strict=True):
        np.testing.assert_array_equal(found, expected)
    assert int(ours.model.optimizer.iterations) == ours.steps


def test_the_other_way_trains_the_student_and_not_the_teacher(setting, online):
    online.reset()
    teacher, student = setting.teacher.get_weights(), online.student.get_weights()
    online.run()
    assert all(map(np.array_equal, teacher, setting.teacher.get_weights()))
    assert not all(map(np.array_equal, student, online.student.get_weights()))
    assert set(benchmarks.scores(online.student, setting.dataset)) == {"accuracy", "qwk"}


def test_a_teacher_learns(dataset):
    model = small_model(SIDE)
    before = model.get_weights()
    benchmarks.fit_teacher(model, dataset, 1, 8, 1e-2)
    assert not np.array_equal(before[0], model.get_weights()[0])


def test_every_way_of_input_gives_changed_images_of_one_size(dataset, tmp_path):
    pixels, labels = dataset.pixels("train", 64)[:20], dataset.labels("train")[:20]
    ways = benchmarks.input_ways(pixels, labels, tmp_path, batch_size=4)
    for name, batches in ways.items():
        first, second = (np.asarray(next(batches)[0]) for _ in range(2))
        assert first.shape[:3] == (4, 64, 64), name
        assert not np.array_equal(first, second), name
    assert benchmarks.rate(ways["ours"], 0.05, warm_up=0) > 0


def test_one_pass_over_all_views_equals_predicting_each(dataset):
    model = small_model(SIDE, seed=2)
    pixels = dataset.pixels("val", SIDE)[:3]
    found = benchmarks.test_time(model, pixels, count=3, rounds=1)
    assert found["max_difference"] < 1e-5
    assert found["spread"] > 100 * found["max_difference"]
    times = {"ours_seconds", "predict_seconds", "ratio"}
    assert set(found) == times | {"max_difference", "spread"}


def test_overhead_is_of_epochs_that_write_a_checkpoint(dataset, tmp_path, monkeypatch):
    written = []
    save = checkpoints.save
    monkeypatch.setattr(checkpoints, "save", lambda *a: (written.append(a[0]), save(*a)))
    monkeypatch.setattr(standins, "SIZE", SIDE)
    monkeypatch.setattr(standins, "CLASSES", 5)
    (tmp_path / runs.FOLDERS["04_teacher_phase_3"]).mkdir(parents=True)
    found = benchmarks.checkpoint_overhead(standins.make_model(), dataset, tmp_path, 8, rounds=1)
    assert len(written) == 2  # the warm-up and one round
    assert found["overhead_seconds"] > 0 and found["images"] <= len(dataset.rows("train"))
    assert found["share"] == pytest.approx(found["overhead_seconds"] / found["epoch_seconds"])
