"""Cells of notebook A3, on answers made up here: what it scores, and what it leaves alone."""

from types import SimpleNamespace

import nbformat
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import cohen_kappa_score, f1_score

from utils import metrics, runs, settings

BOOK = nbformat.read(settings.ROOT / "notebooks/A3_does_distillation_pay.ipynb", 4)
CELLS = {cell.id: cell.source for cell in BOOK.cells}


@pytest.mark.parametrize("ordered", [True, False])
def test_classes_without_an_order_are_scored_by_macro_f1(ordered):
    rng, rows = np.random.default_rng(0), np.arange(60) % 2 == 0
    labels, said = rng.integers(3, size=60), rng.integers(3, size=30)
    dataset = SimpleNamespace(ordered=ordered)
    space = {"np": np, "metrics": metrics, "labels": labels, "classes": 3, "dataset": dataset}
    exec(CELLS["3358f0f5"], space)
    kappa = cohen_kappa_score(labels[rows], said, weights="quadratic")
    wanted = kappa if ordered else f1_score(labels[rows], said, average="macro")
    assert space["score"](said, rows) == pytest.approx(wanted)
    assert space["score"](said, rows, np.ones((7, 30), "float32")).shape == (7,)
    judged = {"labels": (np.ones((2, 2)), np.ones((9, 2)))}
    space |= {"judged": judged, "TRIAL_ARMS": {"labels": [0, 1.0]}}
    exec(CELLS["abb5df41"], space)
    assert [row["figure"] for row in space["rows"]] == [
        "accuracy",
        "QWK" if ordered else "macro F1",
    ]


def test_a_finished_table_is_not_written_again(tmp_path):
    space = {"left": [], "TRIAL_ARMS": {"labels": [0, 1.0]}, "runs": runs}
    for finished, value in ((False, 0.5), (True, 0.7)):
        stage = SimpleNamespace(folder=tmp_path, finished=finished, finish=lambda: None)
        table = pd.DataFrame({"mean": [value, value]})
        exec(CELLS["749a1536"], space | {"stage": stage, "table": table})
        assert list(pd.read_csv(tmp_path / "table.csv")["mean"]) == [0.5, 0.5]
