"""The one address in CITATION.cff, written into set-up cells and README, and fetched from."""

import shutil
import subprocess
import sys

import nbformat
import pytest

from utils import __main__ as command
from utils import parameters, runs
from utils.commands import publish, refresh

ROOT = parameters.ROOT
GITHUB = "https://github.com/someone/knees"


def copy(folder, address):
    """What `publish` reads and writes, with an address in CITATION.cff."""
    shutil.copytree(ROOT / "notebooks", folder / "notebooks")
    shutil.copy(ROOT / "README.md", folder)
    lines = (ROOT / "CITATION.cff").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("repository-code:")]
    lines += [f"repository-code: {address}"] * bool(address)
    (folder / "CITATION.cff").write_text("\n".join(lines) + "\n")
    return folder


def first_cells(root):
    books = [nbformat.read(path, 4) for path in sorted((root / "notebooks").glob("*.ipynb"))]
    return {refresh.code_cells(book)[0].source for book in books if book.cells[0].id != "a1-01"}


def test_notebooks_and_readme_are_as_the_citation_says(tmp_path):
    assert first_cells(ROOT) == {publish.setup_cell(*publish.published(ROOT))}
    for name in ("notebooks", "README.md", "CITATION.cff"):
        subprocess.run(["cp", "-r", str(ROOT / name), str(tmp_path)], check=True)
    assert publish.publish(tmp_path) == [], "python -m utils publish"


def test_an_address_reaches_every_notebook_and_readme_and_leaves_again(tmp_path):
    root = copy(tmp_path / "project", GITHUB)
    written = {path.name for path in publish.publish(root)}
    assert written >= {f"{name}.ipynb" for name in runs.NOTEBOOKS} | {"README.md"}
    [cell] = first_cells(root)
    assert f"-b v1.0.0 {GITHUB} /tmp/" in cell
    assert len([line for line in cell.splitlines() if line.strip()]) <= 6
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        nbformat.validate(nbformat.read(path, 4))
        before = refresh.stale(nbformat.read(ROOT / "notebooks" / path.name, 4))
        assert refresh.stale(nbformat.read(path, 4)) == before, "its outputs are still its own"
    readme = (root / "README.md").read_text()
    for link in (
        "https://kaggle.com/kernels/welcome?src=https://github.com/someone/knees/blob/v1.0.0/"
        "notebooks/01_data.ipynb",
        "https://colab.research.google.com/github/someone/knees/blob/v1.0.0/notebooks/"
        "06_evaluation.ipynb",
    ):
        assert f"]({link})" in readme
    assert publish.publish(root) == [], "twice is once"

    shutil.rmtree(root)
    publish.publish(copy(root, ""))
    assert "![Open in" not in (root / "README.md").read_text()
    assert first_cells(root) == {publish.setup_cell("", "v1.0.0")}


def run_cell(source, folder):
    """A set-up cell run by IPython in `folder`: status and what it said."""
    code = f"{source}\nfrom utils import runs\nprint(runs.__file__)"
    done = subprocess.run(
        [sys.executable, "-m", "IPython", "--no-banner", "--colors=NoColor", "-c", code],
        cwd=folder, capture_output=True, text=True,
    )  # fmt: skip
    return done.returncode, done.stdout + done.stderr


@pytest.fixture
def repository(tmp_path):
    """A git repository whose tag v1.0.0 holds the package."""
    folder = tmp_path / "repository"
    shutil.copytree(ROOT / "utils", folder / "utils", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(ROOT / "notebooks" / "profiles", folder / "notebooks" / "profiles")
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    for arguments in (["init", "-q"], ["add", "."], ["commit", "-qm", "x"], ["tag", "v1.0.0"]):
        subprocess.run(["git", *who, *arguments], cwd=folder, check=True)
    return folder


def test_the_cell_fetches_the_tag_once_and_takes_what_is_near_first(tmp_path, repository):
    empty, here = tmp_path / "empty", tmp_path / "fetched"
    empty.mkdir()
    (empty / "utils.py").write_text("raise ImportError('another package of this name')")
    cell = publish.setup_cell(repository.as_uri(), "v1.0.0")
    cell = cell.replace("/tmp/knee-distillation-v1.0.0", str(here))
    for _ in range(2):  # the next notebook of the same session finds it
        status, said = run_cell(cell, empty)
        assert status == 0 and said.strip() == str(here / "utils" / "runs.py")
    shutil.rmtree(here)
    status, said = run_cell(cell, repository)
    assert said.strip() == str(repository / "utils" / "runs.py") and not here.exists()


def test_where_nothing_can_be_fetched_the_cell_says_what_to_do(tmp_path):
    cell = publish.setup_cell((tmp_path / "nowhere").as_uri(), "v9.9.9")
    _, said = run_cell(cell, tmp_path)
    assert "FileNotFoundError" in said and "Turn the internet on, or Add Input" in said


@pytest.mark.parametrize("address", ["https://x.org/a; rm -rf b", "$(whoami)", "a b"])
def test_what_no_shell_should_be_given_is_refused(tmp_path, monkeypatch, capsys, address):
    monkeypatch.setattr(parameters, "ROOT", copy(tmp_path / "project", f'"{address}"'))
    assert command.main(["publish"]) == 2
    assert "is no address" in capsys.readouterr().err
