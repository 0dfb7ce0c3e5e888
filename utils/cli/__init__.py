"""`python -m utils`: each command is a module here, imported when it is asked for."""

import argparse
import importlib
import sys

from utils import runs, settings

COMMANDS = {  # of modules with add_arguments(parser) and main(arguments) -> exit status
    "run": ("run", "run the notebooks in order, from images to the report"),
    "grade": ("grade", "grade radiographs with a finished run"),
    "kaggle": ("kaggle", "write the series as folders for Kaggle, upload and run them"),
    "class": ("classroom", "write the students' copy, without solutions and outputs"),
    "refresh": ("refresh", "update the code and outputs shown in the committed notebooks"),
}


def main(argv: list[str] | None = None) -> int:
    """Run a command line; a user's mistake is one message, not a traceback."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="python -m utils")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, purpose) in COMMANDS.items():
        command = commands.add_parser(name, help=purpose, description=purpose)
        if argv[:1] == [name]:
            chosen = importlib.import_module(f"utils.cli.{module}")
            chosen.add_arguments(command)
    try:
        return chosen.main(parser.parse_args(argv))
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return 130
    except (runs.StageError, OSError, ValueError) as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, settings.SettingsError) else 1
