"""Checks answers to the exercises; lecturers may add cases to exercises.yaml."""

from pathlib import Path

import keras
import numpy as np
import pandas as pd
import yaml

KINDS = {"array": np.array, "list": list, "number": lambda value: value, "table": pd.DataFrame}


class Verdict(str):
    """What a check found, shown without quotes."""

    __repr__ = str.__str__


def check(number: str, answer: object) -> Verdict:
    """Run the answer to an exercise, such as "02.1"; whatever it does, no notebook stops."""
    if not callable(answer):
        return Verdict(f"Not yet: `answer` must be a function; it is {answer!r}.")
    exercise = EXERCISES[number]
    try:
        hint = exercise(answer) if callable(exercise) else first_hint(answer, **exercise)
    except Exception as error:  # the learner's code may do anything
        hint = f"the function raised {type(error).__name__}: {error}"
    return Verdict(f"Not yet: {hint}" if hint else f"Right: {number} is done.")


def first_hint(answer, given: list[str], cases: list[dict]) -> str | None:
    """The hint of the first case that fails; None when all are right."""
    for case in cases:
        wanted, hint = case["wanted"], case["hint"]
        found = answer(*(KINDS[kind](x) for kind, x in zip(given, case["given"], strict=True)))
        if found is None:
            return "the function returned nothing: end it with `return`."
        if isinstance(wanted, set):
            if not isinstance(found, set):
                return f"return a set of patients, not an object of type {type(found).__name__}."
            found, wanted = [found == wanted], [True]
        try:
            numbers = np.asarray(found, float)
        except (TypeError, ValueError):
            return f"the function returned {type(found).__name__}, not numbers. {hint.capitalize()}"
        shapes = numbers.shape, np.shape(wanted)
        if shapes[0] != shapes[1]:
            names = [f"an array of shape {shape}" if shape else "one number" for shape in shapes]
            return f"the function returned {names[0]}, not {names[1]}: {hint}"
        if not np.allclose(numbers, wanted, rtol=1e-3, atol=1e-4):
            return case.get("slips", {}).get(numbers.item() if numbers.ndim == 0 else None, hint)
    return None


def frozen_norms(answer) -> str | None:
    """03.1: freeze every BatchNormalization of a model, and nothing else."""
    norm, dense = keras.layers.BatchNormalization, keras.layers.Dense
    inner = keras.Sequential([keras.Input((4,)), dense(3), norm()], name="backbone")
    model = keras.Sequential([keras.Input((4,)), inner, dense(2), norm()])
    answer(model)
    if not (model.trainable and inner.trainable):
        return "freezing a model freezes all its layers: set the layers' own flags instead."
    if inner.layers[-1].trainable:
        return "the one in the backbone still trains: model.layers holds the backbone as one layer."
    right = [layer.trainable for layer in (*inner.layers, *model.layers[1:])]
    return None if right == [True, False, True, False] else "only the Dense layers should train."


def patients_drawn(answer) -> str | None:
    """06.1: patients (n,) and a generator -> rows of one bootstrap resample of patients."""
    patients = np.repeat(np.arange(40), np.arange(40) % 2 + 1)  # every second one has two images
    rows = [np.asarray(answer(patients.copy(), np.random.default_rng(seed))) for seed in range(20)]
    times = pd.DataFrame([np.bincount(drawn, minlength=60) for drawn in rows]).T.groupby(patients)
    if (times.nunique() > 1).any(axis=None) or (times.first().sum() != 40).any():
        return "draw 40 of the 40 patients; each brings all images, as often as the patient came."
    if times.first().max(axis=None) < 2 or times.first().T.duplicated().any():
        return "draw with replacement, by the generator that is passed in: every draw differs."
    if times.first()[1::2].to_numpy().sum() > 0.58 * 40 * 20:  # half is right; two thirds by image
        return "each patient is equally likely, however many images: draw from the unique names."
    return None


CASES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
EXERCISES = dict(sorted((CASES | {"03.1": frozen_norms, "06.1": patients_drawn}).items()))
