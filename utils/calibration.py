"""Probabilities that mean what they say, decisions made from them, and when to ask a person.

Everything here is fitted on val alone, before test is opened: the temperature (Guo et al. 2017,
https://arxiv.org/abs/1706.04599), the thresholds that serve quadratic weighted kappa, and the
confidence under which an image goes to a reader.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import optimize, special
from sklearn.metrics import log_loss

from utils import metrics

RULES = ("argmax", "qwk")
COVERAGES = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5)
# Bounds of the temperature: a model outside them is broken, not over-confident.
LOWEST, HIGHEST = 0.05, 20.0


def softmax(logits, temperature: float = 1.0) -> np.ndarray:
    """Probabilities, float64 (n, K), of logits (n, K) divided by a temperature."""
    return special.softmax(np.asarray(logits, np.float64) / temperature, axis=-1)


@dataclass(frozen=True)
class Calibration:
    """What val taught about one model's logits.

    Attributes:
        temperature: logits are divided by it before softmax; above 1 the model was too sure.
        thresholds: (K - 1,) rising cuts of the expected class index, for the rule "qwk".
        refer_below: confidence under which an image goes to a person.
        coverage: the share of val that stays with the model at that confidence.
    """

    temperature: float
    thresholds: tuple[float, ...]
    refer_below: float
    coverage: float

    def probabilities(self, logits) -> np.ndarray:
        """Calibrated probabilities: float64 (n, K)."""
        return softmax(logits, self.temperature)

    def decide(self, probabilities, rule: str = "argmax") -> np.ndarray:
        """Classes, int64 (n,): the most probable one, or the expected one cut at the thresholds.

        Raises:
            ValueError: a rule that is neither "argmax" nor "qwk".
        """
        if rule not in RULES:
            raise ValueError(f"The decision rule is {rule!r}, not one of {RULES}: see DECISION.")
        if rule == "argmax":
            return np.asarray(probabilities).argmax(axis=1)
        return np.searchsorted(self.thresholds, expected_class(probabilities), side="right")


def expected_class(probabilities) -> np.ndarray:
    """Mean class index under each row of probabilities: float64 (n,), from 0 to K - 1."""
    return np.asarray(probabilities) @ np.arange(np.shape(probabilities)[1])


def fit(labels, logits, coverage: float = 0.8) -> Calibration:
    """Fit all three on val: labels int (n,), logits float (n, K).

    Args:
        coverage: share of val that the model keeps; the least sure rest would go to a person.
    """
    temperature = fit_temperature(labels, logits)
    probabilities = softmax(logits, temperature)
    refer_below = float(np.quantile(probabilities.max(axis=1), 1 - coverage, method="lower"))
    return Calibration(temperature, fit_thresholds(labels, probabilities), refer_below, coverage)


def fit_temperature(labels, logits) -> float:
    """The temperature, 0.05 to 20, that gives these labels the smallest mean log loss."""
    logits, rows = np.asarray(logits, np.float64), np.arange(len(labels))

    def loss(log_temperature):
        scaled = logits / np.exp(log_temperature)
        return np.mean(special.logsumexp(scaled, axis=1) - scaled[rows, labels])

    bounds = (np.log(LOWEST), np.log(HIGHEST))
    found = optimize.minimize_scalar(loss, bounds=bounds, method="bounded")
    return float(np.exp(found.x))


def fit_thresholds(labels, probabilities, sweeps: int = 10) -> tuple[float, ...]:
    """Cuts of the expected class index that give the largest quadratic weighted kappa.

    One cut after another moves to its best place between its neighbours, on a grid of 0.02, until
    none moves. The grid is coarse on purpose: finer cuts would fit val's accidents.
    """
    labels, expected = np.asarray(labels), expected_class(probabilities)
    classes = np.shape(probabilities)[1]
    cuts = np.arange(classes - 1) + 0.5
    for _ in range(sweeps):
        before = cuts.copy()
        for k in range(len(cuts)):
            low = cuts[k - 1] if k else 0.0
            high = cuts[k + 1] if k + 1 < len(cuts) else classes - 1.0
            tried = np.append(np.arange(low + 0.02, high, 0.02), cuts[k])
            cuts[k] = best_cut(labels, expected, cuts, k, tried)
        if np.array_equal(cuts, before):
            break
    return tuple(float(round(cut, 6)) for cut in cuts)


def best_cut(labels, expected, cuts, k: int, tried) -> float:
    """Which of `tried` as the k-th cut gives the largest kappa; among equals the nearest to now."""
    classes = len(cuts) + 1
    fixed = np.searchsorted(np.delete(cuts, k), expected, side="right")
    decisions = fixed + (expected >= np.asarray(tried)[:, None])
    cells = labels * classes + decisions + classes**2 * np.arange(len(tried))[:, None]
    counts = np.bincount(cells.ravel(), minlength=len(tried) * classes**2)
    confusion = counts.reshape(-1, classes, classes).astype(float)
    cost = np.subtract.outer(np.arange(classes), np.arange(classes)) ** 2
    chance = np.einsum("ri,rj->rij", confusion.sum(axis=2), confusion.sum(axis=1)) / len(labels)
    with np.errstate(invalid="ignore", divide="ignore"):
        ratio = (cost * confusion).sum((1, 2)) / (cost * chance).sum((1, 2))
    kappa = np.nan_to_num(1 - ratio, nan=-1.0)
    best = np.flatnonzero(kappa >= kappa.max() - 1e-12)
    return float(tried[best[np.argmin(np.abs(tried[best] - cuts[k]))]])


def quality(labels, probabilities, drawn: metrics.Resamples) -> dict:
    """How honest the probabilities are: `ece`, `brier` (0 to 2) with `_ci95`, and `log_loss`."""
    probabilities = np.asarray(probabilities, np.float64)
    classes = probabilities.shape[1]
    error = np.sum((probabilities - metrics.one_hot(labels, classes)) ** 2, axis=1)
    weights = drawn.point_first
    ece = metrics.resampled_ece(weights[:1], labels, probabilities)
    ece = np.append(ece, metrics.ece_draws(weights[1:], labels, probabilities))
    found = {"log_loss": float(log_loss(labels, probabilities, labels=np.arange(classes)))}
    brier = weights @ error / weights.sum(axis=1)
    return found | metrics.told("ece", ece) | metrics.told("brier", brier)


def reliability(labels, probabilities, bins: int = metrics.BINS) -> pd.DataFrame:
    """Reliability diagram: a row for each bin of confidence that is not empty.

    Columns: `low`, `high` (the bin), `confidence` and `accuracy` (means in it), `count`.
    """
    confidence = np.max(probabilities, axis=1)
    right = np.argmax(probabilities, axis=1) == labels
    place = np.clip(np.ceil(confidence * bins).astype(int) - 1, 0, bins - 1)
    table = pd.DataFrame({"bin": place, "confidence": confidence, "accuracy": right})
    table = table.groupby("bin").agg(
        confidence=("confidence", "mean"), accuracy=("accuracy", "mean"), count=("bin", "size")
    )
    table.insert(0, "low", table.index / bins)
    table.insert(1, "high", (table.index + 1) / bins)
    return table.reset_index(drop=True)


def selective_curve(labels, probabilities, predictions) -> tuple[np.ndarray, np.ndarray]:
    """Accuracy of the surest 1, 2, ... n images: (coverage (n,), accuracy (n,)), both 0 to 1."""
    order = np.argsort(-np.max(probabilities, axis=1), kind="stable")
    right = (np.asarray(predictions) == labels)[order]
    kept = np.arange(1, len(right) + 1)
    return kept / len(right), np.cumsum(right) / kept


def selective(labels, probabilities, predictions, drawn: metrics.Resamples) -> list[dict]:
    """Accuracy when the least sure images go to a reader, at each of `COVERAGES`.

    Returns:
        Dicts {coverage, images, accuracy, accuracy_ci95}; the most confident images are kept.
    """
    order = np.argsort(-np.max(probabilities, axis=1), kind="stable")
    right = (np.asarray(predictions) == labels)[order]
    weights = drawn.point_first[:, order]
    kept = np.cumsum(weights, axis=1)
    hits = np.cumsum(weights * right, axis=1)
    rows, table = np.arange(len(weights)), []
    for coverage in COVERAGES:
        last = np.argmax(kept >= coverage * kept[:, -1:] - 1e-6, axis=1)
        accuracy = hits[rows, last] / kept[rows, last]
        table.append(
            {
                "coverage": coverage,
                "images": int(kept[0, last[0]]),
                **metrics.told("accuracy", accuracy),
            }
        )
    return table


def referred(labels, probabilities, predictions, refer_below: float, drawn) -> dict:
    """What the threshold that val set does here: {refer_below, coverage, accuracy} with `_ci95`."""
    kept = np.max(probabilities, axis=1) >= refer_below
    right = kept & (np.asarray(predictions) == labels)
    weights = drawn.point_first
    with np.errstate(invalid="ignore"):
        coverage = weights @ kept / weights.sum(axis=1)
        accuracy = (weights @ right) / (weights @ kept)
    found = {"refer_below": metrics.plain(refer_below)}
    return found | metrics.told("coverage", coverage) | metrics.told("accuracy", accuracy)
