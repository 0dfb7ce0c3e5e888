"""What is minimised and what is measured: on logits, in float32 whatever the model's policy.

Distillation: Hinton, Vinyals & Dean, "Distilling the Knowledge in a Neural Network", 2015,
https://arxiv.org/abs/1503.02531. Kappa: Cohen, "Weighted kappa", Psychol. Bulletin 70(4), 1968.
"""

import keras
import numpy as np
from keras import ops


def hard_targets(labels, classes: int, softening: float = 0.0, smoothing: float = 0.0):
    """Turn grades into label distributions, float32 (n, classes), each row summing to 1.

    labels: integers (n,) from 0 to classes - 1.
    softening: standard deviation, in grades, of a Gaussian over neighbouring grades; 0 is one-hot.
        A reader who grades 2 often means "2, perhaps 1 or 3", never "2, perhaps 4".
    smoothing: fraction, 0 to below 1, then spread evenly over all classes (label smoothing).
    ValueError for a label, softening or smoothing out of range.
    """
    labels = np.asarray(labels)
    if not np.isin(labels, range(classes)).all():
        raise ValueError(f"Labels {set(labels.tolist())} must lie in 0 to {classes - 1}.")
    if softening < 0 or not 0 <= smoothing < 1:
        raise ValueError(f"softening={softening} must be >= 0, smoothing={smoothing} in [0, 1).")
    distance = np.arange(classes) - labels.reshape(-1, 1)
    # A very small softening underflows to one-hot, never to 0/0: distance 0 always weighs 1.
    targets = np.exp(-0.5 * (distance / softening) ** 2) if softening else 1.0 * (distance == 0)
    targets /= targets.sum(axis=1, keepdims=True)
    return ((1 - smoothing) * targets + smoothing / classes).astype(np.float32)


class DistillationLoss(keras.losses.Loss):
    """(1 - w) T^2 KL(softmax(teacher / T) || softmax(student / T)) + w cross-entropy, per image.

    y_true: float (B, 2 classes): label distribution, then the teacher's logits.
    y_pred: float (B, classes): the student's logits.
    temperature: T, above 0; T^2 keeps the soft gradient's size as T grows (Hinton 2015, section 2).
    hard_weight: w, 0 to 1.

    Both sides are logits. Probabilities passed instead would be softmaxed a second time, which
    makes every target nearly uniform. ValueError for a temperature or weight out of range.
    """

    def __init__(self, temperature: float, hard_weight: float, classes: int):
        if temperature <= 0 or not 0 <= hard_weight <= 1:
            raise ValueError(f"{temperature=} must be above 0, {hard_weight=} from 0 to 1.")
        super().__init__(name="distillation", dtype="float32")
        self.temperature = temperature
        self.hard_weight = hard_weight
        self.classes = classes

    def call(self, y_true, y_pred):
        labels, teacher = y_true[:, : self.classes], y_true[:, self.classes :]
        log_p = ops.log_softmax(teacher / self.temperature, axis=-1)
        log_q = ops.log_softmax(y_pred / self.temperature, axis=-1)
        soft = self.temperature**2 * ops.sum(ops.exp(log_p) * (log_p - log_q), axis=-1)
        hard = teacher_loss().call(labels, y_pred)  # per image
        return (1 - self.hard_weight) * soft + self.hard_weight * hard


class Accuracy(keras.metrics.Metric):
    """Share of images whose largest logit stands where the label distribution is largest.

    y_true: float (B, K) or (B, 2K), of which the first K columns count; y_pred: logits (B, K).
    """

    title = "accuracy"  # in the history

    def __init__(self, classes: int):
        super().__init__(name=self.title, dtype="float32")
        self.classes = classes
        self.confusion = self.add_weight(shape=(classes, classes), initializer="zeros")

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


class QuadraticWeightedKappa(Accuracy):
    """Agreement beyond chance, where being off by d grades costs d^2: 1 perfect, 0 chance.

    Shapes as for `Accuracy`. 0 where kappa is undefined (truth and answers all in one class).
    """

    title = "qwk"

    def result(self):
        grades = ops.arange(self.classes, dtype=self.dtype)
        cost = ops.square(grades[:, None] - grades[None, :])
        truth, answers = ops.sum(self.confusion, axis=1), ops.sum(self.confusion, axis=0)
        expected = ops.sum(cost * truth[:, None] * answers[None, :])
        observed = ops.sum(cost * self.confusion) * ops.sum(self.confusion)
        return ops.divide_no_nan(expected - observed, expected)


class MacroF1(Accuracy):
    """Mean over the classes of the harmonic mean of precision and recall, 0 to 1.

    Shapes as for `Accuracy`. For classes without an order, where kappa has no weights to use.
    """

    title = "f1"

    def result(self):
        hits = ops.diagonal(self.confusion)
        total = ops.sum(self.confusion, axis=0) + ops.sum(self.confusion, axis=1)
        return ops.mean(ops.divide_no_nan(2 * hits, total))


def teacher_loss() -> keras.losses.Loss:
    """What a model without a teacher minimises: logits (B, K) against distributions (B, K)."""
    return keras.losses.CategoricalCrossentropy(from_logits=True)


def metrics(classes: int, ordered: bool = True) -> list[keras.metrics.Metric]:
    """What `compile` measures: accuracy, and the metric by which the best epoch is chosen."""
    return [Accuracy(classes), QuadraticWeightedKappa(classes) if ordered else MacroF1(classes)]
