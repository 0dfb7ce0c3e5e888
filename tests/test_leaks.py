"""Planted leaks are found, honest data are not accused, and leaking protocols flatter."""

import io

import numpy as np
import pandas as pd
import pytest
from PIL import Image

from utils import data, leaks

SIZE = 64


def film(seed):
    """A smooth made-up radiograph: uint8 (64, 64)."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(30, 220, (9, 9), dtype=np.uint8))
    return np.asarray(small.resize((SIZE, SIZE), Image.Resampling.BICUBIC))


def as_jpeg(film):
    file = io.BytesIO()
    Image.fromarray(film).save(file, "JPEG", quality=60)
    return np.asarray(Image.open(file))


def dataset(films, patients, folder="train", synthetic=False):
    """40 training, 10 val and 10 test images."""
    splits = ["train"] * 40 + ["val"] * 10 + ["test"] * 10
    table = pd.DataFrame({"split": splits, "patient": patients, "grade": np.arange(60) % 5})
    tops = [folder if split == "train" else split for split in splits]
    table["image"] = [f"{tops[k]}/{k % 5}/{k}.png" for k in range(60)]
    table["class"] = table["grade"].astype(str)
    shown = [f"KL {k}" for k in range(5)]
    facts = {"name": "n", "class_names": list("01234"), "names_shown": shown, "seed": 0}
    facts |= {"augmentation": {"flip": True, "shift": 0.02}, "balance": "none", "digest": "d"}
    facts |= {"synthetic": synthetic, "bayes_accuracy": None}
    return data.Dataset(manifest=table, images=np.stack(films)[..., None], **facts)


@pytest.fixture
def films():
    return [film(seed) for seed in range(60)]


PATIENTS = [str(9000 + k // 2) for k in range(60)]


def counts(found):
    return [check["found"] for check in found["checks"]]


def test_honest_data_are_not_accused(films):
    found, pairs = leaks.hunt(dataset(films, PATIENTS))
    assert not found["found"] and counts(found) == [0, 0, 0, 0, 0]
    assert "No leak was found" in found["verdict"] and pairs["distance"].is_monotonic_increasing
    assert pairs["distance"].min() > leaks.NEAR


def test_a_shared_patient_is_found(films):
    patients = [*PATIENTS[:59], PATIENTS[0]]
    assert counts(leaks.hunt(dataset(films, patients))[0]) == [1, 0, 0, 0, 0]


def test_the_same_pixels_are_found(films):
    films[55] = films[3]
    found, pairs = leaks.hunt(dataset(films, PATIENTS))
    assert (
        counts(found) == [0, 1, 1, 0, 0] and "no figure of this report counts" in found["verdict"]
    )
    assert pairs["test"][0] == "test/0/55.png" and pairs["other"][0] == "train/3/3.png"


@pytest.mark.parametrize("change", [as_jpeg, lambda x: (0.9 * x + 9).astype(np.uint8), np.fliplr])
def test_a_copy_saved_again_brightened_or_mirrored_is_found(films, change):
    films[52] = change(films[44])  # of val
    assert counts(leaks.hunt(dataset(films, PATIENTS))[0])[1:3] == [0, 1]


def test_a_pooled_folder_and_copies_within_train_are_found(films):
    films[1] = films[0]
    found, _ = leaks.hunt(dataset(films, PATIENTS, folder="auto_test"))
    assert counts(found)[3:] == [40, 1]


def test_only_real_knees_of_five_grades_are_suspected(films):
    real, drawn = dataset(films, PATIENTS), dataset(films, PATIENTS, synthetic=True)
    assert leaks.suspicious(0.761, real) and not leaks.suspicious(0.76, real)
    assert not leaks.suspicious(0.99, drawn)
    object.__setattr__(real, "names_shown", ["cat", "dog"])
    assert not leaks.suspicious(0.99, real)


def test_leaking_protocols_flatter_where_nothing_can_be_learned():
    """Features that tell the image and the patient but nothing of the class."""
    rng = np.random.default_rng(0)
    patients = np.repeat(np.arange(150), 2)
    labels = np.repeat(rng.choice(3, 150, p=[0.6, 0.3, 0.1]), 2)
    own = rng.normal(size=(150, 20))[patients] + 0.3 * rng.normal(size=(300, 20))
    features = own[:, None] + 0.1 * rng.normal(size=(300, 3, 20))
    table = {row["protocol"]: row for row in leaks.study(features, labels, patients, draws=200)}
    assert next(iter(table)) == "split by patient" and not table["split by patient"]["leaking"]
    assert table["split by patient"]["accuracy"] < 0.65 and table["split by patient"]["gap"] is None
    for row in table.values():
        if row["leaking"]:
            low, high = row["gap_ci95"]
            honest = table[row["counterpart"]]["accuracy"]
            assert row["gap"] == pytest.approx(row["accuracy"] - honest, abs=2e-6)
            assert 0.1 < low <= row["gap"] <= high, row["protocol"]
    told = leaks.study_sentences(list(table.values()))
    assert len(told) == 3 and all("points (" in text for text in told)
    drawn = leaks.plot_table(list(table.values()))
    assert np.isnan(drawn["gap"][0]) and drawn["gap"].notna().sum() == 3


def test_a_class_too_rare_for_the_folds_is_said():
    with pytest.raises(ValueError, match="raise LEAK_IMAGES"):
        leaks.study(np.zeros((10, 1, 2)), np.array([0] * 7 + [1] * 3), np.arange(10))


def test_the_study_takes_whole_patients_of_train_and_val_alone(films):
    found = dataset(films, PATIENTS)
    rows = leaks.study_sample(found, 20)
    assert 20 <= len(rows) <= 21 and rows.max() < 50
    chosen = found.manifest["patient"][rows]
    inside = found.manifest["patient"][:50].isin(chosen)
    assert inside.sum() == len(rows)
    assert len(leaks.study_sample(found, 1000)) == 50


def test_features_without_pretrained_weights_are_thumbnails_of_views(films):
    found = dataset(films, PATIENTS)
    pixels = np.stack(films[:6])[..., None]
    features = leaks.frozen_features(pixels, found, "MobileNetV3Small", "none")
    assert features.shape == (6, 3, 256) and features.dtype == np.float32
    np.testing.assert_allclose(features.mean(axis=2), 0, atol=1e-4)
    np.testing.assert_allclose(
        features[:, 0], leaks.thumbnails(pixels), atol=0.05
    )  # 8-bit rounding
    assert np.abs(features[:, 1] - features[:, 0]).max() > 0.1
