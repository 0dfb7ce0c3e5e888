"""Folders and files as people have them, given to the commands: read, or refused in fitting words.

Each case goes through `utils.cli.main(argv)` in this process. The cells of notebook 01 that read,
audit and store run here too, instead of in a kernel each.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import nbformat
import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils import cli, data, images, runs, settings
from utils.cli import run as run_command

CELLS = re.findall(r"\w+", "open negatives summary find decode carve audit notes store finish")
BOOK = nbformat.read(settings.ROOT / "notebooks/01_data.ipynb", 4)
ALL = ("train", "val", "test")


def run_cells(names, space):
    """Run cells of notebook 01 in `space`."""
    written = {cell.id: cell.source for cell in BOOK.cells}
    for name in names:
        exec(written[name], space)
    return space


def execute(run, notebook, values):
    """Stands in for `utils.cli.run.execute`: the cells above, without a kernel."""
    space = run_cells(["parameters"], {})
    run_cells(CELLS, space | {name: value for name, value in values.items() if name in space})
    done = run / "notebooks" / f"{notebook}.ipynb"
    done.parent.mkdir(parents=True, exist_ok=True)
    done.touch()


def picture(rng, size=32):
    """A bright column on dark ground with noise, uint8: no two are alike."""
    column = 120 * (np.abs(np.linspace(-1, 1, size)) < 0.5)
    return (40 + column + rng.integers(0, 60, (size, size))).astype("uint8")


def save(path, pixels):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).save(path)


def write(folder, splits=ALL, classes="01", count=5, name="{}L.png", size=32):
    """`count` images of each class in each split, a patient each; the folder."""
    rng, patient = np.random.default_rng(len(str(classes))), 9_000_000
    for split in splits:
        for cls in classes:
            for _ in range(count):
                patient += 1
                save(folder / split / cls / name.format(patient), picture(rng, size))
    return folder


def first(folder, pattern="train/*/*"):
    return sorted(p for p in folder.glob(pattern) if p.is_file())[0]


# --- cases: each writes images below `folder`, and may return further arguments


def made(*arguments, **options):
    """The images of `write`."""
    return lambda folder: write(folder, **options) and list(arguments)


def changed(change, *arguments, **options):
    """The images of `write`, and a change to their folder."""

    def case(folder):
        change(write(folder, **options))
        return arguments

    return case


def given(parameter, value, **options):
    return made("-p", parameter, value, **options)


def copied(path):
    return lambda folder: shutil.copy(first(folder), folder / path)


def added(path, pixels):
    return lambda folder: save(folder / path, pixels.astype("uint8"))


def dicom(folder):
    for path in list(folder.rglob("*.png")):
        path.rename(path.with_suffix(".dcm"))


def empty_split(folder):
    shutil.rmtree(folder / "val")
    (folder / "val/0").mkdir(parents=True)


def two_splits(folder):
    shutil.move(first(folder), folder / "val/0/9000030R.png")
    shutil.copy(first(folder, "train/1/*"), folder / "train/0/9000030L.png")


def near_copies(folder):
    for number, path in enumerate(sorted((folder / "train/0").iterdir())[:2]):
        save(folder / f"test/0/{number}L.png", np.asarray(Image.open(path)) // 10 * 9)


def many_unreadable(folder):
    first(folder).write_bytes(b"")
    first(folder, "val/*/*").write_text("no image")


def kinds(folder):
    write(folder, splits="01", classes=("Image", "Edges"))


def flat_train(folder):
    for path in list(folder.glob("train/*/*")):
        path.rename(folder / "train" / path.name)


WORDS = ("Moderate", "Mild", "No_DR")
REFUSED = {
    "no folder": (lambda folder: ["--data", str(folder / "nowhere")], 2, "nowhere"),
    "empty": (lambda folder: folder.mkdir(), 1, "There is no train/<class>/<image>"),
    "words": (made(classes=WORDS), 1, "Set CLASS_ORDER"),
    "DICOM": (changed(dicom), 1, "30 .dcm"),
    "two datasets": (lambda f: write(f / "one") and write(f / "two") and [], 1, "set DATA_DIR"),
    "one class": (made(classes="0"), 1, "At least two classes"),
    "an empty split": (changed(empty_split), 1, "no image in val"),
    "train lacks one": (changed(lambda f: write(f, ("test",), "2")), 1, "no image of class 2"),
    "no train": (made(splits=("val", "test")), 1, "has no train folder"),
    "doubled split": (made(splits=("train", "val", "valid")), 1, "both name val"),
    "order of others": (given("CLASS_ORDER", "[a, b]", classes=WORDS), 1, "the classes are"),
    "same number twice": (made(classes=("v2_healthy", "v2_sick")), 1, "Set CLASS_ORDER"),
    "bad pattern": (given("PATIENT_PATTERN", "(["), 2, "is no regular expression"),
    "pattern without group": (given("PATIENT_PATTERN", "'[0-9]+'"), 2, "has no group"),
    "patient in two splits": (changed(two_splits), 1, "patient 9000030 is in"),
    "same pixels": (changed(copied("test/1/7L.png")), 1, "(same pixels)"),
    "near-copies": (changed(near_copies, "-p", "STORED_SIZE", "96", size=96), 1, "(near-copies)"),
    "many unreadable": (changed(many_unreadable), 1, "repair or remove them"),
    "few patients": (made(splits=("train",), count=1), 1, "too few"),
    "kinds of picture": (kinds, 1, "Edges, Image"),
    "kinds in splits": (lambda f: kinds(f / "train"), 1, "Edges, Image"),
    "flat train": (changed(flat_train), 1, "train"),
    "small": (given("STORED_SIZE", "16"), 2, "STORED_SIZE"),
    "no val": (given("VAL_FRACTION", "0.0"), 2, "VAL_FRACTION"),
    "not a number": (given("ROTATION", ".nan"), 2, "ROTATION"),
    "misspelled": (given("SEDE", "1"), 2, "Did you mean SEED"),
    "order of numbers": (given("CLASS_ORDER", "[0, 1]"), 2, "CLASS_ORDER"),
    "no profile": (made("--profile", "nowhere"), 2, "No profile"),
    "no notebook": (made("--only", "13"), 2, "is none of"),
    "out is a file": (made("--out", __file__), 2, "give --out a folder"),
}


@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    """`run --only 01` on tmp_path/images into tmp_path/run: (status, what was printed)."""
    monkeypatch.setattr(run_command, "execute", execute)
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "no-mount"))
    monkeypatch.delenv("SERIES_STARTED", raising=False)

    def call(*more):
        argv = ["run", "--only", "01", "--profile", "tiny", "-p", "STORED_SIZE", "96"]
        argv += ["--data", str(tmp_path / "images"), "--out", str(tmp_path / "run")]
        argv += ["-p", "TEACHER_IMAGE_SIZE", "32", "-p", "STUDENT_IMAGE_SIZE", "32"]
        status = cli.main([*argv, *more])
        runs.unlock(tmp_path / "run")
        printed = capsys.readouterr()
        return status, printed.out + printed.err

    return call


@pytest.mark.parametrize("name", REFUSED)
def test_refused_in_words_that_fit(name, command, tmp_path):
    case, status, said = REFUSED[name]
    found, printed = command(*(case(tmp_path / "images") or []))
    assert found == status, printed
    assert said in printed and "Traceback" not in printed
    assert len(printed) < 1500
    assert not (tmp_path / "run/data/dataset.json").exists()


def cut_off(folder):
    first(folder).write_bytes(first(folder).read_bytes()[:200])


def pixel_bomb(folder):
    content = first(folder).read_bytes()
    first(folder).write_bytes(content[:16] + (60000).to_bytes(4, "big") * 2 + content[24:])


def broken_link(folder):
    (folder / "train/0/1L.png").symlink_to(folder / "gone.png")


def gbk_name(folder):
    path = first(folder)
    path.rename(path.with_name(os.fsdecode("膝1L.png".encode("gbk"))))


def gbk_class(folder):
    for split in ALL:
        (folder / split / "1").rename(folder / split / os.fsdecode("1级".encode("gbk")))


def other_formats(folder):
    rng = np.random.default_rng(1)
    for number, ending in enumerate(("bmp", "tif", "tiff", "webp", "JPG")):
        for cls in "01":
            save(folder / f"train/{cls}/{number}{cls}L.{ending}", picture(rng))


def twelve_bits(folder):
    rng = np.random.default_rng(2)
    for number, top in enumerate((4095, 4096)):
        deep = rng.integers(1000, 3000, (32, 32)).astype("uint16")
        deep[0, :2] = 4095, top
        save(folder / f"train/0/{number}L.png", deep)


def one_level_in_splits(folder):
    for split in ALL:
        (folder / split).rename(folder / "moved")
        (folder / split).mkdir()
        (folder / "moved").rename(folder / split / "knees")


def folder_per_patient(folder):
    for path in list(folder.rglob("*.png")):
        path.rename(path.with_suffix(".old"))
        path.with_suffix("").mkdir()
        path.with_suffix(".old").rename(path.with_suffix("") / "left.png")


def macos(folder):
    write(folder / "__MACOSX")
    (folder / "train/0/._9000001L.png").write_bytes(b"Mac OS X")


def no_splits(folder):
    for cls in list((folder / "train").iterdir()):
        cls.rename(folder / cls.name)
    (folder / "train").rmdir()


def neighbours(folder):
    (folder / "train/0/readme.csv").write_text("a,b")
    (folder / "train/0/scan.dcm").write_bytes(b"DICM")


def beside(folder):
    (folder / "labels.csv").write_text("a,b")
    (folder / "train/readme.md").write_text("a")
    (folder / "train/0/loop").symlink_to(folder / "train")  # leads back up: nothing comes twice
    for path in ("train", "test/1/patient/visit"):
        save(folder / path / "1L.png", picture(np.random.default_rng(3)))


def photographs(folder):
    write(folder, classes=("bud", "green", "turning", "ripe", "rotten"), name="{}.jpg")
    rng = np.random.default_rng(4)
    for path in folder.rglob("*.jpg"):
        Image.fromarray(rng.integers(0, 255, (20, 37, 3), "uint8")).resize((300, 162)).save(path)
    order = "[bud, green, turning, ripe, rotten]"
    return ["-p", "SUBJECT", "photographs of tomatoes", "-p", "CLASS_ORDER", order]


LEAK = "shared {'9000030': ['train', 'val', 'test']}"
STRIP = np.arange(2700).reshape(3, 900)  # some versions of Pillow cannot resize it
READ = {
    "words": (given("CLASS_ORDER", "[No_DR, Mild, Moderate]", classes=WORDS), str([*WORDS[::-1]])),
    "unordered": (given("ORDERED", "false", classes=WORDS), "ordered False"),
    "two and ten": (made(classes=("0", "2", "10")), "['0', '2', '10']"),
    "numbers and words": (made(classes=("2Bad", "0Good", "1Fair")), "['0Good', '1Fair', '2Bad']"),
    "words and numbers": (made(classes=("KL-3", "KL-1")), "['KL-1', 'KL-3']"),
    "nameless": (made(name="scan-{}.png"), "shared None"),
    "half nameless": (changed(copied("train/0/scan.png")), "shared None ['1 of 31 file names"),
    "pattern": (given("PATIENT_PATTERN", "scan-([0-9]+)", name="scan-{}.png"), "shared {}"),
    "allowed": (changed(two_splits, "-p", "ALLOW_LEAKS", "true"), LEAK),
    "cut off": (changed(cut_off), "1 left out"),
    "strip": (changed(added("train/0/1L.png", STRIP)), "left out"),
    "pixel bomb": (changed(pixel_bomb), "1 left out"),
    "broken link": (changed(broken_link), "1 left out"),
    "constant": (changed(added("train/0/1L.png", np.full((32, 32), 7))), "1 left out"),
    "GBK name": (changed(gbk_name), "30 images, 0 left out"),
    "GBK class": (changed(gbk_class), "30 images, 0 left out"),
    "HTML class": (made(classes=("0", "1<img src=x onerror=alert()>")), "30 images"),
    "other formats": (changed(other_formats), "40 images"),
    "12 bits": (changed(twelve_bits), "'bits': 12"),
    "training, testing": (made(splits=("training", "testing")), "20 images"),
    "deeper": (lambda f: write(f / "archive/knees") and [], "30 images"),
    "one level in splits": (changed(one_level_in_splits), "30 images"),
    "folder per patient": (changed(folder_per_patient), "30 images"),
    "macOS": (changed(macos), "30 images"),
    "flat test": (changed(added("test/1.png", np.eye(9)), splits=ALL[:2], count=9), "test is left"),
    "no splits": (changed(no_splits, splits=("train",), count=12), "24 images"),
    "neighbours": (changed(neighbours), "1 .csv, 1 .dcm: train/0/readme.csv, "),
    "beside": (changed(beside), "2 .png, 1 .csv, 1 .md: labels.csv, test/1/patient/visit/1L.png"),
    "photographs": (photographs, "'colour': True"),
}
assert len(REFUSED) + len(READ) >= 35


@pytest.mark.parametrize("name", READ)
def test_read_and_said(name, command, tmp_path):
    case, holds = READ[name]
    status, printed = command(*(case(tmp_path / "images") or []))
    assert status == 0, printed
    found = json.loads((tmp_path / "run/data/audit.json").read_text())
    dataset = data.load(tmp_path / "run/data")
    said = f"{found['images']} images, {len(found['left_out'])} left out, {dataset.class_names}"
    said += f" ordered {dataset.ordered} shared {found['shared_patients']} {found['notes']}"
    assert holds in f"{said} {dataset.origin}"
    assert all(len(dataset.rows(split)) for split in data.SPLITS)
    if name == "photographs":
        assert dataset.subject != settings.KNEES and dataset.names_shown[0] == "bud"
        assert dataset.origin["aspect"] == pytest.approx([300 / 162] * 2, abs=1e-3)


def test_a_finished_01_stays_and_a_run_inside_the_data_is_no_data(command, tmp_path):
    write(tmp_path / "images")
    inside, stamps = tmp_path / "images/run", []
    for attempt in range(3):
        status, printed = command("--out", str(inside))
        assert status == 0, printed
        assert ("kept" in printed) == (attempt > 0)
        stamps.append((inside / "data/images.npy").stat().st_mtime_ns)
        if attempt == 1:  # the notebook alone, run again
            shutil.rmtree(inside / "notebooks")
    assert len(set(stamps)) == 1 and not list(inside.glob("data.*"))


def test_a_replaced_image_is_seen_through_links_and_said(command, tmp_path):
    write(tmp_path / "elsewhere")
    (tmp_path / "images").mkdir()
    for split in ALL:
        (tmp_path / "images" / split).symlink_to(tmp_path / "elsewhere" / split)
    assert command()[0] == 0
    path = first(tmp_path / "elsewhere")
    save(path, picture(np.random.default_rng(9)))
    first(tmp_path / "elsewhere", "val/*/*").rename(path.with_name("1L.png"))
    status, printed = command()
    assert status == 0 and f"1 image changed: train/0/{path.name}" in printed
    assert "1 image gone: val/0/" in printed and "1 image new: train/0/1L.png" in printed
    assert len(list((tmp_path / "run").glob("data*"))) == 2  # the old one is kept


@pytest.mark.slow
def test_photographs_go_from_01_to_a_card_without_a_word_about_knees(tmp_path):
    options, out = photographs(tmp_path / "images"), tmp_path / "run"
    argv = [sys.executable, "-m", "utils", "run", "--profile", "test", "--out", str(out), *options]
    argv += ["--data", str(tmp_path / "images")]
    done = subprocess.run(argv, cwd=settings.ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    card = (out / "report/deploy/model_card.md").read_text()
    assert "photographs of tomatoes" in card and "rotten" in card
    for text in (card, (out / "index.html").read_text()):
        text = re.sub('base64,[^"]+', "", text)
        assert not re.search(r"(?i)knee|radiograph|kellgren|osteoarthritis|x-ray|\bKL\b", text)


@pytest.mark.parametrize("name", list(REFUSED)[:3])
def test_as_a_process(name, tmp_path):
    case, status, said = REFUSED[name]
    argv = [sys.executable, "-m", "utils", "run", "--only", "01", "--out", str(tmp_path / "run")]
    argv += ["--data", str(tmp_path / "images"), *(case(tmp_path / "images") or [])]
    done = subprocess.run(argv, cwd=settings.ROOT, capture_output=True, text=True)
    assert done.returncode == status
    assert said in done.stderr and "Traceback" not in done.stderr


@pytest.fixture
def grading(monkeypatch, capsys):
    """`grade` with a model that grades everything 0: (status, rows)."""
    command = pytest.importorskip("utils.cli.grade")
    about = {"class_names": ["0", "1"], "image_size": 32, "temperature": 1.0, "refer_below": 0.0}
    about |= {"subject": "discs", "colour": True, "aspect": [0.01, 400.0], "bits": 12}
    model = lambda x: np.tile([0.9, 0.1], (len(x), 1))  # noqa: E731
    monkeypatch.setattr(command, "load", lambda path: (model, about | {"sides": [32]}))

    def call(folder):
        status = cli.main(["grade", str(folder), "--model", "m.keras", "--json"])
        return status, json.loads(capsys.readouterr().out)

    return call


def test_each_file_of_a_folder_gets_a_row_from_grade(grading, tmp_path):
    for case in (cut_off, pixel_bomb, gbk_name, neighbours, broken_link):
        case(write(tmp_path / case.__name__))
    (tmp_path / "linked").symlink_to(write(tmp_path / "macOS/__MACOSX", count=1))
    files = [p for p in tmp_path.rglob("*") if "macOS" not in str(p) and not p.is_dir()]
    status, rows = grading(tmp_path)
    assert status == 1 and len(rows) == len(files) + 6
    # cut off, bomb, CSV, DICOM, and a link whose file is gone
    assert sum(row["grade"] is None for row in rows) == 5
    assert all(row["note"] for row in rows if row["grade"] is None)


@pytest.mark.slow
def test_no_damaged_file_ends_decode_or_grade(grading, tmp_path):
    rng, formats = np.random.default_rng(0), ("png", "jpg", "bmp", "tif", "webp")
    deep, colour = picture(rng).astype("uint16") * 200, rng.integers(0, 255, (9, 9, 3), "uint8")
    whole = []
    for ending in formats:
        for pixels in (picture(rng), colour, *[deep] * (ending in ("png", "tif"))):
            save(tmp_path / f"whole.{ending}", pixels)
            whole.append((ending, (tmp_path / f"whole.{ending}").read_bytes()))
    paths = []
    for number in range(3000):
        ending, content = whole[number % len(whole)]
        content = bytearray(content[: rng.integers(len(content))] if number % 3 == 0 else content)
        for _ in range(rng.integers(1, 30) if content else 0):
            content[rng.integers(len(content))] = rng.integers(256)
        ending = formats[number % 5] if number % 7 == 0 else ending
        paths.append(tmp_path / f"damaged/{number % 10}/{number}.{ending}")
        paths[-1].parent.mkdir(parents=True, exist_ok=True)
        paths[-1].write_bytes(bytes(content))
    table = pd.DataFrame({"image": [path.name for path in paths], "path": paths})
    pixels, facts, left_out = images.decode(table, 16, unusable=1)
    assert len(facts) + len(left_out) == len(pixels) == 3000 and 100 < len(facts) < 2900
    assert not np.delete(pixels, facts.index, axis=0).any()
    status, rows = grading(tmp_path / "damaged")
    assert status == 1 and len(rows) == 3000
    assert 100 < sum(row["grade"] is None for row in rows) < 2900
