"""A2: its own code stays short, and the page runs at the smallest sizes."""

from pathlib import Path

import nbformat
import papermill
import pytest

from utils import runs

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "A2_speed.ipynb"
SMALL = {"SPEED_PROFILE": "test", "SPEED_IMAGES": 32, "SPEED_TEACHER_SIZE": 96}
SMALL |= {"SPEED_INPUT_SIZE": 32, "SPEED_SECONDS": 0.2}


def test_the_page_has_at_most_150_lines_of_code():
    cells = nbformat.read(NOTEBOOK, 4).cells
    assert sum(len(c.source.splitlines()) for c in cells if c.cell_type == "code") <= 150


@pytest.mark.slow
def test_the_page_runs_and_writes_its_ratios(tmp_path):
    given = SMALL | {"RUN_DIR": str(tmp_path / "run")}
    out = tmp_path / "A2.ipynb"
    papermill.execute_notebook(NOTEBOOK, out, given, cwd=NOTEBOOK.parent, progress_bar=False)
    found = runs.read_json(tmp_path / "run" / "benchmarks" / "speed.json")
    assert found["distillation"]["V"] == 2 and found["distillation"]["ratio"] > 0
    assert found["input"]["ratio"] > 0 and found["checkpoint"]["share"] > 0
