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
REPORT = json.loads((FOLDER / "report.json").read_text())


@pytest.mark.parametrize("model", REPORT["models"])
def test_the_table_of_results_is_recomputed(model):
    rows = pd.read_csv(FOLDER / "predictions.csv").query("split == 'test'").sort_values("patient")
    logits = rows[[f"{model}_{k}" for k in range(5)]].to_numpy()
    bootstrap = metrics.Bootstrap(rows["patient"], draws=2000)
    assert bootstrap.patients == REPORT["patients"] and len(rows) == REPORT["images"]
    found = metrics.Evaluation(rows["truth"].to_numpy(), softmax(logits, axis=1), bootstrap)
    saved = REPORT["models"][model]
    for name in ("accuracy", "qwk", "balanced_accuracy"):
        assert found.figures[name] == pytest.approx(saved[name], abs=1e-5)
        ends = metrics.interval(found.samples[name])
        assert ends == pytest.approx(saved["ci95"][name], abs=0.01)  # other draws of the patients
    shown = f"{saved['accuracy']:.3f} ({saved['ci95']['accuracy'][0]:.3f} to"
    assert shown in (settings.ROOT / "README.md").read_text()
    assert shown in (FOLDER.parent / "RESULTS.md").read_text()


def test_the_cross_validation_is_recomputed():
    script, table = FOLDER.parent / "cross_validation.py", FOLDER / "cross_validation.csv"
    command = [sys.executable, script, "table", table, "--draws", "200"]
    found = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    rows = dict(re.findall(r"(?m)^\| ([^|]+?) \| ([+-]?[\d.]+ \(.*?\)) \|", found))
    assert "3964 images, 1982 patients" in found
    for row in ("A", "D", "224 A w0 tuned", "384 A w0 tuned", "384 labels 0.5e-4"):
        assert rows[row][:6] in (FOLDER.parent / "RESULTS.md").read_text()
    assert rows["224 A w0 tuned minus 224 labels tuned"].startswith("+1.8 (+")
    assert rows["384 A w0 1e-4 minus 384 labels 0.5e-4"].startswith("+2.1 (+")
