"""From folders of images to arrays: find a dataset, list it, decode it once. No TensorFlow here."""

import hashlib
import os
import re
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image, ImageOps, UnidentifiedImageError
from tqdm import tqdm

from utils import runs

SPLIT_NAMES = {"train": "train", "val": "val", "valid": "val", "validation": "val", "test": "test"}
SPLITS = ("train", "val", "test")
NEVER_POOLED = "auto_test"  # in the public knee data: the test patients again, in another crop
EXTENSIONS = {".png", ".jpg", ".jpeg"}
PATIENT = re.compile(r"(\d+)[LR](?![0-9A-Za-z])")  # 9001695L.png: the left knee of 9001695
COPIES = 3  # of all images in memory: as stored, as a model wants them, and TensorFlow's own
SYNTHETIC = "SYNTHETIC.json"  # phantoms carry it


def find_dataset(data_dir: str | Path = "") -> Path | None:
    """The folder that holds `train/class/image`, or `class/image` without splits.

    data_dir: searched with the folders below it; empty: Kaggle's input mount, in either of its
    layouts, or None where there is none. FileNotFoundError lists what was searched under a given
    data_dir; ValueError lists the candidates if there are several.
    """
    root, mount = Path(data_dir or runs.kaggle_input()), runs.kaggle_input()
    if not root.is_dir():
        if not data_dir:
            return None
        raise FileNotFoundError(f"DATA_DIR: no folder {root.absolute()}")
    split, flat, searched = _candidates(root, synthetic_too=root != mount)
    found = split or flat
    if len(found) == 1 or root in found:
        return root if root in found else found[0]
    if found:
        raise ValueError(
            f"{len(found)} datasets under {root}; set DATA_DIR to one of: "
            + some([str(f) for f in found])
        )
    if not data_dir:
        return None
    raise FileNotFoundError(
        f"no train/<class>/<image> (png, jpg) under {root.absolute()}; searched "
        f"{len(searched)} folders: {some([str(s) for s in searched], 8)}"
    )


def weights_names(backbone: str) -> list[str]:
    """File names under which a backbone's ImageNet weights may be attached: ours, then Keras's."""
    short = backbone.lower()
    if short.startswith("efficientnetv2"):
        official = f"efficientnetv2-{short.removeprefix('efficientnetv2')}_notop.h5"
    else:
        size = short.removeprefix("mobilenetv3")
        official = f"weights_mobilenet_v3_{size}_224_1.0_float_no_top_v2.h5"
    return [f"{short}_notop.weights.h5", f"{short}_notop.h5", official]


def attached_weights(backbone: str) -> Path | None:
    """The attached file of a backbone's ImageNet weights on Kaggle; None where there is none."""
    wanted = weights_names(backbone)
    found = [p for p in runs.kaggle_input().rglob("*.h5") if p.name.lower() in wanted]
    return min(found, key=lambda p: (wanted.index(p.name.lower()), str(p)), default=None)


def _candidates(root: Path, synthetic_too: bool, depth: int = 6):
    """Dataset folders with splits and without, and all folders looked into, breadth first."""
    split, flat, searched, level = [], [], [], [root]
    for _ in range(depth):
        below = []
        for folder in level:
            searched.append(folder)
            children = _subfolders(folder)
            if not synthetic_too and (folder / SYNTHETIC).exists():
                continue  # phantoms in an attached notebook's output are no find
            if (folder / "data" / "stage.json").exists():
                continue  # an earlier run, whose folders of figures are no classes
            if any(c.name.lower() == "train" and _class_folders(c) for c in children):
                split.append(folder)
            elif len(_class_folders(folder)) > 1 and (
                folder == root or folder.name.lower() not in SPLIT_NAMES
            ):
                flat.append(folder)
            else:
                below += children
        level = below
    return split, flat, searched


def _subfolders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        names = [e.name for e in entries if e.is_dir() and not e.name.startswith(".")]
    return [folder / name for name in sorted(names)]


def _class_folders(folder: Path) -> list[Path]:
    """Subfolders that directly hold an image."""
    return [
        child
        for child in _subfolders(folder)
        if any(Path(name).suffix.lower() in EXTENSIONS for name in os.listdir(child))  # noqa: PTH208 - names are enough
    ]


def scan(folder: Path) -> tuple[pd.DataFrame, dict]:
    """List the images of a dataset without opening them.

    Returns (table, found). table has a row per image, in the order of split and name: image (path
    relative to folder), split ("train", "val" or "test"), class, grade (index of the class),
    patient. found: class_names, names_shown ("KL 0" for "0" where all are 0 to 4), patient_rule
    (share of the names that tell the patient; the others count as a patient each), notes.
    ValueError for fewer than two classes, a class that train lacks, or a split that stands twice.
    """
    folder = Path(folder)
    splits, notes = _split_folders(folder)
    rows = []
    for split in sorted(splits, key=SPLITS.index):
        for class_folder in _subfolders(splits[split]):
            for path in sorted(class_folder.iterdir()):
                if path.suffix.lower() in EXTENSIONS and not path.name.startswith("."):
                    relative = path.relative_to(folder)
                    rows.append((relative.as_posix(), split, class_folder.name))
    table = pd.DataFrame(rows, columns=["image", "split", "class"])
    named = set(table["class"])
    if folder not in splits.values():  # a class folder without images is a class that lacks them
        named |= {c.name for split_folder in splits.values() for c in _subfolders(split_folder)}
    class_names = sorted(named, key=_natural)
    check_classes(table, class_names, set(splits))
    table["grade"] = table["class"].map({name: i for i, name in enumerate(class_names)})
    matches = [PATIENT.match(Path(image).name) for image in table["image"]]
    known = np.array([m is not None for m in matches])
    table["patient"] = [
        m[1] if m else str(Path(image).with_suffix(""))
        for m, image in zip(matches, table["image"], strict=True)
    ]
    if not known.all():
        notes.append(
            f"{(~known).sum()} of {len(known)} file names do not begin with a patient's number and "
            "L or R: each of those images counts as a patient of its own"
        )
    found = {
        "class_names": class_names,
        "names_shown": shown_names(class_names),
        "patient_rule": float(known.mean()),
        "notes": notes,
    }
    return table, found


def _split_folders(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """({"train": its folder, ...}, notes on the folders that are left out)."""
    splits, ignored, notes = {}, [], []
    for child in _subfolders(folder):
        name = SPLIT_NAMES.get(child.name.lower())
        if name is None:
            ignored.append(child.name)
        elif name in splits:
            raise ValueError(f"{folder}: {splits[name].name} and {child.name} both name {name}")
        else:
            splits[name] = child
    if not splits:  # class/image: all of it is train until val and test are carved out
        return {"train": folder}, ["no split folders: all images count as train"]
    if "train" not in splits:
        raise ValueError(f"{folder} has no train folder, only {sorted(splits)}")
    if NEVER_POOLED in [name.lower() for name in ignored]:
        notes.append(f"{NEVER_POOLED} is left out: it repeats the test patients in another crop")
    if others := [name for name in ignored if name.lower() != NEVER_POOLED]:
        notes.append(f"folders left out, as they name no split: {some(others)}")
    return splits, notes


def shown_names(class_names: list[str]) -> list[str]:
    """Kellgren-Lawrence grades by their name, any other class as its folder is called."""
    kl = set(class_names) <= set("01234")
    return [f"KL {name}" if kl else name for name in class_names]


def _natural(name: str):
    """Sort key that puts 2 before 10."""
    return [(0, int(p), "") if p.isdigit() else (1, 0, p) for p in re.findall(r"\d+|\D+", name)]


def check_classes(table: pd.DataFrame, class_names: list[str], splits: set[str]) -> list[str]:
    """Notes on classes that val or test lacks; ValueError if train lacks one, or a split is empty.

    table: columns split and class; splits: the splits that there should be.
    """
    if len(class_names) < 2:
        raise ValueError(f"one class or none ({class_names}): there is nothing to tell apart")
    counts = pd.crosstab(table["class"], table["split"]).reindex(
        index=class_names, columns=sorted(splits), fill_value=0
    )
    if empty := list(counts.columns[counts.sum() == 0]):
        raise ValueError(f"no image in split {', '.join(empty)}: fill the folder or remove it")
    if absent := list(counts.index[counts["train"] == 0]):
        raise ValueError(
            f"class {', '.join(absent)} has no image in train: no model can learn it. "
            f"Classes found: {', '.join(class_names)}"
        )
    return [
        f"{split} has no image of class {name}"
        for split in counts.columns
        for name in counts.index[counts[split] == 0]
    ]


def decode(folder: Path, table: pd.DataFrame, size: int) -> tuple[np.ndarray, pd.DataFrame]:
    """Read every image once, in threads.

    Returns (images, facts). images: uint8 (n, size, size, 1), gray, padded with black to a square
    and resized with antialiasing; 16-bit images are scaled by the bits that they use. facts: table
    and the columns width, height, bits, pixels (sha256 of the decoded gray values), constant,
    problem ("" or why the file could not be read: its row of images is black).

    Raises:
        MemoryError: so many images of this size do not fit, with the copies that training makes.
    """
    needed, free = COPIES * len(table) * size**2, psutil.virtual_memory().available
    if needed > free:
        raise MemoryError(
            f"{len(table):,} images at {size} px and the copies that training makes take "
            f"{needed / 1e9:.1f} GB of memory, {free / 1e9:.1f} GB are free: lower STORED_SIZE."
        )
    images = np.zeros((len(table), size, size, 1), "uint8")

    def one(row):
        index, name = row
        facts = {"width": 0, "height": 0, "bits": 0, "pixels": "", "constant": False, "problem": ""}
        try:
            gray, facts["bits"] = read_gray(Path(folder) / name)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            return facts | {"problem": _problem(Path(folder) / name, error)}
        facts["height"], facts["width"] = gray.shape
        facts["pixels"] = hashlib.sha256(repr(gray.shape).encode() + gray.tobytes()).hexdigest()
        facts["constant"] = bool(gray.min() == gray.max())
        images[index, :, :, 0] = square(gray, size)
        return facts

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = pool.map(one, enumerate(table["image"]))
        facts = list(tqdm(rows, total=len(table), desc="decode", disable=runs.batch_mode()))
    return images, pd.concat([table.reset_index(drop=True), pd.DataFrame(facts)], axis=1)


def read_gray(path: Path) -> tuple[np.ndarray, int]:
    """Decode a PNG or JPEG, gray or colour: (uint8 (height, width), bits used). OSError if bad.

    Deep gray images are divided by the largest value of 10, 12, 14 or 16 bits that holds them:
    radiographs of 12 bits often come in files of 16.
    """
    with Image.open(path, formats=("PNG", "JPEG")) as image:
        image = ImageOps.exif_transpose(image)
        if not image.mode.startswith("I"):
            return np.asarray(image.convert("L")), 8
        values = np.asarray(image).astype("float32")
    bits = next((b for b in (8, 10, 12, 14) if values.max() < 2**b), 16)
    return np.round(values * (255 / (2**bits - 1))).clip(0, 255).astype("uint8"), bits


def square(gray: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w) to (size, size): aspect kept, black bars, bicubic with antialiasing."""
    if gray.shape == (size, size):
        return gray
    image = Image.fromarray(gray)
    return np.asarray(ImageOps.pad(image, (size, size), Image.Resampling.BICUBIC))


def _problem(path: Path, error: Exception) -> str:
    if not path.exists():
        return "missing"
    if path.stat().st_size == 0:
        return "empty"
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return "truncated" if "truncated" in str(error) else f"unreadable ({error})"


def some(names, limit: int = 5) -> str:
    names = list(map(str, names))
    return ", ".join(names[:limit]) + (f" and {len(names) - limit} more" * (len(names) > limit))
