"""Targets, losses and metrics, against the libraries that have them."""

import keras
import numpy as np
import pytest
from scipy.special import log_softmax, softmax
from sklearn.metrics import accuracy_score, cohen_kappa_score, f1_score

from utils import losses

RNG = np.random.default_rng(0)
TEACHER, STUDENT = RNG.normal(size=(2, 6, 5)).astype("float32") * 3
LABELS = np.array([0, 1, 2, 3, 4, 2])
HARD = losses.hard_targets(LABELS, 5)


def test_targets_are_distributions():
    softened = losses.hard_targets(LABELS, 5, softening=0.6)
    assert np.allclose(softened.sum(axis=1), 1) and softened.dtype == np.float32
    assert (softened.argmax(axis=1) == LABELS).all()
    assert softened[2, 1] == softened[2, 3] > softened[2, 0]
    smoothed = losses.hard_targets(LABELS, 5, smoothing=0.1)
    assert smoothed[0, 0] == pytest.approx(0.92) and smoothed[0, 1] == pytest.approx(0.02)
    assert np.array_equal(losses.hard_targets(LABELS, 5, softening=1e-9), np.eye(5)[LABELS])
    for bad in ({"softening": -1}, {"smoothing": 1}):
        with pytest.raises(ValueError, match="softening"):
            losses.hard_targets(LABELS, 5, **bad)
    with pytest.raises(ValueError, match="0 to 3"):
        losses.hard_targets(LABELS, 4)


@pytest.mark.parametrize("temperature", [1.0, 4.0])
@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_distillation_loss_equals_the_formula(temperature, weight):
    log_p = log_softmax(TEACHER / temperature, axis=1)
    log_q = log_softmax(STUDENT / temperature, axis=1)
    soft = temperature**2 * (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    hard = -(HARD * log_softmax(STUDENT, axis=1)).sum(axis=1)
    loss = losses.DistillationLoss(temperature, weight, 5)
    found = loss(np.concatenate([HARD, TEACHER], axis=1), STUDENT)
    assert float(found) == pytest.approx(((1 - weight) * soft + weight * hard).mean(), rel=1e-4)


def test_distillation_loss_equals_keras():
    keras_loss = keras.losses.KLDivergence()
    p, q = softmax(TEACHER / 4, axis=1), softmax(STUDENT / 4, axis=1)
    loss = losses.DistillationLoss(4.0, 0.0, 5)
    found = loss(np.concatenate([HARD, TEACHER], axis=1), STUDENT)
    assert float(found) == pytest.approx(16 * float(keras_loss(p, q)), rel=1e-4)


def test_hard_loss_is_cross_entropy_and_finite_for_large_logits():
    expected = -(HARD * log_softmax(STUDENT, axis=1)).sum(axis=1).mean()
    loss = losses.teacher_loss()
    assert float(loss(HARD, STUDENT)) == pytest.approx(expected, rel=1e-4)
    assert np.isfinite(float(loss(HARD, STUDENT * 1e4)))


@pytest.mark.parametrize("arguments", [(0.0, 0.3), (4.0, 1.1), (4.0, -0.1)])
def test_settings_out_of_range_are_refused(arguments):
    with pytest.raises(ValueError, match="temperature"):
        losses.DistillationLoss(*arguments, 5)


def test_metrics_equal_scikit_learn_in_batches_and_with_distillation_targets():
    labels, logits = RNG.integers(0, 5, 200), RNG.normal(size=(200, 5)).astype("float32")
    logits[np.arange(200), labels] += 1
    targets = np.concatenate([losses.hard_targets(labels, 5, 0.4), RNG.normal(size=(200, 5))], 1)
    answers = logits.argmax(axis=1)
    expected = {
        losses.Accuracy: accuracy_score(labels, answers),
        losses.QuadraticWeightedKappa: cohen_kappa_score(labels, answers, weights="quadratic"),
        losses.MacroF1: f1_score(labels, answers, average="macro"),
    }
    for metric_class, value in expected.items():
        metric = metric_class(5)
        for start in range(0, 200, 64):
            metric.update_state(targets[start : start + 64], logits[start : start + 64])
        assert float(metric.result()) == pytest.approx(value, abs=1e-6)
    one = losses.QuadraticWeightedKappa(5)
    one.update_state(
        losses.hard_targets([1, 1], 5), logits[:1].repeat(2, axis=0) * 0 + np.eye(5)[1]
    )
    assert float(one.result()) == 0  # undefined


def test_unordered_classes_get_no_kappa():
    assert [m.name for m in losses.metrics(3, ordered=False)] == ["accuracy", "f1"]
