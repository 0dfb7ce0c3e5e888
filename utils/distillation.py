"""The teachers' logits for stored views (Hinton et al. 2015; Beyer et al. 2022).

A view is a pure function of (seed, image, view number): the teachers look at V views of every
training image once; the student's epoch e trains on view e mod V, on the very pixels they saw.
"""

import contextlib
import hashlib
import json
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
from tqdm import tqdm

from utils import data, runs, settings, views

TEACHER = "teacher/phase_3/teacher.keras"  # in a run


@dataclass(frozen=True)
class ViewStore:
    """Mean logits of the teachers for `count` views of each of `images` images, one file a view."""

    folder: Path
    count: int
    images: int

    def path(self, view: int) -> Path:
        """The file of one view."""
        return self.folder / f"view_{view:04d}.npy"

    def logits(self, view: int) -> np.ndarray:
        """Float32 (n, K), rows as in the training split; StageError when missing or damaged."""
        with contextlib.suppress(OSError, ValueError, EOFError):
            return np.load(self.path(view)).reshape(self.images, -1)
        raise runs.StageError(f"{self.path(view)} is missing or damaged: run 05 again.")

    def missing(self) -> list[int]:
        """Views that are not stored yet, or damaged."""

        def stored(view):
            with contextlib.suppress(runs.StageError):
                return len(self.logits(view))

        return [view for view in range(self.count) if not stored(view)]

    @property
    def complete(self) -> bool:
        """Whether every view is stored."""
        return not self.missing()


def teacher_files(run: Path, dataset: data.Dataset, more: list[str]) -> list[Path]:
    """The finished teachers to distil from: this run's, then those of other run folders.

    StageError: another run has no finished teacher, or its teacher was trained on other classes or
    on patients of this run's val or test, or chosen on those of its test.
    """
    val, test = ({*dataset.patients(split)} for split in ("val", "test"))
    for folder in map(Path, more):
        saved = runs.read_stage(folder, "04_teacher_phase_3")
        if not saved or not saved["finished"]:
            raise runs.StageError(f"MORE_TEACHERS: {folder} has no finished teacher: run 02 to 04.")
        other = data.load(folder / "data")
        if other.class_names != dataset.class_names:
            both = f"the classes {other.class_names}, this run has {dataset.class_names}"
            raise runs.StageError(f"MORE_TEACHERS: {folder} has {both}.")
        seen = ((val | test) & {*other.patients("train")}) | (test & {*other.patients("val")})
        if seen:
            raise runs.StageError(
                f"MORE_TEACHERS: the teacher of {folder} has seen {len(seen)} patients of this"
                f" run's val or test, such as {min(seen)}: use runs of the same split."
            )
    return [Path(folder) / TEACHER for folder in (run, *more)]


def digests(more: list[str]) -> dict[str, str]:
    """What stage 05 depends on beside its own run: SHA-256 of each further teacher's file."""
    return {str(folder): _sha256(folder / TEACHER) for folder in map(settings.resolve, more)}


def _sha256(path: Path) -> str:
    if not path.is_file():
        raise runs.StageError(f"There is no finished teacher at {path}: run 02 to 04 there.")
    return hashlib.sha256(path.read_bytes()).hexdigest()


def mean_logits(
    teachers: list, dataset: data.Dataset, split: str, view: int | None = None, batch_size: int = 64
) -> np.ndarray:
    """The teachers' logits for a split, averaged: float32 (n, K); each looks at its own size.

    view: number of the augmented view; None: the images as they are. ValueError: not finite.
    """
    options = {"seed": dataset.seed, "batch_size": batch_size, "view": view or 0}
    options["augmentation"] = None if view is None else dataset.augmentation
    total = 0
    for teacher in teachers:
        pixels = dataset.pixels(split, teacher.input_shape[1])
        total = total + teacher.predict(views.view_batches(pixels, **options), verbose=0)
    if not np.isfinite(total).all():
        raise ValueError("A teacher's logits are not finite: train it again, or in float32.")
    return np.asarray(total, "float32") / len(teachers)


def teacher_views(
    stage: runs.Stage, teachers: dict, dataset: data.Dataset, *, count: int, batch_size: int = 64
) -> ViewStore:
    """Let the teachers look at `count` views of every training image; keep their mean logits.

    teachers: {file: the model loaded from it}. Views already stored are kept: a killed pass
    goes on, and more views only add to them. The deadline ends the pass between two views: then
    `ViewStore.complete` is False. ValueError: logits that are not finite.
    """
    origin = {"augmentation": dataset.augmentation, "seed": dataset.seed, "data": dataset.digest}
    origin["teachers"] = [_sha256(file) for file in teachers]
    key = hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]
    store = ViewStore(stage.path("views", key), count, len(dataset.rows("train")))
    for view in tqdm(store.missing(), "teacher views", disable=runs.batch_mode()):
        if time.time() > stage.deadline:
            break
        runs.write_json(store.folder / "origin.json", origin)
        logits = mean_logits(list(teachers.values()), dataset, "train", view, batch_size)
        runs.write_atomic(store.path(view), partial(np.save, arr=logits))
    return store
