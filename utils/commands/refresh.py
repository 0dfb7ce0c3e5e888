"""Give the committed notebooks the outputs of a finished run, so that GitHub shows them.

Outputs and execution counts are taken over; what belongs to one machine or one moment is not:
widgets, what went to stderr, absolute folders, papermill's notes and its injected cell. Each cell
keeps a mark of the source that its output came from, so that a stale output shows.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import re
import sys
from collections.abc import Iterable
from pathlib import Path

import nbformat

from utils import parameters, runs

MARK = "made_from"  # in a code cell's metadata: the digest of the source that its output came from
LARGEST = 400_000  # bytes of a notebook, which GitHub still shows
WIDGET = "application/vnd.jupyter.widget-view+json"
PICTURE = re.compile(r"(data:image/[a-z+]+;base64,[A-Za-z0-9+/=\\n]+)")
# An absolute folder of whatever machine, up to its last slash; not the path within an address.
FOLDER = re.compile(
    r"(?<![\w.:/~-])(?:/(?:home|root|tmp|Users|var|mnt|usr|opt|work|private)/|[A-Z]:\\{1,2}Users\\)"
    r"(?:[^\s\"'<>()\[\],;/\\]+[/\\]+)*"
)


class RefreshError(RuntimeError):
    """A run whose outputs the notebooks cannot take; the message says what to do."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m utils refresh`."""
    parser.add_argument(
        "run",
        nargs="?",
        default="runs/tiny",
        metavar="RUN",
        help="the folder of a finished run (default: runs/tiny)",
    )
    parser.add_argument(
        "--also",
        nargs="+",
        default=[],
        metavar="FILE",
        help="executed copies of other notebooks, such as A1_mixed_precision.ipynb",
    )


def main(arguments: argparse.Namespace) -> int:
    """Refresh as the command line asks; return the exit status."""
    try:
        written = refresh(arguments.run, arguments.also)
    except RefreshError as error:
        print(error, file=sys.stderr)
        return 1
    for path in written:
        print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")
    return 0


def refresh(
    run: str | Path, also: Iterable[str | Path] = (), root: Path | None = None
) -> list[Path]:
    """Write all notebooks anew with the outputs of `run`, or none of them.

    Args:
        run: a run's folder, all of whose stages are finished.
        also: executed copies of notebooks outside the series, told by their file names.
        root: the project; default the one that this file is part of.

    Returns:
        The notebooks written.

    Raises:
        RefreshError: a stage or an executed notebook is missing, its cells are not those of the
            project's notebook, its parameters are others, or the result would be too large.
    """
    root, run = Path(root or runs.root()).resolve(), Path(run).expanduser().resolve()
    copies = {name: run / "notebooks" / f"{name}.ipynb" for name in parameters.declared(root)}
    for name, path in copies.items():
        if not path.is_file() or not (runs.read_stage(run, name) or {}).get("finished"):
            raise RefreshError(
                f"{run} has no finished {name}: let `python -m utils run --out {run}` end first."
            )
    copies |= {Path(path).stem: Path(path) for path in also}
    texts = {}
    for name, path in copies.items():
        shown = root / "notebooks" / f"{name}.ipynb"
        for needed in (shown, path):
            if not needed.is_file():
                raise RefreshError(f"There is no {needed}.")
        book, executed = nbformat.read(shown, 4), nbformat.read(path, 4)
        try:
            check_parameters(book, executed)
            made = with_outputs(book, executed, places(run, root, executed))
        except RefreshError as error:
            raise RefreshError(f"{path}: {error}") from error
        texts[shown] = nbformat.writes(made) + "\n"
        if (size := len(texts[shown].encode())) >= LARGEST:
            raise RefreshError(
                f"{path}: {size / 1000:.0f} kB with its outputs, {LARGEST // 1000} are the limit; "
                f"the largest is of {largest(made)}."
            )
    for shown, text in texts.items():
        runs.write_atomic(shown, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return list(texts)


def digest(source: str) -> str:
    """A short mark of a cell's source."""
    return hashlib.sha256(source.encode()).hexdigest()[:16]


def code_cells(book) -> list:
    """The code cells, without the one that papermill injects."""
    return [
        cell
        for cell in book.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


def stale(book) -> list[str]:
    """The ids of code cells that changed since their output was made, or that were never run."""
    return [cell.id for cell in code_cells(book) if cell.metadata.get(MARK) != digest(cell.source)]


def injected(book) -> dict[str, object]:
    """What papermill set over the notebook's own parameters: `{NAME: value}`."""
    found = {}
    for cell in book.cells:
        if "injected-parameters" in cell.metadata.get("tags", []):
            found |= parameters.read_cell(cell.source)
    return found


def check_parameters(book, executed) -> None:
    """Whether a notebook was executed with the parameters that it shows.

    Where it ran (RUN_DIR and the other shared ones) is not asked.

    Raises:
        RefreshError: other parameters.
    """
    own = {}
    for cell in book.cells:
        if "parameters" in cell.metadata.get("tags", []):
            own = parameters.read_cell(cell.source)
    others = [
        f"{name} = {value!r} (the notebook: {own.get(name)!r})"
        for name, value in injected(executed).items()
        if name not in parameters.SHARED and value != own.get(name)
    ]
    if others:
        raise RefreshError(
            f"made with other parameters: {'; '.join(others[:6])}. Refresh from a run of profile "
            "tiny."
        )


def with_outputs(book, executed, known: dict[str, str]):
    """A copy of `book` with the outputs of `executed`, cleaned, and its cells marked.

    Args:
        book: the project's notebook; its sources, ids, tags and kernel stay.
        executed: the same notebook after a run.
        known: folders of this machine to what stands in their place.

    Raises:
        RefreshError: the code cells differ, or one was not run.
    """
    made = copy.deepcopy(book)
    pairs = list(zip(code_cells(made), code_cells(executed), strict=False))
    differing = [cell.id for cell, other in pairs if cell.source.strip() != other.source.strip()]
    if differing or len(code_cells(made)) != len(code_cells(executed)):
        raise RefreshError(
            f"its code is not the notebook's any more (cell {(differing or ['at the end'])[0]}): "
            "run the series again with --fresh."
        )
    for count, (cell, other) in enumerate(pairs, 1):
        if other.source.strip() and other.execution_count is None:
            raise RefreshError(f"cell {cell.id} was not run.")
        cell.execution_count = count
        cell.outputs = cleaned(other.outputs, known, count)
        cell.metadata[MARK] = digest(cell.source)
    return made


def cleaned(outputs: Iterable, known: dict[str, str], count: int) -> list:
    """Outputs without stderr, widgets and folders; printed lines in one piece."""
    kept = []
    for output in outputs:
        output = copy.deepcopy(output)
        if output.output_type == "stream":
            if output.name == "stderr":
                continue
            output.text = without_folders(overwritten(output.text), known)
            if kept and kept[-1].output_type == "stream":
                kept[-1].text += output.text
                continue
        elif output.output_type == "error":
            output.evalue = without_folders(output.evalue, known)
            output.traceback = [without_folders(line, known) for line in output.traceback]
        else:
            if WIDGET in output.data:
                continue
            for kind, value in output.data.items():
                if isinstance(value, str) and (kind.startswith("text/") or "svg" in kind):
                    output.data[kind] = without_folders(value, known)
            output.metadata = nbformat.NotebookNode()
            if "execution_count" in output:
                output.execution_count = count
        kept.append(output)
    return [o for o in kept if o.output_type != "stream" or o.text.strip()]


def overwritten(text: str) -> str:
    """What a terminal still shows of each line after its carriage returns."""
    lines = text.replace("\r\n", "\n").split("\n")
    return "\n".join(line.rstrip("\r").rsplit("\r", 1)[-1] for line in lines)


def places(run: Path, root: Path, executed) -> dict[str, str]:
    """Folders that outputs may name, to what stands in their place."""
    shown = "runs/tiny"
    told = str(injected(executed).get("RUN_DIR", ""))
    known = {str(run): shown, str(root / shown): shown}
    if Path(told).is_absolute():
        known[told.rstrip("/")] = shown
    elif told:
        known[str(root / told)] = shown
    return known | {f"{root}/": "", str(root): ".", str(Path.home()): "~"}


def without_folders(text: str, known: dict[str, str]) -> str:
    """Text in which no folder of a machine is left; pictures stay as they are."""
    parts = PICTURE.split(text)
    for number in range(0, len(parts), 2):
        for folder in sorted(known, key=len, reverse=True):
            parts[number] = parts[number].replace(folder, known[folder])
        parts[number] = FOLDER.sub("", parts[number])
    return "".join(parts)


def largest(book) -> str:
    """The cell with the most output, in words."""
    sizes = {cell.id: len(str(cell.outputs)) for cell in code_cells(book)}
    return f"cell {max(sizes, key=sizes.get)} ({max(sizes.values()) / 1000:.0f} kB)"
