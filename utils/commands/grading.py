"""`python -m utils grade`: grade radiographs with a finished run, or with a model file.

Each image is one knee, centred on the joint and framed as in the data the model learned from; what
clearly is not is refused, a line each (see `screening`). TensorFlow is imported only for `.keras`.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from utils import calibration, folders, litert, runs
from utils.commands import screening

BATCH = 64
WARNING = "Research software, no medical device: a grade from it decides nothing about a patient."


@dataclass(frozen=True)
class Grader:
    """A model that is ready to grade.

    Attributes:
        path: its file.
        class_names: of its K classes, in order.
        image_size: S, side of its input.
        refer_below: 0 to 1; a likeliest grade less probable than this goes to a person.
        probabilities: uint8 (n, S, S, 1) -> float (n, K), calibrated.
        decide: float (n, K) -> int (n,), the decision rule that notebook 06 fixed.
        model: the Keras model, None for a LiteRT file.
        note: what every result must say, or "".
    """

    path: Path
    class_names: list[str]
    image_size: int
    refer_below: float
    probabilities: Callable[[np.ndarray], np.ndarray]
    decide: Callable[[np.ndarray], np.ndarray]
    model: object = None
    note: str = ""

    @property
    def knees(self) -> bool:
        """Whether the classes are Kellgren-Lawrence grades: then inputs are screened for knees."""
        return set(self.class_names) <= set("01234")


def newest_model(folder: str | Path | None = None) -> Path:
    """The student of the newest finished run in a folder (default: where runs are kept).

    Raises:
        FileNotFoundError: no run there has finished notebook 06.
    """
    folder = runs.run_folder("runs") if folder is None else Path(folder)
    found = []
    for path in folder.glob("*/report/stage.json"):
        student = path.parent.parent / "student" / "student.keras"
        if student.is_file() and runs.read_json(path).get("finished"):
            found.append((path.stat().st_mtime, student))
    if not found:
        raise FileNotFoundError(
            f"No finished run in {folder}: make one with `python -m utils run`, or name a model "
            "file with --model."
        )
    return max(found)[1]


def load(path: str | Path) -> Grader:
    """Open a `.keras` or `.tflite` student and its sidecar.

    Raises:
        FileNotFoundError: no such file.
        ValueError: another kind of file, a damaged one, or a sidecar of another model.
        RuntimeError: a LiteRT file that no interpreter here runs.
    """
    path = Path(path)
    if path.suffix not in (".keras", ".tflite"):
        raise ValueError(f"{path} is no .keras or .tflite file.")
    if not path.is_file():
        raise FileNotFoundError(f"No model file {path}.")
    facts = litert.read_sidecar(path)
    known = facts or {"temperature": 1.0, "refer_below": litert.REFER_BELOW, "decision": "argmax"}
    fitted = calibration.Calibration(
        known["temperature"], known.get("thresholds", ()), known["refer_below"], 1.0
    )
    if path.suffix == ".keras":
        from utils import models

        model = models.load(path, precision="float32")
        size, classes = model.inputs[0].shape[1], model.outputs[0].shape[-1]

        def probabilities(pixels):
            logits = model.predict(pixels.astype("float32"), batch_size=BATCH, verbose=0)
            return fitted.probabilities(logits)
    else:
        model = None
        interpreter, _ = litert.open_interpreter(path)
        size, classes = litert.shapes(interpreter)

        def probabilities(pixels):
            return litert.predict(interpreter, pixels)

    note = ""
    if facts is None:
        doubt = "" if path.suffix == ".tflite" else ", probabilities are not calibrated"
        note = f"no {path.with_suffix('.json').name} beside the model{doubt}"
        facts = {"class_names": [str(k) for k in range(classes)], "image_size": size}
    if (len(facts["class_names"]), facts["image_size"]) != (classes, size):
        raise ValueError(
            f"{path.with_suffix('.json')} tells of {len(facts['class_names'])} classes at "
            f"{facts['image_size']} px, {path.name} has {classes} at {size} px: export it again."
        )
    return Grader(
        path,
        facts["class_names"],
        size,
        fitted.refer_below,
        probabilities,
        lambda found: fitted.decide(found, known["decision"]),
        model,
        note,
    )


def find_images(paths: Sequence[str | Path]) -> list[Path]:
    """Files as they are named, and the PNG and JPEG files of folders, by name, at any depth.

    Raises:
        FileNotFoundError: a path that does not exist, or a folder without any such file.
    """
    found = []
    for path in map(Path, paths):
        if path.is_dir():
            inside = sorted(
                p
                for p in path.rglob("*")
                if p.suffix.lower() in folders.EXTENSIONS and not p.name.startswith(".")
            )
            if not inside:
                raise FileNotFoundError(f"Folder {path} holds no PNG or JPEG file.")
            found += inside
        elif path.exists():
            found.append(path)
        else:
            raise FileNotFoundError(f"There is no file or folder {path}.")
    return found


def grade(
    paths: Sequence[str | Path],
    grader: Grader,
    *,
    overlay: str | Path | None = None,
    progress: bool = False,
) -> list[dict]:
    """Grade images, in batches.

    paths: files and folders. overlay: a folder for Grad-CAM pictures, one for each graded image.
    progress: show a bar on the error stream, if that is a terminal.

    Returns a row for each image: file, grade (int for KL, else the class's name; None if refused),
    probabilities (list of K, or None), refer (whether a person should read it), notes (list of
    str, the reason of a refusal among them).

    Raises:
        FileNotFoundError: as `find_images` does.
        ValueError: overlays asked of a LiteRT file, which has no gradients.
    """
    if overlay is not None and grader.model is None:
        raise ValueError(f"Overlays need gradients: give the .keras model, not {grader.path.name}.")
    files, rows = find_images(paths), []
    names = _picture_names(files)
    with tqdm(total=len(files), unit="image", disable=None if progress else True) as bar:
        for start in range(0, len(files), BATCH):
            batch = files[start : start + BATCH]
            part = [_row(path) for path in batch]
            good, pixels = [], []
            for row, path, name in zip(part, batch, names[start:], strict=False):
                gray, reason = screening.read(path, grader.knees)
                if gray is None:
                    row["notes"].append(f"refused: {reason}")
                    continue
                good.append((row, name, gray.shape))
                pixels.append(folders.square(gray, grader.image_size)[..., None])
            if good:
                # A short batch would be traced anew: fill it up, unless it is the only one.
                short = (BATCH - len(good)) * (len(files) > BATCH)
                found = grader.probabilities(np.stack(pixels + pixels[:1] * short))[: len(good)]
                classes = grader.decide(found)
                for (row, _, shape), k, shares in zip(good, classes, found, strict=True):
                    _fill(row, shape, int(k), shares, grader)
                if overlay is not None:
                    targets = [(row, Path(overlay) / name) for row, name, _ in good]
                    _write_overlays(grader, np.stack(pixels), classes, targets)
            rows += part
            bar.update(len(batch))
    return rows


def _row(path: Path) -> dict:
    """What is said of an image that is not graded."""
    return {"file": str(path), "grade": None, "probabilities": None, "refer": True, "notes": []}


def _fill(row: dict, shape: tuple[int, int], k: int, shares: np.ndarray, grader: Grader) -> None:
    """Set down class k, with probabilities (K,), for an image of this (height, width)."""
    name = grader.class_names[k]
    row["grade"] = int(name) if grader.knees else name
    row["probabilities"] = [round(float(p), 4) for p in shares]
    row["refer"] = bool(shares.max() < grader.refer_below)
    if row["refer"]:
        row["notes"].append(f"less sure than {grader.refer_below:.2f}: a person should read it")
    if max(shape) < grader.image_size:
        small = f"{shape[1]} x {shape[0]} px"
        row["notes"].append(f"{small} is smaller than the model's input of {grader.image_size} px")
    if grader.note:
        row["notes"].append(grader.note)


def _picture_names(files: Sequence[Path]) -> list[str]:
    """A PNG name for each file, none twice even where folders hold equal names."""
    names, taken = [], set()
    for path in files:
        name, number = path.stem, 1
        while f"{name}.png" in taken:
            number += 1
            name = f"{path.stem}_{number}"
        taken.add(f"{name}.png")
        names.append(f"{name}.png")
    return names


def _write_overlays(grader: Grader, pixels, classes, targets: list[tuple[dict, Path]]) -> None:
    """Radiograph and Grad-CAM of the grade given, side by side with a line of text: PNG files."""
    from utils import explain
    from utils.plots.images import overlay

    maps = explain.grad_cam(grader.model, pixels, classes)
    shown = folders.shown_names(grader.class_names)
    for image, heat, k, (row, target) in zip(pixels, maps, classes, targets, strict=True):
        pair = np.concatenate([image.repeat(3, axis=2), overlay(image, heat)], axis=1)
        scale = max(1, 320 // grader.image_size)
        picture = Image.fromarray(pair.repeat(scale, 0).repeat(scale, 1))
        text = f"{shown[k]}, probability {row['probabilities'][k]:.2f}"
        text += ", refer to a person" if row["refer"] else ""
        sheet = Image.new("RGB", (picture.width, picture.height + 24))
        sheet.paste(picture, (0, 24))
        ImageDraw.Draw(sheet).text((6, 4), text, "white", ImageFont.load_default(14))
        runs.write_atomic(target, sheet.save)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """What `python -m utils grade` takes."""
    parser.epilog = (
        "Each image is one knee, centred on the joint, framed as in the data. Exit status: 0 all "
        f"graded, 1 some refused, 2 wrong use. {WARNING}"
    )
    parser.add_argument("images", nargs="+", metavar="IMAGE|FOLDER", help="PNG or JPEG")
    parser.add_argument(
        "--model", metavar="FILE", help=".keras or .tflite; default: the newest finished run's"
    )
    parser.add_argument("--overlay", metavar="DIR", help="write where the model looked (Grad-CAM)")
    parser.add_argument("--format", choices=("table", "json", "csv"), default="table")


def main(arguments: argparse.Namespace) -> int:
    """Grade, print; return 0 if all were graded, 1 if some were refused, 2 for wrong use."""
    try:
        find_images(arguments.images)  # before a model is loaded
        grader = load(arguments.model or newest_model())
        print(f"Grading with {grader.path}. {WARNING}", file=sys.stderr)
        rows = grade(arguments.images, grader, overlay=arguments.overlay, progress=True)
    except (OSError, ValueError, RuntimeError) as error:
        print(f"grade: {error}", file=sys.stderr)
        return 2
    if arguments.format == "json":
        print(json.dumps(rows, indent=2, ensure_ascii=False))
    elif arguments.format == "csv":
        csv.writer(sys.stdout, lineterminator="\n").writerows(_cells(rows, grader))
    else:
        print("\n".join(_aligned(list(_cells(rows, grader)))))
    return int(any(row["grade"] is None for row in rows))


def _cells(rows: list[dict], grader: Grader) -> Iterator[list[str]]:
    """Header and rows of text, for CSV and the table."""
    yield ["file", "grade", *(f"p({name})" for name in grader.class_names), "refer", "notes"]
    for row in rows:
        found = row["probabilities"]
        shares = [""] * len(grader.class_names) if found is None else [f"{p:.4f}" for p in found]
        name = "" if row["grade"] is None else str(row["grade"])
        refer = "yes" if row["refer"] else "no"
        yield [row["file"], name, *shares, refer, "; ".join(row["notes"])]


def _aligned(cells: list[list[str]]) -> Iterator[str]:
    """Columns set under each other, two spaces apart."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    for row in cells:
        yield "  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip()
