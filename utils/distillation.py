"""Distillation from stored teacher views (Hinton et al. 2015; Beyer et al. 2022).

A good teacher sees what its student sees. Augmentation is a pure function of (seed, image, view),
so the teacher looks once at V views of every training image and its logits are kept; the student's
epoch e trains on view e mod V, with exactly the pixels that the teacher saw. With T the time of a
teacher pass and S of a student epoch, E epochs cost V·T + E·S instead of E·(T + S).
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np
from tqdm import tqdm

from utils import data, devices, runs, views

# A stored view must agree with the teacher looking again, up to what other batch sizes change.
TOLERANCE = 2e-2


@dataclass(frozen=True)
class ViewStore:
    """Teacher logits of V views of every training image, one file a view.

    Attributes:
        folder: `views/<key>` in the run.
        count: V.
        images: number of training images.
    """

    folder: Path
    count: int
    images: int

    def path(self, view: int) -> Path:
        """The file of one view."""
        return self.folder / f"view_{view:04d}.npy"

    def logits(self, view: int) -> np.ndarray:
        """The teacher's logits of one view: float32 (n, K), rows as in the training split.

        Raises:
            runs.StageError: when the file is missing or damaged.
        """
        logits = read_view(self.path(view), self.images)
        if logits is None:
            raise runs.StageError(f"{self.path(view)} is missing or damaged: run 05 again.")
        return logits

    def validation(self) -> np.ndarray:
        """The teacher's logits of the val split, not augmented: float32 (n_val, K)."""
        return np.load(self.folder / "validation.npy")


def read_view(path: Path, images: int) -> np.ndarray | None:
    """Stored logits of `images` images, or None when the file is missing or damaged."""
    try:
        logits = np.load(path)
    except (OSError, ValueError, EOFError):
        return None
    whole = logits.ndim == 2 and len(logits) == images and np.isfinite(logits).all()
    return logits if whole else None


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def store_origin(teacher_file: Path, dataset: data.Dataset, image_size: int) -> dict:
    """All that the teacher's logits depend on; its hash names the store."""
    return {
        "teacher": file_digest(teacher_file),
        "data": dataset.digest,
        "augmentation": dataset.augmentation,
        "seed": dataset.seed,
        "image_size": image_size,
    }


def teacher_views(
    stage: runs.Stage,
    teacher: keras.Model,
    teacher_file: Path,
    dataset: data.Dataset,
    *,
    image_size: int,
    count: int,
    batch_size: int,
) -> ViewStore:
    """Let the teacher look at `count` views of every training image, or find that it has.

    Views already stored are kept, so a killed pass goes on and a later student with more views only
    adds to them. Before use, a sample is looked at again and compared.

    Args:
        stage: whose run keeps the store (in `views/`) and whose deadline counts.
        teacher: gives logits (B, K) from images (B, S, S, 1).
        teacher_file: the file that the teacher was loaded from.
        dataset: whose training split is looked at.
        image_size: the teacher's input size S in pixels.
        count: V, the number of views.
        batch_size: images per forward pass.

    Returns:
        The store. When the time limit came first the stage is paused: run again to go on.

    Raises:
        ValueError: the teacher was made for other classes or another image size.
        runs.StageError: the stored logits are not this teacher's, or not finite.
        MemoryError: the device's memory is full.
    """
    check_teacher(teacher, dataset, image_size)
    origin = store_origin(teacher_file, dataset, image_size)
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
    store = ViewStore(stage.path("views", key), count, len(dataset.rows("train")))
    if not (store.folder / "origin.json").exists():
        runs.write_json(store.folder / "origin.json", origin)
    held_out = store.folder / "validation.npy"
    if read_view(held_out, len(dataset.rows("val"))) is None:
        save_array(held_out, look(teacher, dataset.pixels("val", image_size), None, batch_size))
    missing = [v for v in range(count) if read_view(store.path(v), store.images) is None]
    if len(missing) < count:
        print(f"{count - len(missing)} of {count} views are stored already in {store.folder}.")
    pixels, seconds = dataset.pixels("train", image_size), 0.0
    for number, view in enumerate(tqdm(missing, "teacher views", disable=runs.batch_mode())):
        began = time.time()
        if began + 1.1 * seconds > stage.deadline:
            stage.pause(f"{count - len(missing) + number} of {count} views are stored.")
            return None
        save_array(store.path(view), look(teacher, pixels, (view, dataset), batch_size))
        seconds = time.time() - began
        if runs.batch_mode():
            left = (len(missing) - number - 1) * seconds / 60
            print(f"teacher view {view + 1} of {count}, {left:.1f} min left", flush=True)
    check_sample(store, teacher, pixels, dataset, batch_size)
    return store


def check_teacher(teacher: keras.Model, dataset: data.Dataset, image_size: int) -> None:
    """Whether a teacher fits the data, before it looks.

    Raises:
        ValueError: other classes or another image size.
    """
    side, classes = teacher.input_shape[1], teacher.output_shape[-1]
    if classes != len(dataset.class_names):
        raise ValueError(
            f"The teacher tells {classes} classes apart, the data have {len(dataset.class_names)} "
            f"({', '.join(dataset.class_names)}): run notebooks 02 to 04 on these data."
        )
    if side != image_size:
        raise ValueError(
            f"The teacher takes images of {side} px, not of {image_size}: give the teacher's own "
            "TEACHER_IMAGE_SIZE."
        )


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a `.npy` file under a temporary name, then rename."""

    def write(temporary: Path) -> None:
        with temporary.open("wb") as file:
            np.save(file, array)

    runs.write_atomic(path, write)


def look(teacher, pixels, seen: tuple[int, data.Dataset] | None, batch_size: int) -> np.ndarray:
    """The teacher's logits for `pixels`: float32 (n, K).

    `seen` is the view and the dataset whose seed and augmentation make it; None: as they are.

    Raises:
        runs.StageError: logits that are not finite.
        MemoryError: the device's memory is full.
    """
    size = devices.share_size(len(pixels), batch_size, devices.replicas_of(teacher))
    if seen is None:
        batches = views.evaluation_batches(pixels, batch_size=size)
    else:
        view, dataset = seen
        drawing = {"seed": dataset.seed, "augmentation": dataset.augmentation}
        batches = views.view_batches(pixels, view=view, batch_size=size, **drawing)
    with devices.memory_advice("the teacher's look at the images"):
        logits = teacher.predict(batches, verbose=0).astype("float32")
    if not np.isfinite(logits).all():
        raise runs.StageError(
            "The teacher's logits are not finite: its training went wrong, or it overflows in "
            "TEACHER_PRECISION. Look at teacher/phase_3/history.csv and train it again."
        )
    return logits


def check_sample(store: ViewStore, teacher, pixels, dataset, batch_size: int) -> None:
    """Look again at the first images of the last view and compare with what is stored.

    Raises:
        runs.StageError: when they differ by more than `TOLERANCE` of the logits' spread.
    """
    few = pixels[: min(len(pixels), batch_size)]
    stored = store.logits(store.count - 1)[: len(few)]
    again = look(teacher, few, (store.count - 1, dataset), batch_size)
    difference = float(np.abs(again - stored).max() / max(stored.std(), 1e-3))
    if not difference < TOLERANCE:
        raise runs.StageError(
            f"The stored views in {store.folder} are not this teacher's (they differ by "
            f"{difference:.3f} of the logits' spread): move that folder away and run 05 again."
        )


def distillation_targets(hard: np.ndarray, store: ViewStore):
    """A function view -> float32 (n, 2K): hard label distribution beside the teacher's logits."""
    return lambda view: np.concatenate([hard, store.logits(view)], axis=1)


def soften(logits: np.ndarray, temperature: float) -> np.ndarray:
    """Softmax of `logits` (..., K) at a temperature: float64 probabilities that sum to 1."""
    scaled = np.asarray(logits, "float64") / temperature
    scaled = np.exp(scaled - scaled.max(axis=-1, keepdims=True))
    return scaled / scaled.sum(axis=-1, keepdims=True)


def least_sure(logits: np.ndarray) -> int:
    """Index of the image whose two largest logits (n, K) lie closest together."""
    ordered = np.sort(logits, axis=1)
    return int(np.argmin(ordered[:, -1] - ordered[:, -2]))
