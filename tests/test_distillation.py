"""The store of teacher views, and the recipes that train on it."""

import time

import distillation_trial
import keras
import numpy as np
import pandas as pd
import pytest
import standins
import tensorflow as tf
from standins import AUGMENTATION, CLASSES, COUNT, SIZE, without_times

from utils import data, distillation, objectives, recipes, runs, training, views

SETTINGS = {
    "TEACHER_IMAGE_SIZE": SIZE,
    "TEACHER_WEIGHTS": "imagenet",
    "BATCH_SIZE": 8,
    "ACCUMULATION": 1,
    "LABEL_SOFTENING": 0.5,
    "LABEL_SMOOTHING": 0.1,
    "FOCAL_GAMMA": 0.0,
    "WARMUP_EPOCHS": 1,
    "RESTARTS": 0,
    "UNFREEZE": 0.4,
    "PHASE_1_EPOCHS": 2,
    "PHASE_1_LEARNING_RATE": 1e-2,
    "PHASE_2_EPOCHS": 3,
    "PHASE_2_LEARNING_RATE": 1e-3,
    "PHASE_3_EPOCHS": 4,
    "PHASE_3_LEARNING_RATE": 1e-4,
    "STUDENT_IMAGE_SIZE": SIZE,
    "STUDENT_WEIGHTS": "none",
    "STUDENT_BATCH_SIZE": 6,
    "STUDENT_LABEL_SOFTENING": 0.0,
    "STUDENT_HEAD_EPOCHS": 1,
    "STUDENT_HEAD_LEARNING_RATE": 1e-2,
    "STUDENT_EPOCHS": 2,
    "STUDENT_LEARNING_RATE": 1e-3,
    "TEMPERATURE": 4.0,
    "HARD_WEIGHT": 0.3,
    "VIEWS": 3,
}


def make_dataset(**changes):
    """24 training images and 9 of val, as notebook 01 would leave them."""
    images, labels = standins.make_images(count=COUNT + 9)
    manifest = pd.DataFrame({"split": ["train"] * COUNT + ["val"] * 9, "grade": labels})
    about = {
        "name": "stand-in",
        "class_names": ["0", "1", "2"],
        "names_shown": ["KL 0", "KL 1", "KL 2"],
        "seed": 3,
        "augmentation": AUGMENTATION,
        "balance": "none",
        "synthetic": True,
        "bayes_accuracy": None,
        "digest": "d",
    }
    return data.Dataset(manifest=manifest, images=images, **about | changes)


def make_teacher(slope=1 / 32):
    """Three logits an image, each the largest value of a part of it: exact in every batch."""
    image = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.MaxPooling2D((SIZE, SIZE // CLASSES))(image)
    return keras.Model(image, keras.layers.Rescaling(slope)(keras.layers.Flatten()(x)))


@pytest.fixture(scope="module")
def teacher():
    """The exact teacher, traced once."""
    return make_teacher()


@pytest.fixture
def make_stage(tmp_path):
    """Notebook 05's stage, in the same run each time it is asked for."""

    def make(**changes):
        return standins.make_stage(
            tmp_path / "run", notebook="05_distillation", **SETTINGS | changes
        )

    return make


@pytest.fixture
def look_at(make_stage, teacher, tmp_path):
    """Let the teacher look, in the same run each time; parts of it changed."""
    file = tmp_path / "teacher.keras"
    file.write_bytes(b"weights")

    def look_at(count=3, stage=None, model=teacher, dataset=None, **changes):
        return distillation.teacher_views(
            stage or make_stage(),
            model,
            changes.pop("file", file),
            dataset or make_dataset(),
            **{"image_size": SIZE, "count": count, "batch_size": 8} | changes,
        )

    return look_at


@pytest.fixture
def looks(monkeypatch):
    """What the teacher is asked to look at: the view, or None for val."""
    seen, look = [], distillation.look

    def counted(model, pixels, what, batch_size):
        seen.append(what and what[0])
        return look(model, pixels, what, batch_size)

    monkeypatch.setattr(distillation, "look", counted)
    return seen


def contents(store):
    """Every file of a store."""
    return {p.name: p.read_bytes() for p in sorted(store.folder.iterdir())}


class Killed(BaseException):
    """What stands here for the end of a process."""


def test_a_pass_killed_at_ten_random_moments_ends_like_one_that_was_not(
    look_at, make_stage, tmp_path, monkeypatch
):
    whole = contents(look_at(count=8))
    make_stage().path("views").rename(tmp_path / "whole")
    rng, left = np.random.default_rng(0), [0]

    def dies_sometimes(function, half=None):
        def run(*arguments, **options):
            left[0] -= 1
            if left[0] == 0:
                if half:
                    half(*arguments)
                raise Killed
            return function(*arguments, **options)

        return run

    write_half = lambda file, array: file.write(array.tobytes()[:50])  # noqa: E731
    for module, name, half in (
        (distillation, "look", None),
        (np, "save", write_half),
        (runs.Path, "replace", None),
    ):
        monkeypatch.setattr(module, name, dies_sometimes(getattr(module, name), half))
    for _ in range(10):
        left[0] = int(rng.integers(1, 5))
        with pytest.raises(Killed):
            look_at(count=8)
        for path in make_stage().path("views").rglob("view_*"):
            assert distillation.read_view(path, COUNT) is not None, "half a view"
            path.with_name(".view_0007.9.tmp.npy").write_bytes(b"left by a kill")
    left[0] = 0
    assert contents(look_at(count=8)) == whole


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 4},
        {"augmentation": {"flip": True}},
        {"digest": "other images"},
        "another teacher",
        "another size",
    ],
)
def test_views_of_anything_else_are_made_anew_beside_the_old(look_at, tmp_path, change):
    first = look_at(count=1)
    before = contents(first)
    if change == "another teacher":
        (tmp_path / "other.keras").write_bytes(b"other weights")
        second = look_at(count=1, file=tmp_path / "other.keras")
    elif change == "another size":
        small = keras.Sequential(
            [keras.Input((8, 8, 1)), keras.layers.Flatten(), keras.layers.Dense(CLASSES)]
        )
        second = look_at(count=1, model=small, image_size=8)
    else:
        second = look_at(count=1, dataset=make_dataset(**change))
    assert second.folder != first.folder and contents(first) == before
    assert second.logits(0).shape == (COUNT, CLASSES)


def test_more_views_only_add(look_at, looks):
    first = contents(look_at(count=2))
    assert looks == [None, 0, 1, 1], "val, the views, and a sample of the last one"
    looks.clear()
    second = contents(look_at(count=4))
    assert looks == [2, 3, 3]
    assert {name: second[name] for name in first} == first
    looks.clear()
    assert look_at(count=2).count == 2 and looks == [1], "fewer are there already"


def test_a_store_that_is_not_this_teachers_is_noticed(look_at):
    look_at()
    with pytest.raises(runs.StageError, match=r"are not this teacher's.*move that folder away"):
        look_at(model=make_teacher(slope=1 / 30))


@pytest.mark.parametrize("damage", ["cut", "empty", "short", "nan", "text"])
def test_a_damaged_view_is_made_again(look_at, looks, damage):
    store = look_at()
    whole, path = contents(store), store.path(1)
    logits = store.logits(1)
    if damage == "short":
        np.save(path, logits[:-1])
    elif damage == "nan":
        np.save(path, np.where(np.arange(CLASSES) == 1, np.nan, logits))
    else:
        torn = {"cut": path.read_bytes()[:150], "empty": b"", "text": b"logits"}[damage]
        path.write_bytes(torn)
    with pytest.raises(runs.StageError, match=r"view_0001.npy is missing or damaged"):
        store.logits(1)
    looks.clear()
    assert contents(look_at()) == whole and looks == [1, 2]


def test_time_that_runs_out_is_said_and_the_rest_follows(look_at, make_stage, monkeypatch, looks):
    stage, look = make_stage(), distillation.look

    def last_one(model, pixels, what, batch_size):
        if what and what[0] == 1:
            stage.deadline = time.time()
        return look(model, pixels, what, batch_size)

    monkeypatch.setattr(distillation, "look", last_one)
    stage.deadline = time.time() + 3600
    assert look_at(count=4, stage=stage) is None
    assert stage.paused and stage.saved["stopped"] == "2 of 4 views are stored."
    recipe = recipes.student(stage, make_dataset(), None)
    student = standins.make_model()
    monkeypatch.setattr(student, "fit", None)
    result = training.train(stage, "student", student, recipe)
    assert not result.complete and result.history.empty, "nor does the student begin"
    monkeypatch.undo()
    assert look_at(count=4).logits(3).shape == (COUNT, CLASSES)


def test_logits_that_are_not_finite_are_refused_and_not_stored(look_at, make_stage):
    with pytest.raises(runs.StageError, match=r"not finite.*history.csv"):
        look_at(model=make_teacher(slope=np.inf))
    assert not list(make_stage().path("views").rglob("*.npy"))


def test_a_teacher_of_other_classes_or_size_is_refused_before_it_looks(look_at, make_stage):
    four = make_dataset(class_names=["0", "1", "2", "3"])
    with pytest.raises(ValueError, match=r"tells 3 classes apart, the data have 4 \(0, 1, 2, 3\)"):
        look_at(dataset=four)
    with pytest.raises(ValueError, match="takes images of 16 px, not of 32"):
        look_at(image_size=32)
    assert not make_stage().path("views").exists()


def test_as_many_views_as_epochs_is_online_distillation(look_at, teacher):
    dataset, epochs = make_dataset(), 3
    store, pixels = look_at(count=epochs), dataset.pixels("train", SIZE)
    hard = objectives.hard_targets(dataset.labels("train"), CLASSES)
    drawing = {"batch_size": 6, "epochs": epochs, "seed": 3, "augmentation": AUGMENTATION}
    targets = distillation.distillation_targets(hard, store)
    stored, steps = views.training_batches(pixels, targets, views=epochs, **drawing)
    online, _ = views.training_batches(pixels, hard, **drawing)
    seen = 0
    for (x, y), (x_online, y_online) in zip(stored, online, strict=True):
        np.testing.assert_array_equal(x, x_online)
        np.testing.assert_array_equal(y[:, :CLASSES], y_online)
        np.testing.assert_array_equal(y[:, CLASSES:], teacher(x_online))
        seen += 1
    assert seen == epochs * steps == 12


def test_the_trial_compares_students_on_the_same_images(look_at, monkeypatch):
    def stand_in(backbone, side, seed, **_):
        return standins.make_model(seed=seed)

    monkeypatch.setattr(distillation_trial.models, "build_student", stand_in)
    dataset = make_dataset()
    dataset.manifest["patient"] = np.arange(len(dataset.manifest)) // 2
    store = look_at(count=2)
    said = [store.logits(view) for view in range(2)]
    how = {"weights": "file", "side": SIZE, "epochs": 3, "rate": 1e-2, "batch_size": 6}

    def student(seed=0, said=said, **arm):
        return distillation_trial.student_of(
            distillation_trial.Arm(**arm), dataset, said, seed=seed, **how
        )

    taught, alone = student(views=2), student()
    np.testing.assert_array_equal(student(views=2)["last"], taught["last"])
    contrary = [-logits for logits in said]
    others = {
        "labels": alone,
        "seed": student(seed=1, views=2),
        "teacher": student(views=2, said=contrary),
        "temperature": student(views=2, temperature=1.0),
        "weight": student(views=2, hard_weight=0.9),
        "softening": student(views=2, softening=1.0),
        "views": student(views=1),
    }
    for name, other in others.items():
        assert np.abs(other["last"] - taught["last"]).max() > 1e-4, name
    found = distillation_trial.compare({"labels": [alone], "taught": [taught]}, dataset)
    right = {
        name: (one["last"].argmax(axis=1) == dataset.labels("val")).mean()
        for name, one in (("labels", alone), ("taught", taught))
    }
    assert found["taught"]["last_accuracy"] == [right["taught"]]
    gain, low, high = found["taught"]["last_accuracy_over_labels"]
    assert gain == pytest.approx(right["taught"] - right["labels"])
    assert low <= gain <= high
    assert found["labels"]["last_accuracy_over_labels"] == [0, 0, 0]


def test_fewer_views_come_round_again(look_at):
    dataset = make_dataset()
    store, pixels = look_at(count=2), dataset.pixels("train", SIZE)
    hard = objectives.hard_targets(dataset.labels("train"), CLASSES)
    batches, _ = views.training_batches(
        pixels,
        distillation.distillation_targets(hard, store),
        batch_size=COUNT,
        epochs=4,
        seed=3,
        augmentation=AUGMENTATION,
        views=2,
        shuffle=False,
    )
    said = [y.numpy()[:, CLASSES:] for _, y in batches]
    for epoch in range(4):
        np.testing.assert_array_equal(said[epoch], store.logits(epoch % 2))
    assert (said[0] != said[1]).any()


# --- recipes


@pytest.mark.parametrize(("phase", "part"), [(1, "head"), (2, "tail"), (3, "all")])
def test_the_teachers_phases(make_stage, phase, part):
    recipe = recipes.teacher(make_stage(), make_dataset(), phase)
    [leg] = recipe.legs
    assert (leg.part, leg.epochs) == (part, phase + 1) and leg.pretrained and leg.unfreeze == 0.4
    assert leg.learning_rate == 10.0 ** -(phase + 1) and recipe.batch_size == 8
    batches, steps = recipe.batches(0)
    x, y = next(iter(batches))
    assert steps == 3 and x.shape == (8, SIZE, SIZE, 1) and y.shape == (8, CLASSES)
    assert float(tf.reduce_min(y)) >= 0.1 / 3 - 1e-6, "smoothed"
    _, held_out = next(iter(recipe.validation))
    softened = objectives.hard_targets(make_dataset().labels("val")[:8], CLASSES, 0.5)
    np.testing.assert_allclose(held_out, softened, atol=1e-6)


def test_a_later_phase_goes_on_with_new_views(make_stage, monkeypatch):
    asked = []
    monkeypatch.setattr(
        views, "training_batches", lambda *_, **options: asked.append(options) or (None, 1)
    )
    for phase in (1, 2, 3):
        recipes.teacher(make_stage(), make_dataset(), phase).batches(1)
    assert [o["first_view"] for o in asked] == [0, 2, 5]
    assert all(o["first_epoch"] == 1 and o["seed"] == 3 for o in asked)


def test_the_student_with_and_without_a_teacher_sees_the_same(look_at, make_stage):
    dataset, store = make_dataset(), look_at()
    taught = recipes.student(make_stage(), dataset, store)
    alone = recipes.student(make_stage(), dataset, None)
    assert [(leg.part, leg.epochs) for leg in taught.legs] == [("head", 1), ("all", 2)]
    assert not taught.legs[0].pretrained and taught.batch_size == 6
    assert taught.loss.temperature == 4.0 and taught.loss.hard_weight == 0.3
    pairs = zip(taught.batches(1)[0], alone.batches(1)[0], strict=True)
    for (x, y), (x_alone, y_alone) in pairs:
        np.testing.assert_array_equal(x, x_alone)
        assert y.shape == (6, 2 * CLASSES)
        np.testing.assert_array_equal(y[:, :CLASSES], y_alone)
    held_out = np.concatenate([y for _, y in taught.validation])
    np.testing.assert_array_equal(held_out[:, CLASSES:], store.validation())


def test_a_student_is_distilled_and_goes_on_where_it_was_killed(look_at, make_stage, tmp_path):
    dataset, store = make_dataset(), look_at()
    epochs = {"STUDENT_HEAD_EPOCHS": 0, "STUDENT_EPOCHS": 2}

    class Dies(training.Keeper):
        def on_epoch_end(self, epoch, logs=None):
            super().on_epoch_end(epoch, logs)
            raise Killed

    def train():
        recipe = recipes.student(make_stage(**epochs), dataset, store)
        return training.train(make_stage(), "student", standins.make_model(), recipe)

    with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
        patch.setattr(training, "Keeper", Dies)
        train()
    pieces = train()
    make_stage().folder.rename(tmp_path / "pieces")
    whole = train()
    assert list(whole.history["epoch"]) == [1, 2] and set(whole.history["leg"]) == {"all"}
    pd.testing.assert_frame_equal(
        without_times(whole.history), without_times(pieces.history), atol=1e-5
    )


# --- what the notebook shows


def test_soften_is_a_softmax_at_a_temperature():
    logits = np.array([[1.0, 2.0, 4.0], [1000.0, 0.0, -1000.0]])
    for temperature in (1.0, 4.0):
        soft = distillation.soften(logits, temperature)
        np.testing.assert_allclose(soft.sum(axis=1), 1)
        expected = keras.ops.softmax(logits / temperature)
        np.testing.assert_allclose(soft, expected, atol=1e-6)
    assert distillation.soften(logits, 100.0)[0].max() < 0.35


def test_least_sure_is_where_two_logits_lie_closest():
    assert distillation.least_sure(np.array([[5.0, 1, 0], [3.0, 2.9, -5], [0, 1, 9]])) == 1
