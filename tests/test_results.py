"""The published results can be computed again from the published predictions."""

import json
import re
import subprocess
import sys

import pandas as pd
import pytest
from scipy.special import softmax

from utils import metrics, settings

FOLDER = settings.ROOT / "notebooks" / "results"
TEXT = (FOLDER.parent / "RESULTS.md").read_text()


@pytest.mark.parametrize("run", ["", "_float16"])
@pytest.mark.parametrize("model", ["teacher", "student", "labels_only"])
def test_the_table_of_results_is_recomputed(run, model):
    report = json.loads((FOLDER / f"report{run}.json").read_text())
    rows = pd.read_csv(FOLDER / f"predictions{run}.csv").query("split == 'test'")
    logits = rows[[f"{model}_{k}" for k in range(5)]].to_numpy()
    bootstrap = metrics.Bootstrap(rows["patient"], draws=2000)
    assert bootstrap.patients == report["patients"] and len(rows) == report["images"]
    found = metrics.Evaluation(rows["truth"].to_numpy(), softmax(logits, axis=1), bootstrap)
    saved = report["models"][model]
    for name in ("accuracy", "qwk", "balanced_accuracy"):
        assert found.figures[name] == pytest.approx(saved[name], abs=1e-5)
        ends = metrics.interval(found.samples[name])
        assert ends == pytest.approx(saved["ci95"][name], abs=0.01)  # other draws of the patients
        assert f"{saved[name]:.3f} ({saved['ci95'][name][0]:.3f} to" in TEXT


GAIN = "384 A w0 1e-4, 3 seeds minus 384 labels 0.5e-4, 3 seeds"


@pytest.mark.parametrize(
    ("table", "title", "shown", "difference", "value"),
    [
        ("5_folds", "6604 images, 3302", ["A", *GAIN.split(" minus ")], GAIN, "+2.3 (+"),
        ("160_px", "3964 images, 1982", ["E", "160 short E w0 V4 2e-4"], "F minus E", "+0.7 (-"),
        ("", "3964 images, 1982", ["D"], "224 A w0 tuned minus 224 labels tuned", "+1.8 (+"),
    ],
)
def test_the_cross_validation_is_recomputed(table, title, shown, difference, value):
    script = FOLDER.parent / "cross_validation.py"
    saved = FOLDER / f"cross_validation{'_' if table else ''}{table}.csv"
    command = [sys.executable, script, "table", saved]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = dict(re.findall(r"(?m)^\| ([^|]+?) \| ([+-]?[\d.]+ \(.*?\)) \|", found))
    assert title in found and rows[difference].startswith(value)
    readme = (settings.ROOT / "README.md").read_text()
    for row in shown:  # accuracy and its interval, digit by digit
        assert rows[row] in TEXT and (rows[row] in readme or table != "5_folds")
