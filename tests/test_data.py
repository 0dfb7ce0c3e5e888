"""Finding, reading, splitting, auditing and storing a dataset: what goes in and what comes out."""

import io
import os
import subprocess
import sys
from functools import partial

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from tests.test_bad_inputs import picture, run_cells, save, write
from utils import audit, data, folders, images, phantoms, runs, settings

NEGATIVES = run_cells(["negatives"], {"audit": audit, "np": np})["negatives"]


def read(folder, size=32):
    """What notebook 01 does up to the split: (table, found, pixels, facts, notes)."""
    table, found = folders.scan(folder)
    pixels, facts, _ = images.decode(table, size)
    return table, found, pixels, *data.complete_splits(facts, 0.2, 0.2, 0)


def store(folder, target):
    table, found, pixels, facts, _ = read(folder)
    decided = {"subject": settings.KNEES, "ordered": True, "seed": 7, "balance": "none"}
    decided |= {"augmentation": {"flip": True}, "class_names": found["class_names"]}
    data.save(target, facts, pixels, table, folder, **decided, names_shown=["KL 0", "KL 1"])
    return data.load(target)


@pytest.fixture
def knees(tmp_path):
    return write(tmp_path / "knees")


@pytest.mark.parametrize("layout", ["slug", "datasets/owner/slug", "slug/inner/more"])
def test_finds_what_is_attached_on_kaggle(layout, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path))
    assert folders.find_dataset() is None
    folder = write(tmp_path / layout, count=1)
    phantoms.draw(tmp_path / "output/runs/tiny/phantoms/drawn", 20, 0, 32)
    (tmp_path / "output/runs/tiny/data").mkdir()
    assert folders.find_dataset() == folder
    assert folders.find_dataset(tmp_path / layout.split("/")[0]) == folder


def test_neighbours_that_cannot_be_read_are_passed_over(knees, monkeypatch):
    (knees / "closed").mkdir()

    def denied(real, path, *rest, **options):
        if "/closed/" in (str(path) if real is looked_at else f"{path}/"):  # nothing below it
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *rest, **options)

    looked_at = os.stat
    for name in ("listdir", "stat"):
        monkeypatch.setattr(os, name, partial(denied, getattr(os, name)))
    assert folders.find_dataset(knees.parent) == knees
    assert len(folders.scan(knees)[0]) == 30


def test_a_folder_that_names_no_split_is_never_pooled(knees):
    write(knees, splits=("auto_test",))
    table, found, _, facts, notes = read(knees)
    assert len(table) == 30 and "auto_test" in found["notes"][0]
    assert notes == [] and list(facts["image"]) == list(table["image"])  # the splits stay


PATIENTS = {
    "9001695L": "9001695",
    "9000012_L": "9000012",
    "P1000_left_V00": "P1000",
    "123-R": "123",
}
UNKNOWN = dict.fromkeys(["0001", "IMG_20240101_L2", "12Lateral", "knee"])


@pytest.mark.parametrize(("name", "patient"), (PATIENTS | UNKNOWN | {"17 Right": "17"}).items())
def test_patients_are_read_from_names_or_not_at_all(name, patient, tmp_path):
    save(write(tmp_path, count=2) / f"train/0/{name}.png", picture(np.random.default_rng(0)))
    table, found = folders.scan(tmp_path)
    read_as = table.set_index("image")["patient"][f"train/0/{name}.png"]
    assert read_as == (patient or f"train/0/{name}")
    assert (found["patient_rule"] == 1) == bool(patient)


def test_every_kind_of_file_becomes_the_same_gray_picture(tmp_path):
    gray = np.arange(0, 250, 2, dtype="uint8")[:, None].repeat(125, 1)
    image, place = Image.fromarray(gray), tmp_path
    for ending in ("png", "bmp", "tif", "tiff"):
        image.save(place / f"a.{ending}")
    image.save(place / "lossless.webp", lossless=True)
    image.save(place / "fine.jpg", quality=100)
    for mode in ("RGB", "RGBA", "LA", "P", "CMYK"):
        image.convert(mode).save(place / f"{mode}.tif" if mode == "CMYK" else place / f"{mode}.png")
    Image.fromarray(gray.astype("uint16") * 257).save(place / "deep.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned a quarter to the right
    image.rotate(90, expand=True).save(place / "turned.png", exif=exif)
    for path in sorted(place.iterdir()):
        difference = np.abs(images.read_image(path).astype(int) - gray)
        assert difference.max() <= 3, path.name


def test_one_bit_depth_for_a_data_set(tmp_path):
    """4,095 or 4,096 in one pixel of an image changes no other pixel of it, nor other images."""
    deep = np.full((40, 40), 2000, "uint16")
    deep[0] = np.linspace(0, 4095, 40)
    paths = [tmp_path / "a.png", tmp_path / "b.png", tmp_path / "dark.png"]
    for path, top in zip(paths, (4095, 4096), strict=False):
        deep[0, -1] = top
        save(path, deep)
    save(paths[2], deep // 8)
    pixels, facts, _ = images.decode(pd.DataFrame({"image": "abc", "path": paths}), 40)
    assert pixels[:2, 20, 20, 0].tolist() == [125, 125]
    assert pixels[2, 20, 20, 0] == 16  # an eighth, also here
    assert images.read_image(paths[2], facts["bits"].max())[20, 20] == 16


def test_aspect_is_kept_with_black_bars():
    wide = images.square(np.full((20, 40), 200, "uint8"), 40)
    assert wide[15].min() == 200 and wide[:10].max() == 0 and wide[30:].max() == 0


def test_more_images_than_memory_holds_are_refused():
    with pytest.raises(MemoryError, match="lower STORED_SIZE"):
        images.decode(pd.DataFrame({"path": ["a.png"] * 10_000_000}), 2048)


def test_missing_splits_are_carved_by_patient(tmp_path):
    write(tmp_path, splits=("train",), classes="012", count=20)
    for path in list(tmp_path.rglob("*L.png")):
        save(path.with_stem(path.stem[:-1] + "R"), picture(np.random.default_rng()))
    facts, notes = read(tmp_path)[3:]
    assert facts.groupby("patient")["split"].nunique().max() == 1
    shares = facts["split"].value_counts(normalize=True)
    assert shares["test"] == pytest.approx(0.2, abs=0.06) and set(shares.index) == set(data.SPLITS)
    assert pd.crosstab(facts["split"], facts["class"]).min().min() > 0
    assert len(notes) == 2 and list(facts["split"].unique()) == list(data.SPLITS)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("rare", [1, 2])
def test_the_last_patient_of_a_class_stays_in_train(rare, seed, tmp_path):
    write(tmp_path, splits=("train",), classes="01", count=15)
    write(tmp_path, splits=("train",), classes="2", count=rare, name="7{}L.png")
    table, found = folders.scan(tmp_path)
    pixels, facts, _ = images.decode(table, 16)
    facts, _ = data.complete_splits(facts, 0.3, 0.3, seed)
    assert set(facts["class"][facts["split"] == "train"]) == {"0", "1", "2"}
    notes = audit.audit(facts, pixels, found)["notes"]
    assert "has no image of class 2" in " ".join(notes)


def test_equal_pictures_of_two_patients_are_carved_together(tmp_path):
    write(tmp_path, splits=("train",), count=20)
    for number, path in enumerate(sorted(tmp_path.rglob("*.png"))[:10]):
        path.with_name(f"{number}L.png").write_bytes(path.read_bytes())
    assert read(tmp_path)[3].groupby("pixels")["split"].nunique().max() == 1


def crop(pixels, share=0.03):
    size, cut = len(pixels), max(1, round(len(pixels) * share))
    image = Image.fromarray(pixels[cut:, : size - cut])
    return np.asarray(image.resize((size, size), Image.Resampling.BICUBIC))


def jpeg(pixels):
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


COPIES = {
    "crop 3 %": crop,
    "JPEG 60": jpeg,
    "darker": lambda pixels: pixels // 10 * 8 + 20,
    "mirrored": lambda pixels: pixels[:, ::-1],
    "all of it": lambda pixels: jpeg(crop(pixels[:, ::-1] // 10 * 8 + 20)),
}


@pytest.fixture(scope="module")
def crowd():
    """300 synthetic X-rays and a table of them: 240 in train, the others in val."""
    facts = pd.DataFrame({"image": [f"{number}.png" for number in range(300)]})
    facts = facts.assign(pixels=facts["image"], patient=facts["image"], width=96, height=96)
    return phantoms.knees(300, 3, 96)[0], facts.assign(split=["train"] * 240 + ["val"] * 60)


def test_strangers_and_small_or_enlarged_images_are_no_near_copies(crowd):
    pixels, facts = crowd
    assert audit.near_copies(pixels, facts) == []
    assert audit.near_copies(pixels, facts.assign(width=40, height=40)) is None
    assert audit.near_copies(pixels[:, ::3, ::3], facts) is None


@pytest.mark.parametrize("kind", COPIES)
def test_near_copies_across_splits_are_found(kind, crowd):
    pixels, facts = crowd[0].copy(), crowd[1]
    for number in range(20):
        pixels[240 + number, ..., 0] = COPIES[kind](pixels[10 * number, ..., 0])
    pairs = {(pair["image"], pair["copy"]) for pair in audit.near_copies(pixels, facts)}
    wanted = {(f"{10 * number}.png", f"{240 + number}.png") for number in range(20)}
    assert len(wanted & pairs) >= 19 and len(pairs - wanted) <= 1


def test_equal_pixels_are_reported_by_place(knees):
    train = sorted((knees / "train/0").iterdir())
    Image.open(train[0]).save(knees / "train/0/1L.png")
    Image.open(train[1]).save(knees / "test/0/2L.bmp")
    _, found, pixels, facts, _ = read(knees)
    report = audit.audit(facts, pixels, found)
    assert report["identical_within_split"] == [["train/0/1L.png", f"train/0/{train[0].name}"]]
    assert report["identical_across_splits"] == [[f"train/0/{train[1].name}", "test/0/2L.bmp"]]
    with pytest.raises(ValueError, match="ALLOW_LEAKS"):
        audit.check_leaks(report)
    assert len(audit.check_leaks(report, allow=True)) == 1


def test_negatives_are_named_and_unlike_images_not_judged(knees):
    paths = sorted(knees.rglob("*.png"))[:4]
    for path in paths:
        save(path, 255 - np.asarray(Image.open(path)))
    pixels, facts = read(knees)[2:4]
    names = [path.relative_to(knees).as_posix() for path in paths]
    assert sorted(NEGATIVES(pixels, facts)) == names
    noise = np.random.default_rng(0).integers(0, 255, pixels.shape, "uint8")
    assert NEGATIVES(noise, facts) is None


def test_planted_faults_are_found(tmp_path):
    planted = phantoms.plant_faults(tmp_path, 0)
    table, found = folders.scan(tmp_path)
    pixels, facts, left_out = images.decode(table, 96)
    report = audit.audit(facts, pixels, found)
    pairs = [[pair["image"], pair["copy"]] for pair in report["near_copies"]]
    assert list(left_out) == planted["unreadable"] and pairs == [planted["near_copy"]]
    assert NEGATIVES(pixels, facts) == planted["negative"] and len(report["shared_patients"]) == 1


def test_what_is_stored_comes_back(knees, tmp_path):
    dataset = store(knees, tmp_path / "data")
    assert (
        dataset.subject == settings.KNEES
        and dataset.names_shown == ["KL 0", "KL 1"]
        and dataset.seed == 7
    )
    assert dataset.origin == {"colour": False, "aspect": [1.0, 1.0], "bits": 8}
    assert not dataset.synthetic and dataset.monitor == "val_qwk"
    labels, patients = dataset.labels("train"), dataset.patients("train")
    assert labels.dtype == np.int32 and len(labels) == len(patients) == 10
    assert dataset.pixels("val", 16).shape == (10, 16, 16, 1)
    first = dataset.manifest["image"][dataset.rows("test")[0]]
    assert np.array_equal(dataset.pixels("test", 32)[0, ..., 0], images.read_image(knees / first))


def test_the_digest_follows_the_content(knees, tmp_path):
    one, again = store(knees, tmp_path / "a"), store(knees, tmp_path / "b")
    assert one.digest == again.digest
    path = sorted(knees.rglob("*.png"))[0]
    path.rename(path.with_stem("5L"))
    assert store(knees, tmp_path / "c").digest != one.digest


def test_loading_says_what_to_run(tmp_path):
    with pytest.raises(runs.StageError, match="run the notebook that writes it"):
        data.load(tmp_path / "data")


def test_phantoms_are_known_as_synthetic(tmp_path):
    dataset = store(phantoms.draw(tmp_path / "drawn", 20, 0, 32), tmp_path / "data")
    assert dataset.synthetic and 0.5 < dataset.bayes_accuracy < 1


def test_data_needs_no_tensorflow():
    code = "import sys; from utils import audit, data; assert 'tensorflow' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], cwd=settings.ROOT, check=True)


def test_identity_does_not_depend_on_where_the_images_are(knees, tmp_path):
    values = settings.validate({"RUN_DIR": str(tmp_path / "run"), "DATA_DIR": str(knees)})
    before = folders.check_folder(values)[1]
    values["DATA_DIR"] = str(knees.rename(tmp_path / "moved"))
    assert folders.check_folder(values)[1] == before
