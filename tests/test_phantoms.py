"""The phantoms: stated difficulty, no shortcut, class shares, same bytes for the same seed."""

import hashlib
import json
import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from utils import phantoms, settings

PRETRAIN = settings.ROOT / "notebooks/pretrain_shapes.py"


def digests(folder):
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in files
    }


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return phantoms.draw(tmp_path_factory.mktemp("phantoms") / "knees", 40, seed=1, size=32)


def test_bayes_accuracy_is_what_the_best_reader_reaches():
    rng = np.random.default_rng(0)
    grades = rng.choice(5, 20_000, p=phantoms.SHARES)
    narrowest = [min(phantoms.sample_knee(grade, rng).joint_space) for grade in grades]
    severity = (phantoms.HEALTHY_MM - np.array(narrowest)[:, None]) / phantoms.STEP_MM
    likelihood = np.exp(-(((severity - np.arange(5)) / phantoms.SPREAD) ** 2) / 2)
    reached = ((likelihood * phantoms.SHARES).argmax(1) == grades).mean()
    assert 0.90 <= phantoms.bayes_accuracy() <= 0.95
    assert reached == pytest.approx(phantoms.bayes_accuracy(), abs=4 * 0.27 / 20_000**0.5)


def test_gray_levels_carry_no_grade():
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    images, grades, _ = phantoms.knees(900, 7, 48)
    histograms = np.stack([np.histogram(image, 32, (0, 256))[0] for image in images])
    reader = make_pipeline(StandardScaler(), LogisticRegression(class_weight="balanced"))
    reader.fit(histograms[:600], grades[:600])
    found = reader.predict(histograms[600:])
    recalls = [(found[grades[600:] == grade] == grade).mean() for grade in range(4)]
    assert np.mean(recalls) < 0.4


def test_the_grade_drives_what_a_radiologist_looks_at():
    rng = np.random.default_rng(0)
    knees = [[phantoms.sample_knee(grade, rng) for _ in range(300)] for grade in range(5)]
    narrowest = [np.mean([min(knee.joint_space) for knee in row]) for row in knees]
    osteophytes = [np.mean([max(knee.lips) for knee in row]) for row in knees]
    sclerosis = [np.mean([max(knee.sclerosis) for knee in row]) for row in knees]
    varus = [np.mean([abs(knee.tilt) for knee in row]) for row in knees]
    medial = np.mean([knee.joint_space[1] < knee.joint_space[0] for knee in knees[4]])
    assert np.all(np.diff(narrowest) < 0) and np.all(np.diff(osteophytes) > 0)
    assert sclerosis[0] < 0.01 < sclerosis[3] < sclerosis[4] and varus[4] > 1.5 * varus[0]
    assert medial > 0.75


def test_a_left_knee_is_a_mirrored_right_one():
    right, left = (phantoms.draw_knee(2, np.random.default_rng(3), 64, side) for side in "RL")
    np.testing.assert_array_equal(left, right[:, ::-1])
    assert right.dtype == np.uint8 and right.shape == (64, 64)


def test_knees_have_the_class_shares_and_two_knees_a_patient():
    images, grades, patients = phantoms.knees(400, 3, 32)
    assert images.shape == (400, 32, 32, 1) and images.dtype == np.uint8
    np.testing.assert_array_equal(np.bincount(grades), np.rint(np.array(phantoms.SHARES) * 400))
    assert np.all(np.bincount(patients) == 2)
    assert 0.3 < np.corrcoef(grades.reshape(-1, 2).T)[0, 1] < 0.8
    again, other = phantoms.knees(400, 3, 32)[0], phantoms.knees(400, 4, 32)[0]
    assert np.array_equal(images, again) and not np.array_equal(images, other)
    assert len(phantoms.knees(3, 0, 32)[0]) == 3


@pytest.mark.parametrize("seed", [0, 1])
def test_splitting_leaky_knees_by_image_flatters(seed):
    from sklearn.model_selection import GroupKFold, KFold, cross_val_score
    from sklearn.svm import SVC

    images, grades, patients = phantoms.knees(500, seed, 32, leaky=True)
    small = images.reshape(500, 16, 2, 16, 2).mean((2, 4)).reshape(500, -1)
    small = (small - small.mean(1, keepdims=True)) / small.std(1, keepdims=True)
    by_image = cross_val_score(SVC(C=3), small, grades, cv=KFold(5, shuffle=True, random_state=0))
    honest = cross_val_score(SVC(C=3), small, grades, groups=patients, cv=GroupKFold(5))
    assert by_image.mean() - honest.mean() > 0.05
    assert honest.mean() > 0.35


def test_folder_has_every_grade_in_every_split_and_patients_of_its_own(folder):
    label = json.loads((folder / phantoms.LABEL).read_text())
    assert label["bayes_accuracy"] == pytest.approx(phantoms.bayes_accuracy(), abs=1e-4)
    where = {}
    for path in folder.rglob("*.png"):
        assert len(path.stem) == 8 and path.stem[:-1].isdigit() and path.stem[-1] in "LR"
        where.setdefault(path.stem[:-1], set()).add(path.parts[-3])
    assert len(where) == 40 and all(len(splits) == 1 for splits in where.values())
    assert len(list(folder.glob("*/*"))) == 15
    with Image.open(path) as image:
        assert image.mode == "L" and image.size == (32, 32)


def test_same_seed_same_bytes_and_anything_else_is_refused(folder, tmp_path):
    assert digests(phantoms.draw(tmp_path / "again", 40, seed=1, size=32)) == digests(folder)
    other = phantoms.draw(tmp_path / "other", 40, seed=2, size=32)
    assert not set(digests(other).values()) & set(digests(folder).values())
    drawn = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert phantoms.draw(folder, 40, seed=1, size=32) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == drawn
    with pytest.raises(FileExistsError, match="name another folder"):
        phantoms.draw(folder, 40, seed=2, size=32)


def test_an_interrupted_drawing_leaves_nothing_behind(tmp_path, monkeypatch):
    monkeypatch.setattr(phantoms.Path, "write_text", lambda *_, **__: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        phantoms.draw(tmp_path / "knees", 20, seed=0, size=32)
    assert not list(tmp_path.iterdir())


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(ValueError, match="too few"):
        phantoms.draw(tmp_path / "knees", 8, seed=0)
    assert not list(tmp_path.iterdir())


def test_planted_faults_are_there_and_stay(tmp_path):
    faults = phantoms.plant_faults(tmp_path / "faulty", seed=0, size=32)
    files = {name: [tmp_path / "faulty" / file for file in faults[name]] for name in faults}
    source, copy = (np.asarray(Image.open(file), float) for file in files["near_copy"])
    assert np.corrcoef(source.ravel(), copy.ravel())[0, 1] > 0.97
    assert [file.parts[-3] for file in files["near_copy"]] == ["train", "test"]
    with pytest.raises(OSError):
        np.asarray(Image.open(files["unreadable"][0]))
    left, right = files["split_patient"]
    assert left.stem[:-1] == right.stem[:-1] and left.parts[-3] != right.parts[-3]
    before = digests(tmp_path / "faulty")
    assert phantoms.plant_faults(tmp_path / "faulty", seed=0, size=32) == faults
    assert digests(tmp_path / "faulty") == before


WEIGHTS = Path(phantoms.__file__).parent / "weights" / "mobilenetv3small_shapes.weights.h5"


@pytest.mark.parametrize("size", [64, 128])
def test_weights_of_drawn_shapes_are_the_recorded_ones_and_load_at_any_size(size):
    import keras

    facts = json.loads(WEIGHTS.with_name("mobilenetv3small_shapes.json").read_text())
    assert hashlib.sha256(WEIGHTS.read_bytes()).hexdigest() == facts["sha256"]
    assert WEIGHTS.stat().st_size < 2.3e6 and facts["held_out_accuracy"] > 0.8
    shape = (size, size, 3)
    network = keras.applications.MobileNetV3Small(shape, include_top=False, weights=None)
    before = network.get_weights()
    network.load_weights(WEIGHTS)
    changed = [not np.array_equal(a, b) for a, b in zip(before, network.get_weights(), strict=True)]
    assert all(changed) and network.weights[0].dtype == "float32"


def test_drawn_shapes_are_equally_many_and_repeatable():
    script = runpy.run_path(str(PRETRAIN))
    images, kinds = script["draw_shapes"](36, 5, 48)
    assert images.shape == (36, 48, 48, 1) and images.dtype == np.uint8
    assert set(np.bincount(kinds)) == {2} and len(script["SHAPES"]) == 18
    assert np.array_equal(images, script["draw_shapes"](36, 5, 48)[0])
    assert all(np.ptp(image) > 30 for image in images)


@pytest.mark.slow
def test_pretraining_writes_weights_and_what_made_them(tmp_path):
    file = tmp_path / "some.weights.h5"
    short = [sys.executable, PRETRAIN, file, "--images", "36", "--epochs", "1"]
    subprocess.run(short, check=True)
    facts = json.loads((tmp_path / "some.json").read_text())
    assert hashlib.sha256(file.read_bytes()).hexdigest() == facts["sha256"]
