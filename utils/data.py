"""Split, audit, store and load a dataset. No TensorFlow here.

Notebook 01 calls, in this order, `folders.find_dataset`, `folders.scan`, `folders.decode`, then
`leave_out`, `complete_splits`, `audit`, `check_leaks` and `save`; the later notebooks only `load`.
"""

import hashlib
import os
import warnings
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd

from utils import folders, runs

SPLITS = folders.SPLITS
MAX_UNREADABLE = 0.01


class LeakError(ValueError):
    """The same patient, or the same pixels, in two splits."""


def leave_out(facts: pd.DataFrame) -> tuple[pd.DataFrame, dict[str, str]]:
    """Drop the files that cannot be read, or show nothing: (the others, {name: reason}).

    facts: from `folders.decode`; the index of what is returned still counts in its images.
    ValueError names the files if they are more than 1 %.
    """
    reasons = facts["problem"].mask(facts["constant"], "constant")
    bad = facts["image"][reasons != ""]
    left_out = dict(zip(bad, reasons[bad.index], strict=True))
    if len(bad) > MAX_UNREADABLE * len(facts):
        listed = folders.some([f"{name} ({reason})" for name, reason in left_out.items()], 8)
        raise ValueError(
            f"{len(bad)} of {len(facts)} images ({len(bad) / len(facts):.1%}, allowed are "
            f"{MAX_UNREADABLE:.0%}) cannot be used; mend or remove them: {listed}"
        )
    return facts.drop(bad.index), left_out


def complete_splits(
    facts: pd.DataFrame, val_fraction: float, test_fraction: float, seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """Carve a val or test that is missing out of train, by patient and stratified by class.

    facts: from `decode`; patients who share an image stay together. Fractions are of train as it
    came. Returns (facts in the order train, val, test; notes). ValueError if a fraction that is
    needed is not in (0, 0.5].
    """
    facts, notes = facts.copy(), []
    whole = (facts["split"] == "train").sum()
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if (facts["split"] == split).any():
            continue
        if not 0 < fraction <= 0.5:
            raise ValueError(f"{split.upper()}_FRACTION is {fraction}, but there is no {split}")
        train = facts.index[facts["split"] == "train"]
        folds = max(2, round(len(train) / (fraction * whole)))
        chosen = train[_fold(facts.loc[train], folds, seed)]
        facts.loc[chosen, "split"] = split
        notes.append(
            f"{split} was missing: {len(chosen)} of {whole} train images of "
            f"{facts.loc[chosen, 'patient'].nunique()} patients were carved out, stratified"
        )
    order = facts["split"].map(SPLITS.index)
    return facts.loc[order.sort_values(kind="stable").index], notes


def _fold(train: pd.DataFrame, folds: int, seed: int) -> np.ndarray:
    from sklearn.model_selection import StratifiedGroupKFold

    groups = _connected(train["patient"], train["pixels"])
    if len(np.unique(groups)) < folds:
        raise ValueError(f"{len(np.unique(groups))} patients are too few to carve {folds} folds")
    splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a rare class: check_classes says what lacks
        return next(splitter.split(train, train["grade"], groups))[1]


def _connected(patients: pd.Series, pixels: pd.Series) -> np.ndarray:
    """Group number of each row: rows of one patient, or of equal pixels, are in one group."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    a, b = pd.factorize(patients)[0], pd.factorize(pixels)[0]
    nodes = a.max() + b.max() + 2
    edges = coo_array((np.ones(len(a)), (a, a.max() + 1 + b)), shape=(nodes, nodes))
    return connected_components(edges, directed=False)[1][a]


def audit(
    facts: pd.DataFrame,
    images: np.ndarray,
    found: Mapping,
    left_out: Mapping[str, str],
    notes: list[str],
) -> dict:
    """What a reader should know about a dataset before training on it, as plain JSON values.

    facts: what `complete_splits` gave; images: uint8 (n, S, S, 1) of `folders.decode`, in which
    the index of facts counts; found: of `folders.scan`; left_out and notes: of the steps before.
    ValueError for a class that train lacks, or an empty split.
    """
    class_names, size = found["class_names"], images.shape[1]
    absent = folders.check_classes(facts, class_names, set(SPLITS))
    counts = pd.crosstab(facts["split"], facts["class"])
    counts = counts.reindex(index=SPLITS, columns=class_names, fill_value=0)
    per_patient = facts.groupby("patient").size().value_counts().sort_index()
    turned, notes = inverted(images, facts.index), [*found["notes"], *notes, *absent]
    if turned is None:
        notes.append("inverted images were not looked for: the images are too unlike each other")
    small = facts[["width", "height"]].max(axis=1) < size
    sizes = (facts["width"].astype(str) + "x" + facts["height"].astype(str)).value_counts()
    same = facts[facts.duplicated("pixels", keep=False)].groupby("pixels")
    crossing = same["split"].nunique() > 1
    copies = same["image"].agg(list)
    splits_of = facts[["patient", "split"]].drop_duplicates().groupby("patient")["split"]
    shared = splits_of.agg(list)[splits_of.size() > 1]
    return {
        "images": len(facts),
        "classes": found["names_shown"],
        "counts": {s: dict(zip(class_names, map(int, counts.loc[s]), strict=True)) for s in SPLITS},
        "imbalance": round(float(counts.loc["train"].max() / counts.loc["train"].min()), 2),
        "patients": {s: int(facts["patient"][facts["split"] == s].nunique()) for s in SPLITS},
        "patient_rule": found["patient_rule"],
        "images_per_patient": {str(k): int(v) for k, v in per_patient.items()},
        "shared_patients": {str(patient): splits for patient, splits in shared.items()},
        "identical_across_splits": copies[crossing].tolist(),
        "identical_within_split": copies[~crossing].tolist(),
        "left_out": dict(left_out),
        "inverted": turned and facts["image"][turned].tolist(),
        "stored_size": size,
        "smaller_than_stored": int(small.sum()),
        "sizes": {name: int(count) for name, count in sizes.head(10).items()},
        "bits": {str(b): int(n) for b, n in facts["bits"].value_counts().sort_index().items()},
        "notes": notes,
    }


def inverted(images: np.ndarray, rows: np.ndarray) -> list[int] | None:
    """Rows whose gray values are turned (bone dark on white), against the majority.

    Images of one kind look alike when blurred to 16 x 16: their first principal component carries
    a sign, and a negative of an image gets the other sign. None if the images are not of one kind
    (median correlation with the component under 0.5) or fewer than 20, so that there is no telling.
    """
    side = images.shape[1] // 16 * 16
    if len(rows) < 20 or side == 0:
        return None
    blurred = [
        images[part, :side, :side, 0].reshape(len(part), 16, side // 16, 16, side // 16)
        for part in np.array_split(np.asarray(rows), -(-len(rows) // 256))
    ]
    blurred = np.concatenate([b.mean((2, 4), dtype="float32") for b in blurred])
    z = blurred.reshape(len(rows), 256)
    z = z - z.mean(axis=1, keepdims=True)
    z /= np.linalg.norm(z, axis=1, keepdims=True) + 1e-6
    correlation = z @ np.linalg.eigh(z.T @ z)[1][:, -1]
    correlation *= np.sign(np.median(correlation))
    if np.median(np.abs(correlation)) < 0.5:
        return None
    return [int(row) for row in np.asarray(rows)[correlation < -0.3]]


def summary(report: Mapping) -> pd.DataFrame:
    """The audit as a table: what was checked, what was found, how to take it."""
    shared, copied = report["shared_patients"], report["identical_across_splits"]
    turned = report["inverted"]
    rows = [
        ("images, left out", f"{report['images']}, {len(report['left_out'])}", report["left_out"]),
        ("train: largest class / smallest", f"{report['imbalance']:.1f}", report["imbalance"] > 3),
        (
            "file names that tell the patient",
            f"{report['patient_rule']:.0%}",
            not report["patient_rule"],
        ),
        ("patients in two splits", str(len(shared)), "leak" if shared else ""),
        ("same pixels in two splits", str(len(copied)), "leak" if copied else ""),
        (
            "same pixels within a split",
            str(len(report["identical_within_split"])),
            report["identical_within_split"],
        ),
        (
            "inverted images",
            "not looked for" if turned is None else str(len(turned)),
            turned is None or turned,
        ),
        (
            f"smaller than the stored {report['stored_size']} px",
            str(report["smaller_than_stored"]),
            report["smaller_than_stored"],
        ),
    ]
    table = pd.DataFrame(rows, columns=["check", "found", "verdict"]).set_index("check")
    table["verdict"] = [v if v == "leak" else "note" if v else "good" for v in table["verdict"]]
    return table


def check_leaks(report: Mapping, allow: bool = False) -> list[str]:
    """Say what leaks between the splits; LeakError unless that is allowed."""
    found = [
        f"patient {patient} is in {' and '.join(splits)}"
        for patient, splits in report["shared_patients"].items()
    ]
    found += [f"{' = '.join(names)} (same pixels)" for names in report["identical_across_splits"]]
    if found and not allow:
        raise LeakError(
            f"{len(found)} leaks between splits: {folders.some(found, 6)}. Scores would be too "
            "good: remove those files from one of the splits, or set ALLOW_LEAKS to go on."
        )
    return found


@dataclass(frozen=True)
class Dataset:
    """What notebook 01 stored: `images` row i belongs to `manifest` row i."""

    manifest: (
        pd.DataFrame
    )  # image, split, grade (index of the class), class, patient, width, height
    images: np.ndarray = field(repr=False)  # uint8 (n, stored size, stored size, 1), on disk
    name: str
    class_names: list[str]
    names_shown: list[str]
    seed: int
    augmentation: dict  # keys of views.DEFAULTS
    balance: str
    synthetic: bool
    bayes_accuracy: float | None  # of phantoms: the most that any reader can reach
    digest: str  # sha256 over manifest and images

    def rows(self, split: str) -> np.ndarray:
        """Rows of one split, int64 (n,); ValueError for a name that is no split."""
        if split not in SPLITS:
            raise ValueError(f"split is one of {SPLITS}, not {split!r}")
        return np.flatnonzero(self.manifest["split"] == split)

    def labels(self, split: str) -> np.ndarray:
        """Index of the class of each image: int32 (n,)."""
        return self.manifest["grade"].to_numpy("int32")[self.rows(split)]

    def patients(self, split: str) -> np.ndarray:
        """Patient of each image: str (n,)."""
        return self.manifest["patient"].to_numpy(str)[self.rows(split)]

    def pixels(self, split: str, size: int) -> np.ndarray:
        """Images of one split, resized from the stored size with antialiasing.

        Returns uint8 (n, size, size, 1), in main memory.
        """
        rows = self.rows(split)
        pixels = np.empty((len(rows), size, size, 1), "uint8")

        def resize(i):
            pixels[i, :, :, 0] = folders.square(self.images[rows[i], :, :, 0], size)

        with ThreadPoolExecutor(os.cpu_count()) as pool:
            list(pool.map(resize, range(len(rows))))
        return pixels


def save(
    folder: Path,
    facts: pd.DataFrame,
    images: np.ndarray,
    *,
    source: Path,
    found: Mapping,
    seed: int,
    augmentation: Mapping,
    balance: str,
) -> None:
    """Write manifest.csv, images.npy and, last, dataset.json into `folder`.

    facts, images, found: as for `audit`; source: the folder that they came from.
    """
    folder = Path(folder)
    columns = ["image", "split", "grade", "class", "patient", "width", "height"]
    manifest = facts[columns].to_csv(index=False, lineterminator="\n")
    rows = facts.index.to_numpy()
    kept = images if np.array_equal(rows, np.arange(len(images))) else images[rows]

    def write_images(path):
        with Path(path).open("wb") as file:
            np.save(file, kept)

    runs.write_atomic(
        folder / "manifest.csv", lambda path: Path(path).write_text(manifest, "utf-8")
    )
    runs.write_atomic(folder / "images.npy", write_images)
    label = Path(source) / folders.SYNTHETIC
    about = runs.read_json(label) if label.exists() else {}
    digest = hashlib.sha256(manifest.encode())
    digest.update(np.ascontiguousarray(kept))
    runs.write_json(
        folder / "dataset.json",
        {
            "name": Path(source).name,
            "class_names": found["class_names"],
            "names_shown": found["names_shown"],
            "seed": seed,
            "augmentation": dict(augmentation),
            "balance": balance,
            "synthetic": bool(about),
            "bayes_accuracy": about.get("bayes_accuracy"),
            "digest": digest.hexdigest(),
        },
    )


def load(folder: Path) -> Dataset:
    """Open what `save` wrote; the images stay on disk until they are used.

    FileNotFoundError if there is nothing; ValueError if the files do not fit each other.
    """
    folder = Path(folder)
    if not (folder / "dataset.json").exists():
        raise FileNotFoundError(f"no dataset.json in {folder.absolute()}: run notebook 01_data")
    text = {"image": str, "split": str, "class": str, "patient": str}
    manifest = pd.read_csv(folder / "manifest.csv", dtype=text, keep_default_na=False)
    images = np.load(folder / "images.npy", mmap_mode="r")
    if len(images) != len(manifest):
        raise ValueError(
            f"{folder.absolute()}: {len(images)} images, but {len(manifest)} rows in the manifest; "
            "run notebook 01_data again"
        )
    return Dataset(manifest=manifest, images=images, **runs.read_json(folder / "dataset.json"))
