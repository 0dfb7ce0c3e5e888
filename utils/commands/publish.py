"""Write where the project is published into what people open: set-up cells, README's badges.

The address stands in one place, `repository-code` of CITATION.cff; the tag is its `version` after a
"v". Without an address the set-up cell fetches nothing and there are no badges.
"""

from __future__ import annotations

import argparse
import re
import sys
from pathlib import Path

import nbformat
import yaml

from utils import runs
from utils.commands import refresh

FIND = """import sys
from pathlib import Path

places = [Path(), Path(".."), *Path("/kaggle/input").glob("**/knee-distillation-code")]
"""
ATTACHED = """found = [place.resolve() for place in places if (place / "utils/runs.py").exists()]
assert found, "Add Input > Datasets > knee-distillation-code, or run this inside the project."
sys.path.insert(0, str(found[0]))"""
# The shell prints the folder, or what is to be done, which the path's error then says.
FETCHED = """if not (found := [place for place in places if (place / "utils/runs.py").exists()]):
    found = !(git clone -q -b {tag} {address} {here}; ls -d {here} || echo {remedy}) 2>/dev/null
sys.path.insert(0, str(Path(found[0]).resolve(strict=True)))"""
REMEDY = "Turn the internet on, or Add Input, Datasets, knee-distillation-code"
PLACES = {  # name: its badge, and what opens a file of GitHub there
    "Kaggle": (
        "https://kaggle.com/static/images/open-in-kaggle.svg",
        "https://kaggle.com/kernels/welcome?src=https://github.com/",
    ),
    "Colab": (
        "https://colab.research.google.com/assets/colab-badge.svg",
        "https://colab.research.google.com/github/",
    ),
}
BADGES = re.compile(r"^!\[Open in .*\n\n", re.MULTILINE)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """`python -m utils publish` has no options."""


def main(arguments: argparse.Namespace) -> int:
    """Write set-up cells and badges; return the exit status."""
    try:
        written = publish()
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    print(
        f"Written: {', '.join(path.name for path in written)}." if written else "All is as it was."
    )
    return 0


def publish(root: Path | None = None) -> list[Path]:
    """Bring README and the notebooks' first code cell to what CITATION.cff says.

    Args:
        root: the project; default the one that this file is part of.

    Returns:
        The files that changed.

    Raises:
        ValueError: an address that no shell should be given.
    """
    root = Path(root or runs.root())
    address, tag = published(root)
    written = []
    wanted = setup_cell(address, tag)
    for path in sorted((root / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, 4)
        first = refresh.code_cells(book)[0]
        if first.source.startswith(FIND) and first.source != wanted:
            first.source = wanted
            if refresh.MARK in first.metadata:  # it prints nothing, so nothing is out of date
                first.metadata[refresh.MARK] = refresh.digest(wanted)
            nbformat.write(book, path)
            written.append(path)
    readme = root / "README.md"
    text = readme.read_text(encoding="utf-8")
    made = BADGES.sub("", text).replace("\n![", f"\n{badges(address, tag)}![", 1)
    if made != text:
        readme.write_text(made, encoding="utf-8")
        written.append(readme)
    return written


def published(root: Path) -> tuple[str, str]:
    """Address, "" before it is known, and tag.

    Raises:
        ValueError: an address or a tag with anything but what addresses are made of.
    """
    citation = yaml.safe_load((root / "CITATION.cff").read_text(encoding="utf-8"))
    address, tag = citation.get("repository-code") or "", f"v{citation['version']}"
    for name, value in (("repository-code", address), ("version", tag)):
        if not re.fullmatch(r"[\w.:/@~+-]*", value):
            raise ValueError(f"CITATION.cff: {name} {value!r} is no address or version.")
    return address.removesuffix(".git").rstrip("/"), tag


def setup_cell(address: str, tag: str) -> str:
    """The set-up cell of every notebook, at most six lines of code."""
    if not address:
        return FIND + ATTACHED
    here = f"/tmp/knee-distillation-{tag}"
    return FIND + FETCHED.format(address=address, tag=tag, here=here, remedy=REMEDY)


def badges(address: str, tag: str) -> str:
    """A line for each place that opens notebooks from GitHub; nothing for other addresses."""
    name = address.removeprefix("https://github.com/")
    if name == address:
        return ""
    lines = ""
    for place, (picture, opens) in PLACES.items():
        links = [f"[{n[:2]}]({opens}{name}/blob/{tag}/notebooks/{n}.ipynb)" for n in runs.NOTEBOOKS]
        lines += f"![Open in {place}]({picture}) {' '.join(links)}\n\n"
    return lines
