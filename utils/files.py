"""Files that are whole or not there, whatever kills their writer, and errors that name a remedy."""

import json
import os
from collections.abc import Callable
from datetime import datetime
from pathlib import Path


class StageError(RuntimeError):
    """A stage that a notebook needs is missing, unfinished, damaged or in use."""


def write_atomic(path: str | os.PathLike, write: Callable[[Path], object]) -> Path:
    """Let `write(temporary path)` make a file, then rename it: no half-written file ever counts.

    OSError, with a remedy, when the disk is full or read-only.
    """
    path = Path(path)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")  # keeps the suffix, which decides
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".*.{path.name}"):
            left.unlink(missing_ok=True)  # by a killed process; the lock keeps living ones away
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        raise OSError(
            error.errno or 0,
            f"{path} cannot be written ({error.strerror or error}). Make room or choose another "
            "RUN_DIR; what was complete is kept",
        ) from error
    finally:
        temporary.unlink(missing_ok=True)
    return path


def write_json(path: Path, content: object) -> Path:
    """Write `content` as JSON, whole or not at all."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path, *missing) -> object:
    """Read a JSON file; StageError when it is damaged, or missing without a value for that case."""
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        if missing:
            return missing[0]
        raise StageError(f"{path} is missing: run the notebook that writes it.") from error
    except ValueError as error:
        message = f"{path} is damaged ({error}): move it away and run its notebook."
        raise StageError(message) from error


def set_aside(folder: Path, why: str) -> Path:
    """Rename a folder to `<name>.<time>`, say why, and return the new path."""
    stamp = f"{datetime.now():%Y%m%d-%H%M%S-%f}"
    aside = folder.rename(folder.with_name(f"{folder.name}.{stamp}"))
    print(f"{folder} {why}: kept as {aside.name}.")
    return aside
