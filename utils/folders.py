"""Find a dataset of images in folders, and list it. No TensorFlow here."""

import hashlib
import os
import re
from collections import Counter, namedtuple
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd

from utils import runs, settings

SPLITS, SYNTHETIC = settings.SPLITS, settings.SYNTHETIC
SPLIT = re.compile("(train|val|test)(ing|id|idation)?")
EXTENSIONS = {".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"}
# 9001695L, 9000012_L, P1000_left_V00, 123-R: a patient's number, then the side.
PATIENT = r"(?i)(?:^|/)([a-z]*[0-9]+)[ _-]?(?:left|right|l|r)(?![a-z0-9])[^/]*$"

Contents = namedtuple("Contents", "folders images others")  # lists of paths, by name


def contents(folder: Path) -> Contents:
    """What a folder holds, through links, but hidden files, macOS's own and runs of this series."""
    found = Contents([], [], [])
    try:
        paths = sorted(p for p in folder.iterdir() if not p.name.startswith((".", "__MACOSX")))
    except OSError:  # nobody may list it, or it is a file: it counts as one that is not read
        return Contents([], [], [folder])
    for path in paths:
        if os.path.isdir(path):  # noqa: PTH112  # pathlib fails where nobody may look
            run = any(map(os.path.exists, (path / ".lock", path / "data/stage.json")))
            found.folders.extend([path] * (not run))
        elif path.suffix.lower() in EXTENSIONS:
            found.images.append(path)
        elif path.name not in (SYNTHETIC, "FAULTS.json"):
            found.others.append(path)
    return found


def files_below(folder: Path, above: tuple[Path, ...] = ()) -> list[Path]:
    """All files in a folder and below it, through links, except those that lead back up."""
    inside, above = contents(folder), (*above, folder.resolve())
    deeper = [f for c in inside.folders if c.resolve() not in above for f in files_below(c, above)]
    return inside.images + inside.others + deeper


def classes(folder: Path) -> list[Path]:
    """Subfolders that directly hold images."""
    return [child for child in contents(folder).folders if contents(child).images]


def kinds(folder: Path) -> list[str]:
    """Names of folders that several classes have inside, and that are no patients' numbers."""
    inside = Counter(c.name for cls in contents(folder).folders for c in classes(cls))
    return sorted(name for name, n in inside.items() if n > 1 and not re.search(r"\d", name))


def counted(files: list[Path]) -> str:
    """Files by extension, such as "12 .dcm, 1 .csv"; "no file" for none."""
    counts = Counter(path.suffix.lower() or "without extension" for path in files).most_common()
    return listing([f"{n} {ending}" for ending, n in counts]) or "no file"


def find_dataset(data_dir: str | Path = "") -> Path | None:
    """The folder that holds `train/class/image`, or `class/image`, at or below data_dir.

    data_dir: empty: Kaggle's input mount, without synthetic X-rays; None where nothing is attached.
    Raises FileNotFoundError (nothing there) or ValueError (several datasets).
    """
    root = settings.resolve(data_dir) if data_dir else runs.kaggle_input()

    def search(folder, levels=6):
        inside = contents(folder)
        if not data_dir and (folder / SYNTHETIC).exists():
            return []
        splits = [c for c in inside.folders if SPLIT.fullmatch(c.name.lower())]
        deep = [place for c in splits for place in (c, *contents(c).folders)]
        if any(map(classes, deep)) or len(classes(folder)) > 1:
            return [folder]
        return [f for c in inside.folders for f in search(c, levels - 1)] if levels else []

    found = search(root)
    # `0/Image` and `0/Edges` look like a dataset each; the folder above holds the classes.
    if len(found) > 1 and len({f.parent for f in found}) == 1 and kinds(found[0].parent):
        return found[0].parent
    if len(found) > 1:
        raise ValueError(f"{len(found)} datasets; set DATA_DIR to one of: {listing(found)}.")
    if data_dir and not found:
        raise FileNotFoundError(
            f"There is no train/<class>/<image> or <class>/<image> below {root}, which holds "
            f"{counted(files_below(root))}. Supported: {', '.join(sorted(EXTENSIONS))}."
        )
    return found[0] if found else None


def scan(
    folder: Path, class_order: Iterable[str] = (), ordered: bool = True, patient_pattern: str = ""
) -> tuple[pd.DataFrame, dict]:
    """List the images of a dataset and read their bytes, without decoding them.

    class_order, ordered, patient_pattern: as notebook 01 takes them; the pattern is searched in a
    file's path below folder. Returns (table, found). table has a row per image: image (path below
    folder), split, class, grade (index of the class), patient (the image's own name where the
    pattern finds none), path and sha (of the bytes; "" if unreadable). found: class_names,
    patient_rule (share of the images whose patient is known), notes. ValueError: unusable folders.
    """
    rows, named = [], set()
    splits, notes = _splits(folder)
    for split, place in splits.items():
        while len(inside := contents(place).folders) == 1 and not contents(inside[0]).images:
            place = inside[0]  # train/knees/0/…
        if several := kinds(place):
            raise ValueError(
                f"The classes in {place} have folders inside ({listing(several)}): put splits "
                "first, as train/<class>/<image>; of several pictures of a patient keep one kind."
            )
        for cls in inside:
            name = printable(cls.name)
            for deep in (cls, *contents(cls).folders):  # class/image or class/patient/image
                found = contents(deep).images
                own = None if deep == cls else printable(deep.name)
                rows += [(path, split, name, own) for path in found]
                if found or place != folder:
                    named.add(name)
    table = pd.DataFrame(rows, columns=["path", "split", "class", "patient"])
    class_names = order_classes(named, class_order, ordered)
    check_classes(table, class_names, list(splits))
    table["grade"] = table["class"].map(class_names.index)
    table["image"] = [printable(path.relative_to(folder).as_posix()) for path in table["path"]]
    patient = table["image"].str.extract(patient_pattern or PATIENT)[0].fillna(table["patient"])
    table["patient"] = patient.fillna(table["image"].str.rpartition(".")[0])
    if unknown := int(patient.isna().sum()):
        alone = "each of those images counts as a patient of its own (PATIENT_PATTERN)"
        notes.append(f"{unknown} of {len(table)} file names do not tell the patient: {alone}")
    files = set(contents(folder).images + contents(folder).others)
    files.update(*map(files_below, splits.values()))
    if left := sorted(files - set(table["path"])):
        names = listing(printable(path.relative_to(folder).as_posix()) for path in left)
        notes.append(f"Not read (no image in a class or patient folder): {counted(left)}: {names}")
    with ThreadPoolExecutor() as pool:
        table["sha"] = list(pool.map(_sha, table["path"]))
    rule = float(patient.notna().mean())
    return table, {"class_names": class_names, "patient_rule": rule, "notes": notes}


def check_folder(values: Mapping, quiet: bool = False) -> tuple[Path | None, dict[str, str]]:
    """Find and list the images before anything is drawn or decoded; print what changed.

    values: the parameters of notebook 01. Returns (the dataset's folder, None where X-rays will be
    drawn; what identifies the images). Raises as `find_dataset` and `scan` do.
    """
    source = find_dataset(values["DATA_DIR"])
    if source is None:
        return None, {"images": "drawn"}
    names = ("CLASS_ORDER", "ORDERED", "PATIENT_PATTERN")
    table, _ = scan(source, *(values[name] for name in names))
    before = runs.run_folder(values["RUN_DIR"]) / "data/files.csv"
    if before.exists() and not quiet:
        old = pd.read_csv(before, dtype=str, keep_default_na=False)
        both = old.merge(table, "outer", "image", suffixes=("_old", "")).query("sha != sha_old")
        what = np.where(both["sha_old"].isna(), "new", "changed")
        for kind, images in both["image"].groupby(np.where(both["sha"].isna(), "gone", what)):
            print(f"{len(images)} image{'s' * (len(images) > 1)} {kind}: {listing(images)}")
    listed = table[["image", "split", "class", "sha"]].sort_values("image").to_csv(index=False)
    return source, {"images": hashlib.sha256(listed.encode()).hexdigest()}


def _sha(path: Path) -> str:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError:
        return ""


def _splits(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """({"train": its folder, ...}, notes on what is left out)."""
    splits, ignored, notes = {}, [], []
    for child in contents(folder).folders:
        match = SPLIT.fullmatch(child.name.lower())
        if match is None:
            ignored.append(printable(child.name))
        elif (name := match[1]) in splits:
            raise ValueError(f"{folder}: {splits[name].name} and {child.name} both name {name}.")
        elif contents(child).images and not classes(child) and name != "train":
            notes.append(f"{child.name} is left out: its images are in no class folder")
        else:
            splits[name] = child
    if not splits and not notes:  # class/image: all of it is train until val and test are carved
        return {"train": folder}, ["no split folders: all images count as train"]
    if "train" not in splits:
        raise ValueError(f"{folder} has no train folder, only {listing(sorted(splits) or notes)}.")
    if ignored:
        notes.append(f"folders left out, as they name no split: {listing(ignored)}")
    return {name: splits[name] for name in SPLITS if name in splits}, notes


def order_classes(names: Iterable[str], class_order: Iterable[str], ordered: bool) -> list[str]:
    """Class names from least to most: as given, by the number in each, or without an order."""
    names = sorted(names)
    if len(names) < 2:
        raise ValueError(f"At least two classes are needed; found: {listing(names) or 'none'}.")
    if class_order:
        if sorted(class_order) != names:
            raise ValueError(f"CLASS_ORDER is {list(class_order)}; the classes are {names}.")
        return list(class_order)
    numbers = {name: int(found[0]) for name in names if (found := re.search(r"\d+", name))}
    if len(set(numbers.values())) == len(names):
        return sorted(names, key=numbers.get)
    if ordered:
        raise ValueError(
            f"The class names have no numbers to order them by: {listing(names, 20)}. Set "
            "CLASS_ORDER to all of them, from least to most, or ORDERED to false."
        )
    return names


def check_classes(table: pd.DataFrame, class_names: list[str], splits: list[str]) -> pd.DataFrame:
    """Images of each class (column) in each split (row); ValueError: train lacks one."""
    counts = pd.crosstab(table["split"], table["class"])
    counts = counts.reindex(index=splits, columns=class_names, fill_value=0)
    if empty := list(counts.index[~counts.any(axis=1)]):
        raise ValueError(f"There is no image in {', '.join(empty)}: fill the folder or remove it.")
    if absent := list(counts.columns[counts.loc["train"] == 0]):
        raise ValueError(f"Train has no image of class {listing(absent)}: no model can learn it.")
    return counts


def printable(name: str) -> str:
    """A file name whose bytes are no UTF-8, with those bytes as \\x…; any other as it is."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def listing(names: Iterable, limit: int = 5) -> str:
    """The first names, and how many more there are."""
    names = list(map(str, names))
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more
