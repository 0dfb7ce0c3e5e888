"""`python -m utils refresh`: fills fenced blocks after `<!-- source: utils.layers.CBAM -->`.

With a RUN_DIR, outputs of its notebooks are taken over, each with a hash of the cell's source.
"""

import argparse
import hashlib
import inspect
import json
import pydoc
import re
from pathlib import Path

import nbformat

from utils import runs, settings

BLOCK = re.compile(r"(<!-- source: (utils\.[\w.]+) -->\n+```python\n)(.*?)(?=^```$)", re.S | re.M)
# An absolute path of some machine, in JSON; not the path within an address.
MACHINE = re.compile(r"(?:(?<![\w.:/~+=-])|(?<=\\n))/(?:home|root|tmp|Users|var|mnt|opt|work)/")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", nargs="?", metavar="RUN_DIR", help="take over this run's outputs")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 if one differs")


def main(arguments: argparse.Namespace) -> int:
    """Refresh all notebooks, or none; ValueError for a run whose outputs they cannot take."""
    changed = {}
    for path in sorted((settings.ROOT / "notebooks").glob("*.ipynb")):
        book, before = nbformat.read(path, 4), nbformat.read(path, 4)
        for cell in book.cells:
            if cell.cell_type == "markdown":
                cell.source = BLOCK.sub(lambda b: b[1] + source_of(b[2]), cell.source)
        executed = Path(arguments.run or "-", "notebooks", path.name)
        if executed.exists():
            take_outputs(book, executed)
        if book != before:
            changed[path] = nbformat.writes(book) + "\n"
    for path, text in changed.items():
        print(f"{path.name} {'differs' if arguments.check else 'is refreshed'}")
        if not arguments.check:
            runs.write_atomic(path, lambda file, text=text: file.write_text(text, encoding="utf-8"))
    return int(arguments.check and bool(changed))


def source_of(name: str) -> str:
    """The source of a class or function, such as "utils.layers.CBAM"."""
    if (found := pydoc.locate(name)) is None:
        raise ValueError(f"A notebook shows {name}, which is not there.")
    return inspect.getsource(found)


def source_hash(cell) -> str:
    """A short mark of a cell's source."""
    return hashlib.sha256(cell.source.strip().encode()).hexdigest()[:12]


def code_cells(book) -> list:
    """The code cells, without the one that papermill adds."""
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    return [cell for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]


def take_outputs(book, path: Path) -> None:
    """Give `book` the outputs of its executed copy, without this machine's folders and messages."""
    executed, run = nbformat.read(path, 4), path.absolute().parents[1]
    used, tiny = executed.metadata.papermill.parameters, settings.validate({})
    if other := [n for n in used if n in settings.OWNER and used[n] != tiny[n]]:
        raise ValueError(f"{run} was made with other {', '.join(other)}: take one of profile tiny.")
    ours, theirs = code_cells(book), code_cells(executed)
    if [source_hash(cell) for cell in ours] != [source_hash(cell) for cell in theirs]:
        raise ValueError(f"{path} ran other code than the notebook has: run it with --fresh.")
    for number, (cell, other) in enumerate(zip(ours, theirs, strict=True), 1):
        shown = [o for o in other.outputs if not re.search("'stderr'|:tensorflow:", str(o))]
        text = json.dumps(shown).replace(str(run), "runs/tiny").replace(f"{settings.ROOT}/", "")
        if found := MACHINE.search(text):
            raise ValueError(f"{path}: an output of cell {cell.id} names a folder, {found[0]}…")
        cell.outputs, cell.execution_count = nbformat.from_dict(json.loads(text)), number
        cell.metadata["source_hash"] = source_hash(cell)
        for output in cell.outputs:
            if "execution_count" in output:
                output.execution_count = number
