"""What `python -m utils grade` takes, refuses, prints and returns."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from utils import images, models, phantoms, runs, settings
from utils.cli import grade, main

SIZE = 32
ABOUT = {"class_names": list("01234"), "subject": settings.KNEES, "image_size": SIZE}
ABOUT |= {"sides": [96, SIZE], "bits": None, "colour": False, "aspect": [1.0, 1.0]}
ABOUT |= {"temperature": 2.5, "refer_below": 0.5}
KNEES = phantoms.knees(20, 3, 96)[0][..., 0]
KNEE = KNEES[0]


@pytest.fixture(scope="module")
def model_file(tmp_path_factory):
    """A stand-in for the student: the brighter an image, the higher its grade."""
    image = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    logits = keras.layers.Dense(5, name="logits")
    model = keras.Model(image, logits(x))
    k = np.arange(5)
    logits.set_weights([32.0 * k[None], 10.0 * k - 2.5 * k**2])
    path = tmp_path_factory.mktemp("run") / "report" / "deploy" / "student.keras"
    models.save(model, path)
    runs.write_json(path.with_suffix(".json"), ABOUT)
    return path


def other(model_file, folder, **changed):
    """The same model with another JSON."""
    (folder / "model").mkdir()
    runs.write_json(folder / "model" / "student.json", ABOUT | changed)
    return shutil.copy(model_file, folder / "model")


def graded(capsys, *arguments):
    """(exit status, rows of the JSON) of a call."""
    status = main(["grade", *map(str, arguments), "--json"])
    return status, json.loads(capsys.readouterr().out)


def photograph():
    hue = np.random.default_rng(0).integers(0, 256, (6, 6, 3), "uint8")
    return Image.fromarray(hue).resize((96, 96), Image.Resampling.BICUBIC)


def truncated(path):
    Image.fromarray(KNEE).save(path)
    path.write_bytes(path.read_bytes()[:2000])


def image(array):
    return lambda path: Image.fromarray(np.ascontiguousarray(array)).save(path)


BAD = {
    "wide.png": (image(KNEE[:60]), "96 x 60 px"),
    "strip.png": (image(np.tile(KNEE[:3], (1, 10))), "960 x 3 px"),
    "photo.jpg": (lambda path: photograph().save(path), "colour picture"),
    "black.png": (image(np.zeros((96, 96), "uint8")), "blank frame"),
    "inverted.png": (image(255 - KNEE), "inverted"),
    "two.png": (image(np.vstack([np.hstack([KNEE[:, 8:88], KNEE[:, 8:88]])] * 2)), "two knees"),
    "notes.txt": (lambda path: path.write_text("notes"), "cannot identify"),
    "empty.png": (lambda path: path.touch(), "cannot identify"),
    "truncated.png": (truncated, "truncated"),
}


def test_every_file_of_a_folder_gets_a_row_and_none_ends_the_batch(model_file, tmp_path, capsys):
    (tmp_path / "below").mkdir()
    for name, (write, _) in BAD.items():
        write(tmp_path / "below" / name)
    (tmp_path / ".hidden.png").touch()
    Image.fromarray(KNEE).save(tmp_path / "knee.png")
    status, rows = graded(capsys, tmp_path, "--model", model_file)
    assert (status, len(rows)) == (1, len(BAD) + 1)
    for row in rows:
        name = Path(row["file"]).name
        assert (row["grade"] is None) == (row["probabilities"] is None) == (name in BAD), row
        assert name not in BAD or BAD[name][1] in row["note"], row


def test_a_grade_is_the_calibrated_answer_to_an_image_as_01_stores_it(model_file, tmp_path, capsys):
    for k, gray in enumerate(KNEES):
        image(np.clip(gray * (0.5 + k / 20), 0, 255).astype("uint8"))(tmp_path / f"{k:02}.png")
    status, rows = graded(capsys, tmp_path, "--model", model_file)
    assert (status, len(rows)) == (0, 20)
    model = models.load(model_file)
    for row in rows:
        stored = images.square(images.read_image(row["file"]), 96)
        pixels = images.square(stored, SIZE)[None, ..., None].astype("float32")
        wanted = softmax(np.asarray(model(pixels)) / 2.5, axis=1)[0]
        np.testing.assert_allclose(list(row["probabilities"].values()), wanted, atol=1e-3)
        assert row["grade"] == str(wanted.argmax())
        assert ("a person" in row["note"]) == (wanted.max() < 0.5)
    assert len({row["grade"] for row in rows}) > 1 < len({row["note"] for row in rows})


def test_deep_and_turned_images_are_read_as_01_reads_them(model_file, tmp_path, capsys):
    Image.fromarray(KNEE).save(tmp_path / "a.png")
    Image.fromarray(KNEE.astype("uint16") * 16).save(tmp_path / "b.png")
    turned = Image.Exif()
    turned[0x0112] = 3  # upside down
    Image.fromarray(KNEE[::-1, ::-1]).save(tmp_path / "c.png", exif=turned)
    model = other(model_file, tmp_path, bits=12)
    found = [graded(capsys, tmp_path / f"{name}.png", "--model", model)[1][0] for name in "abc"]
    eight, deep, upright = (row["probabilities"] for row in found)
    assert deep == pytest.approx(eight, abs=0.01) and upright == pytest.approx(eight, abs=0.01)


def test_synthetic_knees_are_knees_and_inverted_ones_are_not():
    assert {grade.knee_problem(gray) for gray in KNEES} == {""}
    assert all("inverted" in grade.knee_problem(255 - gray) for gray in KNEES)


def test_another_subject_is_not_screened_for_knees(model_file, tmp_path, capsys):
    """Colour photographs of 3 to 2 in shape, as the model's own data were."""
    photograph().resize((90, 60)).save(tmp_path / "leaf.jpg")
    path = other(model_file, tmp_path, subject="leaves", colour=True, aspect=[1.4, 1.6])
    status, (row,) = graded(capsys, tmp_path / "leaf.jpg", "--model", path)
    assert (status, row["grade"] is None) == (0, False), row["note"]


def test_the_newest_finished_run_is_the_default(model_file, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(runs, "run_folder", lambda name: tmp_path / name)
    Image.fromarray(KNEE).save(tmp_path / "knee.png")
    assert main(["grade", str(tmp_path / "knee.png")]) == 1
    assert "no finished run" in capsys.readouterr().err
    for age, (name, finished) in enumerate({"newer": False, "new": True, "old": True}.items()):
        folder = tmp_path / "runs" / name / "report" / "deploy"
        shutil.copytree(model_file.parent, folder)
        runs.write_json(folder / "stage.json", {"finished": finished})
        os.utime(folder / "stage.json", (10_000 - age, 10_000 - age))
    for name, option in {"new": [], "old": ["--run", str(tmp_path / "runs/old")]}.items():
        assert main(["grade", str(tmp_path / "knee.png"), *option]) == 0
        assert str(tmp_path / "runs" / name / "report") in capsys.readouterr().err


def test_what_a_user_can_mend_is_one_line(model_file, tmp_path, capsys):
    Image.fromarray(KNEE).save(tmp_path / "knee.png")
    (tmp_path / "none").mkdir()
    damaged = tmp_path / "damaged.keras"
    damaged.write_bytes(b"PK no zip")
    runs.write_json(tmp_path / "damaged.json", ABOUT)
    for arguments, words in {
        (tmp_path / "gone.png", "--model", model_file): "no file",
        (tmp_path / "none", "--model", model_file): "no folder with files",
        (tmp_path / "knee.png", "--model", tmp_path / "gone.keras"): "is missing",
        (tmp_path / "knee.png", "--model", tmp_path / "knee.png"): "neither a .keras",
        (tmp_path / "knee.png", "--model", damaged): "cannot be read as a model",
        (tmp_path / "knee.png", "--run", tmp_path): "no finished run",
    }.items():
        assert main(["grade", *map(str, arguments)]) == 1
        out, err = capsys.readouterr()
        assert out == "" and words in err


def test_output_survives_a_console_that_cannot_print_a_name(model_file, tmp_path):
    Image.fromarray(KNEE).save(tmp_path / "Łódź-膝.png")
    bad = os.fsencode(str(tmp_path)) + b"/\xcf\xa5.png"  # a name in GBK
    shutil.copy(tmp_path / "Łódź-膝.png", bad)
    command = [sys.executable, "-m", "utils", "grade", tmp_path, "--model", model_file]
    console = {"cwd": settings.ROOT, "env": os.environ | {"PYTHONIOENCODING": "ascii"}}
    done = subprocess.run(command, capture_output=True, **console)
    assert done.returncode == 0 and done.stdout.count(b".png") == 2
