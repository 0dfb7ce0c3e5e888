"""What the notebooks assert of the default run holds for other seeds, and fails without labels."""

import json
import os
import re
import shutil
import subprocess
import sys

import pandas as pd
import pytest

from utils import settings

SHUFFLED = """

_labels = Dataset.labels
Dataset.labels = lambda self, split: np.random.default_rng(0).permutation(_labels(self, split))
"""


def a_copy(folder, seed):
    """The project with `seed` as the default of SEED and TEACHER_SEED."""
    ignore = shutil.ignore_patterns("runs", ".*", "__pycache__", "*.png")
    shutil.copytree(settings.ROOT, folder, ignore=ignore)
    for file in (folder / "utils/settings.py", *folder.glob("notebooks/0*.ipynb")):
        seeds = r"(?<!_)((?:TEACHER_)?SEED(?:: Seed)? =) 0\b"
        file.write_text(re.sub(seeds, rf"\1 {seed}", file.read_text()))
    return folder


def run(project, *arguments):
    command = [sys.executable, "-m", "utils", "run", *arguments]
    environment = {n: v for n, v in os.environ.items() if n not in ("PYTHONPATH", "SERIES_STARTED")}
    return subprocess.run(command, cwd=project, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_lessons_hold_for_other_seeds(tmp_path):
    gains = []
    for seed in range(3):
        project = a_copy(tmp_path / f"project_{seed}", seed)
        done = run(project)
        assert done.returncode == 0, done.stderr[-3000:]
        out = project / "runs/tiny"
        assert json.loads((out / "data/stage.json").read_text())["parameters"]["SEED"] == seed
        models = json.loads((out / "report/evaluation/report.json").read_text())["models"]
        assert models["teacher"]["accuracy"] > 0.8 and models["student"]["accuracy"] > 0.75
        gains.append(models["student"]["accuracy"] - models["labels_only"]["accuracy"])
    assert sum(gains) > 0  # lesson 05, on average over seeds


@pytest.mark.slow
def test_without_labels_the_lessons_fail(tmp_path):
    project = a_copy(tmp_path / "project", 0)
    with (project / "utils/data.py").open("a") as file:
        file.write(SHUFFLED)
    done = run(project, "--only", "01,02")
    assert done.returncode == 1 and "AssertionError" in done.stderr, done.stderr[-3000:]
    history = pd.read_csv(project / "runs/tiny/teacher/phase_1/teacher.history.csv")
    assert history["val_qwk"].max() < 0.2
