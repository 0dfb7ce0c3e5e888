"""Code and outputs in the committed notebooks: equal to the source, clean, and never stale."""

import functools
import inspect
import json
import operator

import nbformat
import pytest
from nbformat import v4

from utils import cli, runs, settings
from utils.cli import refresh

SHOWN = "Why.\n\n<!-- source: utils.files.read_json -->\n```python\nold\n```\nThen.\n"


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of one notebook; and an executed copy of the notebook, by hand."""
    monkeypatch.setattr(settings, "ROOT", tmp_path / "project")
    cells = [
        v4.new_markdown_cell(SHOWN, id="text"),
        v4.new_code_cell("SEED = 0", id="first", metadata={"tags": ["parameters"]}),
        v4.new_code_cell("show()", id="second"),
    ]
    book = v4.new_notebook(cells=cells)
    run, shown = tmp_path / "run", tmp_path / "project" / "notebooks" / "01_data.ipynb"
    for folder in (shown.parent, run / "notebooks"):
        folder.mkdir(parents=True)
    nbformat.write(book, shown)
    book.cells.insert(2, v4.new_code_cell("SEED = 0", metadata={"tags": ["injected-parameters"]}))
    book.metadata.papermill = {"parameters": {"SEED": 0}}
    book.cells[3].outputs = [
        v4.new_output("stream", text=f"{run}/teacher.keras\nhttps://a.b/tmp/x\n"),
        v4.new_output("stream", name="stderr", text="I0000 oneDNN is on"),
        v4.new_output("display_data", {"image/png": "A/tmp/A"}),
        v4.new_output("execute_result", {"text/plain": "True"}, execution_count=7),
    ]
    executed = run / "notebooks" / "01_data.ipynb"
    nbformat.write(book, executed)
    return shown, executed, run


def test_code_and_outputs_are_taken_over_without_what_belongs_to_a_machine(project, capsys):
    shown, _, run = project
    assert cli.main(["refresh", str(run), "--check"]) == 1
    assert cli.main(["refresh", str(run)]) == 0
    book = nbformat.read(shown, 4)
    nbformat.validate(book)
    assert book.cells[0].source == SHOWN.replace("old\n", inspect.getsource(runs.read_json))
    assert [c.get("execution_count") for c in book.cells] == [None, 1, 2]
    words, picture, value = book.cells[2].outputs
    assert words.text == "runs/tiny/teacher.keras\nhttps://a.b/tmp/x\n"
    assert "image/png" in picture.data and value.execution_count == 2
    capsys.readouterr()
    assert cli.main(["refresh", str(run), "--check"]) == cli.main(["refresh", "--check"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("place", "value", "said"),
    [
        (("cells", 3, "source"), "show(2)", "--fresh"),
        (("metadata", "papermill", "parameters"), {"SEED": 5}, "other SEED: "),
        (("cells", 3, "outputs", 0, "text"), "in\n/home/someone/x", "names a folder"),
    ],
)
def test_what_cannot_be_taken_is_refused(project, capsys, place, value, said):
    shown, executed, run = project
    before, book = shown.read_text(), json.loads(executed.read_text())
    functools.reduce(operator.getitem, place[:-1], book)[place[-1]] = value
    executed.write_text(json.dumps(book))
    assert cli.main(["refresh", str(run)]) == 1
    assert said in capsys.readouterr().err and shown.read_text() == before


def test_the_notebooks_show_the_code_as_it_is(capsys):
    assert cli.main(["refresh", "--check"]) == 0, capsys.readouterr().out


@pytest.mark.parametrize("path", settings.ROOT.glob("notebooks/*.ipynb"), ids=lambda p: p.stem)
def test_no_committed_output_is_older_than_its_cell(path):
    code = refresh.code_cells(nbformat.read(path, 4))
    shown = [cell for cell in code if cell.outputs]
    stale = [c.id for c in shown if c.metadata.get("source_hash") != refresh.source_hash(c)]
    assert stale == [], "python -m utils run --fresh, then python -m utils refresh RUN_DIR"
    assert len(path.read_bytes()) < 1_000_000, "larger ones are not shown on GitHub"
    text = json.dumps([cell.outputs for cell in code])
    assert not refresh.MACHINE.search(text)
