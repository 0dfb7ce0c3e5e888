"""What the models say about val and test: test-time views, openings of the test split, predictions.

Test-time views are deterministic and averaged as logits. All views of all images go through the
network in one compiled pass, in batches of one shape.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from utils import calibration, data, distillation, metrics, runs, views

OPENINGS = "test_openings.json"
GOLDEN_ANGLE = np.pi * (3 - 5**0.5)  # spreads any number of views evenly round a circle
# Batches on their way: one alone leaves cores idle in a network's small layers, and an accelerator
# while views are made.
AT_A_TIME = 2
USUAL = {"flip": True, "rotation": 8.0, "shift": 0.04}


def test_time_parameters(count: int, augmentation: Mapping | None = None) -> np.ndarray:
    """The first `count` test-time views, float32 (count, 12) as `views.augment` takes them.

    View 0 is the image itself; then come, where training mirrored, its mirror image, and small
    rotations with shifts. They go half as far as training did, so that no view is a new kind of
    image. Nothing is random: a file is graded alike every time.

    Args:
        count: 1 or more.
        augmentation: what training did, with keys of `views.DEFAULTS`; None for a usual one.

    Raises:
        ValueError: count below 1.
    """
    if count < 1:
        raise ValueError(f"TEST_VIEWS is {count}: at least one view, the image itself, is needed.")
    trained = USUAL if augmentation is None else augmentation
    mirrored = bool(trained.get("flip", False))
    found = views.view_parameters(0, count, 0, None)
    for view in range(1, count):
        step = view // 2 if mirrored else view
        flip = -1.0 if mirrored and view % 2 else 1.0
        turn = GOLDEN_ANGLE * step if step else np.pi / 2
        angle = np.deg2rad(trained.get("rotation", 0.0)) / 2 * (np.sin(turn) if step else 0.0)
        shift = trained.get("shift", 0.0) / 2 * np.cos(turn)
        cos, sin = np.cos(angle), np.sin(angle)
        found[view, :6] = flip * cos, -flip * sin, shift, sin, cos, shift
    return found


def view_logits(
    model: keras.Model,
    pixels: np.ndarray,
    count: int = 7,
    batch_size: int = 64,
    *,
    augmentation: Mapping | None = None,
    jit_compile: bool | str = "auto",
) -> np.ndarray:
    """Logits of every test-time view of every image, in one compiled pass.

    Args:
        model: takes float32 (B, S, S, 1), 0 to 255; compiled here, without a loss, if it is not.
        pixels: uint8 (n, S, S, 1), n >= 1.
        count: number of views, see `test_time_parameters`.
        batch_size: images times views in a batch, at least one image with all its views.
        jit_compile: whether with XLA; "auto" leaves it to Keras, which does so on a GPU.

    Returns:
        float32 (n, count, K); [:, 0] belongs to the image itself.
    """
    parameters = test_time_parameters(count, augmentation)
    batches = -(-len(pixels) // max(1, batch_size // count))
    images = -(-len(pixels) // batches)  # evenly, so that little is padded
    padding = images * batches - len(pixels)  # every batch has one shape: compiled once
    padded = np.concatenate([pixels, np.repeat(pixels[-1:], padding, axis=0)])
    tiled = np.tile(parameters, (images, 1))
    if not model.compiled or jit_compile not in ("auto", model.jit_compile):  # once for all splits
        model.compile(jit_compile=jit_compile)

    def look(start):
        same = np.repeat(padded[start : start + images], count, axis=0)
        x = views.augment(same, tiled) if count > 1 else same.astype(np.float32)
        return model.predict_on_batch(x)

    first = look(0)  # traces, which two threads at once must not
    with ThreadPoolExecutor(AT_A_TIME) as pool:
        logits = np.concatenate([first, *pool.map(look, range(images, len(padded), images))])
    return logits.reshape(len(padded), count, -1)[: len(pixels)].astype(np.float32)


def predict_views(model, pixels, views: int = 7, batch_size: int = 64, **options) -> np.ndarray:
    """Logits averaged over the test-time views: float32 (n, K); options as for `view_logits`."""
    return view_logits(model, pixels, views, batch_size, **options).mean(axis=1)


def model_state(paths: Mapping[str, Path]) -> dict[str, str]:
    """SHA-256 of each model's file: {name: hexadecimal}."""
    return {name: distillation.file_digest(path) for name, path in paths.items()}


def open_test(folder: Path, paths: Mapping[str, Path], dataset: data.Dataset, **fixed) -> dict:
    """Note in `test_openings.json` that the test split is opened now, before it is.

    The file only ever grows: no rerun and no `--fresh` resets it.

    Args:
        folder: where the report goes.
        paths: model name to its file.
        dataset: whose test split it is.
        fixed: what was settled beforehand, such as the decision rule (plain values).

    Returns:
        `{count, changed_model, changed_fixed, history}`: how often a test split was opened in this
        run, now included; whether an earlier opening was for another model or of another split;
        whether one was with other things settled; every entry.

    Raises:
        runs.StageError: the file is damaged.
    """
    path = Path(folder) / OPENINGS
    history = runs.read_json(path) if path.exists() else []
    models = model_state(paths)
    now = (models, dataset.digest)
    changed = any((entry["models"], entry["data"]) != now for entry in history)
    # What an older entry does not tell is taken to have been the same.
    changed_fixed = any((fixed | entry["fixed"]) != (entry["fixed"] | fixed) for entry in history)
    entry = {
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "data": dataset.digest,
        "models": models,
        "fixed": fixed,
        "after_changed_model": changed,
    }
    history = [*history, entry]
    runs.write_json(path, history)
    found = {"count": len(history), "changed_model": changed, "changed_fixed": changed_fixed}
    return found | {"history": history}


def count_openings(folder: Path) -> int:
    """How often the test split was opened in this run."""
    path = Path(folder) / OPENINGS
    return len(runs.read_json(path)) if path.exists() else 0


def opening_sentence(opening: Mapping | None) -> str:
    """What a reader must know about how often test was looked at."""
    if opening is None:
        return "The test split stays closed: every figure here is of val, which chose the epochs."
    count = opening["count"]
    if count == 1:
        return "The test split was opened once, for this report."
    times = f"The test split was opened {count} times in this run"
    if opening["changed_model"]:
        return (
            f"{times}, at least once for another model than this one: whoever saw the earlier "
            "figures may have chosen by them, and then these flatter."
        )
    if opening["changed_fixed"]:
        return (
            f"{times}, for the same models but with other settings than these (decision rule, "
            "views and the like): whoever saw the earlier figures may have chosen them by those."
        )
    return f"{times}, always for the same models and settings: nothing was chosen by it."


def predictions_table(
    dataset: data.Dataset, split: str, probabilities: Mapping[str, np.ndarray], decided: Mapping
) -> pd.DataFrame:
    """Everything needed to compute the report again, a row for each image of a split.

    Columns: `image`, `patient`, `split`, `truth` (class index), and for each model `<model>`
    (decided class index) and `<model>_p0`, `_p1` ... (calibrated probabilities).
    """
    rows = dataset.manifest.iloc[dataset.rows(split)]
    table = rows[["image", "patient", "split"]].reset_index(drop=True)
    columns = {"truth": dataset.labels(split)}
    for name, values in probabilities.items():
        columns[name] = decided[name]
        columns |= {f"{name}_p{k}": values[:, k] for k in range(values.shape[1])}
    return pd.concat([table, pd.DataFrame(columns)], axis=1)


def save_predictions(path: Path, tables: Sequence[pd.DataFrame]) -> Path:
    """Write predictions of one or several splits as one CSV, probabilities to 8 digits."""
    table = pd.concat(tables, ignore_index=True)
    return runs.write_atomic(
        path, lambda file: table.to_csv(file, index=False, float_format="%.8f")
    )


def save_split(path: Path, dataset: data.Dataset) -> Path:
    """Write which image is in which split, with patient and class, as CSV."""
    table = dataset.manifest[["image", "patient", "split", "class", "grade"]]
    return runs.write_atomic(path, lambda file: table.to_csv(file, index=False))


def known_patients(dataset: data.Dataset, audit: Mapping, split: str) -> np.ndarray | None:
    """Patient of each image, or None where file names tell none and images must be resampled."""
    return dataset.patients(split) if audit["patient_rule"] > 0 else None


def views_pay(
    labels, logits: np.ndarray, fitted: calibration.Calibration, rule: str, drawn: metrics.Resamples
) -> dict:
    """Averaged test-time views against the image alone: a paired difference, and the cost.

    Args:
        logits: float32 (n, V, K) of `view_logits`.
        fitted, rule: how probabilities and decisions are made, the same for both.
        drawn: resamples of these images.

    Returns:
        `{views, passes_per_image, single, averaged, accuracy, qwk, sentence}`: accuracies, and
        differences as `metrics.difference` gives them.
    """
    both = []
    for chosen in (logits[:, 0], logits.mean(axis=1)):
        probabilities = fitted.probabilities(chosen)
        decided = fitted.decide(probabilities, rule)
        both.append(metrics.evaluate(labels, probabilities, decided, drawn))
    gaps = {name: metrics.difference(*both, name) for name in ("accuracy", "qwk")}
    count = logits.shape[1]
    words = metrics.sentence(gaps["accuracy"], f"averaging {count} views", "the image alone")
    return {
        "views": count,
        "passes_per_image": count,
        "single": metrics.plain(both[0].figures["accuracy"]),
        "averaged": metrics.plain(both[1].figures["accuracy"]),
        **gaps,
        "sentence": words,
    }
