"""`python -m utils class`: the students' copy, without solutions and outputs."""

import argparse
import shutil
from pathlib import Path

import nbformat
from nbconvert import preprocessors

from utils import runs, settings


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, numbers = parser.add_argument, [name[:2] for name in settings.SERIES]
    add("--out", required=True, metavar="DIR", help="a folder that does not exist")
    add("--ready", metavar="RUN_DIR", help="put in this finished run, made with profile tiny")
    add("--before", choices=numbers, help="of that run, only the stages before this notebook")


def main(arguments: argparse.Namespace) -> int:
    """Write the students' copy, whole or not at all; a ready run lets a lesson begin anywhere."""
    out, root, ready = Path(arguments.out).expanduser(), settings.ROOT, Path(arguments.ready or "")
    if out.exists():
        raise settings.SettingsError(f"{out} exists already: name a folder that does not.")
    names = [n for n in settings.SERIES if arguments.ready and n < (arguments.before or "09")]
    for name in names:
        saved = runs.read_stage(ready, name) or {"finished": False}
        if not saved["finished"] or saved["parameters"] != runs.identity(name, {}):
            message = f"{name} in {ready} is unfinished, or was made with other parameters"
            raise settings.SettingsError(f"{message}: `python -m utils run --out {ready}`.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", "*.png")
    for name in ("utils", "notebooks/profiles", "notebooks/results"):
        shutil.copytree(root / name, part / name, ignore=ignore)
    shutil.copy(root / "utils/templates/class_readme.md", part / "README.md")
    for name in ("requirements.txt", "LICENSE"):
        shutil.copy(root / name, part)
    remove = preprocessors.TagRemovePreprocessor(enabled=True, remove_cell_tags={"solution"})
    clear = preprocessors.ClearOutputPreprocessor(enabled=True)
    for path in (root / "notebooks").glob("*.ipynb"):
        book, _ = clear.preprocess(remove.preprocess(nbformat.read(path, 4), {})[0], {})
        nbformat.write(book, part / "notebooks" / path.name)
    for folder in [runs.STAGES[name] for name in names] + ["views"] * ("05_distillation" in names):
        shutil.copytree(ready / folder, part / "runs/tiny" / folder)
    part.rename(out)
    print(f"Written to {out}: hand it to the students; README.md says how to begin.")
    return 0
