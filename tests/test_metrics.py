"""Figures and intervals against scikit-learn, and the intervals against a known truth."""

import warnings

import numpy as np
import pytest
from sklearn import metrics as sk

from tests import coverage_simulation
from utils import metrics

CLASSES = 5


@pytest.fixture(scope="module")
def graded():
    """Labels, probabilities with ties, and decisions of 300 images of 150 patients."""
    labels, probabilities, predictions, patients = coverage_simulation.knees(
        150, np.random.default_rng(3)
    )
    probabilities = np.round(probabilities, 2) + 1e-3
    probabilities /= probabilities.sum(axis=1, keepdims=True)
    return labels, probabilities, predictions, patients


def by_scikit_learn(labels, probabilities, predictions, weights, cut):
    """Every figure the slow way, with scikit-learn's own sample weights."""
    kept = weights > 0
    labels, predictions, weights = labels[kept], predictions[kept], weights[kept]
    probabilities, w = probabilities[kept], {"sample_weight": weights}
    kappa = {"labels": np.arange(CLASSES), **w}
    present = np.unique(labels)
    off = np.abs(labels - predictions)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        precision, recall, _, _ = sk.precision_recall_fscore_support(
            labels, predictions, labels=np.arange(CLASSES), zero_division=0, **w
        )
    found = {
        "accuracy": sk.accuracy_score(labels, predictions, **w),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, predictions, **w),
        "qwk": sk.cohen_kappa_score(labels, predictions, weights="quadratic", **kappa),
        "kappa": sk.cohen_kappa_score(labels, predictions, **kappa),
        "mae": sk.mean_absolute_error(labels, predictions, **w),
        "off_by_two": np.average(off >= 2, weights=weights),
        "macro_auroc": np.mean(
            [sk.roc_auc_score(labels == k, probabilities[:, k], **w) for k in present]
        ),
        "sensitivity": sk.recall_score(labels >= cut, predictions >= cut, **w),
        "specificity": sk.recall_score(labels < cut, predictions < cut, **w),
        "auroc": sk.roc_auc_score(labels >= cut, probabilities[:, cut:].sum(axis=1), **w),
        "brier": sum(
            np.average((probabilities[:, k] - (labels == k)) ** 2, weights=weights)
            for k in range(CLASSES)
        ),
    }
    absent = ~np.isin(np.arange(CLASSES), labels)
    uncalled = ~np.isin(np.arange(CLASSES), predictions)
    found["recall"] = np.where(absent, np.nan, recall)
    found["precision"] = np.where(uncalled, np.nan, precision)
    return found


def test_all_resamples_at_once_equal_scikit_learn_one_by_one(graded):
    *arrays, patients = graded
    drawn = metrics.resample(len(patients), patients, draws=25, seed=1)
    found = metrics.resampled(drawn.weights, *arrays, 2)
    for row, weights in enumerate(drawn.weights.astype(float)):
        for name, value in by_scikit_learn(*arrays, weights, 2).items():
            np.testing.assert_allclose(found[name][row], value, atol=1e-5, err_msg=name)


def test_weights_of_one_give_the_figures_themselves(graded):
    *arrays, _ = graded
    points = metrics.figures(*arrays, 2)
    ones = metrics.resampled(np.ones((1, len(arrays[0])), np.float32), *arrays, 2)
    assert set(points) == set(ones)
    for name, value in by_scikit_learn(*arrays, np.ones(len(arrays[0])), 2).items():
        np.testing.assert_allclose(points[name], value, atol=1e-6, err_msg=name)
        np.testing.assert_allclose(ones[name][0], value, atol=1e-5, err_msg=name)


def test_calibration_error_by_a_loop(graded):
    labels, probabilities, *_ = graded
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    expected = 0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            gap = abs(confidence[inside].mean() - right[inside].mean())
            expected += inside.mean() * gap
    ones = np.ones((1, len(labels)))
    assert metrics.resampled_ece(ones, labels, probabilities)[0] == pytest.approx(expected)


def test_a_class_without_images_is_undefined_and_becomes_null():
    labels, predictions = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 2, 0])
    probabilities = metrics.one_hot(predictions, 3) * 0.8 + 0.2 / 3
    drawn = metrics.resample(6, draws=200)
    summary = metrics.evaluate(labels, probabilities, predictions, drawn).summary()
    assert summary["recall"][2] is None and summary["recall_ci95"][2] == [None, None]
    assert summary["precision"][2] == 0 and summary["support"] == [3, 3, 0]
    assert summary["balanced_accuracy"] == pytest.approx(2 / 3, abs=1e-6)
    assert "binary" not in summary


def test_whole_patients_are_drawn():
    patients = np.array(["b", "a", "b", "c"])
    drawn = metrics.resample(4, patients, draws=500, seed=2)
    assert (drawn.unit, drawn.units) == ("patients", 3)
    np.testing.assert_array_equal(drawn.weights[:, 0], drawn.weights[:, 2])
    assert (drawn.weights[:, :2].sum(axis=1) + drawn.weights[:, 3] == 3).all()
    assert drawn.weights.mean() == pytest.approx(1, abs=0.1)
    again = metrics.resample(4, patients, draws=500, seed=2)
    np.testing.assert_array_equal(drawn.weights, again.weights)


def test_without_patients_images_are_drawn_and_it_says_so():
    drawn = metrics.resample(7, draws=50)
    assert (drawn.unit, drawn.units) == ("images", 7)
    assert (drawn.weights.sum(axis=1) == 7).all()


@pytest.mark.parametrize(("count", "patients"), [(0, None), (3, ["a", "b"])])
def test_patients_that_do_not_fit_are_refused(count, patients):
    with pytest.raises(ValueError, match="one patient for each image"):
        metrics.resample(count, patients)


def test_arrays_that_do_not_fit_are_refused(graded):
    labels, probabilities, predictions, _ = graded
    with pytest.raises(ValueError, match="differ in length"):
        metrics.evaluate(labels[1:], probabilities, predictions, metrics.resample(300, draws=100))


def test_a_paired_difference_is_surer_than_two_intervals(graded):
    labels, probabilities, predictions, patients = graded
    other = predictions.copy()
    other[:15] = (other[:15] + 1) % CLASSES
    drawn = metrics.resample(len(labels), patients, draws=1000)
    first = metrics.evaluate(labels, probabilities, predictions, drawn)
    second = metrics.evaluate(labels, probabilities, other, drawn)
    found = metrics.difference(first, second, "accuracy")
    gap = np.mean(other == labels) - np.mean(predictions == labels)
    assert found["difference"] == pytest.approx(gap, abs=1e-6)
    low, high = found["ci95"]
    assert low <= gap <= high
    width = np.ptp(metrics.interval(first.samples["accuracy"]))
    assert high - low < width
    elsewhere = metrics.evaluate(
        labels, probabilities, other, metrics.resample(len(labels), draws=100)
    )
    with pytest.raises(ValueError, match="same resamples"):
        metrics.difference(first, elsewhere)


@pytest.mark.parametrize(
    ("figure", "difference", "ci95", "text"),
    [
        ("accuracy", -0.012, [-0.023, -0.001], "A gives up 1.2 points (0.1 to 2.3) of accuracy"),
        ("accuracy", 0.004, [-0.003, 0.011], "A gains 0.4 points (-0.3 to 1.1) of accuracy"),
        ("mae", 0.05, [0.02, 0.08], "A adds 0.050 (0.020 to 0.080) of mean absolute error"),
        ("mae", -0.05, [-0.08, -0.02], "A takes off 0.050 (0.020 to 0.080) of mean absolute"),
        ("qwk", -0.02, [-0.04, -0.01], "A gives up 0.020 (0.010 to 0.040) of quadratic weighted"),
    ],
)
def test_a_difference_in_words(figure, difference, ci95, text):
    found = {"figure": figure, "difference": difference, "ci95": ci95}
    words = metrics.sentence(found, "A", "B")
    assert words.startswith(text) and "against B" in words
    assert ("holds zero" in words) == (ci95[0] <= 0 <= ci95[1])


def test_intervals_hold_the_truth_over_patients_and_less_often_over_images():
    """A short run of the simulation; 2,000 trials by hand gave the figures in its docstring."""
    found = coverage_simulation.coverage(trials=120, patients=120, draws=200)
    plain = ("accuracy", "qwk", "kappa", "mae", "off_by_two", "auroc", "brier")
    over_patients = np.mean([found["patients"][name] for name in plain])
    over_images = np.mean([found["images"][name] for name in plain])
    assert 0.91 <= over_patients <= 0.985
    assert over_images < over_patients - 0.02


def test_the_calibration_errors_interval_holds_its_figure_where_plain_percentiles_do_not():
    rng = np.random.default_rng(0)
    probabilities = rng.dirichlet(np.ones(CLASSES) * 0.8, 800)
    labels = np.array([rng.choice(CLASSES, p=p) for p in probabilities])  # calibrated by making
    weights = metrics.resample(800, draws=300).weights
    figure = metrics.resampled_ece(np.ones((1, 800)), labels, probabilities)[0]
    plain = metrics.interval(metrics.resampled_ece(weights, labels, probabilities))
    assert plain[0] > figure  # noise adds to every gap
    low, high = metrics.interval(metrics.ece_draws(weights, labels, probabilities))
    assert 0 <= low < figure < high < plain[1]
