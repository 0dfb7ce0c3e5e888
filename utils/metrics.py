"""How good a grader is, and how sure that is.

The two knees of a patient are alike, so the bootstrap draws whole patients (Field & Welsh 2007, the
cluster bootstrap). A draw is a row of weights, how often each image was drawn, so all draws are
computed at once. Intervals cover patients; they do not cover what another training would give.
"""

import functools

import numpy as np
import pandas as pd
from scipy import optimize, special
from sklearn.metrics import confusion_matrix

TITLES = {
    "accuracy": "accuracy", "balanced_accuracy": "balanced accuracy", "qwk": "QWK",
    "macro_f1": "macro F1", "macro_auroc": "macro AUROC", "sensitivity": "sensitivity",
    "specificity": "specificity", "mae": "mean error in grades",
    "off_by_two": "off by two grades or more", "brier": "Brier score",
    "ece": "calibration error (ECE)",
}  # fmt: skip


class Bootstrap:
    """Patients (n,) drawn with replacement, each with all of their images.

    `weights`, float32 (draws, n), says how often each image was drawn; `patients` counts them.
    """

    def __init__(self, patients, draws: int = 2000, seed: int = 0):
        names, patient = np.unique(np.asarray(patients), return_inverse=True)
        self.patients = len(names)
        drawn = np.random.default_rng(seed).integers(len(names), size=(draws, len(names)))
        times = np.stack([np.bincount(row, minlength=len(names)) for row in drawn])
        self.weights = times[:, patient].astype(np.float32)

    def mean(self, values) -> np.ndarray:
        """Mean over the images of values (n,) or (n, K) in every draw: float64 (draws[, K])."""
        return _mean(np.asarray(values), self.weights)


def interval(samples) -> list[float | None]:
    """95 % percentile interval [low, high] of draws (R,), leaving NaN out; [None, None] of none."""
    return _values(pd.Series(samples, dtype=float).quantile([0.025, 0.975]))


@np.errstate(invalid="ignore", divide="ignore")
def figures(labels, probabilities, ordered=True, cut: int | None = None, weights=None) -> dict:
    """Every figure of one model on one split, or on many draws of it at once.

    labels: int (n,) true classes.
    probabilities: float (n, K), rows sum to 1; the most probable class is the decision.
    ordered: whether classes have an order: else no `qwk`, `mae` and `off_by_two`.
    cut: first class of the positive side of `sensitivity` and `specificity`; None: neither.
    weights: float32 (R, n) of `Bootstrap`; None for the split as it is.

    Returns:
        Names to a float, or (R,) with weights; `recall` to (K,) or (R, K). As in scikit-learn; NaN
        where undefined; `mae` in grades, `brier` summed over the classes (0 to 2). `ece` comes
        without weights only: draws are noisier, so they look worse calibrated.
    """
    labels, probabilities = np.asarray(labels), np.asarray(probabilities, np.float64)
    predictions, classes = probabilities.argmax(axis=1), probabilities.shape[1]
    truth, called = np.eye(classes)[labels], np.eye(classes)[predictions]
    drawn = np.ones((1, len(labels)), np.float32) if weights is None else weights
    mean = functools.partial(_mean, weights=drawn)
    hits = mean(truth * called)
    recall, f1 = hits / mean(truth), 2 * hits / (mean(truth) + mean(called))
    areas = [auroc(labels == k, probabilities[:, k], drawn) for k in range(classes)]
    found = {"balanced_accuracy": recall, "macro_f1": f1, "macro_auroc": np.transpose(areas)}
    found = {name: pd.DataFrame(of).mean(axis=1).to_numpy() for name, of in found.items()}
    found |= {"accuracy": hits.sum(axis=1), "recall": recall}
    found["brier"] = mean(((probabilities - truth) ** 2).sum(axis=1))
    if ordered:
        off = np.abs(labels - predictions)
        found |= {"mae": mean(off), "off_by_two": mean(off >= 2)}
        found["qwk"] = qwk(labels, predictions, drawn)
    if cut is not None:
        positive, said = labels >= cut, predictions >= cut
        found["sensitivity"] = mean(positive & said) / mean(positive)
        found["specificity"] = mean(~positive & ~said) / mean(~positive)
    if weights is not None:
        return found
    bins = reliability(labels, probabilities)
    gaps = (bins["accuracy"] - bins["confidence"]).abs() * bins["count"]
    found = {n: v[0] if v.ndim > 1 else float(v[0]) for n, v in found.items()}
    return found | {"ece": float(gaps.sum() / len(labels))}


@np.errstate(invalid="ignore", divide="ignore")
def qwk(labels, predictions, weights) -> np.ndarray:
    """Quadratic weighted kappa (Cohen 1968) for weights (R, n): (R,), NaN where undefined.

    1 - E[(t - p)^2] / (E[t^2] + E[p^2] - 2 E[t] E[p]), which is the distance of independent t, p.
    """
    t, p = np.asarray(labels, np.float64), np.asarray(predictions, np.float64)
    moments = _mean(np.stack([(t - p) ** 2, t**2 + p**2, t, p], axis=1), weights).T
    return 1 - moments[0] / (moments[1] - 2 * moments[2] * moments[3])


def auroc(positive, score, weights) -> np.ndarray:
    """Area under the ROC curve for weights (R, n): (R,), NaN where a side is missing.

    The probability that a positive scores above a negative; ties count half.
    """
    lower = np.flatnonzero(~positive)[np.argsort(score[~positive])]
    down = np.cumsum(weights[:, lower], axis=1, dtype=np.float64)
    down, up = np.pad(down, ((0, 0), (1, 0))), weights[:, positive]
    below, upto = (np.searchsorted(score[lower], score[positive], s) for s in ("left", "right"))
    beaten = (up * (down[:, below] + down[:, upto]) / 2).sum(axis=1)
    return beaten / (up.sum(axis=1, dtype=np.float64) * down[:, -1])


def reliability(labels, probabilities, bins: int = 15) -> pd.DataFrame:
    """Reliability diagram (Guo et al. 2017): a row for each bin of confidence that is not empty.

    Columns `confidence` and `accuracy` (means in the bin, 0 to 1) and `count`.
    """
    confidence, right = np.max(probabilities, axis=1), np.argmax(probabilities, axis=1) == labels
    place = np.clip(np.ceil(confidence * bins) - 1, 0, bins - 1)
    table = pd.DataFrame({"confidence": confidence, "accuracy": right.astype(float)})
    groups = table.groupby(place)
    return groups.mean().assign(count=groups.size()).reset_index(drop=True)


def temperature(logits, labels) -> float:
    """What to divide logits (n, K) by for the least log loss, 0.05 to 20.

    Guo et al., "On calibration of modern neural networks", https://arxiv.org/abs/1706.04599.
    """
    logits, rows = np.asarray(logits, np.float64), np.arange(len(labels))

    def loss(t):
        return -special.log_softmax(logits / t, axis=1)[rows, labels].mean()

    return float(optimize.minimize_scalar(loss, bounds=(0.05, 20), method="bounded").x)


class Evaluation:
    """One model on one split: `figures`, `samples` (on all draws), `confusion` (truth down)."""

    def __init__(self, labels, probabilities, bootstrap, ordered=True, cut=None):
        arguments = (labels, probabilities, ordered, cut)
        self.bootstrap, self.figures = bootstrap, figures(*arguments)
        self.samples = figures(*arguments, weights=bootstrap.weights)
        said, classes = np.argmax(probabilities, axis=1), np.shape(probabilities)[1]
        self.confusion = confusion_matrix(labels, said, labels=range(classes))

    def summary(self) -> dict:
        """Values for JSON, None where undefined: figures by name, `ci95` (name to [low, high]),
        `recall` (a list, one entry a class) and `confusion`."""
        ends = {n: interval(s) for n, s in self.samples.items() if s.ndim == 1}
        ends["recall"] = [interval(column) for column in self.samples["recall"].T]
        found = {n: _values(v) for n, v in self.figures.items()} | {"ci95": ends}
        return found | {"confusion": self.confusion.tolist()}


def difference(first: Evaluation, second: Evaluation, figure: str = "accuracy") -> dict:
    """`first` minus `second`: `{figure, difference, ci95}`; ValueError unless on the same draws."""
    if first.bootstrap is not second.bootstrap:
        raise ValueError("A paired difference needs both models on the same draws.")
    gap = _values(first.figures[figure] - second.figures[figure])
    ends = interval(first.samples[figure] - second.samples[figure])
    return {"figure": figure, "difference": gap, "ci95": ends}


def _mean(values: np.ndarray, weights: np.ndarray) -> np.ndarray:
    return ((weights @ values).T / weights.sum(axis=1, dtype=np.float64)).T


def _values(value):
    """NumPy values as JSON ones, rounded to 6 digits; NaN becomes None."""
    if np.ndim(value):
        return [_values(v) for v in value]
    return None if np.isnan(value) else round(float(value), 6) + 0.0  # no -0.0
