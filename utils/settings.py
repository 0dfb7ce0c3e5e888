"""The parameters of the series: one pydantic model per notebook, checked before anything runs.

A parameter belongs to exactly one notebook, the one that decides it; only those of `Shared` stand
in several. So one flat profile serves the whole series; a name that no notebook owns is refused.
"""

import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError

ROOT = Path(__file__).resolve().parent.parent
PROFILES = ROOT / "notebooks" / "profiles"
KNEES = "knee radiographs with KL grades"
SPLITS = ("train", "val", "test")
SYNTHETIC = "SYNTHETIC.json"  # lies in a folder of synthetic X-rays


class SettingsError(ValueError):
    """A profile or a parameter that the series cannot run with; the message is for its user."""


def resolve(path: str | Path) -> Path:
    """An absolute path: `~` expanded; a relative one lies below the caller's folder or ROOT."""
    path = Path(path).expanduser()
    return (path if path.is_absolute() or path.exists() else ROOT / path).absolute()


def _existing_folder(value: str) -> str:
    if value and not resolve(value).is_dir():
        raise ValueError(f"there is no folder {resolve(value)}")
    return str(resolve(value)) if value else ""


def _weights(value: str) -> str:
    if value in ("imagenet", "shapes", "none"):
        return value
    if not (path := resolve(value)).is_file():
        raise ValueError(f'must be "imagenet", "shapes", "none" or a file; no file {path}')
    return str(path)


def _pattern(value: str) -> str:
    try:
        groups = re.compile(value).groups
    except re.error as error:
        raise ValueError(f"is no regular expression: {error}") from error
    if value and not groups:
        raise ValueError("has no group (…) for the patient, such as scan-([0-9]+)")
    return value


Folder = Annotated[str, AfterValidator(_existing_folder)]
Weights = Annotated[str, AfterValidator(_weights)]
ImageSize = Annotated[int, Field(ge=32, le=1024, multiple_of=32)]
Share = Annotated[float, Field(ge=0, le=1)]
Jitter = Annotated[float, Field(ge=0, lt=1)]
Rate = Annotated[float, Field(gt=0, le=1)]
Text = Annotated[str, Field(min_length=1)]
Seed = Annotated[int, Field(ge=0, lt=2**31)]
Count = Annotated[int, Field(ge=1, le=100_000)]
Precision = Literal["float32", "mixed_float16", "mixed_bfloat16"]
EFFICIENTNET = r"block\d+[a-z]+|(stem|top)(?=_)"  # how the names of a block's layers begin
MOBILENET = r"expanded_conv(_\d+)?(?=_)|conv(_1)?(?=_|$)"
BACKBONES = {f"EfficientNetV2{s}": EFFICIENTNET for s in ("B0", "B1", "B2", "B3", "S", "M", "L")}
BACKBONES |= {"MobileNetV3Small": MOBILENET, "MobileNetV3Large": MOBILENET}
Backbone = Literal[*BACKBONES]


class Shared(BaseModel):
    """Where and how a notebook runs: no part of what it makes."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)
    RUN_DIR: Text = "runs/tiny"
    MAX_HOURS: Annotated[float, Field(gt=0)] | None = None
    JIT_COMPILE: Literal["auto", True, False] = "auto"
    DEVICES: Annotated[int, Field(ge=1, le=64)] = 1


class Data(Shared):
    DATA_DIR: Folder = ""
    SUBJECT: Text = KNEES
    ORDERED: bool = True
    CLASS_ORDER: list[str] = []
    PATIENT_PATTERN: Annotated[str, AfterValidator(_pattern)] = ""
    PHANTOM_PATIENTS: Annotated[int, Field(ge=20, le=100_000)] = 1000
    STORED_SIZE: Annotated[int, Field(ge=32, le=2048)] = 96
    VAL_FRACTION: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    TEST_FRACTION: Annotated[float, Field(gt=0, le=0.5)] = 0.15
    ALLOW_LEAKS: bool = False
    BALANCE: Literal["none", "class_weight"] = "none"
    FLIP: bool = True
    ROTATION: Annotated[float, Field(ge=0, le=180)] = 7.0
    SHIFT: Jitter = 0.05
    ZOOM: Jitter = 0.1
    BRIGHTNESS: Jitter = 0.1
    CONTRAST: Jitter = 0.1
    CUTOUT: Jitter = 0.0
    SEED: Seed = 0


class Phase1(Shared):
    TEACHER_BACKBONE: Backbone = "MobileNetV3Small"
    TEACHER_WEIGHTS: Weights = "shapes"
    TEACHER_IMAGE_SIZE: ImageSize = 96
    TEACHER_PRECISION: Precision = "float32"
    TEACHER_SEED: Seed = 0
    BATCH_SIZE: Count = 32
    DROPOUT: Jitter = 0.2
    LABEL_SMOOTHING: Jitter = 0.0
    LABEL_SOFTENING: Annotated[float, Field(ge=0, le=5)] = 0.4
    WARMUP_EPOCHS: Annotated[int, Field(ge=0, le=1000)] = 1
    PHASE_1_EPOCHS: Count = 3
    PHASE_1_LEARNING_RATE: Rate = 3e-3


class Phase2(Shared):
    UNFREEZE: Annotated[float, Field(gt=0, le=1)] = 0.3
    PHASE_2_EPOCHS: Count = 3
    PHASE_2_LEARNING_RATE: Rate = 2e-3


class Phase3(Shared):
    PHASE_3_EPOCHS: Count = 6
    PHASE_3_LEARNING_RATE: Rate = 2e-3


class Distillation(Shared):
    MORE_TEACHERS: list[Folder] = []
    STUDENT_BACKBONE: Backbone = "MobileNetV3Small"
    STUDENT_WEIGHTS: Weights = "shapes"
    STUDENT_IMAGE_SIZE: ImageSize = 64
    STUDENT_PRECISION: Precision = "float32"
    STUDENT_BATCH_SIZE: Count = 32
    STUDENT_LABEL_SMOOTHING: Jitter = 0.0
    STUDENT_LABEL_SOFTENING: Annotated[float, Field(ge=0, le=5)] = 0.0
    TEMPERATURE: Annotated[float, Field(gt=0, le=100)] = 2.0
    HARD_WEIGHT: Share = 0.0
    VIEWS: Annotated[int, Field(ge=0, le=10_000)] = 3
    STUDENT_EPOCHS: Count = 6
    STUDENT_LEARNING_RATE: Rate = 2e-3
    LABELS_ONLY_LEARNING_RATE: Rate = 2e-3
    LABELS_ONLY: bool = True


class Evaluation(Shared):
    TARGET_ACCURACY: Share = 0.85
    POSITIVE_FROM: Annotated[int, Field(ge=0, le=1000)] = 0
    BOOTSTRAP: Annotated[int, Field(ge=100, le=1_000_000)] = 2000


class Trust(Shared):
    COVERAGE: Annotated[float, Field(gt=0, le=1)] = 0.8
    LEAK_IMAGES: Annotated[int, Field(ge=50, le=1_000_000)] = 600


class Deploy(Shared):
    ALLOWED_LOSS: Share = 0.01


class Trial(Shared):
    """A3_does_distillation_pay; an arm is [stored views (0: a new one each epoch), hard weight]."""

    TRIAL_ARMS: dict[str, list[float]] = {"labels": [3, 1.0], "one teacher": [3, 0.0]}
    TRIAL_SEEDS: Annotated[list[int], Field(min_length=2)] = [0, 1, 2]
    TRIAL_EPOCHS: Count = 6
    TRIAL_RATES: list[Rate] = [2e-3, 3e-3]


SERIES: dict[str, type[Shared]] = {
    "01_data": Data,
    "02_teacher_phase_1": Phase1,
    "03_teacher_phase_2": Phase2,
    "04_teacher_phase_3": Phase3,
    "05_distillation": Distillation,
    "06_evaluation": Evaluation,
    "07_trust": Trust,
    "08_deploy": Deploy,
}
APPENDIX = {"A3_does_distillation_pay": Trial}
OWNER = {
    name: notebook
    for notebook, model in (SERIES | APPENDIX).items()
    for name in model.model_fields
    if name not in Shared.model_fields
}


def validate(values: Mapping[str, object], notebook: str | None = None) -> dict[str, object]:
    """Check parameters, of one notebook or of the whole series, and fill in the defaults.

    Returns a flat dict of plain values with absolute paths. SettingsError: all findings, a line
    each: unknown names, wrong types, values out of range, or that do not go together.
    """
    known, findings, found = [*OWNER, *Shared.model_fields], [], {}
    for name in sorted(set(values) - set(known)):
        near = "".join(f" Did you mean {n}?" for n in difflib.get_close_matches(name, known, 1))
        text = f"{name} is no parameter of any notebook; write your own names in lower case."
        findings.append(text + near)
    for key, model in (SERIES | APPENDIX).items():
        if notebook in (None, key):
            own = {name: values[name] for name in model.model_fields if name in values}
            try:
                found |= model(**own).model_dump()
            except ValidationError as error:
                findings += [_finding(key, fault) for fault in error.errors()]
    if findings:
        raise SettingsError("\n".join(dict.fromkeys(findings)))
    return settle(found)


def _finding(notebook: str, fault: Mapping) -> str:
    name, value, text = fault["loc"][0], fault["input"], fault["msg"].removeprefix("Value error, ")
    if fault["type"].startswith("float") and re.fullmatch(r"\d+(\.\d*)?e[+-]?\d+", str(value)):
        text += f"; in YAML write {float(value):.1e} with a point and a sign"
    return f"{name} = {value!r} (notebook {notebook[:2]}): {text}."


def settle(found: Mapping[str, object]) -> dict[str, object]:
    """Values as they apply together, as far as they are known yet: no softening without an order.

    SettingsError: all findings, a line each, where they do not go together.
    """
    findings, stored = [], found.get("STORED_SIZE", float("inf"))
    for name in ("TEACHER", "STUDENT"):
        if (size := found.get(f"{name}_IMAGE_SIZE", 0)) > stored:
            findings.append(
                f"{name}_IMAGE_SIZE = {size}, but notebook 01 stores {stored} px: lower it, or set "
                f"STORED_SIZE = {size} and run 01 again."
            )
        backbone = found.get(f"{name}_BACKBONE", "MobileNetV3Small")
        if found.get(f"{name}_WEIGHTS") == "shapes" and backbone != "MobileNetV3Small":
            findings.append(f'{name}_WEIGHTS "shapes" fit MobileNetV3Small only, not {backbone}.')
    if found.get("VIEWS", 0) > found.get("STUDENT_EPOCHS", 0):
        findings.append(
            f"VIEWS = {found['VIEWS']}, but the student trains {found['STUDENT_EPOCHS']} epochs, "
            "one view each: the extra views would never be used."
        )
    for name in ("BATCH_SIZE", "STUDENT_BATCH_SIZE"):
        if found.get(name, 0) % found.get("DEVICES", 1):
            findings.append(f"{name} = {found[name]} is no multiple of {found['DEVICES']} DEVICES")
    if findings:
        raise SettingsError("\n".join(findings))
    soft = [n for n in found if n.endswith("LABEL_SOFTENING") and not found.get("ORDERED", True)]
    return {**found, **dict.fromkeys(soft, 0.0)}


def load_profile(name: str) -> dict[str, object]:
    """`{NAME: value}` of a profile in `notebooks/profiles/`, or of a path; else SettingsError."""
    path = PROFILES / f"{name}.yaml"
    path = path if path.is_file() else resolve(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in PROFILES.glob("*.yaml")))
        raise SettingsError(f"No profile {name!r}: it is neither a file nor one of: {known}.")
    try:
        return dict(yaml.safe_load(path.read_text(encoding="utf-8")) or {})
    except (yaml.YAMLError, ValueError, TypeError) as error:
        raise SettingsError(f"{path} is no valid YAML of `NAME: value` lines: {error}") from error
