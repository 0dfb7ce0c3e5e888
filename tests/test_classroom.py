"""The student's copy: whole, without solutions and outputs; a ready run is taken up."""

import json
import re

import nbformat
import pytest

from utils import __main__ as command
from utils import parameters, runs
from utils.commands import classroom

DONE = parameters.NOTEBOOKS[:3]


@pytest.fixture
def run(tmp_path):
    """What notebooks 01 to 03 leave, as files: finished, with the notebooks' own parameters."""
    folder, before = tmp_path / "made", None
    for name in DONE:
        wanted = runs.identity(folder, name, {})
        assert wanted["upstream"] == before
        before = f"id of {name}"
        stage = wanted | {"id": before, "finished": True, "stopped": None}
        runs.write_json(folder / runs.FOLDERS[name] / "stage.json", stage)
    (folder / "teacher/phase_1/teacher.keras").write_bytes(b"model")
    (folder / "teacher/phase_1/teacher.checkpoint.npz").write_bytes(b"large")
    return folder


def test_the_copy_has_all_that_students_need_and_nothing_that_tells(tmp_path):
    out = tmp_path / "class"
    assert command.main(["class", "--out", str(out)]) == 0
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "requirements.txt", "LICENSE", "utils/runs.py"} <= there
    assert {f"notebooks/{name}.ipynb" for name in parameters.NOTEBOOKS} <= there
    assert "notebooks/profiles/tiny.yaml" in there and "notebooks/README.md" not in there
    assert not any("__pycache__" in name or name.startswith("tests") for name in there)
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, 4)
        nbformat.validate(book)
        assert not any("solution" in c.metadata.get("tags", []) for c in book.cells)
        assert not any(c.get("outputs") or c.get("execution_count") for c in book.cells)
        original = nbformat.read(parameters.ROOT / "notebooks" / path.name, 4)
        kept = [c.source for c in original.cells if "solution" not in c.metadata.get("tags", [])]
        assert [c.source for c in book.cells] == kept
    assert parameters.declared(out).keys() == parameters.declared().keys()


def test_solutions_and_outputs_are_what_is_taken_out():
    cell = nbformat.v4.new_code_cell("1 + 1", execution_count=1, metadata={"made_from": "x"})
    cell.outputs = [nbformat.v4.new_output("stream", text="2")]
    told = nbformat.v4.new_markdown_cell("It is 2.", metadata={"tags": ["solution"]})
    book = classroom.without_solutions(nbformat.v4.new_notebook(cells=[cell, told]))
    assert [c.source for c in book.cells] == ["1 + 1"]
    assert (cell.outputs, cell.execution_count, dict(cell.metadata)) == ([], None, {})


def test_a_ready_run_is_one_that_the_next_notebook_takes_up(tmp_path, run):
    out = classroom.write(tmp_path / "class", run, "04")
    copied = out / classroom.READY
    assert [runs.state(copied, name, {}, out) for name in DONE] == ["done"] * 3
    assert runs.earlier_settings(copied, "04_teacher_phase_3")["PHASE_1_EPOCHS"] > 0
    assert (copied / "teacher/phase_1/teacher.keras").read_bytes() == b"model"
    assert not list(copied.rglob("*.checkpoint.npz"))
    early = classroom.write(tmp_path / "early", run, "02") / classroom.READY
    assert [p.name for p in early.iterdir()] == ["data"]


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--before", "03"], "--ready"),
        (["--ready", "RUN", "--before", "09"], "one of 01_data"),
        (["--ready", "RUN"], "04_teacher_phase_3 in .* is missing.*--fresh"),
        (["--ready", "OTHER", "--before", "02"], "of other parameters"),
    ],
)
def test_what_cannot_be_given_away_is_refused_and_leaves_nothing(
    tmp_path, run, capsys, arguments, said
):
    if "OTHER" in arguments:
        stage = run / "data" / "stage.json"
        saved = json.loads(stage.read_text())
        saved["parameters"]["SEED"] = 7
        stage.write_text(json.dumps(saved))
    arguments = [str(run) if word in ("RUN", "OTHER") else word for word in arguments]
    assert command.main(["class", "--out", str(tmp_path / "class"), *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(said, error) and len(error.splitlines()) <= 3
    assert {path.name for path in tmp_path.iterdir()} == {"made"}


def test_an_existing_folder_is_never_written_into(tmp_path, capsys):
    assert command.main(["class", "--out", str(tmp_path)]) == 2
    assert "exists already" in capsys.readouterr().err
