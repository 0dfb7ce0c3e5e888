"""The notebooks as files, and run as a user runs them: papermill's parameters, then nbval."""

import ast
import json
import subprocess
import sys
from pathlib import Path
from statistics import median

import papermill
import pytest

from utils import parameters

ROOT = parameters.ROOT
SERIES = [ROOT / "notebooks" / f"{name}.ipynb" for name in parameters.NOTEBOOKS]
ALL = sorted((ROOT / "notebooks").glob("*.ipynb"))


def cells(path, kind):
    book = json.loads(path.read_text(encoding="utf-8"))
    return [c for c in book["cells"] if c["cell_type"] == kind]


def lines(cell):
    return [line for line in "".join(cell["source"]).splitlines() if line.strip()]


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_a_notebook_reads_well(path):
    headings = [
        line for cell in cells(path, "markdown") for line in lines(cell) if line.startswith("# ")
    ]
    assert len(headings) == 1
    lengths = [len(lines(cell)) for cell in cells(path, "code")]
    assert max(lengths) <= 18 and median(lengths) <= 5
    assert path.stat().st_size < 400_000


@pytest.mark.parametrize("path", ALL, ids=lambda p: p.stem)
def test_a_notebook_has_its_kernel_and_plain_parameters(path):
    book = json.loads(path.read_text(encoding="utf-8"))
    assert book["metadata"]["kernelspec"]["name"] == "python3"
    assert book["metadata"]["language_info"]["name"] == "python"
    for node in ast.parse(parameters.parameter_cell(path)).body:
        assert isinstance(node, ast.Assign | ast.AnnAssign)
        ast.literal_eval(node.value)


def test_the_set_up_cell_is_the_same_everywhere():
    first = {"".join(cells(path, "code")[0]["source"]) for path in SERIES}
    assert len(first) == 1 and len([x for x in first.pop().splitlines() if x.strip()]) <= 6


@pytest.mark.parametrize("path", SERIES, ids=lambda p: p.stem)
def test_two_or_three_cells_are_to_be_predicted(path):
    asked = ["".join(c["source"]).count("**Predict, then run:**") for c in cells(path, "markdown")]
    assert 2 <= sum(asked) <= 3 and max(asked) == 1


def test_a_parameter_stands_in_exactly_one_notebook():
    owners = {}
    for notebook, own in parameters.declared().items():
        for name in own:
            owners.setdefault(name, []).append(notebook)
    several = {name: where for name, where in owners.items() if len(where) > 1}
    assert set(several) <= set(parameters.SHARED), several


@pytest.mark.parametrize("name", ["tiny", "test", "cpu", "kaggle"])
def test_a_profile_is_one_that_the_series_takes(name):
    assert parameters.check(parameters.load_profile(name))["RUN_DIR"] == f"runs/{name}"


def test_the_series_runs_from_papermills_parameters_under_nbval(tmp_path):
    """Each notebook gets the test profile by `prepare_only`, then nbval runs it, in order."""
    values = parameters.load_profile("test") | {"RUN_DIR": str(tmp_path / "run")}
    (tmp_path / "notebooks").mkdir()
    (tmp_path / "utils").symlink_to(ROOT / "utils")  # nbval's kernel starts beside the notebook
    prepared = []
    for path in SERIES:
        prepared.append(tmp_path / "notebooks" / path.name)
        papermill.execute_notebook(
            path, prepared[-1], values, prepare_only=True, progress_bar=False
        )
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider",
         "-c", "/dev/null", "--rootdir", str(tmp_path), *map(str, prepared)],
        cwd=ROOT, capture_output=True, text=True, timeout=1200,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-4000:]
    report = json.loads((tmp_path / "run/report/report.json").read_text(encoding="utf-8"))
    assert report["dataset"]["synthetic"] and report["target"]["teacher_met"] is None
    assert (tmp_path / "run/student/student.keras").exists()
    for csv in sorted((tmp_path / "run").rglob("history*.csv")):
        epochs = [int(row.split(",")[0]) for row in Path(csv).read_text().splitlines()[1:]]
        assert epochs == list(range(1, len(epochs) + 1))


@pytest.mark.parametrize("stop", ["NOT_A_PARAMETER", "PHASE_1_EPOCHS"])
def test_a_notebook_alone_refuses_what_it_cannot_run_with(tmp_path, stop):
    values = {"RUN_DIR": str(tmp_path / "run"), stop: -1}
    with pytest.raises(papermill.PapermillExecutionError, match=stop):
        papermill.execute_notebook(
            SERIES[1], tmp_path / "out.ipynb", values, cwd=ROOT, progress_bar=False
        )
    assert not (tmp_path / "run").exists()


def test_the_lesson_on_precision_passes_nbval_in_three_minutes(tmp_path):
    lesson = ROOT / "notebooks" / "A1_mixed_precision.ipynb"
    subprocess.run(
        [sys.executable, "-m", "pytest", "--nbval-lax", "-q", "-p", "no:cacheprovider",
         "-c", "/dev/null", "--rootdir", str(ROOT), str(lesson)],
        cwd=tmp_path, check=True, timeout=180,
    )  # fmt: skip
