"""Leaks from test into train: how much they flatter, and the hunt when a figure is too good.

The study puts one and the same classifier through the protocols that the literature on knee grading
is full of and through an honest one. It uses train and val only: test stays closed.
"""

from __future__ import annotations

from collections.abc import Mapping

import keras
import numpy as np
import pandas as pd
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from sklearn.svm import SVC

from utils import data, folders, metrics, models, views

# Above what honest splits gave on far larger sets of knees: 0.71 (Thomas et al. 2020, 32,116
# training images of the OAI), 0.72 (Swiecicki et al. 2021, MOST, two views of each knee).
TOO_GOOD = 0.76
THUMBNAIL = 16
# Root mean square distance of standardised 16 x 16 thumbnails. On 6,604 OAI knees two different
# patients were never closer than 0.087; saved again as JPEG of quality 60 a copy stays under 0.05.
NEAR = 0.05
FOLDS, VIEWS, PENALTY = 5, 3, 3.0


def thumbnails(pixels: np.ndarray) -> np.ndarray:
    """Tiny images of mean 0 and variance 1, so that exposure does not count.

    Args:
        pixels: uint8 or float32 (n, S, S, 1), 0 to 255.

    Returns:
        float32 (n, 256).
    """
    small = np.stack([folders.square(image[:, :, 0], THUMBNAIL) for image in pixels])
    flat = small.reshape(len(small), -1).astype(np.float32)
    flat -= flat.mean(axis=1, keepdims=True)
    return flat / np.maximum(flat.std(axis=1, keepdims=True), 1.0)


def nearest(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """For each row of `first` the nearest row of `second`: (distance float (n,), index (n,)).

    Both as from `thumbnails`; the distance is a root mean square, 0 for equal thumbnails.
    """
    squared = (first**2).mean(1)[:, None] + (second**2).mean(1) - 2 * first @ second.T / 256
    index = squared.argmin(axis=1)
    return np.sqrt(np.maximum(squared[np.arange(len(first)), index], 0)), index


def suspicious(accuracy: float, dataset: data.Dataset) -> bool:
    """Whether an accuracy is too good to be true: above 0.76 on five KL grades of real knees."""
    grades = dataset.names_shown == [f"KL {k}" for k in range(5)]
    return grades and not dataset.synthetic and accuracy > TOO_GOOD


def hunt(dataset: data.Dataset) -> tuple[dict, pd.DataFrame]:
    """Look for test images in train and val, by name, by pixels and by likeness.

    Returns:
        (`{found, checks: [{check, found, detail}], verdict}`, the 20 closest pairs as a table
        with columns `test`, `other`, `mirrored`, `distance`, to be looked at).
    """
    table = dataset.manifest
    test, rest = dataset.rows("test"), np.flatnonzero(table["split"] != "test")
    names, patients = table["image"].to_numpy(str), table["patient"].to_numpy(str)
    pixels = dataset.pixels("test", THUMBNAIL * 4)
    others = np.concatenate([dataset.pixels(s, THUMBNAIL * 4) for s in ("train", "val")])
    order = np.concatenate([dataset.rows("train"), dataset.rows("val")])
    there = thumbnails(others)
    pairs = []
    for mirrored in (False, True):
        distance, index = nearest(thumbnails(pixels[:, :, ::-1] if mirrored else pixels), there)
        found = {"test": names[test], "other": names[order[index]]}
        pairs.append(pd.DataFrame(found | {"mirrored": mirrored, "distance": distance}))
    pairs = pd.concat(pairs, ignore_index=True).sort_values("distance", ignore_index=True)
    stored = [hash(np.asarray(image).tobytes()) for image in dataset.images]
    known = {stored[row] for row in rest}
    shared = sorted(set(patients[test]) & set(patients[rest]))
    same = [names[row] for row in test if stored[row] in known]
    near = pairs[pairs["distance"] < NEAR]
    pooled = [name for name in names[rest] if "auto_test" in name]
    train = dataset.rows("train")
    copies = len(train) - len({stored[row] for row in train})
    checks = [
        ("patients of test in train or val", len(shared), folders.some(shared, 3)),
        ("test images with the same pixels in train or val", len(same), folders.some(same, 3)),
        (
            "test images nearly like one in train or val (mirrored too)",
            int(near["test"].nunique()),
            f"nearest distance {pairs['distance'].min():.3f}, alarm under {NEAR}; "
            "crops that differ by 2 % or more escape this",
        ),
        ("images of a folder auto_test in train or val", len(pooled), folders.some(pooled, 3)),
        ("copies within train, as oversampling before a split leaves them", copies, ""),
    ]
    found = any(count for _, count, _ in checks)
    verdict = (
        "A leak was found: no figure of this report counts until it is closed."
        if found
        else "No leak was found; a figure this high still needs data from elsewhere to be believed."
    )
    checks = [{"check": c, "found": n, "detail": d} for c, n, d in checks]
    return {"found": found, "checks": checks, "verdict": verdict}, pairs.head(20)


def study_sample(dataset: data.Dataset, images: int = 1000) -> np.ndarray:
    """Rows of about `images` train and val images, whole patients, drawn by the dataset's seed."""
    rows = np.concatenate([dataset.rows("train"), dataset.rows("val")])
    patients = dataset.manifest["patient"].to_numpy(str)[rows]
    order = np.random.default_rng(dataset.seed).permutation(np.unique(patients))
    place = pd.Series(np.arange(len(order)), order)[patients].to_numpy()
    enough = np.sort(place)[min(images, len(rows)) - 1]
    return rows[place <= enough]


def frozen_features(pixels: np.ndarray, dataset: data.Dataset, backbone, weights) -> np.ndarray:
    """Features of three views of each image, from a network that never trained on these data.

    Args:
        pixels: uint8 (n, S, S, 1).
        dataset: its seed and augmentation make the views; view 0 is the image itself.
        backbone, weights: as for `models.build_student`; without pretrained weights the features
            are the views' thumbnails.

    Returns:
        float32 (n, 3, F).
    """
    found, network = [], None
    if weights != "none":
        whole = models.build_student(backbone, pixels.shape[1], 2, weights)
        pooled = keras.layers.GlobalAveragePooling2D()(whole.get_layer("attention").input)
        network = keras.Model(whole.input, pooled)
    for view in range(VIEWS):
        augmentation = dataset.augmentation if view else None
        options = {"view": view, "seed": dataset.seed, "batch_size": 64}
        batches = views.view_batches(pixels, augmentation=augmentation, **options)
        if network is not None:
            found.append(network.predict(batches, verbose=0))
        else:
            found.append(np.concatenate([thumbnails(np.asarray(x)) for x in batches]))
    return np.stack(found, axis=1).astype(np.float32)


def kernel(features: np.ndarray) -> np.ndarray:
    """Gaussian kernel of the features' directions, float64 (m, m) for (m, F); no label enters."""
    unit = features / np.maximum(np.linalg.norm(features, axis=1, keepdims=True), 1e-9)
    squared = np.maximum(2 - 2 * unit.astype(np.float64) @ unit.T, 0)
    return np.exp(-squared / max(np.median(squared), 1e-9))


def cross_validated(similar, rows, labels, splitter, groups=None) -> np.ndarray:
    """Whether a support vector machine grades each row right when its fold is left out: bool (m,).

    Args:
        similar: kernel of all features.
        rows: (m,) places in it, repeats allowed.
        labels: (m,) classes.
        splitter: of scikit-learn.
    """
    right = np.empty(len(rows), bool)
    for train, test in splitter.split(rows, labels, groups):
        machine = SVC(C=PENALTY, kernel="precomputed", cache_size=500)
        machine.fit(similar[np.ix_(rows[train], rows[train])], labels[train])
        right[test] = machine.predict(similar[np.ix_(rows[test], rows[train])]) == labels[test]
    return right


def study(features, labels, patients, *, draws: int = 2000, seed: int = 0) -> list[dict]:
    """One classifier through leaking protocols and their honest counterparts.

    Each protocol is a five-fold cross-validation in which every image is graded once (every copy
    of it, where there are copies). The gap to the counterpart is paired image by image, and its
    interval is a bootstrap over patients.

    Args:
        features: float (n, V, F), view 0 the image itself.
        labels: int (n,).
        patients: (n,).

    Returns:
        Dicts {protocol, leaking, counterpart, accuracy, accuracy_ci95, gap, gap_ci95, images},
        the honest one first; gap and counterpart are None for honest ones.

    Raises:
        ValueError: a class with fewer images than there are folds.
    """
    labels, count, copies = np.asarray(labels), *features.shape[:2]
    if np.bincount(labels)[np.unique(labels)].min() < FOLDS:
        raise ValueError(f"The leak study needs {FOLDS} images of each class: raise LEAK_IMAGES.")
    similar = kernel(features.reshape(count * copies, -1))
    by_image = StratifiedKFold(FOLDS, shuffle=True, random_state=seed)
    by_patient = StratifiedGroupKFold(FOLDS, shuffle=True, random_state=seed)
    once = np.arange(count)
    most = np.bincount(labels).max()
    rng = np.random.default_rng(seed)
    members = [rng.permutation(np.flatnonzero(labels == k)) for k in np.unique(labels)]
    balanced = np.concatenate([np.resize(rows, most) for rows in members])
    repeated = np.repeat(once, copies)
    honest, fair, wide = (
        "split by patient",
        "oversampled after the split by patient",
        "views after the split by patient",
    )
    plans = [
        (honest, None, once, once * copies, True),
        ("split by image", honest, once, once * copies, False),
        (fair, None, balanced, balanced * copies, True),
        ("oversampled before the split", fair, balanced, balanced * copies, False),
        (wide, None, repeated, np.arange(count * copies), True),
        ("views before the split", wide, repeated, np.arange(count * copies), False),
    ]
    drawn = metrics.resample(count, patients, draws=draws, seed=seed)
    weights = drawn.point_first
    table, samples = [], {}
    for name, counterpart, images, rows, grouped in plans:
        splitter = by_patient if grouped else by_image
        groups = np.asarray(patients)[images] if grouped else None
        right = cross_validated(similar, rows, labels[images], splitter, groups)
        hits = np.bincount(images, right, minlength=count)
        total = np.bincount(images, minlength=count)
        samples[name] = (weights @ hits) / (weights @ total)
        entry = {"protocol": name, "leaking": counterpart is not None, "counterpart": counterpart}
        entry |= metrics.told("accuracy", samples[name]) | {"gap": None, "gap_ci95": None}
        if counterpart:
            entry |= metrics.told("gap", samples[name] - samples[counterpart])
        table.append(entry | {"images": len(np.unique(images)), "unit": drawn.unit})
    return table


def run_study(dataset: data.Dataset, images: int, backbone: str, weights: str, size: int) -> dict:
    """Draw a sample, make its features, and put them through `study`.

    Args:
        images: about how many, of train and val.
        backbone, weights, size: of the frozen network, see `frozen_features`.

    Returns:
        `{protocols, sentences, images, features, classifier}` for report.json.
    """
    rows = study_sample(dataset, images)
    table = dataset.manifest.iloc[rows]
    pixels = np.stack([folders.square(dataset.images[row, :, :, 0], size) for row in rows])[
        ..., None
    ]
    features = frozen_features(pixels, dataset, backbone, weights)
    labels, patients = table["grade"].to_numpy(), table["patient"].to_numpy(str)
    protocols = study(features, labels, patients, seed=dataset.seed)
    made = (
        "thumbnails" if weights == "none" else f"frozen {backbone}, never trained on these images"
    )
    return {
        "protocols": protocols,
        "sentences": study_sentences(protocols),
        "images": len(rows),
        "features": made,
        "classifier": f"support vector machine, Gaussian kernel, C = {PENALTY:g}",
    }


def study_sentences(table: list[Mapping]) -> list[str]:
    """Each leaking protocol in words."""
    return [
        f"{row['protocol']}: {100 * row['gap']:+.1f} points "
        f"({100 * row['gap_ci95'][0]:+.1f} to {100 * row['gap_ci95'][1]:+.1f}) of accuracy "
        f"against {row['counterpart']}"
        for row in table
        if row["leaking"]
    ]


def plot_table(table: list[Mapping]) -> pd.DataFrame:
    """The study as `plots.leak_gaps` wants it."""
    rows = []
    for row in table:
        low, high = row["accuracy_ci95"]
        gap_low, gap_high = row["gap_ci95"] or (np.nan, np.nan)
        gap = np.nan if row["gap"] is None else row["gap"]
        rows.append((row["protocol"], row["accuracy"], low, high, gap, gap_low, gap_high))
    columns = ["protocol", "value", "low", "high", "gap", "gap_low", "gap_high"]
    return pd.DataFrame(rows, columns=columns)
