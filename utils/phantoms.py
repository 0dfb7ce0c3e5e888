"""Phantoms: drawn frontal knee radiographs whose joint space narrows with the grade.

They are the data this project carries with it, so that the whole series runs anywhere, within
minutes and without anybody's images. They are a smoke test that looks right, not a simulator:
nothing learned from them says anything about real knees.

What the grade means follows Kellgren and Lawrence, "Radiological assessment of osteo-arthrosis",
Annals of the Rheumatic Diseases 16 (1957) 494-502:

====  ========  =======================================================================
KL    name      what the radiologist sees
====  ========  =======================================================================
0     none      no feature of osteoarthritis
1     doubtful  doubtful narrowing of the joint space, possible osteophytic lipping
2     minimal   definite osteophytes, possible narrowing
3     moderate  several osteophytes, definite narrowing, some sclerosis, possible deformity
4     severe    large osteophytes, marked narrowing, severe sclerosis, definite deformity
====  ========  =======================================================================

How the answer is hidden in an image: the grade gives a severity, ``grade + SPREAD * normal``, and
everything drawn (joint space, osteophytes, sclerosis, deformity) depends on the severity alone,
never on the grade. The narrowest joint space is a straight line in severity, so whoever knows it
knows all that an image can tell, and `bayes_accuracy` is the most that any reader of one image
can reach. Grades and gray levels are kept apart: exposure is drawn anew for every image after its
gray levels are standardised.

Lengths are millimetres where named so; otherwise half image sides, with u to the right, v down.
"""

import json
import math
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

GRADES = 5
SPREAD = 0.31  # standard deviation of the severity around its grade, in grades
HEALTHY_MM, STEP_MM = 6.2, 1.45  # mean joint space at KL 0, and what each grade takes away
FIELD_MM = 90.0  # what an image side shows
LATERAL = 0.15  # share of knees whose narrow side is the lateral one; the others' is the medial
CORRELATION = 0.6  # between the severities of a patient's two knees
SPLITS = ("train", "val", "test")
LABEL = "SYNTHETIC.json"


@dataclass(frozen=True)
class Knee:
    """What is drawn. Sites of `osteophytes`: femur lateral, femur medial, tibia lateral, medial."""

    severity: float
    joint_space: tuple[float, float]  # lateral, medial, mm
    osteophytes: tuple[float, ...]
    sclerosis: tuple[float, float]  # lateral, medial
    tilt: float  # of the tibia against the femur, radians, positive is varus


def bayes_accuracy(spread: float = SPREAD, grades: int = GRADES) -> float:
    """Accuracy of the best possible reader who knows the true (narrowest) joint space.

    Grades are equally likely and severity is normal around each with the same `spread` (in
    grades), so the best reader rounds to the nearest grade: the two outer grades err to one side
    only, the others to both. No reader of a single image does better, since the image depends on
    the grade through this one number.

    Raises ValueError unless `spread` > 0 and `grades` >= 2.
    """
    if spread <= 0 or grades < 2:
        raise ValueError(f"spread must be > 0 and grades >= 2, not {spread} and {grades}")
    miss = 0.5 * math.erfc(0.5 / spread / math.sqrt(2))  # beyond the boundary on one side
    return 1 - miss * 2 * (grades - 1) / grades


def read_joint_space(millimetres: np.ndarray) -> np.ndarray:
    """Grades (int64) that the best possible reader gives to narrowest joint spaces in mm."""
    severity = (HEALTHY_MM - np.asarray(millimetres)) / STEP_MM
    return np.clip(np.rint(severity), 0, GRADES - 1).astype(np.int64)


def sample_knee(grade: int, rng: np.random.Generator) -> Knee:
    """Draw what a knee of this KL grade (0 to 4) is like. Raises ValueError for another grade."""
    if grade not in range(GRADES):
        raise ValueError(f"grade is {grade!r}: KL grades are 0 to {GRADES - 1}")
    severity = grade + SPREAD * rng.standard_normal()
    narrow = max(HEALTHY_MM - STEP_MM * severity, 0.0)  # bone on bone at 0
    wide = max(narrow, HEALTHY_MM - 0.25 * max(severity, 0) + 0.3 * rng.standard_normal())
    sick = np.array([0.35, 1.0])  # how far the lateral and the medial side take part
    space = (wide, narrow)
    if rng.random() < LATERAL:
        sick, space = sick[::-1], space[::-1]
    lips = 0.045 * max(severity - 0.6, 0) * rng.uniform(0.5, 1.3, 4) * np.tile(0.4 + 0.6 * sick, 2)
    sclerosis = 0.08 * max(severity - 1.2, 0) * rng.uniform(0.7, 1.3) * sick
    tilt = math.radians(1.2 * max(severity - 2.2, 0) + rng.standard_normal())
    tilt *= 1 if sick[1] > sick[0] else -1
    return Knee(severity, space, tuple(lips), tuple(sclerosis), tilt)


def sample_patient(rng: np.random.Generator) -> dict[str, float]:
    """Draw what a patient's two knees share: size and shape of the bones, soft tissue, texture."""
    return {
        "scale": 1.04 + 0.05 * rng.standard_normal(),
        "shaft": rng.uniform(0.55, 0.72),
        "shin": rng.uniform(0.42, 0.6),
        "condyle": rng.uniform(0.82, 0.9),
        "notch": rng.uniform(0.04, 0.11),
        "spines": rng.uniform(0.05, 0.08),
        "fibula": rng.uniform(0.55, 0.75),
        "patella": rng.uniform(-0.6, -0.4),
        "flesh": rng.uniform(0.0, 1.0),
        "density": rng.uniform(0.85, 1.15),
        "grain": rng.uniform(0.5, 1.3),
    }


def draw(
    grade: int,
    rng: np.random.Generator,
    size: int = 128,
    side: str = "R",
    patient: dict[str, float] | None = None,
) -> np.ndarray:
    """Draw one frontal knee radiograph, uint8 (size, size), bone bright.

    `side` is "R" (the fibula, lateral, to the viewer's left) or "L". `patient` is what
    `sample_patient` drew, and is drawn here if None. Only `rng` decides, so equal generators give
    equal images. Raises ValueError for a grade outside 0 to 4, another side, or a size under 32.
    """
    if side not in ("L", "R"):
        raise ValueError(f"side is {side!r}: it must be 'L' or 'R'")
    if size < 32:
        raise ValueError(f"size is {size}: under 32 px a joint space cannot be seen")
    patient = sample_patient(rng) if patient is None else patient
    radiograph = _render(sample_knee(grade, rng), patient, rng, size)
    return radiograph if side == "R" else np.ascontiguousarray(radiograph[:, ::-1])


def _render(knee, patient, rng, size):
    """Absorption of soft tissue and bones, line by line, then exposure and noise. A right knee."""
    pixel = 2 / size
    blur = max(pixel, 0.02)
    axis = (np.arange(size) + 0.5) * pixel - 1
    u, v = _pose(axis[None, :], axis[:, None], patient["scale"], rng)
    medial = 1 / (1 + np.exp(-u / 0.06))  # 0 on the lateral half, 1 on the medial one

    # The joint line: condyles above, plateau below, the joint space between them.
    width = np.sqrt(u**2 + 0.06**2)
    off_center = ((width - 0.45) / 0.4) ** 2
    femur_end = 0.1 - 0.07 * off_center - 0.07 * off_center**3
    femur_end -= patient["notch"] * np.exp(-((u / 0.14) ** 2))
    lateral_mm, medial_mm = knee.joint_space
    to_halves = 2 / FIELD_MM
    plateau = 0.1 + to_halves * (lateral_mm + (medial_mm - lateral_mm) * medial)
    plateau -= 0.03 * off_center + math.tan(knee.tilt) * np.abs(u) * (medial - 0.5)
    for place, height, breadth in ((-0.08, 0.7, 0.05), (0.09, 1.0, 0.05), (0, 0.8, 0.22)):
        plateau -= patient["spines"] * height * np.exp(-(((u - place) / breadth) ** 2))

    # Distance to each bone's edge, positive inside, from its end and its two sides.
    femur_side = patient["shaft"] + (patient["condyle"] - patient["shaft"]) / (
        1 + np.exp(-(v + 0.6) / 0.08)
    )
    femur_side = femur_side - 0.06 * np.exp(-(((v + 0.12) / 0.1) ** 2))
    tibia_side = patient["shin"] + (0.82 - patient["shin"]) * np.exp(
        -((np.maximum(v - 0.18, 0) / 0.5) ** 2)
    )
    lips = knee.osteophytes
    femur_lip = np.exp(-((v / 0.06) ** 2)) * (lips[0] + (lips[1] - lips[0]) * medial)
    tibia_lip = np.exp(-(((v - 0.24) / 0.05) ** 2)) * (lips[2] + (lips[3] - lips[2]) * medial)
    femur = _soft_min(femur_end - v, femur_side + 1.5 * femur_lip - np.abs(u), 0.12)
    tibia = _soft_min(v - plateau, tibia_side + 1.5 * tibia_lip - np.abs(u), 0.08)
    head = patient["fibula"]
    fibula = 0.2 - 0.09 * np.clip((v - head) / 0.35, 0, 1) - np.abs(u + 0.76 - 0.1 * (v - head))
    fibula = _soft_min(fibula, v - head, 0.25)
    patella = 0.42 - (u**4 + (v - patient["patella"]) ** 4) ** 0.25

    # Absorption: flesh is a cylinder; bone a filled one with a dense rim.
    image = 0.55 * np.sqrt(np.maximum(1 - (u / (1.02 + patient["flesh"])) ** 2, 0))
    texture = _trabeculae(rng, size) * 0.025 * patient["grain"]
    for depth, dense in ((femur, 0.34), (tibia, 0.34), (fibula, 0.14)):
        inside = np.clip(depth / blur + 0.5, 0, 1)
        rim = np.exp(-((np.maximum(depth, 0) / 0.03) ** 2))
        body = 1 - 0.45 * np.exp(-np.maximum(depth, 0) / 0.15)
        image += inside * patient["density"] * (dense * body + 0.12 * rim + texture)
    image += 0.06 * np.clip(patella / 0.15 + 0.5, 0, 1)

    # Sclerosis: bone whitens beneath the cartilage, along the loaded part of the joint line.
    loaded = np.exp(-(((width - 0.5) / 0.28) ** 4))
    amount = knee.sclerosis[0] + (knee.sclerosis[1] - knee.sclerosis[0]) * medial + 0.05
    below, above = np.maximum(v - plateau, 0), np.maximum(femur_end - v, 0)
    image += loaded * amount * np.where(v > plateau, np.exp(-((below / 0.09) ** 2)), 0)
    image += loaded * amount * np.where(v < femur_end, np.exp(-((above / 0.05) ** 2)), 0)
    return _expose(image, axis, rng)


def _pose(u, v, scale, rng):
    """Turn, shift and scale the coordinates: no two patients stand alike."""
    angle = math.radians(2.5 * rng.standard_normal())
    du, dv = 0.04 * rng.standard_normal(2)
    scale *= 1 + 0.02 * rng.standard_normal()
    u, v = u - du, v - dv
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    return cos * u + sin * v, cos * v - sin * u


def _soft_min(a, b, radius):
    """Minimum with its corner rounded to about `radius` (polynomial smooth minimum)."""
    mix = np.maximum(radius - np.abs(a - b), 0) / radius
    return np.minimum(a, b) - mix**2 * radius / 4


def _trabeculae(rng, size):
    """Bone texture (size, size), mean 0, deviation about 1: fine streaks along the load."""
    fine = rng.standard_normal((size, size))
    streaks = sum(np.roll(fine, shift, axis=0) for shift in range(max(size // 20, 3)))
    coarse = rng.standard_normal((16, 16)).repeat(-(-size // 16), 0).repeat(-(-size // 16), 1)
    return streaks / streaks.std() + 0.5 * coarse[:size, :size]


def _expose(image, axis, rng):
    """Standardise, then expose as chance has it: uneven field, contrast, brightness, noise."""
    u, v = axis[None, :], axis[:, None]
    slope = rng.normal(0, 0.4, 4)
    image = (image - image.mean()) / image.std()
    image = image + slope[0] * u + slope[1] * v + slope[2] * u * v + slope[3] * (v**2 - 1 / 3)
    image = (image - image.mean()) / image.std()
    image = image + rng.uniform(0.02, 0.1) * rng.standard_normal(image.shape)
    bend = rng.uniform(-0.12, 0.12)  # the film's curve
    image = image + bend * (image**2 - 1)
    gray = rng.uniform(95, 160) + rng.uniform(25, 50) * image
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)


def _grades(patients: int, rng: np.random.Generator) -> np.ndarray:
    """Grades (patients, 2) of left and right knees: equally many of each, alike in a patient."""
    common, own = rng.standard_normal((patients, 1)), rng.standard_normal((patients, 2))
    health = math.sqrt(CORRELATION) * common + math.sqrt(1 - CORRELATION) * own
    rank = health.ravel().argsort().argsort()  # ranks, not thresholds: exactly equal counts
    return (rank * GRADES // (2 * patients)).reshape(patients, 2)


def write(
    folder: str | Path,
    patients: int = 400,
    size: int = 128,
    seed: int = 0,
    splits: Sequence[float] = (0.7, 0.15, 0.15),
) -> Path:
    """Draw both knees of made-up patients into `folder`/train|val|test/0..4/<patient><L|R>.png.

    PNGs are gray, 8 bit, size x size. Each split has equally many of each grade (but for what
    five does not divide), and a patient is in one split only. The same arguments give the same
    pixels. `SYNTHETIC.json` beside the splits says what was drawn. Everything is drawn in a
    temporary folder that is renamed at the end: what is there is whole. A folder that already
    holds this very drawing is kept and returned.

    Raises ValueError for fewer than 5 patients in a split or fractions that do not add up to 1,
    FileExistsError if `folder` holds anything else.
    """
    folder = Path(folder)
    counts = _split_counts(patients, splits)
    label = {
        "synthetic": True,
        "what": "drawn phantoms of knee radiographs, no real patient (utils/phantoms.py)",
        "grades": "Kellgren and Lawrence 1957, KL 0 to 4",
        "patients": patients,
        "size": size,
        "seed": seed,
        "splits": list(splits),
        "images": {split: 2 * count for split, count in zip(SPLITS, counts, strict=True)},
        "bayes_accuracy": round(bayes_accuracy(), 4),
        "joint_space_mm": [round(HEALTHY_MM - STEP_MM * grade, 2) for grade in range(GRADES)],
        "joint_space_spread_mm": round(STEP_MM * SPREAD, 3),
    }
    if folder.exists() and any(folder.iterdir()):
        return _kept(folder, label)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        drawn = Path(scratch) / "drawn"
        rng = np.random.default_rng([seed, 0])
        names = 9_000_000 + rng.permutation(1_000_000)[:patients]  # as long as real ones
        first = 0
        for split, count in zip(SPLITS, counts, strict=True):
            for grade in range(GRADES):
                (drawn / split / str(grade)).mkdir(parents=True)
            for index, pair in enumerate(_grades(count, rng), start=first):
                _write_patient(drawn / split, int(names[index]), pair, [seed, 1 + index], size)
            first += count
        (drawn / LABEL).write_text(json.dumps(label, indent=2) + "\n", encoding="utf-8")
        drawn.replace(folder)
    return folder


def _write_patient(folder, name, grades, seed, size):
    rng = np.random.default_rng(seed)
    patient = sample_patient(rng)
    for side, grade in zip("LR", grades.tolist(), strict=True):
        image = Image.fromarray(draw(grade, rng, size, side, patient))
        image.save(folder / str(grade) / f"{name}{side}.png", compress_level=1)


def _split_counts(patients, splits):
    """Patients per split; the first takes what rounding leaves."""
    if len(splits) != len(SPLITS) or min(splits) <= 0 or abs(sum(splits) - 1) > 1e-6:
        raise ValueError(f"splits is {splits}: three fractions above 0 that add up to 1 are needed")
    others = [round(patients * fraction) for fraction in splits[1:]]
    counts = [patients - sum(others), *others]
    if min(counts) < GRADES:
        raise ValueError(
            f"{patients} patients give splits of {counts}: each needs {GRADES} or more"
        )
    if patients > 1_000_000:
        raise ValueError(f"{patients} patients: there are numbers for 1,000,000")
    return counts


def _kept(folder, label):
    """The folder, if it holds this very drawing."""
    try:
        same = json.loads((folder / LABEL).read_text(encoding="utf-8")) == label
    except (OSError, ValueError):
        same = False
    if same and len(list(folder.glob("*/*/*.png"))) == 2 * label["patients"]:
        return folder
    raise FileExistsError(
        f"{folder} is not empty and holds other things than these phantoms: "
        "remove it, or name another folder"
    )
