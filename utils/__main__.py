"""`python -m utils`: run the series, grade radiographs, or make it ready for Kaggle.

Only argparse lives here; a subcommand's module is imported when it is asked for.
"""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Sequence

# Each module of `utils.commands` has `add_arguments(parser)` and `main(arguments) -> exit status`.
COMMANDS = {
    "run": ("series", "run the notebooks in order, from images to the report"),
    "grade": ("grading", "grade radiographs with a finished run"),
    "kaggle": ("kaggle", "write folders that the kaggle client can upload"),
    "class": ("classroom", "write the copy of the series that students get"),
    "refresh": ("refresh", "give the committed notebooks the outputs of a finished run"),
    "publish": ("publish", "write the address in CITATION.cff into notebooks and README"),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Parse `argv` (default: the command line), run the subcommand, return its exit status."""
    argv = sys.argv[1:] if argv is None else list(argv)
    parser = argparse.ArgumentParser(prog="python -m utils", description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose.capitalize() + ".")
        if argv[:1] == [name]:
            asked = importlib.import_module(f"utils.commands.{module}")
            asked.add_arguments(command)
    arguments = parser.parse_args(argv)
    return asked.main(arguments)


if __name__ == "__main__":
    sys.exit(main())
