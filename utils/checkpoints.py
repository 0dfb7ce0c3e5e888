"""One file that holds all of a training's state, so that a kill at any moment loses no whole epoch.

Keras's BackupAndRestore keeps weights and epoch in two files, forgets the best epoch so far and the
state of dropout's seed generators. Here weights, optimizer, best weights, seed generators, history
and epoch stand in one `.npz`, written under a temporary name and renamed; the one before is kept.
"""

from __future__ import annotations

import contextlib
import errno
import json
import math
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path

import keras
import numpy as np

from utils import runs


@dataclass
class Progress:
    """How far a training is.

    Attributes:
        key: marks the stage that this belongs to; another stage's is refused.
        epoch: whole epochs done, over all legs.
        best_epoch: the epoch (from 1) with the best `val_qwk`; 0 for none yet.
        best_qwk: its value.
        history: one dict an epoch.
        stopped: why a training ended early, or None.
    """

    key: str
    epoch: int = 0
    best_epoch: int = 0
    best_qwk: float = -2.0
    history: list[dict] = field(default_factory=list)
    stopped: str | None = None


def arrays_of(variables) -> list[np.ndarray]:
    """Values of Keras variables."""
    return [keras.ops.convert_to_numpy(variable.value) for variable in variables]


def assign(variables, arrays, what: str) -> None:
    """Set `variables` to `arrays`, which must match in number and shape.

    Raises:
        runs.StageError: when they do not.
    """
    shapes = [tuple(v.shape) for v in variables], [tuple(a.shape) for a in arrays]
    if shapes[0] != shapes[1]:
        raise runs.StageError(
            f"The checkpoint's {what} ({len(arrays)} arrays) does not fit this model "
            f"({len(variables)} variables): move the checkpoint away or restore the parameters."
        )
    for variable, array in zip(variables, arrays, strict=True):
        variable.assign(array)


def save(path: Path, progress: Progress, groups: dict[str, list[np.ndarray]]) -> None:
    """Write a checkpoint to `path`; the one that stood there becomes `<name>.previous.npz`."""
    content = {
        f"{group}/{i:05d}": array
        for group, arrays in groups.items()
        for i, array in enumerate(arrays)
    }
    content["progress"] = np.frombuffer(json.dumps(asdict(progress)).encode(), dtype=np.uint8)

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.savez(file, **content)
            file.flush()
            os.fsync(file.fileno())  # before the only other one loses its name
        if path.exists():
            path.replace(previous(path))

    runs.write_atomic(path, write)


def previous(path: Path) -> Path:
    """Where the checkpoint before the one at `path` is kept."""
    return path.with_name(f"{path.stem}.previous{path.suffix}")


def damaged(path: Path) -> Path:
    """Where a checkpoint that cannot be read is put, until the training is done."""
    return path.with_name(f"{path.stem}.damaged{path.suffix}")


def check_room(folder: Path, model: keras.Model) -> None:
    """Whether the disk holds what a training of `model` writes: three checkpoints at a time.

    Raises:
        OSError: when less is free; better now than after the first epoch.
    """
    numbers = sum(math.prod(variable.shape) for variable in model.variables)
    needed = 3 * 4 * 4 * numbers  # weights, best weights and two moments of AdamW, in float32
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise OSError(
            errno.ENOSPC,
            f"No room to train: checkpoints need {needed / 1e9:.1f} GB in {folder}, "
            f"{free / 1e9:.1f} GB are free. Free some, or choose another RUN_DIR",
        )


def load(path: Path, key: str) -> tuple[Progress, dict[str, list[np.ndarray]]] | None:
    """The newest whole checkpoint at `path`, or None when there is none.

    A damaged one is renamed, passed over for the one before, and said. Arrays come grouped as
    they were saved.

    Raises:
        runs.StageError: when the checkpoint belongs to another stage; it is left where it is.
    """
    for candidate in (path, previous(path)):
        if not candidate.exists():
            continue
        try:
            with np.load(candidate) as archive:
                progress = Progress(**json.loads(archive["progress"].tobytes()))
                groups: dict[str, list[np.ndarray]] = {}
                for name in sorted(n for n in archive.files if "/" in n):
                    groups.setdefault(name.split("/")[0], []).append(archive[name])
        except Exception as error:  # damage can make of an archive whatever its reader dislikes
            print(f"{candidate} is damaged ({str(error)[:80]}): passed over.")
            candidate.replace(damaged(path))  # lest it takes the place of the whole one before
            continue
        if progress.key != key:
            raise runs.StageError(
                f"{candidate} belongs to another run or other parameters: it is left where it is. "
                "Move it away, or choose another RUN_DIR."
            )
        return progress, groups
    return None


def remove(path: Path) -> None:
    """Delete a finished training's checkpoints: what they held stands in the saved model."""
    for candidate in (path, previous(path), damaged(path)):
        with contextlib.suppress(FileNotFoundError):
            candidate.unlink()
