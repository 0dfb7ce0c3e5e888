"""Split, store and load a dataset; after notebook 01, only `load`. No TensorFlow here."""

import hashlib
import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pandas as pd
from scipy.sparse import csr_array
from scipy.sparse.csgraph import connected_components
from sklearn.model_selection import StratifiedGroupKFold

from utils import runs, settings
from utils.images import square

SPLITS = settings.SPLITS


def complete_splits(
    facts: pd.DataFrame, val_fraction: float, test_fraction: float, seed: int
) -> tuple[pd.DataFrame, list[str]]:
    """Carve a val or test that is missing out of train, by patient and stratified by class.

    Patients who share an image stay together, the last one of a class stays in train; fractions are
    of train as it came. Returns (facts in the order train, val, test; notes).
    """
    facts, notes = facts.copy(), []
    whole = (facts["split"] == "train").sum()
    for split, fraction in (("test", test_fraction), ("val", val_fraction)):
        if not (facts["split"] == split).any():
            train = facts[facts["split"] == "train"]
            chosen = _fold(train, max(2, round(len(train) / (fraction * whole))), seed)
            facts.loc[chosen, "split"] = split
            patients = facts["patient"][chosen].nunique()
            notes.append(f"{split} was missing: {len(chosen)} images, {patients} patients of train")
    return facts.sort_values("split", key=lambda s: s.map(SPLITS.index), kind="stable"), notes


def _fold(train: pd.DataFrame, folds: int, seed: int) -> pd.Index:
    patients, pixels = (pd.factorize(train[column])[0] for column in ("patient", "pixels"))
    shows = csr_array((np.ones(len(train)), (patients, pixels)))
    count, groups = connected_components(shows @ shows.T)
    groups, grades, chosen = groups[patients], train["grade"].to_numpy(), np.array([], int)
    folds = min(folds, count, np.bincount(grades).max())
    if folds > 1:
        splitter = StratifiedGroupKFold(folds, shuffle=True, random_state=seed)
        chosen = next(splitter.split(train, grades, groups))[1]
    for grade in set(grades) - set(np.delete(grades, chosen)):
        last = groups[chosen][grades[chosen] == grade][0]
        chosen = chosen[groups[chosen] != last]
    if not len(chosen):
        raise ValueError(f"{count} patients are too few to carve val and test out of train.")
    return train.index[chosen]


@dataclass(frozen=True)
class Dataset:
    """What notebook 01 stored: `images` row i belongs to `manifest` row i."""

    manifest: pd.DataFrame  # image, split, grade (index of the class), class, patient, width, …
    images: np.ndarray = field(repr=False)  # uint8 (n, stored size, stored size, 1), on disk
    name: str
    class_names: list[str]  # from least to most, if they have an order
    names_shown: list[str]
    subject: str
    ordered: bool
    seed: int
    augmentation: dict  # keys of views.DEFAULTS
    balance: str
    synthetic: bool
    bayes_accuracy: float | None  # of phantoms: the most that any reader can reach
    origin: dict  # of the files: colour (bool), aspect (least and most of width / height), bits
    digest: str  # sha256 over manifest and images

    @property
    def monitor(self) -> str:
        """The column of the history by which the best epoch is chosen; larger is better."""
        return "val_qwk" if self.ordered else "val_f1"

    def rows(self, split: str) -> np.ndarray:
        """Rows of one split: int64 (n,)."""
        return np.flatnonzero(self.manifest["split"] == split)

    def labels(self, split: str) -> np.ndarray:
        """Index of the class of each image: int32 (n,)."""
        return self.manifest["grade"].to_numpy("int32")[self.rows(split)]

    def patients(self, split: str) -> np.ndarray:
        """Patient of each image: str (n,)."""
        return self.manifest["patient"].to_numpy(str)[self.rows(split)]

    def pixels(self, split: str, size: int) -> np.ndarray:
        """Images of one split, resized from the stored size: uint8 (n, size, size, 1)."""
        with ThreadPoolExecutor() as pool:
            resized = pool.map(lambda r: square(self.images[r, ..., 0], size), self.rows(split))
        return np.stack(list(resized))[..., None]


def save(
    folder: Path, facts: pd.DataFrame, images: np.ndarray, table: pd.DataFrame, source: Path, **more
) -> None:
    """Write files.csv (what was scanned), manifest.csv, images.npy and, last, dataset.json.

    facts: of `complete_splits`; images: of `images.decode`; table: of `folders.scan`, of the folder
    `source`; more: the fields of `Dataset` that notebook 01 decides.
    """
    columns = ["image", "split", "grade", "class", "patient", "width", "height"]
    manifest, kept = facts[columns], images[facts.index]
    for name, rows in {"files.csv": table[["image", "sha"]], "manifest.csv": manifest}.items():
        runs.write_atomic(folder / name, lambda path, rows=rows: rows.to_csv(path, index=False))
    runs.write_atomic(folder / "images.npy", lambda path: np.save(path, kept))
    aspect = facts["width"] / facts["height"]
    drawn = runs.read_json(source / settings.SYNTHETIC, {})
    content = manifest.to_csv(index=False).encode() + kept.tobytes()
    about = {
        "name": os.fsencode(source.name).decode("utf-8", "backslashreplace"),
        "synthetic": bool(drawn),
        "bayes_accuracy": drawn.get("bayes_accuracy"),
        "origin": {
            "colour": bool(facts["colour"].any()),
            "aspect": [round(aspect.min(), 4), round(aspect.max(), 4)],
            "bits": int(facts["bits"].max()),
        },
        "digest": hashlib.sha256(content).hexdigest(),
    }
    runs.write_json(folder / "dataset.json", about | more)


def load(folder: Path) -> Dataset:
    """Open what `save` wrote; the images stay on disk. StageError: it is missing or damaged."""
    about = runs.read_json(folder / "dataset.json")
    text = dict.fromkeys(["image", "split", "class", "patient"], str)
    manifest = pd.read_csv(folder / "manifest.csv", dtype=text, keep_default_na=False)
    return Dataset(manifest, np.load(folder / "images.npy", mmap_mode="r"), **about)
