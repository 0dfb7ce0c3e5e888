"""Exercises: the notebooks' own solutions are right, the usual mistakes get a hint."""

import re
from pathlib import Path
from types import SimpleNamespace

import keras
import nbformat
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from utils import exercises

NOTEBOOKS = sorted((Path(__file__).parents[1] / "notebooks").glob("0[1-8]_*.ipynb"))
CALL = r'exercises\.check\("(\d\d\.\d)", answer\)'


def tagged(tag):
    """(notebook's number, source) of every cell with this tag."""
    for path in NOTEBOOKS:
        for cell in nbformat.read(path, 4).cells:
            if tag in cell.metadata.get("tags", []):
                yield path.name[:2], cell.source


def freeze_outer_norms(model):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def images_of(drawn, patients):
    return np.concatenate([np.flatnonzero(patients == name) for name in drawn])


def soft(logits, temperature):
    powers = np.exp(logits / temperature)
    return powers / powers.sum(1, keepdims=True)


def kl(p, q):
    return rel_entr(softmax(p, 1), softmax(q, 1)).sum(1).mean()


# Exercise, wrong answer, a word of the hint.
WRONG = [
    ("01.1", lambda t: set(t["patient"][t["patient"].duplicated()]), "both images of a"),
    ("01.1", lambda t: 1, "return a set of patients, not an object of type int"),
    ("01.1", lambda t: ["b"], "return a set of patients"),
    ("01.2", lambda train, val: np.mean(val == np.bincount(val).argmax()), "train alone"),
    ("01.2", lambda train, val: np.mean(train == np.bincount(train).argmax()), "hits in val"),
    ("02.1", lambda layers: 1 + sum(k - 1 for k, _ in layers), "stride of 2"),
    ("02.1", lambda layers: int(np.prod([k for k, _ in layers])), "each side"),
    ("02.1", lambda layers: {"sees": 3}, "returned dict, not numbers"),
    ("02.2", lambda n, units: (n * units + 4 * units, 0), "mean and variance"),
    ("02.2", lambda n, units: n * units, "the function returned one number"),
    ("03.1", freeze_outer_norms, "the one in the backbone"),
    ("03.1", lambda model: setattr(model, "trainable", False), "freezes all its layers"),
    ("03.2", lambda blocks, share: round((1 - share) * len(blocks)), "end is nearer"),
    ("04.1", lambda history: history["val_qwk"].argmax(), "number of the row"),
    ("04.1", lambda history: history["val_qwk"].idxmax(), "number of the row"),
    ("04.1", lambda h: h.set_index("epoch")["val_loss"].idxmin(), "nor by val_loss"),
    ("04.1", lambda h: h["epoch"][[2]], r"an array of shape \(1,\), not one number"),
    ("04.2", lambda maps: np.stack([maps.max(-1), maps.mean(-1)], -1), "then their maximum"),
    ("04.2", lambda maps: maps, r"shape \(2, 1, 3\), not an array of shape \(2, 1, 2\)"),
    ("05.1", lambda z, t: softmax(softmax(z, 1) / t, 1), "softmax of each row"),
    ("05.1", soft, "infinite"),
    ("05.1", lambda z, t: soft(z - z.max(), t), "each row"),
    ("05.2", lambda p, q, t: t**2 * kl(q / t, p / t), "order matters"),
    ("05.2", lambda p, q, t: kl(p / t, q / t), r"T \* T"),
    ("06.1", lambda patients, rng: rng.choice(len(patients), len(patients)), "all images"),
    ("06.1", lambda p, rng: images_of(rng.permutation(np.unique(p)), p), "with replacement"),
    ("06.1", lambda p, rng: images_of(rng.choice(p, len(set(p))), p), "equally likely"),
    ("06.2", lambda c, k: (c[:k, :k].sum() / c[:k].sum(), 0.9), "return sensitivity"),
    ("06.2", lambda c, k: 0.8, "returned one number"),
    ("06.3", lambda p, cuts: p.argmax(1), "whatever is most probable"),
    ("06.3", lambda p, cuts: np.rint(p @ np.arange(p.shape[1])), "Rounding"),
]


def test_every_exercise_has_its_cell_and_its_solution_in_its_notebook():
    asked = [(book, re.findall(CALL, source)) for book, source in tagged("exercise")]
    assert [number for _, numbers in asked for number in numbers] == list(exercises.EXERCISES)
    assert all(number[:2] == book for book, numbers in asked for number in numbers)
    assert all("answer = None" in source for _, source in tagged("exercise"))
    assert all(source.startswith("<details>") for _, source in tagged("solution"))


def test_the_solutions_run_and_are_right():
    found, check = {}, exercises.check
    recorder = SimpleNamespace(check=lambda number, f: found.update({number: check(number, f)}))
    for _, source in tagged("solution"):
        for code in re.findall(r"```python\n(.*?)```", source, re.S):
            exec(code, {"exercises": recorder, "np": np, "keras": keras})
    assert found == {number: f"Right: {number} is done." for number in exercises.EXERCISES}


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize(("number", "answer", "hint"), WRONG)
def test_a_usual_mistake_gets_its_hint(number, answer, hint):
    verdict = exercises.check(number, answer)
    assert verdict.startswith("Not yet: ")
    assert re.search(hint, verdict) and "raised" not in verdict


@pytest.mark.parametrize("number", exercises.EXERCISES)
@pytest.mark.parametrize("answer", [None, 3, lambda *given: None, lambda *given: 1 / 0, lambda: 1])
def test_nothing_stops_a_notebook(number, answer):
    assert exercises.check(number, answer).startswith("Not yet: ")
