"""Files that are whole or not there, whatever kills their writer, and errors that name a remedy."""

from __future__ import annotations

import contextlib
import errno
import json
import os
from collections.abc import Callable
from pathlib import Path


class StageError(RuntimeError):
    """A stage that a notebook needs is missing, unfinished or made from something else."""


def write_atomic(path: Path, write: Callable[[Path], object]) -> Path:
    """Let `write(temporary path)` make a file, then give it its name, so that none is half-written.

    Raises:
        OSError: the disk is full or cannot be written; nothing half-written is left.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.stem}.{os.getpid()}.tmp{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        for left in path.parent.glob(f".{path.stem}.*.tmp{path.suffix}"):
            left.unlink(missing_ok=True)  # what a killed process left behind
        write(temporary)
        flush(temporary)
        temporary.replace(path)
        flush(path.parent)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        if isinstance(error, OSError) or "errno" in str(error):  # HDF5 raises what it likes
            raise cannot_write(path, error) from error
        raise
    return path


def flush(path: Path) -> None:
    """Have a file, or a folder's names, on the disk itself: a power cut leaves it then."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:
        if not path.is_dir():  # some file systems flush no folders
            raise
    finally:
        os.close(descriptor)


def cannot_write(path: Path, error: BaseException) -> OSError:
    """The error to raise where a file cannot be written: which one, why, and what to do."""
    number = getattr(error, "errno", None) or errno.EIO
    reason = getattr(error, "strerror", None) or str(error).splitlines()[0][:200]
    return OSError(
        number,
        f"{path} cannot be written ({reason}). Make room or choose another RUN_DIR, then run this "
        "again: what was complete before is kept",
    )


def write_json(path: Path, content: object) -> Path:
    """Write `content` as JSON under a temporary name, then rename."""
    text = json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"
    return write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: Path) -> object:
    """Read a JSON file.

    Raises:
        StageError: when it is missing or damaged.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise StageError(f"{path} is missing.") from error
    except ValueError as error:
        raise StageError(
            f"{path} is damaged ({error}): move it away and run its notebook."
        ) from error
