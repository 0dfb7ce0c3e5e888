"""Test-time views, openings of the test split, and predictions that anyone can compute with."""

import json

import keras
import numpy as np
import pandas as pd
import pytest

from utils import calibration, data, evaluation, metrics, runs, views

SIZE, CLASSES = 32, 5
TRAINED = {"flip": True, "rotation": 10.0, "shift": 0.1}


@pytest.fixture(scope="module")
def network():
    """A small network in which position matters, so that views differ."""
    keras.utils.set_random_seed(1)
    image = keras.Input((SIZE, SIZE, 1))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(4, 3, strides=4, activation="relu")(x)
    return keras.Model(image, keras.layers.Dense(CLASSES)(keras.layers.Flatten()(x)))


@pytest.fixture(scope="module")
def pixels():
    return np.random.default_rng(0).integers(0, 256, (13, SIZE, SIZE, 1), dtype=np.uint8)


def dataset(images=None, digest="d"):
    """Three patients in three splits, as notebook 01 would store them."""
    table = pd.DataFrame(
        {
            "image": [f"test/{k}/900{k}L.png" for k in range(3)] + ["train/0/9005L.png"],
            "split": ["test", "test", "val", "train"],
            "grade": [0, 1, 2, 0],
            "class": ["0", "1", "2", "0"],
            "patient": ["9000", "9001", "9002", "9005"],
        }
    )
    images = np.zeros((4, 8, 8, 1), np.uint8) if images is None else images
    shown = [f"KL {k}" for k in range(5)]
    facts = {"name": "n", "class_names": list("01234"), "names_shown": shown, "seed": 0}
    facts |= {"augmentation": {}, "balance": "none", "synthetic": False, "bayes_accuracy": None}
    return data.Dataset(manifest=table, images=images, digest=digest, **facts)


@pytest.mark.parametrize("count", [1, 2, 5, 7])
def test_one_pass_equals_predict_per_image_and_view(network, pixels, count):
    parameters = evaluation.test_time_parameters(count, TRAINED)
    expected = [
        [network.predict(views.augment(image[None], row[None]), verbose=0)[0] for row in parameters]
        for image in pixels
    ]
    options = {"augmentation": TRAINED, "batch_size": 10}
    found = evaluation.view_logits(network, pixels, count, **options)
    assert found.shape == (13, count, CLASSES) and found.dtype == np.float32
    np.testing.assert_allclose(found, expected, atol=1e-5)
    averaged = evaluation.predict_views(network, pixels, count, **options)
    np.testing.assert_allclose(averaged, np.mean(expected, axis=1), atol=1e-5)


def test_the_first_view_is_the_image_itself_and_the_second_its_mirror(pixels):
    parameters = evaluation.test_time_parameters(4, TRAINED)
    batch = pixels[:1].repeat(4, axis=0)
    seen = np.asarray(views.augment(batch, parameters))
    np.testing.assert_allclose(seen[0], pixels[0], atol=1e-3)
    inner = slice(3, -3)  # the mirror image is shifted by nothing but half of a training shift
    np.testing.assert_allclose(seen[1][:, ::-1][inner, inner], pixels[0][inner, inner], atol=1e-3)
    assert len(np.unique(parameters, axis=0)) == 4


def test_views_mirror_only_where_training_did():
    for flip in (True, False):
        parameters = evaluation.test_time_parameters(9, TRAINED | {"flip": flip})
        assert (parameters[:, 0] < 0).any() == flip
        assert np.abs(parameters[:, 2]).max() <= TRAINED["shift"] / 2 + 1e-6
        angles = np.rad2deg(np.arcsin(parameters[:, 3]))
        assert np.abs(angles).max() <= TRAINED["rotation"] / 2 + 1e-4


def test_no_view_is_refused():
    with pytest.raises(ValueError, match="at least one view"):
        evaluation.test_time_parameters(0)


def test_openings_only_ever_grow_and_tell_of_a_changed_model(tmp_path):
    folder, model = tmp_path / "report", tmp_path / "student.keras"
    model.write_bytes(b"one")
    first = evaluation.open_test(folder, {"student": model}, dataset(), decision="argmax")
    assert first["count"] == 1 and not first["changed_model"]
    assert "opened once" in evaluation.opening_sentence(first)
    again = evaluation.open_test(folder, {"student": model}, dataset(), decision="argmax")
    assert again["count"] == 2 and not again["changed_model"]
    assert "same models" in evaluation.opening_sentence(again)
    assert not again["changed_fixed"]
    other = evaluation.open_test(tmp_path / "b", {"student": model}, dataset(), views=1)
    same = evaluation.open_test(tmp_path / "b", {"student": model}, dataset(), views=1, coverage=1)
    assert not same["changed_fixed"]  # an older version told less
    other = evaluation.open_test(tmp_path / "b", {"student": model}, dataset(), views=4, coverage=1)
    assert other["changed_fixed"] and not other["changed_model"]
    assert "with other settings" in evaluation.opening_sentence(other)
    model.write_bytes(b"two")
    third = evaluation.open_test(folder, {"student": model}, dataset(), decision="argmax")
    assert third["count"] == 3 and third["changed_model"]
    assert "another model" in evaluation.opening_sentence(third)
    kept = json.loads((folder / evaluation.OPENINGS).read_text())
    assert [entry["after_changed_model"] for entry in kept] == [False, False, True]
    assert kept[0]["fixed"] == {"decision": "argmax"} and len(kept[0]["models"]["student"]) == 64
    assert evaluation.count_openings(folder) == 3


def test_openings_outlive_a_folder_that_is_set_aside(tmp_path):
    folder, model = tmp_path / "report", tmp_path / "student.keras"
    model.write_bytes(b"one")
    evaluation.open_test(folder, {"student": model}, dataset())
    (folder / "report.json").write_text("{}")
    runs.set_aside(folder)
    assert not (folder / "report.json").exists()
    assert evaluation.open_test(folder, {"student": model}, dataset())["count"] == 2


def test_a_damaged_record_of_openings_stops(tmp_path):
    (tmp_path / evaluation.OPENINGS).write_text("[")
    model = tmp_path / "student.keras"
    model.write_bytes(b"one")
    with pytest.raises(runs.StageError, match="damaged"):
        evaluation.open_test(tmp_path, {"student": model}, dataset())


def test_a_closed_test_split_is_said():
    assert "stays closed" in evaluation.opening_sentence(None)


def test_anyone_can_compute_the_figures_from_the_predictions(tmp_path):
    probabilities = calibration.softmax(np.random.default_rng(0).normal(size=(2, CLASSES)))
    arguments = ({"student": probabilities}, {"student": probabilities.argmax(axis=1)})
    table = evaluation.predictions_table(dataset(), "test", *arguments)
    path = evaluation.save_predictions(tmp_path / "predictions.csv", [table, table])
    read = pd.read_csv(path, dtype={"patient": str})
    assert list(read.columns[:5]) == ["image", "patient", "split", "truth", "student"]
    assert len(read) == 4 and set(read["split"]) == {"test"} and read["truth"][1] == 1
    columns = [f"student_p{k}" for k in range(CLASSES)]
    np.testing.assert_allclose(read[columns].to_numpy()[:2], probabilities, atol=1e-8)
    split = pd.read_csv(evaluation.save_split(tmp_path / "split.csv", dataset()))
    assert list(split["split"]) == ["test", "test", "val", "train"]


def test_images_are_resampled_only_where_no_patient_is_known():
    assert evaluation.known_patients(dataset(), {"patient_rule": 0.0}, "test") is None
    found = evaluation.known_patients(dataset(), {"patient_rule": 0.4}, "test")
    assert list(found) == ["9000", "9001"]


def test_whether_views_pay_is_a_paired_difference():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, CLASSES, 400)
    truth = 4 * metrics.one_hot(labels, CLASSES)[:, None]
    logits = truth + rng.normal(size=(400, 8, CLASSES)) * 3  # averaging eight views takes noise off
    fitted, drawn = calibration.fit(labels, logits[:, 0]), metrics.resample(400, draws=200)
    found = evaluation.views_pay(labels, logits, fitted, "argmax", drawn)
    assert found["averaged"] > found["single"] and found["passes_per_image"] == 8
    assert found["accuracy"]["ci95"][0] > 0 and "averaging 8 views gains" in found["sentence"]
    gap = found["averaged"] - found["single"]
    assert found["accuracy"]["difference"] == pytest.approx(gap, abs=2e-6)
