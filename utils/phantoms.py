"""Phantoms: synthetic frontal knee X-rays whose joint space narrows with the grade.

They exercise the code; nothing learned from them says anything about real knees. Grades follow
Kellgren and Lawrence (1957), class shares the public OAI radiographs.

An image depends on its grade through one number, the severity, `grade + SPREAD * normal`: so
`bayes_accuracy` is the most that any reader of one image can reach. Lengths are millimetres where
named so; otherwise half image sides, with u to the right, v down.
"""

import json
import math
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
from PIL import Image

SHARES = (0.40, 0.18, 0.26, 0.13, 0.03)  # of the grades 0 to 4
SPREAD = 0.31  # standard deviation of the severity around its grade, in grades
HEALTHY_MM, STEP_MM = 6.2, 1.45  # mean joint space at KL 0, and what each grade takes away
FIELD_MM = 80.0  # what an image side shows
LATERAL = 0.15  # share of knees whose narrow side is the lateral one; the others' is the medial
CORRELATION = 0.6  # between the severities of a patient's two knees
LEAKY_CORRELATION, LEAKY_PATTERN = 0.9, 1.2  # for the lesson on leaks, see `knees`
LABEL = "SYNTHETIC.json"


def bayes_accuracy() -> float:
    """Accuracy of a reader who knows the true joint space and the class shares."""
    severity = np.linspace(-3, 7, 20_001)
    density = np.exp(-(((severity[:, None] - np.arange(5)) / SPREAD) ** 2) / 2)
    best = (np.array(SHARES) * density).max(-1).sum() * (severity[1] - severity[0])
    return float(best / (SPREAD * math.sqrt(2 * math.pi)))


def sample_knee(grade: int, rng: np.random.Generator) -> SimpleNamespace:
    """Draw what a knee of this KL grade (0 to 4) is like.

    Fields: joint_space (lateral, medial; mm); lips, the osteophytes (femur lateral, medial, tibia
    lateral, medial); sclerosis (lateral, medial); tilt (radians, positive is varus).
    """
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
    return SimpleNamespace(joint_space=space, lips=lips, sclerosis=sclerosis, tilt=tilt)


def sample_patient(rng: np.random.Generator) -> dict[str, float]:
    """Draw what a patient's two knees share: shape of the bones, soft tissue, texture."""
    names = "shaft shin condyle notch spines fibula patella flesh density grain"
    low = (0.55, 0.42, 0.82, 0.04, 0.05, 0.55, -0.6, 0.0, 0.85, 0.5)
    high = (0.72, 0.60, 0.90, 0.11, 0.08, 0.75, -0.4, 1.0, 1.15, 1.3)
    shape = dict(zip(names.split(), rng.uniform(low, high), strict=True))
    return {"scale": 1.04 + 0.05 * rng.standard_normal()} | shape


def draw_knee(grade, rng, size=128, side="R", patient=None, pattern=0.0) -> np.ndarray:
    """Draw one frontal knee X-ray, uint8 (size, size), bone bright.

    A right knee's fibula (lateral) is on the viewer's left. `patient` comes from `sample_patient`;
    `pattern` (size, size) is added to the standardised image. Equal generators, equal images.
    """
    patient, mirror = patient or sample_patient(rng), slice(None, None, 1 if side == "R" else -1)
    pattern = np.broadcast_to(pattern, (size, size))[:, mirror]
    image = _render(sample_knee(grade, rng), patient, pattern, rng, size)
    return np.ascontiguousarray(image[:, mirror])


def knees(count: int, seed: int, size: int = 128, leaky: bool = False):
    """Draw knees without files: uint8 (count, size, size, 1), grades int32, patients int64.

    Knees 2k and 2k + 1 are one patient's. With `leaky`, a patient is easy to recognise: both
    images share a smooth random pattern, and both knees mostly have the same grade. Who saw one
    knee can guess the other's grade; splitting by image instead of patient flatters.
    """
    rng = np.random.default_rng([seed, 0])
    grades = _grades(-(-count // 2), rng, LEAKY_CORRELATION if leaky else CORRELATION)
    pairs = [_draw_patient(pair, [seed, 1 + k], size, leaky) for k, pair in enumerate(grades)]
    images, patients = np.concatenate(pairs)[:count, ..., None], np.arange(count) // 2
    return images, grades.ravel()[:count].astype(np.int32), patients


def draw(folder: str | Path, patients: int, seed: int, size: int = 128) -> Path:
    """Draw both knees of made-up patients into `folder`/train|val|test/0..4/<patient><L|R>.png.

    Gray 8-bit PNGs and SYNTHETIC.json, which says what was drawn. Each split has the class shares
    of SHARES and patients of its own. The folder appears whole, or not at all; the same is kept.
    ValueError for fewer than 20 patients, FileExistsError if `folder` holds anything else.
    """
    folder = Path(folder)
    held_out = round(0.15 * patients)  # in val, and again in test
    counts = {"train": patients - 2 * held_out, "val": held_out, "test": held_out}
    if held_out < 3:
        raise ValueError(f"{patients} patients are too few: draw 20 or more")
    label = {"what": "phantoms of knee X-rays, no real patient", "patients": patients}
    label |= {"size": size, "seed": seed, "bayes_accuracy": round(bayes_accuracy(), 4)}
    if folder.exists() and any(folder.iterdir()):
        found = folder / LABEL
        if found.exists() and json.loads(found.read_text(encoding="utf-8")) == label:
            return folder
        raise FileExistsError(f"{folder} holds something else: name another folder")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}.") as scratch:
        part = Path(scratch) / "drawn"
        rng = np.random.default_rng([seed, 0])
        names = 9_000_000 + rng.permutation(1_000_000)[:patients]  # as long as real ones
        splits = np.repeat(list(counts), list(counts.values()))
        grades = np.concatenate([_grades(count, rng, CORRELATION) for count in counts.values()])
        for index, (split, name, pair) in enumerate(zip(splits, names, grades, strict=True)):
            images = _draw_patient(pair, [seed, 1 + index], size)
            for side, grade, image in zip("LR", pair, images, strict=True):
                path = part / split / str(grade) / f"{name}{side}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path, compress_level=1)
        (part / LABEL).write_text(json.dumps(label, indent=2) + "\n", encoding="utf-8")
        part.replace(folder)
    return folder


def plant_faults(folder: str | Path, seed: int, patients: int = 40, size: int = 96) -> dict:
    """Draw a small folder for notebook 01's audit and plant one fault of each kind in it.

    Returns {fault: files in `folder`}, kept there as FAULTS.json: `near_copy` (a train image and
    its darker copy in test), `negative`, `unreadable`, `split_patient` (one knee in val).
    """
    folder = Path(folder)
    if not (folder / "FAULTS.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            part = draw(Path(scratch) / "faulty", patients, seed, size)
            near, negative, broken, right = sorted(part.glob("train/[01]/*R.png"))[:4]
            copy = part / "test" / near.parent.name / "9999999R.png"
            Image.fromarray(np.asarray(Image.open(near)) // 10 * 9).save(copy)
            Image.fromarray(255 - np.asarray(Image.open(negative))).save(negative)
            broken.write_bytes(broken.read_bytes()[: broken.stat().st_size // 3])
            left = next(part.glob(f"train/*/{right.stem[:-1]}L.png"))
            right = right.replace(part / "val" / right.parent.name / right.name)
            found = {"near_copy": [near, copy], "negative": [negative], "unreadable": [broken]}
            found["split_patient"] = [left, right]
            names = {k: [f.relative_to(part).as_posix() for f in v] for k, v in found.items()}
            (part / "FAULTS.json").write_text(json.dumps(names, indent=2) + "\n", encoding="utf-8")
            part.replace(folder)
    return json.loads((folder / "FAULTS.json").read_text(encoding="utf-8"))


def _render(knee, patient, pattern, rng, size):
    """A right knee: absorption of soft tissue and bones, then exposure."""
    blur, axis = max(2 / size, 0.02), (np.arange(size) + 0.5) * 2 / size - 1
    # No two patients stand alike: turn, shift and scale the coordinates.
    angle, (du, dv) = math.radians(2.5 * rng.standard_normal()), 0.04 * rng.standard_normal(2)
    scale = patient["scale"] * (1 + 0.02 * rng.standard_normal())
    cos, sin = math.cos(angle) / scale, math.sin(angle) / scale
    u, v = axis[None, :] - du, axis[:, None] - dv
    u, v = cos * u + sin * v, cos * v - sin * u
    medial = 1 / (1 + np.exp(-u / 0.06))  # 0 on the lateral half, 1 on the medial one

    # The joint line: condyles above, plateau below, the joint space between them.
    width = np.sqrt(u**2 + 0.06**2)
    off_center = ((width - 0.45) / 0.4) ** 2
    femur_end = 0.1 - 0.07 * off_center - 0.07 * off_center**3
    femur_end -= patient["notch"] * np.exp(-((u / 0.14) ** 2))
    lateral_mm, medial_mm = knee.joint_space
    plateau = 0.1 + 2 / FIELD_MM * (lateral_mm + (medial_mm - lateral_mm) * medial)
    plateau -= 0.03 * off_center + math.tan(knee.tilt) * np.abs(u) * (medial - 0.5)
    for place, height, breadth in ((-0.08, 0.7, 0.05), (0.09, 1.0, 0.05), (0, 0.8, 0.22)):
        plateau -= patient["spines"] * height * np.exp(-(((u - place) / breadth) ** 2))
    # Distance to each bone's edge, positive inside, from its end and its two sides.
    flare = (patient["condyle"] - patient["shaft"]) / (1 + np.exp(-(v + 0.6) / 0.08))
    femur_side = patient["shaft"] + flare - 0.06 * np.exp(-(((v + 0.12) / 0.1) ** 2))
    flare = (0.82 - patient["shin"]) * np.exp(-((np.maximum(v - 0.18, 0) / 0.5) ** 2))
    tibia_side, lips = patient["shin"] + flare, 1.5 * knee.lips
    femur_side += np.exp(-((v / 0.06) ** 2)) * (lips[0] + (lips[1] - lips[0]) * medial)
    tibia_side += np.exp(-(((v - 0.24) / 0.05) ** 2)) * (lips[2] + (lips[3] - lips[2]) * medial)
    femur = _soft_min(femur_end - v, femur_side - np.abs(u), 0.12)
    tibia = _soft_min(v - plateau, tibia_side - np.abs(u), 0.08)
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
    loaded *= knee.sclerosis[0] + (knee.sclerosis[1] - knee.sclerosis[0]) * medial + 0.05
    image += loaded * np.where(v > plateau, np.exp(-(((v - plateau) / 0.09) ** 2)), 0)
    image += loaded * np.where(v < femur_end, np.exp(-(((femur_end - v) / 0.05) ** 2)), 0)
    # Exposure as chance has it: uneven field, noise, film curve, contrast, brightness.
    slope, u, v = rng.normal(0, 0.4, 4), axis[None, :], axis[:, None]
    image = (image - image.mean()) / image.std() + pattern
    image += slope[0] * u + slope[1] * v + slope[2] * u * v + slope[3] * (v**2 - 1 / 3)
    image = (image - image.mean()) / image.std()
    image += rng.uniform(0.02, 0.1) * rng.standard_normal(image.shape)
    image += rng.uniform(-0.12, 0.12) * (image**2 - 1)
    gray = rng.uniform(95, 160) + rng.uniform(25, 50) * image
    return np.clip(np.rint(gray), 0, 255).astype(np.uint8)


def _soft_min(a, b, radius):  # the minimum, its corner rounded to about `radius`
    mix = np.maximum(radius - np.abs(a - b), 0) / radius
    return np.minimum(a, b) - mix**2 * radius / 4


def _trabeculae(rng, size):
    """Bone texture (size, size), mean 0, deviation about 1: fine streaks along the load."""
    fine = rng.standard_normal((size, size))
    streaks = sum(np.roll(fine, shift, axis=0) for shift in range(max(size // 20, 3)))
    coarse = rng.standard_normal((16, 16)).repeat(-(-size // 16), 0).repeat(-(-size // 16), 1)
    return streaks / streaks.std() + 0.5 * coarse[:size, :size]


def _grades(patients, rng, correlation):
    """Grades int64 (patients, 2) of left and right knees, in the shares of SHARES."""
    common, own = rng.standard_normal((patients, 1)), rng.standard_normal((patients, 2))
    health = math.sqrt(correlation) * common + math.sqrt(1 - correlation) * own
    counts = np.maximum(np.rint(np.array(SHARES) * health.size), 1).astype(int)
    counts[0] = health.size - counts[1:].sum()
    rank = health.ravel().argsort().argsort()
    return np.repeat(np.arange(5), counts)[rank].reshape(patients, 2)


def _draw_patient(grades, seed, size, leaky=False):
    """A left and a right knee, uint8 (2, size, size)."""
    rng = np.random.default_rng(seed)
    patient, pattern = sample_patient(rng), 0.0
    if leaky:
        coarse = Image.fromarray(rng.standard_normal((8, 8)).astype(np.float32))
        pattern = LEAKY_PATTERN * np.asarray(coarse.resize((size, size), Image.Resampling.BICUBIC))
    pairs = zip("LR", grades, strict=True)
    return np.stack([draw_knee(grade, rng, size, side, patient, pattern) for side, grade in pairs])
