"""What is minimised and what is measured: losses on logits, in float32 whatever the model's policy.

Focal loss: Lin et al., "Focal Loss for Dense Object Detection", ICCV 2017,
https://arxiv.org/abs/1708.02002. Distillation: Hinton, Vinyals & Dean, "Distilling the Knowledge
in a Neural Network", 2015, https://arxiv.org/abs/1503.02531. Quadratic weighted kappa: Cohen,
"Weighted kappa", Psychological Bulletin 70(4), 1968.
"""

from __future__ import annotations

import keras
import numpy as np
from keras import ops

from utils.layers import PACKAGE


def hard_targets(labels, classes: int, softening: float = 0.0, smoothing: float = 0.0):
    """Turn grades into label distributions, float32 (n, classes), each row summing to 1.

    labels: integers (n,) from 0 to classes - 1.
    softening: standard deviation, in grades, of a Gaussian over neighbouring grades; 0 is one-hot.
        A reader who grades 2 often means "2, perhaps 1 or 3", never "2, perhaps 4".
    smoothing: fraction, 0 to below 1, then spread evenly over all classes (label smoothing).

    Raises:
        ValueError: for a label, softening or smoothing out of range.
    """
    labels = np.asarray(labels)
    if labels.size and (labels.min() < 0 or labels.max() >= classes):
        raise ValueError(
            f"Labels run from {labels.min()} to {labels.max()}, but there are {classes} classes:"
            f" 0 to {classes - 1}."
        )
    if softening < 0 or not 0 <= smoothing < 1:
        raise ValueError(
            f"softening={softening} must be at least 0, smoothing={smoothing} from 0 to below 1."
        )
    distance = np.arange(classes) - labels.reshape(-1, 1)
    if softening:
        # A very small softening underflows to one-hot, never to 0/0: distance 0 always weighs 1.
        targets = np.exp(-0.5 * (distance / softening) ** 2)
        targets /= targets.sum(axis=1, keepdims=True)
    else:
        targets = (distance == 0).astype(np.float64)
    return ((1 - smoothing) * targets + smoothing / classes).astype(np.float32)


@keras.saving.register_keras_serializable(PACKAGE)
class HardLoss(keras.losses.Loss):
    """Cross-entropy, or focal loss, of logits (B, K) against label distributions (B, K).

    focal_gamma: 0 is cross-entropy; above 0, classes that the model already gets right weigh
        less, by (1 - p)^gamma.
    """

    def __init__(self, focal_gamma: float = 0.0, name="hard_loss", **kwargs):
        super().__init__(name=name, **{"dtype": "float32", **kwargs})
        self.focal_gamma = focal_gamma

    def call(self, y_true, y_pred):
        if self.focal_gamma == 0:
            return keras.losses.categorical_crossentropy(y_true, y_pred, from_logits=True)
        # alpha weighs all classes alike: 1, so that gamma -> 0 gives cross-entropy.
        return keras.losses.categorical_focal_crossentropy(
            y_true, y_pred, alpha=1.0, gamma=self.focal_gamma, from_logits=True
        )

    def get_config(self):
        return {**super().get_config(), "focal_gamma": self.focal_gamma}


@keras.saving.register_keras_serializable(PACKAGE)
class DistillationLoss(keras.losses.Loss):
    """(1 - w) T^2 KL(softmax(teacher / T) || softmax(student / T)) + w hard loss, per sample.

    y_true: float (B, 2 classes): label distribution, then the teacher's logits.
    y_pred: float (B, classes): the student's logits.
    temperature: T, above 0; T^2 keeps the soft gradient's size as T grows (Hinton 2015, section 2).
    hard_weight: w, 0 to 1.

    Both sides are logits and are softened here once. Soft *probabilities* passed as if they were
    logits would be softmaxed a second time, which makes every target nearly uniform.

    Raises:
        ValueError: for a temperature or weight out of range.
    """

    def __init__(
        self,
        temperature: float,
        hard_weight: float,
        classes: int,
        focal_gamma: float = 0.0,
        name="distillation_loss",
        **kwargs,
    ):
        if temperature <= 0 or not 0 <= hard_weight <= 1:
            raise ValueError(
                f"temperature={temperature} must be above 0, hard_weight={hard_weight} from 0 to 1."
            )
        super().__init__(name=name, **{"dtype": "float32", **kwargs})
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.classes = classes
        self.focal_gamma = focal_gamma
        self.hard_loss = HardLoss(focal_gamma)

    def call(self, y_true, y_pred):
        labels, teacher = y_true[:, : self.classes], y_true[:, self.classes :]
        target = ops.log_softmax(teacher / self.temperature, axis=-1)
        answer = ops.log_softmax(y_pred / self.temperature, axis=-1)
        divergence = ops.sum(ops.exp(target) * (target - answer), axis=-1)
        soft = self.temperature**2 * divergence
        hard = self.hard_loss.call(labels, y_pred)
        return (1 - self.hard_weight) * soft + self.hard_weight * hard

    def get_config(self):
        own = ("temperature", "hard_weight", "classes", "focal_gamma")
        return {**super().get_config(), **{name: getattr(self, name) for name in own}}


@keras.saving.register_keras_serializable(PACKAGE)
class Accuracy(keras.metrics.Metric):
    """Share of images whose largest logit stands where the label distribution is largest.

    y_true: float (B, K) or (B, 2K), of which the first K columns count; y_pred: logits (B, K).
    """

    def __init__(self, classes: int, name="accuracy", **kwargs):
        super().__init__(name=name, **{"dtype": "float32", **kwargs})
        self.classes = classes
        self.confusion = self.add_weight(
            shape=(classes, classes), initializer="zeros", name="confusion"
        )

    def update_state(self, y_true, y_pred, sample_weight=None):
        truth = self._one_hot(y_true)
        if sample_weight is not None:
            truth = truth * ops.reshape(ops.cast(sample_weight, self.dtype), (-1, 1))
        self.confusion.assign_add(ops.matmul(ops.transpose(truth), self._one_hot(y_pred)))

    def _one_hot(self, scores):
        grade = ops.argmax(ops.convert_to_tensor(scores)[:, : self.classes], axis=-1)
        return ops.one_hot(grade, self.classes, dtype=self.dtype)

    def result(self):
        return ops.divide_no_nan(ops.trace(self.confusion), ops.sum(self.confusion))

    def get_config(self):
        return {**super().get_config(), "classes": self.classes}


@keras.saving.register_keras_serializable(PACKAGE)
class QuadraticWeightedKappa(Accuracy):
    """Agreement beyond chance, where being off by d grades costs d^2: 1 perfect, 0 chance.

    Shapes as for `Accuracy`. 0 where kappa is undefined (truth and answers all in one class).
    """

    def __init__(self, classes: int, name="qwk", **kwargs):
        super().__init__(classes, name=name, **kwargs)

    def result(self):
        grades = ops.arange(self.classes, dtype=self.dtype)
        cost = ops.square(grades[:, None] - grades[None, :])
        truth, answers = ops.sum(self.confusion, axis=1), ops.sum(self.confusion, axis=0)
        expected = ops.sum(cost * truth[:, None] * answers[None, :])
        observed = ops.sum(cost * self.confusion) * ops.sum(self.confusion)
        kappa = 1 - ops.divide_no_nan(observed, expected)
        return ops.where(expected > 0, kappa, ops.zeros_like(kappa))
