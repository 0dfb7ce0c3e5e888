"""Exercises: the notebooks' own solutions are right, the usual mistakes not yet."""

import re

import keras
import nbformat
import numpy as np
import pytest
from scipy.special import rel_entr, softmax

from utils import checks, parameters

NOTEBOOKS = parameters.ROOT / "notebooks"
BOOKS = {n: nbformat.read(NOTEBOOKS / f"{n}.ipynb", 4) for n in parameters.NOTEBOOKS}


def tagged(tag):
    return [c for book in BOOKS.values() for c in book.cells if tag in c.metadata.get("tags", [])]


def solutions():
    """Exercise to the code that its solution shows."""
    found = {}
    for cell in tagged("solution"):
        [code] = re.findall(r"```python\n(.*?)```", cell.source, re.S)
        [number] = re.findall(r'checks\.exercise\("(\d\d\.\d)", answer\)', code)
        found[number] = code
    return found


def only_outer_norms(model):
    for layer in model.layers:
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.trainable = False


def draw_rows(patients, rng):
    return rng.choice(len(patients), len(patients))


def each_patient_once(patients, rng):
    drawn = rng.permutation(np.unique(patients))
    return np.concatenate([np.flatnonzero(patients == p) for p in drawn])


def two_knees_twice_as_likely(patients, rng):
    drawn = rng.choice(patients, len(set(patients)))
    return np.concatenate([np.flatnonzero(patients == p) for p in drawn])


def shifted_by_the_largest_of_all(logits, temperature):
    powers = np.exp((logits - logits.max()) / temperature)
    return powers / powers.sum(1, keepdims=True)


def kl(p, q):
    return rel_entr(softmax(p, 1), softmax(q, 1)).sum(1).mean()


WRONG = {
    "01.1": [
        lambda t: set(t["patient"][t["patient"].duplicated()]),
        lambda t: set(t["patient"][t["split"] == "test"]),
    ],
    "01.2": [
        lambda train, val: np.mean(val == np.bincount(val).argmax()),
        lambda train, val: np.mean(train == np.bincount(train).argmax()),
    ],
    "02.1": [
        lambda layers: 1 + sum(k - 1 for k, _ in layers),
        lambda layers: int(np.prod([k for k, _ in layers])),
    ],
    "02.2": [
        lambda inputs, units: (inputs * units + 4 * units, 0),
        lambda inputs, units: ((inputs + 1) * units + 2 * units, 2 * units),
    ],
    "03.1": [only_outer_norms, lambda model: setattr(model, "trainable", False)],
    "03.2": [
        lambda blocks, share: int((1 - share) * len(blocks)),
        lambda blocks, share: blocks.index(blocks[min(int((1 - share) * len(blocks)), 9)]),
    ],
    "04.1": [
        lambda history: history["val_qwk"].argmax(),
        lambda history: history.set_index("epoch")["val_loss"].idxmin(),
    ],
    "04.2": [
        lambda maps: np.stack([maps.mean((0, 1)), maps.max((0, 1))], -1),
        lambda maps: np.stack([maps.max(-1), maps.mean(-1)], -1),
    ],
    "05.1": [
        lambda z, t: softmax(softmax(z, 1) / t, 1),
        lambda z, t: np.exp(z / t) / np.exp(z / t).sum(1, keepdims=True),
        shifted_by_the_largest_of_all,
    ],
    "05.2": [
        lambda p, q, t: t**2 * kl(q / t, p / t),
        lambda p, q, t: kl(p / t, q / t),
    ],
    "06.1": [draw_rows, each_patient_once, two_knees_twice_as_likely],
    "06.2": [
        lambda c, k: (c[k:, k:].sum() / c[:, k:].sum(), c[:k, :k].sum() / c[:, :k].sum()),
        lambda c, k: (np.trace(c) / c.sum(), np.trace(c) / c.sum()),
        lambda c, k: (c[:k, :k].sum() / c[:k].sum(), c[k:, k:].sum() / c[k:].sum()),
    ],
}  # fmt: skip


def test_every_exercise_has_its_cell_and_its_solution_in_its_notebook():
    asked = [re.findall(r'checks\.exercise\("(.*?)"', c.source) for c in tagged("exercise")]
    assert [number for [number] in asked] == list(checks.EXERCISES) == list(solutions())
    for name, book in BOOKS.items():
        own = [c for c in book.cells if "exercise" in c.metadata.get("tags", [])]
        assert len(own) == 2 and all(f'exercise("{name[:2]}.' in c.source for c in own)
        assert all("\nanswer = None" in c.source for c in own)
    assert all(c.source.startswith("<details>") for c in tagged("solution"))
    assert all(c.source.endswith("</details>") for c in tagged("solution"))


@pytest.mark.parametrize("number", checks.EXERCISES)
def test_the_solution_runs_and_is_right(number):
    names = {"checks": checks}
    exec(solutions()[number], names)
    verdict = checks.exercise(number, names["answer"])
    assert verdict and repr(verdict).startswith("Right"), verdict


@pytest.mark.filterwarnings("ignore:.*encountered:RuntimeWarning")
@pytest.mark.parametrize("number", checks.EXERCISES)
def test_the_usual_mistakes_are_not_right_yet(number):
    assert len(WRONG[number]) >= 2
    for wrong in WRONG[number]:
        verdict = checks.exercise(number, wrong)
        assert not verdict and repr(verdict).startswith("Not yet: ")
        assert "raised" not in verdict.text  # a hint, no accident


@pytest.mark.parametrize(
    ("number", "answer", "said"),
    [
        (
            "04.1",
            lambda h: h.loc[[h["val_qwk"].idxmax()], "epoch"],
            r"one number is .* shape \(1,\)",
        ),
        ("05.2", lambda p, q, t: np.zeros(len(p)), r"one number is wanted"),
        ("04.2", lambda maps: maps, r"shape \(2, 1, 2\) is wanted, .* shape \(2, 1, 3\)"),
        ("02.1", lambda layers: {"sees": 3}, "returned dict, where numbers are wanted"),
        ("06.2", lambda c, k: 0.8, r"shape \(2,\) is wanted, and the function returned one"),
    ],
)
def test_an_answer_in_the_wrong_form_hears_of_its_form(number, answer, said):
    assert re.search(said, checks.exercise(number, answer).text)


@pytest.mark.parametrize("number", checks.EXERCISES)
@pytest.mark.parametrize("answer", [None, 3, lambda *given: None, lambda *given: 1 / 0, lambda: 1])
def test_no_answer_and_no_function_ends_in_an_error(number, answer):
    verdict = checks.exercise(number, answer)
    assert not verdict and verdict.text.startswith("Not yet: ")


def test_an_exercise_that_is_not_there_is_said():
    with pytest.raises(ValueError, match=r"no exercise 09\.9.*01\.1"):
        checks.exercise("09.9", None)
