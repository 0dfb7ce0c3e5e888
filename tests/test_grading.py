"""What `python -m utils grade` takes, refuses, prints and returns."""

import csv
import io
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from utils import __main__, folders, litert, models, phantoms
from utils.commands import grading, screening

NAMES = [str(k) for k in range(5)]
SIZE = 32


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A stand-in for the student, and its sidecar: the brighter an image, the higher its grade."""
    image = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.AveragePooling2D(4)(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    logits = keras.layers.Dense(5)
    model = keras.Model(image, logits(x))
    k = np.arange(5)
    logits.set_weights([32.0 * k[None], 10.0 * k - 2.5 * k**2])
    path = tmp_path_factory.mktemp("model") / "student.keras"
    models.save(model, path)
    litert.write_sidecar(path, class_names=NAMES, image_size=SIZE, temperature=2.5, refer_below=0.5)
    return path


@pytest.fixture(scope="module")
def grader(model_file):
    return grading.load(model_file)


@pytest.fixture
def knee():
    return phantoms.draw(2, np.random.default_rng(4), 128)


def run(*arguments) -> int:
    return __main__.main(["grade", *map(str, arguments)])


def two_knees(width=290, height=240, gap=34):
    side = (width - gap) // 2
    left, right = (phantoms.draw(k, np.random.default_rng(k), side) for k in (1, 3))
    low = int(min(np.percentile(left, 2), np.percentile(right, 2)))
    pair = np.hstack([left, np.full((side, gap), low, "uint8"), right])
    above = (height - side) // 2
    return np.vstack([pair[:1].repeat(above, 0), pair, pair[-1:].repeat(above, 0)])


def photograph():
    rng = np.random.default_rng(0)
    hue = rng.integers(0, 256, (6, 6, 3), "uint8")
    return Image.fromarray(hue).resize((128, 128), Image.Resampling.BICUBIC)


def truncated(path):
    Image.fromarray(phantoms.draw(0, np.random.default_rng(0), 128)).save(path)
    path.write_bytes(path.read_bytes()[:3000])


def picture(array, mode=None):
    image = Image.fromarray(np.asarray(array))
    return lambda path: image.convert(mode or image.mode).save(path)


UPRIGHT = phantoms.draw(1, np.random.default_rng(9), 128)
BAD = {
    "wide.png": (picture(UPRIGHT[:80]), r"128 x 80 px, far from square: crop it to a square"),
    "tall.jpg": (picture(UPRIGHT[:, :60]), "far from square"),
    "letterboxed.png": (
        picture(np.pad(UPRIGHT[30:98], ((30, 30), (0, 0)))),
        "far from square",
    ),
    "two.png": (picture(two_knees()), r"two knees: crop each.*\(0, 47, 145, 192\) and \(145, 47"),
    "two_square.jpg": (picture(two_knees(290, 290)), "two knees: crop each"),
    "two_wide.png": (picture(two_knees(290, 128)), "two knees: crop each"),
    "photo.jpg": (lambda path: photograph().save(path), "colour picture"),
    "black.png": (picture(np.zeros((128, 128), "uint8")), "a blank frame"),
    "white.jpg": (picture(np.full((128, 128), 255, "uint8")), "a blank frame"),
    "noise.png": (
        picture(np.random.default_rng(0).integers(0, 256, (512, 512), "uint8")),
        "a blank frame",
    ),
    "inverted.png": (picture(255 - UPRIGHT), "inverted, bone dark on bright"),
    "text.png": (lambda path: path.write_text("not an image"), "no PNG or JPEG image"),
    "other.gif": (picture(UPRIGHT), "no PNG or JPEG image"),
    "empty.png": (lambda path: path.write_bytes(b""), "the file is empty"),
    "truncated.png": (truncated, "truncated: copy it again"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_is_no_framed_knee_is_refused(name, tmp_path):
    write, reason = BAD[name]
    write(tmp_path / name)
    gray, found = screening.read(tmp_path / name)
    assert gray is None
    assert len(found.splitlines()) == 1
    assert re.search(reason, found), found


GOOD = {
    "gray.png": picture(UPRIGHT),
    "gray.jpg": picture(UPRIGHT),
    "gray_in_colour.jpg": picture(UPRIGHT, "RGB"),
    "palette.png": picture(UPRIGHT, "P"),
    "alpha.png": picture(UPRIGHT, "LA"),
    "deep.png": picture(UPRIGHT.astype("uint16") * 16),
    "a_little_wide.png": picture(UPRIGHT[6:122]),
    "left_edge_dark.png": picture(np.where(np.arange(128) < 8, 0, UPRIGHT).astype("uint8")),
}


@pytest.mark.parametrize("name", GOOD)
def test_what_is_a_framed_knee_is_taken(name, tmp_path):
    GOOD[name](tmp_path / name)
    gray, reason = screening.read(tmp_path / name)
    assert reason == ""
    assert gray.dtype == np.uint8


def test_no_phantom_is_refused_and_every_inverted_one_is():
    rng = np.random.default_rng(1)
    for size in (64, 128):
        drawn = [phantoms.draw(i % 5, rng, size) for i in range(100)]
        assert {screening.not_one_knee(gray) for gray in drawn} == {""}
        found = [screening.not_one_knee(255 - gray) for gray in drawn]
        assert all(reason.startswith("inverted") for reason in found)


def test_other_classes_are_not_screened_for_knees(tmp_path):
    photograph().save(tmp_path / "cat.jpg")
    gray, reason = screening.read(tmp_path / "cat.jpg", knees=False)
    assert (gray.shape, reason) == ((128, 128), "")
    (tmp_path / "empty.jpg").write_bytes(b"")
    assert screening.read(tmp_path / "empty.jpg", knees=False)[0] is None


def test_grades_are_the_models_calibrated_answers(grader, phantom_folder, monkeypatch):
    """Over several batches, the last one short, in the order of the files."""
    monkeypatch.setattr(grading, "BATCH", 4)
    files = sorted((phantom_folder / "val").rglob("*.png"))[:10]
    rows = grading.grade(files, grader)
    assert [row["file"] for row in rows] == list(map(str, files))
    pixels = np.stack([folders.square(np.asarray(Image.open(f)), SIZE) for f in files])[..., None]
    wanted = softmax(np.asarray(grader.model(pixels.astype("float32"))) / 2.5, axis=1)
    for row, shares in zip(rows, wanted, strict=True):
        np.testing.assert_allclose(row["probabilities"], shares, atol=1e-3)
        assert row["grade"] == shares.argmax()
        assert row["refer"] == (shares.max() < 0.5)
        assert any("a person should read it" in note for note in row["notes"]) == row["refer"]
    assert {row["refer"] for row in rows} == {True, False}
    assert len({row["grade"] for row in rows}) > 1


def test_the_sidecars_decision_rule_is_followed(model_file, tmp_path, phantom_folder):
    path = tmp_path / "student.keras"
    path.write_bytes(model_file.read_bytes())
    cuts = [-1.0, -0.5, -0.2, 9.0]
    litert.write_sidecar(path, class_names=NAMES, image_size=SIZE, decision="qwk", thresholds=cuts)
    rows = grading.grade([phantom_folder / "val" / "0"], grading.load(path))
    assert {row["grade"] for row in rows} == {3}


def test_without_a_sidecar_it_says_so(model_file, tmp_path, knee):
    path = tmp_path / "student.keras"
    path.write_bytes(model_file.read_bytes())
    Image.fromarray(knee).save(tmp_path / "knee.png")
    (row,) = grading.grade([tmp_path / "knee.png"], grading.load(path))
    assert row["grade"] in range(5)
    assert any("not calibrated" in note for note in row["notes"])


def test_a_sidecar_of_another_model_is_refused(model_file, tmp_path):
    path = tmp_path / "student.keras"
    path.write_bytes(model_file.read_bytes())
    litert.write_sidecar(path, class_names=["a", "b"], image_size=SIZE)
    with pytest.raises(ValueError, match=r"2 classes at 32 px, student\.keras has 5"):
        grading.load(path)


def test_a_folder_goes_on_after_bad_files(model_file, tmp_path, knee, capsys):
    folder = tmp_path / "in"
    for name, (write, _) in BAD.items():
        (folder / "bad").mkdir(parents=True, exist_ok=True)
        write(folder / "bad" / name)
    Image.fromarray(knee).save(folder / "knee.png")
    Image.fromarray(knee).save(folder / ".hidden.png")
    (folder / "notes.txt").write_text("left alone")
    status = run(folder, "--model", model_file, "--format", "json")
    rows = json.loads(capsys.readouterr().out)
    assert status == 1
    assert len(rows) == len(BAD)  # the GIF is no PNG or JPEG, the knee is one
    assert all(set(row) == {"file", "grade", "probabilities", "refer", "notes"} for row in rows)
    (good,) = [row for row in rows if row["grade"] is not None]
    assert Path(good["file"]).name == "knee.png"
    assert len(good["probabilities"]) == 5
    assert sum(good["probabilities"]) == pytest.approx(1, abs=1e-3)
    for row in rows:
        if row is not good:
            assert (row["probabilities"], row["refer"]) == (None, True)
            assert row["notes"][0].startswith("refused: ")


def test_table_and_csv_and_exit_status(model_file, tmp_path, knee, capsys):
    path = tmp_path / "knee.png"
    Image.fromarray(knee).save(path)
    assert run(path, path, "--model", model_file) == 0
    table = capsys.readouterr()
    assert "no medical device" in table.err
    head, first, second = table.out.splitlines()
    assert head.split() == ["file", "grade", *(f"p({k})" for k in range(5)), "refer", "notes"]
    assert first == second
    empty = tmp_path / "empty.png"
    empty.touch()
    assert run(path, empty, "--model", model_file, "--format", "csv") == 1
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    assert rows[0]["grade"] in NAMES
    assert rows[1]["grade"] == rows[1]["p(0)"] == ""
    assert rows[1]["notes"] == "refused: the file is empty"


def test_wrong_use_is_one_line_and_2(model_file, tmp_path, knee, capsys, monkeypatch):
    path = tmp_path / "knee.png"
    Image.fromarray(knee).save(path)
    (tmp_path / "none").mkdir()
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes(b"PK no zip")
    monkeypatch.setattr(grading.runs, "run_folder", lambda _: tmp_path / "no runs here")
    for arguments, complaint in (
        ((tmp_path / "gone.png",), "no file or folder"),
        ((tmp_path / "none",), "holds no PNG or JPEG"),
        ((path,), "No finished run"),
        ((path, "--model", tmp_path / "gone.keras"), "No model file"),
        ((path, "--model", path), "no .keras or .tflite"),
        ((path, "--model", damaged), "cannot be read as a model"),
    ):
        assert run(*arguments) == 2
        found = capsys.readouterr()
        assert complaint in found.err
        assert len(found.err.strip().splitlines()) == 1
        assert found.out == ""
    with pytest.raises(SystemExit) as stop:
        run(path, "--format", "xml")
    assert stop.value.code == 2


def test_overlays_show_what_was_graded(model_file, tmp_path, knee):
    for folder in ("left", "right"):
        (tmp_path / folder).mkdir()
        Image.fromarray(knee).save(tmp_path / folder / "knee.png")
    shown = tmp_path / "shown"
    (tmp_path / "left" / "empty.png").touch()
    assert (
        run(tmp_path / "left", tmp_path / "right", "--model", model_file, "--overlay", shown) == 1
    )
    assert sorted(path.name for path in shown.iterdir()) == ["knee.png", "knee_2.png"]
    found = np.asarray(Image.open(shown / "knee.png"))
    height, width = found.shape[:2]
    assert width == 2 * (height - 24)
    radiograph, overlay = found[24:, : width // 2], found[24:, width // 2 :]
    assert np.ptp(radiograph.astype(int), axis=-1).max() == 0
    assert np.ptp(overlay.astype(int), axis=-1).max() > 20


def test_newest_finished_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="No finished run"):
        grading.newest_model(tmp_path)
    for age, (name, finished) in enumerate([("new", True), ("newer", False), ("old", True)]):
        stage = tmp_path / name / "report" / "stage.json"
        stage.parent.mkdir(parents=True)
        stage.write_text(json.dumps({"finished": finished}))
        (tmp_path / name / "student").mkdir()
        (tmp_path / name / "student" / "student.keras").touch()
        os.utime(stage, (1000 - age, 1000 - age))
    assert grading.newest_model(tmp_path) == tmp_path / "new" / "student" / "student.keras"


def test_a_litert_file_grades_alike_and_needs_no_tensorflow(grader, tmp_path, knee, capsys):
    from utils import export

    calibration = np.stack([np.asarray(Image.fromarray(knee).resize((SIZE, SIZE)))])[..., None]
    files = export.export(
        grader.model,
        tmp_path / "exports",
        calibration=calibration,
        temperature=2.5,
        formats=["float32"],
        class_names=NAMES,
        refer_below=0.5,
    )
    Image.fromarray(knee).save(tmp_path / "knee.png")
    (wanted,) = grading.grade([tmp_path / "knee.png"], grader)
    assert run(tmp_path / "knee.png", "--model", files["float32"], "--format", "json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["grade"] == wanted["grade"]
    np.testing.assert_allclose(found["probabilities"], wanted["probabilities"], atol=1e-3)
    assert run(tmp_path / "knee.png", "--model", files["float32"], "--overlay", tmp_path / "o") == 2
    assert "give the .keras model" in capsys.readouterr().err
    heavy = "bool({'tensorflow', 'keras'} & {*sys.modules})"
    code = f"import sys, utils.commands.grading; sys.exit({heavy})"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
