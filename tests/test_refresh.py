"""Outputs of a finished run in the committed notebooks: cleaned, whole, and never stale."""

import json
import shutil

import nbformat
import papermill
import pytest
from nbformat import v4

from utils import __main__ as command
from utils import parameters, runs
from utils.commands import refresh

ALL = sorted((parameters.ROOT / "notebooks").glob("*.ipynb"))
PRINTING = """import sys
from pathlib import Path

print(Path(RUN_DIR).resolve() / "teacher.keras", "/usr/lib/x/gone/module.py", "https://a.b/tmp/x")
print("I0000 oneDNN custom operations are on", file=sys.stderr)
print("10 %\\r20 %\\r100 %")"""
SHOWING = """from IPython.display import HTML, display

widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "bar"}
display(widget, raw=True)
display(HTML('<img src="data:image/png;base64,AA/tmp/AA">'))
len(RUN_DIR) > 0"""


def notebook(*sources, tags=("parameters",)):
    """A notebook whose first code cell declares parameters."""
    cells = [v4.new_markdown_cell("# Title", id="m")]
    for number, source in enumerate(sources):
        metadata = {"tags": list(tags)} if number == 0 else {}
        cells.append(v4.new_code_cell(source, id=f"c{number}", metadata=metadata))
    kernel = {"kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"}}
    return v4.new_notebook(cells=cells, metadata=kernel)


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """A project of one notebook, and a run of it elsewhere, made by papermill."""
    top = tmp_path_factory.mktemp("executed")
    root, run = top / "project", top / "elsewhere" / "run"
    shown, made = (folder / "notebooks" / "01_data.ipynb" for folder in (root, run))
    for path in (shown, made):
        path.parent.mkdir(parents=True)
    nbformat.write(notebook('RUN_DIR = "runs/tiny"\nSEED = 0', PRINTING, SHOWING), shown)
    values = {"RUN_DIR": str(run), "SEED": 0}
    papermill.execute_notebook(shown, made, values, progress_bar=False, cwd=top)
    runs.write_json(run / "data" / "stage.json", {"finished": True})
    return top


@pytest.fixture
def project(executed, tmp_path):
    """A copy of them: the project and its finished run."""
    shutil.copytree(executed, tmp_path, dirs_exist_ok=True)
    return tmp_path / "project", tmp_path / "elsewhere" / "run"


def test_outputs_are_taken_over_without_what_belongs_to_a_machine(project, tmp_path):
    root, run = project
    [path] = refresh.refresh(run, root=root)
    book, text = nbformat.read(path, 4), path.read_text(encoding="utf-8")
    nbformat.validate(book)
    assert [c.get("execution_count") for c in book.cells] == [None, 1, 2, 3]  # none injected
    assert [c.id for c in book.cells] == ["m", "c0", "c1", "c2"]
    assert book.cells[1].metadata["tags"] == ["parameters"]
    assert not refresh.injected(book) and "papermill" not in text and 'stderr",' not in text
    [printed] = book.cells[2].outputs
    assert printed.text == "runs/tiny/teacher.keras module.py https://a.b/tmp/x\n100 %\n"
    picture, value = book.cells[3].outputs
    assert "base64,AA/tmp/AA" in picture.data["text/html"]  # a picture is no path
    assert value.data["text/plain"] == "True" and value.execution_count == 3
    assert str(tmp_path) not in text and str(runs.root()) not in text
    assert refresh.stale(book) == []
    assert refresh.refresh(run, root=root) == [path] and path.read_text() == text  # settles


def test_a_changed_cell_is_stale_and_no_longer_takes_the_old_output(project):
    root, run = project
    [path] = refresh.refresh(run, root=root)
    book = nbformat.read(path, 4)
    book.cells[0].source += " and words, which may change"
    assert refresh.stale(book) == []
    book.cells[2].source += "\n# changed"
    assert refresh.stale(book) == ["c1"]
    nbformat.write(book, path)
    before = path.read_text()
    with pytest.raises(refresh.RefreshError, match=r"cell c1.*--fresh"):
        refresh.refresh(run, root=root)
    assert path.read_text() == before
    book.cells[2].metadata.pop(refresh.MARK)
    assert refresh.stale(book) == ["c1"]  # nor does a mark that is gone hide it


def test_what_cannot_be_refreshed_is_refused_and_nothing_is_written(project, monkeypatch):
    root, run = project
    shown = root / "notebooks" / "01_data.ipynb"
    before = shown.read_text()
    with pytest.raises(refresh.RefreshError, match=r"no .*A1\.ipynb"):
        refresh.refresh(run, [run / "A1.ipynb"], root=root)
    with monkeypatch.context() as patch:
        patch.setattr(refresh, "LARGEST", 1000)
        with pytest.raises(refresh.RefreshError, match=r"kB with its outputs.*largest is of cell"):
            refresh.refresh(run, root=root)
    executed = run / "notebooks" / "01_data.ipynb"
    book = nbformat.read(executed, 4)
    book.cells[2].source = book.cells[2].source.replace("SEED = 0", "SEED = 5")
    nbformat.write(book, executed)
    with pytest.raises(refresh.RefreshError, match="SEED = 5"):
        refresh.refresh(run, root=root)
    assert shown.read_text() == before
    book = nbformat.read(executed, 4)
    book.cells[2].source = book.cells[2].source.replace("SEED = 5", "SEED = 0")
    nbformat.write(book, executed)
    assert refresh.refresh(run, root=root) == [shown]
    runs.write_json(run / "data" / "stage.json", {"finished": False})
    with pytest.raises(refresh.RefreshError, match="no finished 01_data"):
        refresh.refresh(run, root=root)


def test_the_command_reports_in_one_line_what_is_missing(tmp_path, capsys):
    assert command.main(["refresh", str(tmp_path / "none")]) == 1
    assert "has no finished 01_data" in capsys.readouterr().err


def test_an_executed_appendix_is_taken_too(project):
    root, run = project
    book = notebook("SIZE = 3", "SIZE + 1")
    nbformat.write(book, root / "notebooks" / "A1_more.ipynb")
    copy = run / "A1_more.ipynb"
    papermill.execute_notebook(root / "notebooks" / "A1_more.ipynb", copy, progress_bar=False)
    written = refresh.refresh(run, [copy], root=root)
    assert [path.name for path in written] == ["01_data.ipynb", "A1_more.ipynb"]
    assert nbformat.read(written[1], 4).cells[2].outputs[0].data["text/plain"] == "4"


@pytest.mark.parametrize("path", ALL, ids=lambda path: path.stem)
def test_no_committed_output_is_older_than_its_cell(path):
    books = {other: nbformat.read(other, 4) for other in ALL}
    if path.stem == "A2_benchmarks" and not any(c.outputs for c in refresh.code_cells(books[path])):
        pytest.skip("A2 takes a quarter of an hour on an idle machine: not run for these outputs")
    assert refresh.stale(books[path]) == [], "python -m utils run --fresh, then refresh"
    assert len(path.read_bytes()) < refresh.LARGEST
    text = json.dumps([c.outputs for c in refresh.code_cells(books[path])])
    assert str(parameters.ROOT) not in text and refresh.WIDGET not in text
