"""Figures and draws against scikit-learn, and the intervals against a known truth."""

import json
import time

import numpy as np
import pytest
from scipy import special
from sklearn import metrics as sk

from utils import metrics

CLASSES, CUTS = 5, [-0.2, 0.3, 1.1, 1.9]  # grades about as frequent as in the OAI


def knees(patients: int, rng: np.random.Generator):
    """Both knees of simulated patients, alike in severity and in how hard they are to read."""
    severity = rng.normal(size=(patients, 1)) * 0.85 + rng.normal(size=(patients, 2)) * 0.55
    misread = rng.normal(size=(patients, 1)) * 0.6 + rng.normal(size=(patients, 2)) * 0.1
    labels = np.searchsorted(CUTS, severity.ravel())
    middles = np.array([-0.9, 0.05, 0.7, 1.5, 2.4])
    logits = -2 * ((severity + misread).ravel()[:, None] - middles) ** 2
    return labels, special.softmax(logits, axis=1), np.repeat(np.arange(patients), 2)


@pytest.fixture(scope="module")
def graded():
    labels, probabilities, patients = knees(120, np.random.default_rng(3))
    probabilities = np.round(probabilities, 2) + 1e-3  # ties
    return labels, probabilities / probabilities.sum(axis=1, keepdims=True), patients


def by_scikit_learn(labels, probabilities, weights, cut):
    kept = weights > 0
    labels, probabilities, w = labels[kept], probabilities[kept], weights[kept]
    said, every = probabilities.argmax(axis=1), {"sample_weight": w}
    areas = [sk.roc_auc_score(labels == k, probabilities[:, k], **every) for k in np.unique(labels)]
    kappa = {"labels": range(CLASSES), "weights": "quadratic"}
    squares = ((probabilities - np.eye(CLASSES)[labels]) ** 2).sum(axis=1)
    return {
        "accuracy": sk.accuracy_score(labels, said, **every),
        "balanced_accuracy": sk.balanced_accuracy_score(labels, said, **every),
        "macro_f1": sk.f1_score(labels, said, average="macro", **every),
        "qwk": sk.cohen_kappa_score(labels, said, **kappa, **every),
        "mae": sk.mean_absolute_error(labels, said, **every),
        "off_by_two": np.average(np.abs(labels - said) >= 2, weights=w),
        "macro_auroc": np.mean(areas),
        "brier": np.average(squares, weights=w),
        "sensitivity": sk.recall_score(labels >= cut, said >= cut, **every),
        "specificity": sk.recall_score(labels < cut, said < cut, **every),
    }


@pytest.mark.filterwarnings("ignore")
def test_figures_of_all_draws_equal_scikit_learn(graded):
    labels, probabilities, patients = graded
    drawn = metrics.Bootstrap(patients, draws=15, seed=1)
    found = metrics.figures(labels, probabilities, cut=2, weights=drawn.weights)
    point = metrics.figures(labels, probabilities, cut=2)
    for row, weights in enumerate([np.ones(len(labels)), *drawn.weights.astype(float)]):
        for name, wanted in by_scikit_learn(labels, probabilities, weights, 2).items():
            value = point[name] if row == 0 else found[name][row - 1]
            np.testing.assert_allclose(value, wanted, atol=1e-5, err_msg=name)
    recall = sk.recall_score(labels, probabilities.argmax(axis=1), average=None)
    np.testing.assert_allclose(point["recall"], recall, atol=1e-6)
    unordered = metrics.figures(labels, probabilities, ordered=False)
    assert point.keys() - unordered == {"qwk", "mae", "off_by_two", "sensitivity", "specificity"}


def test_ece_has_no_interval_and_equals_a_loop(graded):
    labels, probabilities, patients = graded
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    wanted = 0
    for k in range(15):
        inside = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if inside.any():
            wanted += inside.mean() * abs(confidence[inside].mean() - right[inside].mean())
    found = metrics.Evaluation(labels, probabilities, metrics.Bootstrap(patients, 100))
    assert found.figures["ece"] == pytest.approx(wanted)
    assert "ece" not in found.samples
    assert metrics.reliability(labels, probabilities)["count"].sum() == len(labels)


def test_a_class_without_images_is_null_and_the_summary_is_json():
    labels, said = np.array([0, 0, 1, 1, 1, 0]), np.array([0, 1, 1, 1, 2, 0])
    probabilities = np.eye(3)[said] * 0.8 + 0.2 / 3
    evaluation = metrics.Evaluation(labels, probabilities, metrics.Bootstrap(range(6), 200), cut=2)
    found = json.loads(json.dumps(evaluation.summary(), allow_nan=False))
    assert found["recall"][2] is None and found["ci95"]["recall"][2] == [None, None]
    assert found["sensitivity"] is None and found["ci95"]["sensitivity"] == [None, None]
    assert found["confusion"][1] == [0, 2, 1]
    assert found["ci95"]["accuracy"][0] < found["accuracy"] < found["ci95"]["accuracy"][1]


def test_a_paired_difference_is_surer_than_two_intervals(graded):
    labels, probabilities, patients = graded
    other = probabilities.copy()
    other[:15] = np.roll(other[:15], 1, axis=1)
    drawn = metrics.Bootstrap(patients, 500)
    first, second = (metrics.Evaluation(labels, p, drawn) for p in (probabilities, other))
    found = metrics.difference(second, first)
    gap = second.figures["accuracy"] - first.figures["accuracy"]
    low, high = found["ci95"]
    assert found["difference"] == pytest.approx(gap, abs=1e-6) and low <= gap <= high
    assert high - low < np.ptp(metrics.interval(first.samples["accuracy"]))
    elsewhere = metrics.Evaluation(labels, other, metrics.Bootstrap(patients, 100))
    with pytest.raises(ValueError, match="same draws"):
        metrics.difference(first, elsewhere)


def test_the_temperature_is_found_another_way():
    rng = np.random.default_rng(5)
    true_logits = rng.normal(size=(4000, 4)) * 1.5
    shares = special.softmax(true_logits, axis=1).cumsum(axis=1)
    labels = (shares > rng.random((4000, 1))).argmax(axis=1)
    found = metrics.temperature(2 * true_logits, labels)
    tried = np.linspace(1.5, 2.5, 500)
    rows = np.arange(4000)
    logs = [special.log_softmax(2 * true_logits / t, axis=1)[rows, labels].mean() for t in tried]
    assert found == pytest.approx(tried[np.argmax(logs)], abs=0.003)
    assert found == pytest.approx(2, rel=0.08)


def test_two_hundred_classes_do_not_stall():
    rng, started = np.random.default_rng(0), time.process_time()
    labels, probabilities = rng.integers(200, size=600), rng.dirichlet(np.ones(200), 600)
    found = metrics.Evaluation(labels, probabilities, metrics.Bootstrap(range(600), 500)).summary()
    assert found["ci95"]["macro_auroc"][0] < found["macro_auroc"]
    assert time.process_time() - started < 10


@pytest.mark.slow
def test_intervals_over_patients_hold_the_truth_and_over_images_do_not():
    """300 trials of 120 patients: about 95 % hold the truth, fewer where knees count as strangers.

    So does the paired difference, zero, of two models with the same error rate.
    """
    names = ("accuracy", "qwk", "mae", "off_by_two", "brier", "sensitivity")
    labels, probabilities, _ = knees(400_000, np.random.default_rng(12345))
    truth = metrics.figures(labels, probabilities, cut=2)
    held = {"patients": [], "images": [], "differences": []}
    for trial in range(300):
        labels, probabilities, patients = knees(120, np.random.default_rng([0, trial]))
        for unit, who in (("patients", patients), ("images", np.arange(240))):
            drawn = metrics.Bootstrap(who, 300, seed=trial)
            found = metrics.figures(labels, probabilities, cut=2, weights=drawn.weights)
            for name in names:
                low, high = metrics.interval(found[name])
                held[unit].append(low <= truth[name] <= high)
        rng, drawn = np.random.default_rng([2, trial]), metrics.Bootstrap(patients, 300, seed=trial)
        models = [np.where(rng.random((240, 1)) < 0.2, 1 / CLASSES, probabilities) for _ in "ab"]
        noisy = [m + rng.random(m.shape) * 1e-6 for m in models]  # ties fall at random
        low, high = metrics.difference(*(metrics.Evaluation(labels, m, drawn) for m in noisy))[
            "ci95"
        ]
        held["differences"].append(low <= 0 <= high)
    assert 0.92 <= np.mean(held["patients"]) <= 0.975
    assert np.mean(held["images"]) < np.mean(held["patients"]) - 0.02
    assert 0.92 <= np.mean(held["differences"]) <= 0.99
