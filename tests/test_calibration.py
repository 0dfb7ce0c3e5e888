"""Calibration, decision rules and referral against SciPy, scikit-learn and plain loops."""

import numpy as np
import pytest
from scipy import optimize
from scipy.special import log_softmax
from sklearn.metrics import cohen_kappa_score, log_loss

from utils import calibration, metrics


@pytest.fixture(scope="module")
def val():
    """Labels drawn from known probabilities, and logits that are twice too large."""
    rng = np.random.default_rng(5)
    true_logits = rng.normal(size=(4000, 4)) * 1.5
    probabilities = calibration.softmax(true_logits)
    labels = (probabilities.cumsum(axis=1) > rng.random((4000, 1))).argmax(axis=1)
    return labels, 2 * true_logits


def test_the_temperature_is_the_one_that_scipy_finds_another_way(val):
    labels, logits = val
    found = calibration.fit_temperature(labels, logits)
    loss = lambda t: -log_softmax(logits / t[0], axis=1)[np.arange(len(labels)), labels].mean()  # noqa: E731
    other = optimize.minimize(loss, [1.0], method="Nelder-Mead", options={"xatol": 1e-6}).x[0]
    assert found == pytest.approx(other, rel=1e-3)
    assert found == pytest.approx(2, rel=0.08)


def test_temperature_scaling_repairs_calibration_and_changes_no_argmax(val):
    labels, logits = val
    fitted = calibration.fit(labels, logits)
    before, after = calibration.softmax(logits), fitted.probabilities(logits)
    drawn = metrics.resample(len(labels), draws=100)
    worse = calibration.quality(labels, before, drawn)
    better = calibration.quality(labels, after, drawn)
    for name in ("ece", "brier", "log_loss"):
        assert better[name] < worse[name]
    assert better["ece"] < 0.03 < 0.05 < worse["ece"]
    assert better["log_loss"] == pytest.approx(log_loss(labels, after))
    np.testing.assert_array_equal(before.argmax(axis=1), after.argmax(axis=1))


def test_thresholds_serve_kappa_at_least_as_well_as_argmax_and_rounding():
    rng = np.random.default_rng(0)
    labels = rng.choice(5, 600, p=[0.4, 0.18, 0.26, 0.13, 0.03])
    seen = labels + rng.normal(0, 0.8, 600)
    fitted = calibration.fit(labels, -2 * (seen[:, None] - np.arange(5)) ** 2)
    probabilities = fitted.probabilities(-2 * (seen[:, None] - np.arange(5)) ** 2)
    expected = probabilities @ np.arange(5)

    def kappa(decided):
        return cohen_kappa_score(labels, decided, weights="quadratic")

    decided = fitted.decide(probabilities, "qwk")
    by_loop = [sum(value >= cut for cut in fitted.thresholds) for value in expected]
    np.testing.assert_array_equal(decided, by_loop)
    assert kappa(decided) >= kappa(np.floor(expected + 0.5).astype(int))
    assert kappa(decided) > kappa(fitted.decide(probabilities, "argmax"))
    assert list(fitted.thresholds) == sorted(fitted.thresholds)
    # No single cut can be moved on the grid to a better place.
    for k, cut in enumerate(fitted.thresholds):
        for moved in (cut - 0.02, cut + 0.02):
            cuts = np.array(fitted.thresholds)
            cuts[k] = moved
            assert kappa(np.searchsorted(cuts, expected, side="right")) <= kappa(decided) + 1e-12


def test_an_unknown_rule_is_refused(val):
    labels, logits = val
    fitted = calibration.fit(labels, logits)
    with pytest.raises(ValueError, match="'median'"):
        fitted.decide(fitted.probabilities(logits), "median")


def test_reliability_bins_by_a_loop(val):
    labels, logits = val
    probabilities = calibration.softmax(logits)
    table = calibration.reliability(labels, probabilities, bins=10)
    confidence, right = probabilities.max(axis=1), probabilities.argmax(axis=1) == labels
    assert table["count"].sum() == len(labels)
    for row in table.itertuples():
        inside = (confidence > row.low) & (confidence <= row.high)
        assert row.count == inside.sum() and row.accuracy == pytest.approx(right[inside].mean())
    ece = (table["count"] * (table["confidence"] - table["accuracy"]).abs()).sum() / len(labels)
    ones = np.ones((1, len(labels)))
    assert ece == pytest.approx(metrics.resampled_ece(ones, labels, probabilities, 10)[0])


def test_the_surest_are_graded_better(val):
    labels, logits = val
    probabilities = calibration.softmax(logits, 2)
    decided = probabilities.argmax(axis=1)
    share, accuracy = calibration.selective_curve(labels, probabilities, decided)
    assert share[-1] == 1 and accuracy[-1] == pytest.approx(np.mean(decided == labels))
    drawn = metrics.resample(len(labels), draws=100)
    table = calibration.selective(labels, probabilities, decided, drawn)
    assert [row["coverage"] for row in table] == list(calibration.COVERAGES)
    for row in table:
        kept = np.argsort(-probabilities.max(axis=1), kind="stable")[: row["images"]]
        assert row["accuracy"] == pytest.approx(np.mean((decided == labels)[kept]), abs=1e-6)
        low, high = row["accuracy_ci95"]
        assert low <= row["accuracy"] <= high
    assert table[-1]["accuracy"] > table[0]["accuracy"] + 0.1


def test_what_val_refers_is_referred_at_about_that_rate(val):
    labels, logits = val
    fitted = calibration.fit(labels[:2000], logits[:2000], coverage=0.7)
    probabilities = fitted.probabilities(logits[2000:])
    decided, drawn = probabilities.argmax(axis=1), metrics.resample(2000, draws=100)
    found = calibration.referred(labels[2000:], probabilities, decided, fitted.refer_below, drawn)
    assert found["coverage"] == pytest.approx(0.7, abs=0.04)
    assert found["accuracy"] > np.mean(decided == labels[2000:])
