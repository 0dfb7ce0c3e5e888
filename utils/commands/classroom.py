"""Write the copy of the series that students get: no solutions, no outputs, perhaps a ready run.

What stays behind: the cells tagged "solution", what notebooks printed and drew (a prediction is
worth little when the answer stands below), the teacher's page, tests and dotfiles.
"""

from __future__ import annotations

import argparse
import shutil
import sys
from pathlib import Path

import nbformat

from utils import parameters, runs

READY = "runs/tiny"  # the notebooks' own RUN_DIR
START = """# Knee distillation: the student's copy

With Python 3.11 or 3.12, in this folder:

    python -m venv .venv
    . .venv/bin/activate              (Windows: .venv\\Scripts\\activate)
    pip install -r requirements.txt jupyterlab
    jupyter lab notebooks/01_data.ipynb

Run the cells in order. Where a cell says "Predict, then run", write your guess down first.
In an exercise's cell replace `answer = None` by a function of that name and run it: it says
"Right" or "Not yet", with a hint.
"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m utils class`."""
    parser.add_argument("--out", required=True, metavar="DIR", help="a folder that does not exist")
    parser.add_argument(
        "--ready",
        metavar="RUN",
        help="put a finished run in, such as runs/tiny, so that any notebook can begin",
    )
    parser.add_argument(
        "--before",
        metavar="04",
        help="of that run, only what the notebooks before this one made",
    )


def main(arguments: argparse.Namespace) -> int:
    """Write the student's copy as the command line asks; return the exit status."""
    try:
        out = write(Path(arguments.out), arguments.ready, arguments.before)
    except parameters.ParameterError as error:
        print(error, file=sys.stderr)
        return 2
    print(f"Written to {out}: give it away as it is, README.md says how to begin.")
    return 0


def write(
    out: Path, ready: str | Path | None = None, before: str | None = None, root: Path | None = None
) -> Path:
    """Write the student's copy to `out`, whole or not at all.

    Args:
        out: a folder that does not exist yet.
        ready: a run, made with the notebooks' own parameters, that goes along as `runs/tiny`.
        before: a notebook's number, such as "04": only stages before it go along.
        root: the project; default the one that this file is part of.

    Returns:
        `out`.

    Raises:
        parameters.ParameterError: `out` exists, no such notebook, or a run that is not finished or
            was made with other parameters.
    """
    root, out = Path(root or runs.root()), Path(out).expanduser()
    if out.exists():
        raise parameters.ParameterError(f"{out} exists already: name a folder that does not.")
    if before and not ready:
        raise parameters.ParameterError("--before says which part of a run: give --ready RUN too.")
    stages = ready_stages(Path(ready).expanduser(), before, root) if ready else []
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    (part / "notebooks").mkdir(parents=True)
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(root / "utils", part / "utils", ignore=no_caches)
    shutil.copytree(root / "notebooks" / "profiles", part / "notebooks" / "profiles")
    for name in ("requirements.txt", "LICENSE"):
        shutil.copy(root / name, part)
    (part / "README.md").write_text(START, encoding="utf-8")
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book = without_solutions(nbformat.read(path, 4))
        nbformat.write(book, part / "notebooks" / path.name)
    for folder in stages:
        shutil.copytree(
            Path(ready) / folder,
            part / READY / folder,
            ignore=shutil.ignore_patterns("*.checkpoint.npz", "phantoms"),
        )
    part.rename(out)
    return out


def ready_stages(run: Path, before: str | None, root: Path) -> list[str]:
    """Folders of the stages that go along.

    Raises:
        parameters.ParameterError: no such notebook, a stage that is not finished, or one made with
            other parameters than the notebooks show, which they would set aside.
    """
    names = list(parameters.declared(root))
    if before is not None:
        later = [n for n in names if n.startswith(before)]
        if len(later) != 1:
            raise parameters.ParameterError(f"--before {before}: one of {', '.join(names)}.")
        names = names[: names.index(later[0])]
    for name in names:
        if (condition := runs.state(run, name, {}, root)) != "done":
            what = {"stale": "of other parameters or data than the notebooks show"}
            raise parameters.ParameterError(
                f"{name} in {run} is {what.get(condition, condition)}: make a ready run with "
                f"`python -m utils run --out {run} --fresh`."
            )
    views = ["views"] if "05_distillation" in names else []
    return [runs.FOLDERS[name] for name in names] + views


def without_solutions(book):
    """The notebook without the cells tagged "solution" and without any output; changes `book`."""
    book.cells = [cell for cell in book.cells if "solution" not in cell.metadata.get("tags", [])]
    for cell in book.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
            cell.metadata.pop("made_from", None)
    return book
