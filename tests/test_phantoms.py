"""The phantoms: stated difficulty, no shortcut, equal grades, same bytes for the same seed."""

import hashlib
import json

import numpy as np
import pytest
from PIL import Image

from utils import phantoms


def files(folder):
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def test_bayes_accuracy_is_what_the_best_reader_reaches_and_within_its_bounds():
    rng = np.random.default_rng(0)
    grades = np.arange(20_000) % phantoms.GRADES
    narrowest = [min(phantoms.sample_knee(int(grade), rng).joint_space) for grade in grades]
    reached = (phantoms.read_joint_space(np.array(narrowest)) == grades).mean()
    assert 0.80 <= phantoms.bayes_accuracy() <= 0.92
    assert reached == pytest.approx(phantoms.bayes_accuracy(), abs=4 * 0.3 / 20_000**0.5)


@pytest.mark.parametrize(("spread", "grades"), [(0, 5), (0.3, 1)])
def test_bayes_accuracy_refuses_what_has_none(spread, grades):
    with pytest.raises(ValueError, match="spread must be > 0"):
        phantoms.bayes_accuracy(spread, grades)


def test_histograms_of_gray_levels_do_not_tell_the_grade():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    grades = np.arange(1500) % phantoms.GRADES
    images = [
        phantoms.draw(int(grade), np.random.default_rng([7, index]), 64)
        for index, grade in enumerate(grades)
    ]
    histograms = np.stack([np.histogram(image, 32, (0, 256))[0] for image in images])
    reader = make_pipeline(StandardScaler(), LogisticRegression(max_iter=2000))
    reader.fit(histograms[:1000], grades[:1000])
    assert reader.score(histograms[1000:], grades[1000:]) < 0.35


def test_the_grade_drives_what_a_radiologist_looks_at():
    rng = np.random.default_rng(0)
    knees = [[phantoms.sample_knee(grade, rng) for _ in range(300)] for grade in range(5)]
    narrowest = [np.mean([min(knee.joint_space) for knee in row]) for row in knees]
    osteophytes = [np.mean([max(knee.osteophytes) for knee in row]) for row in knees]
    sclerosis = [np.mean([max(knee.sclerosis) for knee in row]) for row in knees]
    varus = [np.mean([abs(knee.tilt) for knee in row]) for row in knees]
    assert np.all(np.diff(narrowest) < 0)
    assert np.all(np.diff(osteophytes) > 0)
    assert sclerosis[0] < 0.01 < sclerosis[3] < sclerosis[4]
    assert varus[4] > 1.5 * varus[0]
    medial = np.mean([knee.joint_space[1] < knee.joint_space[0] for knee in knees[4]])
    assert medial > 0.75


def test_a_left_knee_is_a_mirrored_right_one():
    right, left = (phantoms.draw(2, np.random.default_rng(3), 64, side) for side in "RL")
    np.testing.assert_array_equal(left, right[:, ::-1])
    assert right.dtype == np.uint8 and right.shape == (64, 64)


def test_same_seed_same_bytes_other_seed_other_knees(tmp_path):
    first, again, other = (
        files(phantoms.write(tmp_path / name, 40, size=32, seed=seed))
        for name, seed in (("a", 5), ("b", 5), ("c", 6))
    )
    assert first == again
    assert not set(first.values()) & set(other.values())


def test_folder_has_equal_grades_named_knees_and_a_label(phantom_folder):
    label = json.loads((phantom_folder / phantoms.LABEL).read_text())
    assert label["synthetic"] is True and label["patients"] == 60 and label["seed"] == 1
    assert label["bayes_accuracy"] == pytest.approx(phantoms.bayes_accuracy(), abs=1e-4)
    patients, grades = {}, {}
    for split, count in label["images"].items():
        per_grade = [
            len(list((phantom_folder / split / str(grade)).iterdir())) for grade in "01234"
        ]
        assert sum(per_grade) == count and max(per_grade) - min(per_grade) <= 1
        for path in (phantom_folder / split).rglob("*.png"):
            number, side = path.stem[:-1], path.stem[-1]
            assert len(number) == 7 and number.isdigit() and side in "LR"
            patients.setdefault(number, set()).add(split)
            grades.setdefault(number, {})[side] = int(path.parent.name)
    assert len(patients) == 60 and all(len(where) == 1 for where in patients.values())
    both = np.array([[knee["L"], knee["R"]] for knee in grades.values()])
    assert 0.25 < np.corrcoef(both.T)[0, 1] < 0.95
    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (64, 64)


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    calls = []

    def fail(*arguments):
        calls.append(arguments)
        if len(calls) > 3:
            raise OSError("disk full")

    monkeypatch.setattr(phantoms, "_write_patient", fail)
    with pytest.raises(OSError, match="disk full"):
        phantoms.write(tmp_path / "knees", 40, size=32)
    assert not list(tmp_path.iterdir())


def test_the_same_drawing_is_kept_and_anything_else_is_refused(tmp_path):
    folder = phantoms.write(tmp_path / "knees", 40, size=32)
    image = next(folder.rglob("*.png"))
    drawn = image.stat().st_mtime_ns
    assert phantoms.write(folder, 40, size=32) == folder and image.stat().st_mtime_ns == drawn
    with pytest.raises(FileExistsError, match="name another folder"):
        phantoms.write(folder, 40, size=32, seed=1)
    image.unlink()
    with pytest.raises(FileExistsError, match="name another folder"):
        phantoms.write(folder, 40, size=32)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"patients": 8}, "each needs 5 or more"),
        ({"splits": (0.5, 0.5)}, "three fractions"),
        ({"splits": (0.5, 0.3, 0.3)}, "three fractions"),
        ({"size": 16}, "size is 16"),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        phantoms.write(tmp_path / "knees", **{"patients": 40, "size": 32, **arguments})
    assert not (tmp_path / "knees").exists()


@pytest.mark.parametrize(("grade", "side"), [(5, "R"), (-1, "R"), (2, "r")])
def test_draw_refuses_unknown_grades_and_sides(grade, side):
    with pytest.raises(ValueError, match=r"must be 'L' or 'R'|KL grades are"):
        phantoms.draw(grade, np.random.default_rng(0), 64, side)
