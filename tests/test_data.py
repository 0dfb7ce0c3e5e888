"""Finding, reading, splitting and auditing a dataset: what is refused, left out or said."""

import shutil
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils import data, folders


def picture(rng, size=40):
    """A bright disc on dark ground with noise: all are of one kind, no two are equal."""
    at = np.linspace(-1, 1, size)
    disc = 120.0 * (at[:, None] ** 2 + at**2 < 0.5)
    return (60 + disc + rng.uniform(0, 40, (size, size))).astype("uint8")


def write(folder, splits=("train", "val", "test"), classes="01234", patients=6, size=40, seed=0):
    """`split/class/<patient><L|R>.png`, both knees of a patient in one class."""
    rng, patient = np.random.default_rng(seed), 9_000_000
    for split in splits:
        for name in classes:
            (folder / split / name).mkdir(parents=True)
            for _ in range(patients):
                patient += 1
                for side in "LR":
                    image = Image.fromarray(picture(rng, size))
                    image.save(folder / split / name / f"{patient}{side}.png")
    return folder


@pytest.fixture
def knees(tmp_path):
    return write(tmp_path / "knees")


def images_of(folder, split="train"):
    return sorted((folder / split).glob("*/*.png"))


def audit(folder, size=32, val=0.2, test=0.2, seed=0):
    """What notebook 01 does, up to the report: (facts, images, found, report)."""
    table, found = folders.scan(folder)
    images, facts = folders.decode(folder, table, size)
    facts, left_out = data.leave_out(facts)
    facts, notes = data.complete_splits(facts, val, test, seed)
    return facts, images, found, data.audit(facts, images, found, left_out, notes)


def store(folder, target, **changes):
    facts, images, found, _ = audit(folder)
    settings = {"seed": 7, "augmentation": {"flip": True}, "balance": "none"} | changes
    data.save(target, facts, images, source=folder, found=found, **settings)
    return data.load(target)


# ---------------------------------------------------------------- find


def test_finds_the_dataset_below_a_folder_and_none_without_kaggle(knees, tmp_path, monkeypatch):
    assert folders.find_dataset(tmp_path) == folders.find_dataset(knees) == knees
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "nowhere"))
    assert folders.find_dataset("") is None


@pytest.mark.parametrize(
    "layout", ["some-slug", "datasets/owner/some-slug", "some-slug/inner/more"]
)
def test_finds_both_kaggle_layouts(layout, tmp_path, monkeypatch):
    folder = write(tmp_path / layout, patients=1)
    (tmp_path / "weights").mkdir()
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path))
    assert folders.find_dataset("") == folder


def test_phantoms_in_an_attached_output_are_no_find(knees, tmp_path, monkeypatch):
    (knees / "SYNTHETIC.json").write_text("{}")
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path))
    assert folders.find_dataset("") is None
    assert folders.find_dataset(knees) == knees
    with pytest.raises(FileNotFoundError, match="searched 2 folders"):
        folders.find_dataset(tmp_path)  # the mount itself, named: someone wants real images


def test_nothing_found_lists_what_was_searched(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=r"searched 3 folders: .*a/b"):
        folders.find_dataset(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no folder .*missing"):
        folders.find_dataset(tmp_path / "missing")


def test_two_datasets_are_refused_by_name(tmp_path):
    for name in ("size224", "size299"):
        write(tmp_path / name, patients=1)
    with pytest.raises(ValueError, match=r"2 datasets .*size224, .*size299"):
        folders.find_dataset(tmp_path)


# ---------------------------------------------------------------- scan


@pytest.mark.parametrize("name", ["val", "valid", "validation", "Valid"])
def test_split_names_are_normalised(name, tmp_path):
    table, _ = folders.scan(write(tmp_path, splits=("train", name, "test"), patients=1))
    assert set(table["split"]) == {"train", "val", "test"}


def test_kl_grades_and_other_class_names(tmp_path):
    _, found = folders.scan(write(tmp_path / "a", patients=1))
    assert found["names_shown"] == ["KL 0", "KL 1", "KL 2", "KL 3", "KL 4"]
    table, found = folders.scan(write(tmp_path / "b", classes=["10", "9", "none"], patients=1))
    assert found["class_names"] == found["names_shown"] == ["9", "10", "none"]
    assert set(table["grade"][table["class"] == "10"]) == {1}


def test_auto_test_is_never_pooled(knees):
    shutil.copytree(knees / "test", knees / "auto_test")
    (knees / "notes").mkdir()
    table, found = folders.scan(knees)
    assert len(table) == 3 * 60 and not table["image"].str.contains("auto_test").any()
    assert "auto_test is left out" in found["notes"][0] and "notes" in found["notes"][1]
    data.check_leaks(audit(knees)[3])


def test_class_that_train_lacks_is_an_error_and_elsewhere_a_note(knees):
    shutil.rmtree(knees / "val" / "4")
    assert "val has no image of class 4" in audit(knees)[3]["notes"]
    for path in (knees / "train" / "3").iterdir():
        path.unlink()
    with pytest.raises(ValueError, match="class 3 has no image in train"):
        folders.scan(knees)


def test_empty_split_one_class_and_doubled_split_are_errors(knees, tmp_path):
    (knees / "validation").mkdir()
    with pytest.raises(ValueError, match="val and validation both name val"):
        folders.scan(knees)
    shutil.rmtree(knees / "val")
    with pytest.raises(ValueError, match="no image in split val"):
        folders.scan(knees)
    with pytest.raises(ValueError, match="one class"):
        folders.scan(write(tmp_path / "one", classes="0", patients=1))


def test_only_images_count_and_patients_come_from_the_names(tmp_path):
    write(tmp_path, patients=1)
    (tmp_path / "train" / "0" / "Thumbs.db").write_text("x")
    shutil.copy(tmp_path / "train/0/9000001L.png", tmp_path / "train/0/scan_1.JPG")
    table, found = folders.scan(tmp_path)
    assert len(table) == 31 and found["patient_rule"] == 30 / 31
    assert table["patient"][table["image"] == "train/0/9000001R.png"].item() == "9000001"
    assert "1 of 31 file names" in found["notes"][0]


def test_equal_names_without_a_patient_are_no_leak(tmp_path):
    rng = np.random.default_rng(0)
    for split in ("train", "val", "test"):
        for name in ("cat", "dog"):
            (tmp_path / split / name).mkdir(parents=True)
            Image.fromarray(picture(rng)).save(tmp_path / split / name / "1.png")
    assert data.check_leaks(audit(tmp_path)[3]) == []


# ---------------------------------------------------------------- decode


def test_every_kind_of_file_becomes_the_same_gray_picture(tmp_path):
    gray = picture(np.random.default_rng(0))
    Image.fromarray(gray).save(tmp_path / "gray.png")
    Image.fromarray(np.repeat(gray[..., None], 3, 2)).save(tmp_path / "rgb.png")
    Image.fromarray(gray).convert("LA").save(tmp_path / "alpha.png")
    Image.fromarray(gray).convert("P").save(tmp_path / "palette.png")
    Image.fromarray(gray).save(tmp_path / "gray.jpeg", quality=100)
    deep = gray.astype("uint16")
    deep[0, 0] = gray[0, 0] = 255
    for bits in (10, 12, 16):
        scaled = np.round(deep * ((2**bits - 1) / 255)).astype("uint16")
        Image.fromarray(scaled).save(tmp_path / f"{bits}.png")
    for path in sorted(tmp_path.iterdir()):
        read, bits = folders.read_gray(path)
        assert read.dtype == np.uint8 and read.shape == (40, 40)
        assert bits == (int(path.stem) if path.stem.isdigit() else 8)
        difference = np.abs(read.astype(int) - gray)
        difference[0, 0] = 0
        assert difference.max() <= (2 if path.suffix == ".jpeg" else 0), path.name


def test_aspect_is_kept_with_black_bars():
    out = folders.square(np.full((20, 40), 200, "uint8"), 32)
    assert out.shape == (32, 32)
    assert (out[:8] == 0).all() and (out[-8:] == 0).all() and (out[8:24] == 200).all()


def test_bad_files_are_left_out_by_name(tmp_path):
    write(tmp_path, patients=20)
    whole = images_of(tmp_path)[:4]
    whole[0].write_bytes(whole[0].read_bytes()[:300])
    whole[1].write_bytes(b"")
    whole[2].write_text("not a picture")
    Image.new("L", (40, 40), 90).save(whole[3])
    facts, _, _, report = audit(tmp_path)
    names = [path.relative_to(tmp_path).as_posix() for path in whole]
    reasons = ["truncated", "empty", "not an image", "constant"]
    assert report["left_out"] == dict(zip(names, reasons, strict=True))
    assert len(facts) == report["images"] == 596 and not set(names) & set(facts["image"])


def test_more_than_one_percent_of_bad_files_is_an_error(knees):
    for path in images_of(knees)[:2]:
        path.write_bytes(b"")
    with pytest.raises(ValueError, match=r"2 of 180 images \(1.1%.*9000001L.png \(empty\)"):
        audit(knees)


def test_stored_rows_match_the_manifest_after_files_were_left_out(tmp_path):
    folder = write(tmp_path / "a", patients=8)
    images_of(folder)[3].write_bytes(b"")
    dataset = store(folder, tmp_path / "data")
    assert len(dataset.images) == len(dataset.manifest) == 239
    for row in (0, 3, 238):
        gray, _ = folders.read_gray(folder / dataset.manifest["image"][row])
        assert (dataset.images[row, :, :, 0] == folders.square(gray, 32)).all()


# ---------------------------------------------------------------- splits


def test_more_images_than_memory_holds_are_refused_before_any_is_read(tmp_path, monkeypatch):
    free = SimpleNamespace(available=3 * 100 * 64**2 - 1)
    monkeypatch.setattr(folders.psutil, "virtual_memory", lambda: free)
    table = pd.DataFrame({"image": ["gone.png"] * 100})
    with pytest.raises(MemoryError, match=r"100 images at 64 px .* lower STORED_SIZE"):
        folders.decode(tmp_path, table, 64)
    assert len(folders.decode(tmp_path, table[:99], 64)[0]) == 99


def test_missing_splits_are_carved_by_patient_and_said(tmp_path):
    table, _ = folders.scan(write(tmp_path, splits=("train",), patients=15))
    _, facts = folders.decode(tmp_path, table, 32)
    split, notes = data.complete_splits(facts, 0.2, 0.2, 0)
    assert split.groupby("patient")["split"].nunique().max() == 1
    shares = split["split"].value_counts(normalize=True)
    assert shares["val"] == pytest.approx(0.2, abs=0.03)
    assert shares["test"] == pytest.approx(0.2, abs=0.03)
    counts = pd.crosstab(split["split"], split["class"])
    assert (counts.max(axis=1) - counts.min(axis=1) <= 4).all()
    assert [note.split()[0] for note in notes] == ["test", "val"]
    assert data.complete_splits(facts, 0.2, 0.2, 0)[0].equals(split)
    assert not data.complete_splits(facts, 0.2, 0.2, 1)[0].equals(split)
    with pytest.raises(ValueError, match=r"TEST_FRACTION is 0\.9"):
        data.complete_splits(facts, 0.2, 0.9, 0)


def test_a_val_that_is_there_stays_as_it_is(tmp_path):
    facts = audit(write(tmp_path, splits=("train", "val"), patients=10))[0]
    assert facts["image"].str.startswith("val/").equals(facts["split"] == "val")
    assert facts["image"][facts["split"] == "test"].str.startswith("train/").all()


def test_folders_without_splits_count_as_train(tmp_path):
    write(tmp_path, splits=("all",), classes=["cat", "dog"], patients=10)
    (tmp_path / "all" / "papers").mkdir()
    assert folders.find_dataset(tmp_path) == folders.find_dataset(tmp_path / "all")
    facts, _, _, report = audit(tmp_path / "all")
    assert set(facts["split"]) == {"train", "val", "test"}
    assert report["notes"][0].startswith("no split folders")


def test_copies_under_two_patients_are_carved_together(tmp_path):
    folder = write(tmp_path, splits=("train",), patients=10)
    files = images_of(folder)
    for k in range(0, 40, 4):  # the left knee of every second patient becomes the next one's
        shutil.copy(files[k], files[k + 2])
    data.check_leaks(audit(folder)[3])


# ---------------------------------------------------------------- audit


def test_one_patient_in_two_splits_is_a_leak(knees):
    left = images_of(knees)[0]
    shutil.move(left, knees / "val" / "0" / left.name)
    report = audit(knees)[3]
    assert report["shared_patients"] == {"9000001": ["train", "val"]}
    with pytest.raises(data.LeakError, match="patient 9000001 is in train and val"):
        data.check_leaks(report)
    assert len(data.check_leaks(report, allow=True)) == 1
    assert data.summary(report).loc["patients in two splits", "verdict"] == "leak"


def test_one_image_copied_across_splits_is_a_leak_whatever_its_format(knees):
    with Image.open(images_of(knees)[0]) as image:
        image.convert("RGB").save(knees / "test" / "1" / "7654321R.png")
    report = audit(knees)[3]
    assert report["shared_patients"] == {}
    with pytest.raises(data.LeakError, match=r"train/0/9000001L.png = test/1/7654321R.png"):
        data.check_leaks(report)


def test_counts_sizes_and_copies_are_reported(knees):
    files = images_of(knees)
    shutil.copy(files[0], files[-1])
    report = audit(knees, size=64)[3]
    assert report["counts"]["train"] == dict.fromkeys("01234", 12)
    assert report["imbalance"] == 1.0
    assert report["patients"] == {"train": 30, "val": 30, "test": 30}
    assert report["images_per_patient"] == {"2": 90}
    assert report["smaller_than_stored"] == 180 and report["sizes"] == {"40x40": 180}
    assert len(report["identical_within_split"]) == 1 and not report["identical_across_splits"]


@pytest.mark.parametrize("share", [0.02, 0.4])
def test_inverted_images_are_named(knees, share):
    rng = np.random.default_rng(1)
    files = [path for split in ("train", "val") for path in images_of(knees, split)]
    turned = [files[i] for i in rng.permutation(len(files))[: int(share * len(files))]]
    for path in turned:
        with Image.open(path) as image:
            negative = Image.fromarray(255 - np.asarray(image))
        negative.save(path)
    expected = sorted(path.relative_to(knees).as_posix() for path in turned)
    assert sorted(audit(knees)[3]["inverted"]) == expected


def test_inversion_is_not_judged_where_images_are_unlike():
    noise = np.random.default_rng(0).integers(0, 256, (60, 32, 32, 1), "uint8")
    assert data.inverted(noise, np.arange(60)) is None


# ---------------------------------------------------------------- store and load


def test_what_is_stored_comes_back(knees, tmp_path):
    dataset = store(knees, tmp_path / "data")
    assert (dataset.seed, dataset.augmentation, dataset.balance) == (7, {"flip": True}, "none")
    assert dataset.names_shown[4] == "KL 4" and not dataset.synthetic
    labels = dataset.labels("val")
    assert labels.dtype == np.int32 and np.bincount(labels).tolist() == [12] * 5
    assert len(set(dataset.patients("val"))) == 30
    pixels = dataset.pixels("val", 32)
    assert pixels.dtype == np.uint8 and (pixels == dataset.images[dataset.rows("val")]).all()
    assert dataset.pixels("val", 24).shape == (60, 24, 24, 1)
    with pytest.raises(ValueError, match="split is one of"):
        dataset.rows("valid")


def test_the_digest_tells_another_split_from_this_one(knees, tmp_path):
    first = store(knees, tmp_path / "a")
    assert store(knees, tmp_path / "b").digest == first.digest
    files = images_of(knees)
    for side in files[:2]:
        shutil.move(side, knees / "val" / "0" / side.name)
    assert store(knees, tmp_path / "c").digest != first.digest


def test_class_names_that_look_like_missing_values_survive(tmp_path):
    dataset = store(write(tmp_path / "a", classes=["NA", "None"]), tmp_path / "data")
    assert set(dataset.manifest["class"]) == {"NA", "None"}


def test_loading_says_what_to_run(knees, tmp_path):
    with pytest.raises(FileNotFoundError, match="run notebook 01_data"):
        data.load(tmp_path)
    store(knees, tmp_path / "data")
    np.save(tmp_path / "data" / "images.npy", np.zeros((3, 32, 32, 1), "uint8"))
    with pytest.raises(ValueError, match="3 images, but 180 rows"):
        data.load(tmp_path / "data")


def test_phantoms_are_known_as_synthetic(phantom_folder, tmp_path):
    dataset = store(phantom_folder, tmp_path)
    assert dataset.synthetic and 0.8 <= dataset.bayes_accuracy <= 0.92
    report = audit(phantom_folder)[3]
    assert report["inverted"] == [] and report["left_out"] == {}
    data.check_leaks(report)


def test_data_needs_no_tensorflow():
    code = "import sys; from utils import data; sys.exit('tensorflow' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0
