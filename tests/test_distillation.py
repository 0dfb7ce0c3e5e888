"""Stored teacher views: the same pixels for teacher and student, resumable, checked teachers."""

from types import SimpleNamespace

import keras
import numpy as np
import pytest

from utils import distillation, runs, views

RNG = np.random.default_rng(0)
AUGMENTATION = {"rotation": 10.0, "flip": True}


class Images:
    """As much of a `data.Dataset` as distillation asks for."""

    digest, seed, augmentation, class_names = "abc", 4, AUGMENTATION, ["0", "1", "2"]
    stored = RNG.integers(0, 256, (12, 64, 64, 1), dtype="uint8")

    def __init__(self, **patients):
        self.people = {"train": ["a", "b"], "val": ["c"], "test": ["d"]} | patients

    def rows(self, split):
        return np.arange(12)

    def patients(self, split):
        return np.array(self.people[split])

    def pixels(self, split, size):
        return self.stored[:, :: 64 // size, :: 64 // size]


def teacher_at(size, seed, folder):
    keras.utils.set_random_seed(seed)
    image = keras.Input((size, size, 1))
    x = keras.layers.Flatten()(keras.layers.AveragePooling2D(size // 4)(image))
    model = keras.Model(image, keras.layers.Dense(3)(x), name=f"teacher_{seed}")
    folder.mkdir(parents=True, exist_ok=True)
    model.save(folder / "teacher.keras")
    return folder / "teacher.keras", model


@pytest.fixture
def stage(tmp_path):
    return SimpleNamespace(path=tmp_path.joinpath, deadline=float("inf"), run=tmp_path)


def test_stored_logits_are_the_teachers_answers_to_that_view(stage, tmp_path):
    file, teacher = teacher_at(32, 1, tmp_path / "a")
    images = Images()
    store = distillation.teacher_views(stage, {file: teacher}, images, count=2)
    assert store.complete and store.count == 2 and store.images == 12
    drawn = views.parameters(images.seed, 12, 1, AUGMENTATION)
    expected = teacher(np.asarray(views.augment(images.pixels("train", 32), drawn)))
    assert np.allclose(store.logits(1), expected, atol=1e-4)
    assert not np.allclose(store.logits(0), store.logits(1))


def test_teachers_of_different_sizes_are_averaged(stage, tmp_path):
    one, two = teacher_at(32, 1, tmp_path / "a"), teacher_at(64, 2, tmp_path / "b")
    images = Images()
    mean = distillation.mean_logits([one[1], two[1]], images, "val")
    each = [
        m.predict(images.pixels("val", s) * 1.0, verbose=0) for (_, m), s in ((one, 32), (two, 64))
    ]
    assert np.allclose(mean, np.mean(each, axis=0), atol=1e-4)
    both = distillation.teacher_views(stage, dict([one, two]), images, count=1)
    alone = distillation.teacher_views(stage, dict([one]), images, count=1)
    assert both.folder != alone.folder and not np.allclose(both.logits(0), alone.logits(0))


def test_a_stopped_pass_goes_on_and_a_damaged_view_is_made_again(stage, tmp_path):
    teachers = dict([teacher_at(32, 1, tmp_path / "a")])
    stage.deadline = 0.0
    assert not distillation.teacher_views(stage, teachers, Images(), count=3).complete
    stage.deadline = float("inf")
    store = distillation.teacher_views(stage, teachers, Images(), count=3)
    kept = store.logits(0)
    store.path(1).write_bytes(b"damaged")
    with pytest.raises(runs.StageError, match="run 05 again"):
        store.logits(1)
    distillation.teacher_views(stage, teachers, Images(), count=3)
    before = store.path(0).stat().st_mtime_ns
    (store.folder / "origin.json").unlink()
    distillation.teacher_views(stage, teachers, Images(), count=3)
    assert not (store.folder / "origin.json").exists()  # complete: nothing is written
    more = distillation.teacher_views(stage, teachers, Images(), count=4)
    assert more.complete and store.path(0).stat().st_mtime_ns == before
    assert np.array_equal(more.logits(0), kept)


def test_logits_that_are_not_finite_are_refused(stage, tmp_path):
    file, teacher = teacher_at(32, 1, tmp_path / "a")
    teacher.layers[-1].set_weights([np.full((16, 3), np.nan), np.zeros(3)])
    with pytest.raises(ValueError, match="not finite"):
        distillation.teacher_views(stage, {file: teacher}, Images(), count=1)


@pytest.mark.parametrize(
    ("other", "words"),
    [
        (Images(train=["a", "c"]), "1 patients"),  # one of this run's val
        (Images(train=["a", "d"]), "1 patients"),  # one of its test
        (Images(val=["d"]), "1 patients"),  # its epoch was chosen on this run's test
        (Images(), None),
    ],
)
def test_a_teacher_that_has_seen_the_judges_is_refused(tmp_path, monkeypatch, other, words):
    monkeypatch.setattr(runs, "read_stage", lambda run, notebook: {"finished": True})
    monkeypatch.setattr(distillation.data, "load", lambda folder: other)
    if words is None:
        files = distillation.teacher_files(tmp_path, Images(), [str(tmp_path / "other")])
        assert [file.parents[2].name for file in files] == [tmp_path.name, "other"]
    else:
        with pytest.raises(runs.StageError, match=words):
            distillation.teacher_files(tmp_path, Images(), [str(tmp_path / "other")])


def test_other_classes_or_an_unfinished_run_are_refused(tmp_path, monkeypatch):
    with pytest.raises(runs.StageError, match="no finished teacher"):
        distillation.teacher_files(tmp_path, Images(), [str(tmp_path)])
    with pytest.raises(runs.StageError, match="no finished teacher"):
        distillation.digests([str(tmp_path)])
    other = Images()
    other.class_names = ["0", "1"]
    monkeypatch.setattr(runs, "read_stage", lambda run, notebook: {"finished": True})
    monkeypatch.setattr(distillation.data, "load", lambda folder: other)
    with pytest.raises(runs.StageError, match="has the classes"):
        distillation.teacher_files(tmp_path, Images(), [str(tmp_path)])


def test_a_changed_further_teacher_changes_what_05_depends_on(tmp_path, monkeypatch):
    file = tmp_path / distillation.TEACHER
    file.parent.mkdir(parents=True)
    file.write_bytes(b"one")
    before = distillation.digests([str(tmp_path)])
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert distillation.digests([f"~/{tmp_path.name}"]) == before  # as the command would name it
    file.write_bytes(b"two")
    assert distillation.digests([str(tmp_path)]) != before
    assert distillation.digests([]) == {}
