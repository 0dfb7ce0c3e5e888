"""Which pictures are no input for a model that grades one framed knee, and why. No TensorFlow.

The thresholds were set on the 6,604 radiographs of the Osteoarthritis Initiative that Chen et al.
2019 published and on drawn phantoms: there, the checks for knees refuse the 84 inverted frames
that the data holds, and no other.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image, UnidentifiedImageError

from utils import folders

LONGEST = 1.25  # the longer side over the shorter one; the data's images are square
COLOUR = 12.0  # mean spread of red, green and blue, 0 to 255; a radiograph saved in colour has 0
BLANK = 16.0  # darkest to brightest of 16 x 16 fields, 0 to 255; the data's flattest has 32
# In deviations of the gray values. One knee is a bright column between darker sides ...
INVERTED = 0.0  # ... centre minus sides: 0.4 and more upright, -1.1 and less inverted
TWO_KNEES = -0.9  # ... two knees have a gap there: middle minus the darker quarter column
SIDE = 64  # px, the size at which all of this is looked at


def read(path: Path, knees: bool = True) -> tuple[np.ndarray | None, str]:
    """Decode a file: (uint8 (height, width) gray, "") or (None, why it is refused).

    knees: whether one knee is expected; if not, only files that cannot be read are refused.
    """
    try:
        if path.stat().st_size == 0:
            return None, "the file is empty"
        gray, _ = folders.read_gray(path)
        spread = _colour(path) if knees else 0.0
    except UnidentifiedImageError:
        return None, "no PNG or JPEG image"
    except Image.DecompressionBombError:
        return None, "too many pixels: crop it to one knee"
    except (OSError, ValueError, SyntaxError) as error:
        truncated = "truncated" in str(error)
        return None, "truncated: copy it again" if truncated else f"cannot be read ({error})"
    if spread > COLOUR:
        return None, "a colour picture: radiographs are gray"
    reason = not_one_knee(gray) if knees else ""
    return (None, reason) if reason else (gray, "")


def _colour(path: Path) -> float:
    """Mean spread between red, green and blue, 0 to 255."""
    with Image.open(path) as image:
        if image.mode in ("1", "L", "LA") or image.mode.startswith("I"):
            return 0.0
        small = image.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BOX)
    return float(np.ptp(np.asarray(small, "float32"), axis=-1).mean())


def not_one_knee(gray: np.ndarray) -> str:
    """Why uint8 (height, width) is not one upright knee framed as in the data; "" if it may be."""
    height, width = gray.shape
    left, top, right, bottom = _content(gray)
    small = Image.fromarray(gray).resize(
        (SIDE, SIDE), Image.Resampling.BOX, (left, top, right, bottom)
    )
    small = np.asarray(small, "float32")
    if np.ptp(small.reshape(16, SIDE // 16, 16, SIDE // 16).mean(axis=(1, 3))) < BLANK:
        return "a blank frame"
    wide, tall = right - left, bottom - top
    # The joint line crosses everything, so the columns are compared above and below it.
    ends = np.concatenate([small[: SIDE // 4], small[-SIDE // 4 :]])
    column = (ends.mean(axis=0) - small.mean()) / small.std()
    middle, centre = column[28:36].mean(), column[26:38].mean()
    quarters = column[10:22].mean(), column[-22:-10].mean()
    sides = (column[:4].mean() + column[-4:].mean()) / 2
    square = max(wide, tall) <= LONGEST * min(wide, tall)
    gap = TWO_KNEES if square else 0.2 * TWO_KNEES  # what is not square is refused in any case
    if wide > 0.9 * tall and middle - min(quarters) < gap and sides < max(quarters):
        return f"two knees: crop each to {_boxes(left, top, right, bottom)}"
    if not square:
        return (
            f"{width} x {height} px, far from square: crop it to a square centred on the joint, "
            "about as wide as the knee"
        )
    if centre - sides < INVERTED:
        return "inverted, bone dark on bright: turn its gray values round"
    return ""


def _content(gray: np.ndarray) -> tuple[int, int, int, int]:
    """Left, top, right and bottom of what lies inside bars of one gray value."""
    rows = np.flatnonzero(np.ptp(gray, axis=1))
    columns = np.flatnonzero(np.ptp(gray, axis=0))
    if not len(rows) or not len(columns):
        return 0, 0, gray.shape[1], gray.shape[0]
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _boxes(left: int, top: int, right: int, bottom: int) -> str:
    """In words, a square for each half."""
    half, height = (right - left) // 2, bottom - top
    side = min(half, height)
    y = top + (height - side) // 2
    starts = (left + (half - side) // 2, left + half + (half - side) // 2)
    first, second = (f"({x}, {y}, {x + side}, {y + side})" for x in starts)
    return (
        f"a square centred on its joint, such as (left, top, right, bottom) {first} and {second} px"
    )
