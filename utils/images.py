"""Decode image files to gray arrays; one bad file ends nothing. No TensorFlow here."""

import hashlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
from PIL import Image, ImageOps
from tqdm import tqdm

from utils import runs

FORMATS = ("PNG", "JPEG", "BMP", "TIFF", "WEBP")
COLOUR = 12.0  # mean spread of red, green and blue, 0 to 255; a radiograph saved in colour has 0
COPIES = 3  # of all images in memory: as stored, as a model wants them, and the framework's own


def decode(
    table: pd.DataFrame, size: int, unusable: float = 0.05
) -> tuple[np.ndarray, pd.DataFrame, dict[str, str]]:
    """Read the images that `folders.scan` listed, in threads: (images, facts, left_out).

    images: uint8 (n, size, size, 1), gray, padded with black to a square. facts: table without
    those left out, and the columns width, height, bits, colour, pixels (sha256 of the gray values);
    its index counts in images. left_out: {name: why it cannot be used}. Deep images are scaled by
    the bits that the deepest uses. MemoryError: they do not fit; ValueError: more than the share
    `unusable` is left out.
    """
    needed, free = COPIES * len(table) * size**2 / 1e9, psutil.virtual_memory().available / 1e9
    if needed > free:
        raise MemoryError(
            f"{len(table):,} images of {size} px need {needed:.1f} GB, {free:.1f} GB of memory are "
            "free: lower STORED_SIZE."
        )
    paths, images = list(table["path"]), np.zeros((len(table), size, size, 1), "uint8")

    def one(row):
        try:
            gray, colour = read_image(paths[row], bits), is_colour(paths[row])
            if gray.min() == gray.max():
                raise ValueError("one gray value throughout")
            images[row, :, :, 0] = square(gray, size)
            pixels = hashlib.sha256(f"{gray.shape}".encode() + gray.tobytes()).hexdigest()
            return *gray.shape, colour, pixels, ""
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".replace(str(paths[row]), "this file")
            return 0, 0, False, "", problem[:100]

    with ThreadPoolExecutor() as pool:
        depths = list(pool.map(depth, paths))
        bits = max(depths, default=8)
        rows = pool.map(one, range(len(paths)))
        rows = list(tqdm(rows, "decode", len(paths), disable=runs.batch_mode()))
    columns = ["height", "width", "colour", "pixels", "problem"]
    facts = pd.concat([table, pd.DataFrame(rows, table.index, columns)], axis=1).assign(bits=depths)
    bad = facts["problem"] != ""
    left_out = facts[bad].set_index("image")["problem"].to_dict()
    if len(left_out) > unusable * len(facts):
        listed = ", ".join([f"{name} ({why})" for name, why in left_out.items()][:8])
        raise ValueError(
            f"{len(left_out)} of {len(facts)} images cannot be used, more than {unusable:.0%}: "
            f"repair or remove them: {listed}"
        )
    return images, facts[~bad].drop(columns="problem"), left_out


def depth(path: str | Path) -> int:
    """Bits that a deep gray image uses, apart from stray pixels; 8 for any other, or a bad file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            top = np.quantile(image, 0.999, method="lower") if image.mode[0] == "I" else 0
    except Exception:
        top = 0
    return next((bits for bits in (8, 10, 12, 14) if top < 2**bits), 16)


def is_colour(path: str | Path) -> bool:
    """Whether a file holds a colour picture, and no gray one saved in colour."""
    with Image.open(path, formats=FORMATS) as image:
        if image.mode.startswith(("1", "L", "I", "F")):
            return False
        small = image.convert("RGB").resize((64, 64), Image.Resampling.BOX)
    return bool(np.ptp(np.asarray(small, "float32"), axis=-1).mean() > COLOUR)


def read_image(path: str | Path, bits: int | None = None) -> np.ndarray:
    """Decode a PNG, JPEG, BMP, TIFF or WebP file to gray: uint8 (height, width), upright.

    bits: that deep images of the data set use (`Dataset.origin`); None: as this image does.
    Radiographs of 12 bits often come in files of 16. Raises what Pillow raises, or ValueError.
    """
    with Image.open(path, formats=FORMATS) as image:
        image = ImageOps.exif_transpose(image)
        if not image.mode.startswith(("I", "F")):
            return np.asarray(image.convert("L"))
        values = np.asarray(image)
    if values.dtype.kind == "f" or values.min() < 0:
        raise ValueError("floating-point or negative gray values: save it with 8 or 16 bits")
    top = 2 ** (bits if bits and bits > 8 else depth(path)) - 1
    return np.round(values * (255 / top)).clip(0, 255).astype("uint8")


def square(gray: np.ndarray, size: int) -> np.ndarray:
    """uint8 (h, w) to (size, size): aspect kept, black bars, bicubic with antialiasing."""
    small = ImageOps.contain(Image.fromarray(gray), (size, size), Image.Resampling.BICUBIC)
    canvas = Image.new("L", (size, size))
    canvas.paste(small, ((size - small.width) // 2, (size - small.height) // 2))
    return np.asarray(canvas)
