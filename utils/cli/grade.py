"""`python -m utils grade`: grade images; what is clearly no input gets the reason instead."""

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image
from scipy.special import softmax

from utils import export, folders, images, runs, settings

STRETCH = 1.25  # how far outside the range of the data's shapes an image may lie
# Set on 6,604 published radiographs: only the 84 inverted frames among them are refused.
BLANK = 16.0  # darkest to brightest of 16 x 16 fields; the data's flattest has 32
TWO_KNEES = -0.9  # the gap of two knees: middle minus the darker quarter column


def newest_model(folder: Path) -> Path:
    """The student of this run, or of the run in this folder whose 08 finished last."""
    stages = folder.glob("**/report/deploy/stage.json")
    finished = [path for path in stages if runs.read_json(path)["finished"]]
    if not finished:
        raise FileNotFoundError(f"{folder} holds no finished run: name a model with --model FILE.")
    return max(finished, key=lambda path: path.stat().st_mtime).with_name("student.keras")


def load(path: Path) -> tuple:
    """(uint8 (n, S, S, 1) -> probabilities float (n, K), what the JSON beside the model says)."""
    if path.suffix not in (".keras", ".tflite"):
        raise ValueError(f"{path} is neither a .keras nor a .tflite file.")
    about = runs.read_json(path.with_suffix(".json"))
    if path.suffix == ".tflite":
        return export.open_file(path), about
    from utils import models

    model = models.load(path, "float32")
    return lambda x: softmax(model.predict_on_batch(x) / about["temperature"], axis=1), about


def read(path: Path, about: dict) -> np.ndarray:
    """One image as the model takes it: uint8 (S, S, 1). ValueError says why it is no input."""
    gray, (low, high) = images.read_image(path, about["bits"]), about["aspect"]
    height, width = gray.shape
    if not low / STRETCH <= width / height <= high * STRETCH:
        raise ValueError(f"{width} x {height} px: crop to {low:.2f} to {high:.2f} times the height")
    if not about["colour"] and images.is_colour(path):
        raise ValueError("a colour picture, but the model learned from gray images")
    if about["subject"] == settings.KNEES and (problem := knee_problem(gray)):
        raise ValueError(problem)
    for side in about["sides"]:  # as 01 stored it, then as the student takes it
        gray = images.square(gray, side)
    return gray[..., None]


def knee_problem(gray: np.ndarray) -> str:
    """Why uint8 (H, W) is not one upright knee, a bright column between darker sides; or ""."""
    small = np.asarray(Image.fromarray(gray).resize((64, 64), Image.Resampling.BOX), "float32")
    if np.ptp(small.reshape(16, 4, 16, 4).mean(axis=(1, 3))) < BLANK:
        return "a blank frame"
    # The joint line crosses everything, so the columns are compared above and below it.
    column = np.concatenate([small[:16], small[-16:]]).mean(axis=0)
    column = (column - small.mean()) / small.std()
    quarters = column[10:22].mean(), column[-22:-10].mean()
    sides = (column[:4].mean() + column[-4:].mean()) / 2
    if column[28:36].mean() - min(quarters) < TWO_KNEES and sides < max(quarters):
        return "two knees: crop each to a square around its joint"
    inverted = column[26:38].mean() < sides  # .4 and more above it if upright
    return "inverted, bone dark on bright: invert its gray values" if inverted else ""


def grade(path: Path, predict, about: dict) -> dict:
    """file, grade (a class name or None), probabilities by class (or None) and note."""
    row = {"file": str(path), "grade": None, "probabilities": None, "note": ""}
    try:
        shares = predict(read(path, about)[None])[0]
    except Exception as error:  # whatever a damaged file raises, the others are graded
        return row | {"note": f"not graded: {str(error) or type(error).__name__}"}
    if shares.max() < (about["refer_below"] or 0):
        row["note"] = f"below {about['refer_below']:.2f}: a person should decide"
    named = dict(zip(about["class_names"], np.round(shares.astype(float), 4).tolist(), strict=True))
    return row | {"grade": about["class_names"][shares.argmax()], "probabilities": named}


def add_arguments(parser) -> None:
    """Declare the options of `python -m utils grade`."""
    parser.add_argument("images", type=Path, metavar="IMAGE_OR_FOLDER")
    parser.add_argument("--model", type=Path, metavar="FILE", help="a .keras or .tflite file")
    parser.add_argument("--run", type=Path, metavar="DIR", help="default: the newest finished run")
    parser.add_argument("--json", action="store_true", help="print a JSON list")


def main(arguments) -> int:
    """Grade and print; the exit status is 0 if every file was graded, else 1."""
    path, rows = arguments.images, []
    files = sorted(folders.files_below(path)) if path.exists() else []
    if not files:
        raise FileNotFoundError(f"There is no file {path}, and no folder with files in it.")
    model = arguments.model or newest_model(arguments.run or runs.run_folder("runs"))
    predict, about = load(model)
    print(f"Graded by {model}:", file=sys.stderr)
    for file in files:
        row = grade(file, predict, about)
        rows.append(row)
        if not arguments.json:
            share = max(row["probabilities"].values()) if row["grade"] else "-"
            print(row["file"], row["grade"] or "-", share, row["note"], sep="  ")
    if arguments.json:
        print(json.dumps(rows, indent=2))
    return int(None in [row["grade"] for row in rows])
