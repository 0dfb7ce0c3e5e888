"""Self-checks of the notebooks' exercises: right, or not yet with a hint; never an error.

Every answer is a function of the learner's. It is tried on a few cases whose results are written
down here, among them those that the usual mistakes get wrong; no solution stands here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pandas as pd


@dataclass(frozen=True)
class Verdict:
    """What a check says; true when the answer is right."""

    right: bool
    text: str

    def __bool__(self) -> bool:
        return self.right

    def __repr__(self) -> str:
        return self.text


def exercise(number: str, answer: object) -> Verdict:
    """Check the answer to an exercise, such as "02.1".

    Args:
        number: notebook and exercise.
        answer: the learner's function, or None as long as there is none.

    Returns:
        A verdict, shown as its text; whatever the answer is or does, nothing is raised for it.

    Raises:
        ValueError: no such exercise.
    """
    if number not in EXERCISES:
        raise ValueError(f"There is no exercise {number}: it is one of {', '.join(EXERCISES)}.")
    if answer is None:
        return Verdict(False, f"Not yet: give exercise {number} an answer and run this cell again.")
    if not callable(answer):
        kind = type(answer).__name__
        return Verdict(
            False, f"Not yet: the answer is to be a function, and this is of type {kind}."
        )
    try:
        hint = EXERCISES[number](answer)
    except Exception as error:  # the learner's code may do anything
        hint = f"the function raised {type(error).__name__}: {error}"
    return (
        Verdict(False, f"Not yet: {hint}") if hint else Verdict(True, f"Right, {number} is done.")
    )


def misshapen(found: object, wanted: object) -> str | None:
    """What is wrong with the form of an answer; None when it has the form that is wanted."""
    try:
        shape = np.asarray(found, float).shape
    except (TypeError, ValueError):
        return f"the function returned {type(found).__name__}, where numbers are wanted"
    if shape == (asked := np.shape(wanted)):
        return None
    form = f"an array of shape {asked}" if asked else "one number"
    return f"{form} is wanted, and the function returned {f'shape {shape}' if shape else 'one'}"


def differs(found: object, wanted: object) -> bool:
    """Whether numbers or arrays of one shape differ by more than a rounding."""
    return not np.allclose(np.asarray(found, float), wanted, rtol=1e-3, atol=1e-4)


def first_hint(answer: Callable, cases: list[tuple[tuple, object, str]]) -> str | None:
    """The hint of the first case that the answer gets wrong; None when there is none."""
    for arguments, wanted, hint in cases:
        found = answer(*arguments)
        if found is None:
            return "the function returns nothing."
        if fault := misshapen(found, wanted):
            return f"{fault}: {hint}"
        if differs(found, wanted):
            return hint
    return None


def shared_patients(answer: Callable) -> str | None:
    """01.1: table -> patients in more than one split."""
    cases = [
        (["a", "a", "b", "c", "b"], "train train train test test", {"b"},
         "b has an image in train and one in test; a has two, both in train."),
        (["a", "a", "b"], "val val test", set(), "here nobody is shared: the set is empty."),
        (["a", "b", "a", "b", "a"], "train val test train val", {"a", "b"},
         "a patient may stand in three splits, too."),
    ]  # fmt: skip
    for patients, splits, wanted, hint in cases:
        if set(answer(pd.DataFrame({"patient": patients, "split": splits.split()}))) != wanted:
            return hint
    return None


def majority_accuracy(answer: Callable) -> str | None:
    """01.2: labels of train and val -> accuracy on val of train's most frequent class."""
    train, val = np.array([0, 0, 1]), np.array([1, 1, 0, 1])
    return first_hint(answer, [
        ((np.array([2, 2, 0]), np.array([2, 2, 1, 0])), 0.5, "count the hits in val, as a share."),
        ((train, val), 0.25, "which class is the most frequent one is learned from train alone."),
    ])  # fmt: skip


def receptive_field(answer: Callable) -> str | None:
    """02.1: [(kernel, stride), …] -> side in pixels of what one cell sees."""
    return first_hint(answer, [
        (([(3, 1)],), 3, "one 3 by 3 convolution sees 3 pixels."),
        (([(3, 1), (3, 1)],), 5, "a second one adds one pixel on each side."),
        (([(3, 2), (3, 2)],), 7, "after a stride of 2, neighbours lie 2 pixels apart."),
        (([(3, 2), (3, 1), (1, 1), (5, 2)],), 15, "the strides before a layer multiply."),
    ])  # fmt: skip


def head_parameters(answer: Callable) -> str | None:
    """02.2: inputs and units of Dense without bias + BatchNorm -> (trained, measured)."""
    return first_hint(answer, [
        ((768, 512), (394240, 1024), "Dense has no bias here; of BatchNorm's four numbers a unit "
         "two are trained, mean and variance are measured."),
        ((3, 1), (5, 2), "it depends on both: inputs · units, and units."),
    ])  # fmt: skip


def frozen_norms(answer: Callable) -> str | None:
    """03.1: freeze every BatchNormalization of a model, and nothing else."""
    import keras

    norm = keras.layers.BatchNormalization
    inner = keras.Sequential([keras.Input((4,)), keras.layers.Dense(3), norm()], name="backbone")
    model = keras.Sequential([keras.Input((4,)), inner, keras.layers.Dense(2), norm()])
    answer(model)
    if not model.trainable or not inner.trainable:
        return "a model that is frozen freezes everything in it: set the layers' own flags."
    if model.layers[-1].trainable:
        return "the BatchNormalization of the head still trains."
    if inner.layers[-1].trainable:
        return (
            "the one inside the backbone still trains: model.layers holds all of that as one layer."
        )
    if not (inner.layers[0].trainable and model.layers[1].trainable):
        return "the Dense layers should go on training."
    return None


def first_trained(answer: Callable) -> str | None:
    """03.2: each layer's block, and the share to train -> index of the first layer that trains."""
    blocks = ["stem", "stem", "1a", "1a", "1a", "1b", "1b", "2a", "2a", "2a"]
    return first_hint(answer, [
        ((blocks, 0.3), 7, "the last 30 % of ten layers are three: the first that trains is 7."),
        ((blocks, 0.6), 5, "60 % would cut block 1a in two: its end is nearer than its start."),
        ((blocks, 0.75), 2, "75 % would begin between 2 and 3: the start of 1a is the nearest."),
        ((blocks, 1.0), 0, "100 % is everything, from layer 0."),
    ])  # fmt: skip


def best_epoch(answer: Callable) -> str | None:
    """04.1: history -> epoch with the best val_qwk."""
    history = pd.DataFrame({
        "epoch": [1, 2, 3, 4],
        "qwk": [0.2, 0.4, 0.6, 0.8],
        "val_loss": [1.2, 0.9, 1.0, 1.1],
        "val_qwk": [0.1, 0.5, 0.7, 0.6],
    })  # fmt: skip
    return first_hint(answer, [
        ((history,), 3, "val_qwk is best in epoch 3; train is no judge, and neither is val_loss."),
        ((history.assign(epoch=[11, 12, 13, 14]),), 13, "give the epoch, not the row's number."),
        ((history.drop(index=0),), 3, "rows may begin anywhere."),
    ])  # fmt: skip


def channel_summary(answer: Callable) -> str | None:
    """04.2: maps (H, W, C) -> (H, W, 2), average and maximum over the channels."""
    maps = np.array([[[1.0, 2.0, 6.0]], [[0.0, 0.0, 3.0]]])
    return first_hint(answer, [
        ((maps,), [[[3, 6]], [[1, 3]]], "of each place's channels first the average, then the "
         "maximum: two maps of the same height and width."),
        ((np.ones((2, 3, 4)),), np.ones((2, 3, 2)), "two maps, whatever the number of channels."),
    ])  # fmt: skip


def softened(answer: Callable) -> str | None:
    """05.1: logits (n, K) and T -> soft targets."""
    logits = np.array([[2.0, 0.0], [0.0, 4.0]])
    return first_hint(answer, [
        ((logits, 1.0), [[0.8808, 0.1192], [0.0180, 0.9820]], "at T = 1 it is the softmax of each "
         "row, which sums to one."),
        ((logits, 4.0), [[0.6225, 0.3775], [0.2689, 0.7311]], "the logits are divided by T before "
         "the softmax."),
        ((np.array([[3000.0, 0.0], [0.0, 4.0]]), 2.0), [[1, 0], [0.1192, 0.8808]], "exp(1500) is "
         "infinite: subtract each row's own maximum first; no probability changes."),
    ])  # fmt: skip


def distillation_loss(answer: Callable) -> str | None:
    """05.2: logits of teacher and student and T -> T² · KL(teacher ‖ student), the rows' mean."""
    teacher, student = np.array([[2.0, 0.0]]), np.array([[0.0, 1.0]])
    both = np.vstack([teacher, student])
    return first_hint(answer, [
        ((teacher, teacher, 3.0), 0.0, "a student that agrees has nothing to lose."),
        ((teacher, student, 1.0), 0.8287, "sum p · log(p / q) with p the teacher's: the order "
         "matters."),
        ((teacher, student, 2.0), 1.0296, "both are softened at T, and T² makes up for the smaller "
         "gradient."),
        ((both, student[[0, 0]], 1.0), 0.41435, "of several knees it is the mean."),
    ])  # fmt: skip


def patients_drawn(answer: Callable) -> str | None:
    """06.1: patients (n,) and a generator -> rows of one bootstrap resample of patients."""
    patients = np.repeat(np.arange(40), np.arange(40) % 2 + 1)
    seen, pairs = set(), 0.0
    for seed in range(20):
        rows = np.asarray(answer(patients, np.random.default_rng(seed)))
        if rows.ndim != 1 or not np.issubdtype(rows.dtype, np.integer):
            return "give the rows as one array of whole numbers."
        times = np.bincount(rows, minlength=len(patients))
        per_patient = pd.Series(times[: len(patients)]).groupby(patients)
        if len(times) > len(patients) or (per_patient.nunique() > 1).any():
            return "whoever is drawn brings all images along, each as often as the patient came."
        if per_patient.first().sum() != 40:
            return "40 patients are there, so 40 are drawn; the number of images may vary."
        seen.add(tuple(np.sort(rows)))
        pairs += per_patient.first()[1::2].sum() / 40 / 20  # those with two images
    if times.max() < 2:
        return "draw with replacement: somebody comes twice and somebody stays out."
    if len(seen) < 20:
        return "draw with the generator that is given: each draw differs."
    if pairs > 0.58:  # half of the patients have two images: 0.5 when right, 0.67 when not
        return "every patient is equally likely, however many images: draw among different names."
    return None


def sensitivity_specificity(answer: Callable) -> str | None:
    """06.2: confusion matrix (truth down), first positive class -> sensitivity, specificity."""
    confusion = np.array([[9, 1, 0], [2, 6, 2], [0, 1, 4]])
    return first_hint(answer, [
        ((confusion, 2), (0.8, 0.9), "of 5 knees of grade 2 or worse 4 are found; of 20 others 18 "
         "are left in peace. Truth runs down, answers across."),
        ((confusion, 1), (13 / 15, 0.9), "grade 1 counts as positive now: 13 of 15 are found."),
    ])  # fmt: skip


EXERCISES: dict[str, Callable[[Callable], str | None]] = {
    "01.1": shared_patients,
    "01.2": majority_accuracy,
    "02.1": receptive_field,
    "02.2": head_parameters,
    "03.1": frozen_norms,
    "03.2": first_trained,
    "04.1": best_epoch,
    "04.2": channel_summary,
    "05.1": softened,
    "05.2": distillation_loss,
    "06.1": patients_drawn,
    "06.2": sensitivity_specificity,
}
