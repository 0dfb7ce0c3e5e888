"""The parameters of the series: declared in the notebooks, checked here before anything runs.

A parameter stands in exactly one notebook, in the cell tagged `parameters`; only `SHARED` stand in
several. So one flat profile serves all six: a notebook leaves alone what another owns and refuses
what none owns. Nothing here imports TensorFlow.
"""

from __future__ import annotations

import ast
import difflib
import json
import math
import re
from collections.abc import Container, Mapping
from pathlib import Path

import yaml

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = (
    "01_data",
    "02_teacher_phase_1",
    "03_teacher_phase_2",
    "04_teacher_phase_3",
    "05_distillation",
    "06_evaluation",
)
SHARED = ("RUN_DIR", "MAX_HOURS", "JIT_COMPILE", "DEVICES")
PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
BACKBONES = (
    *(f"EfficientNetV2{size}" for size in ("B0", "B1", "B2", "B3", "S", "M", "L")),
    "MobileNetV3Small",
    "MobileNetV3Large",
)


# Every name and its types. The notebooks decide the values; they cannot make up names, for Jupyter
# saves a slip of the pen into the very cell that is read.
NAMES = {
    "str": "BALANCE DATA_DIR DECISION RUN_DIR STUDENT_BACKBONE STUDENT_PRECISION STUDENT_WEIGHTS "
    "TEACHER_BACKBONE TEACHER_PRECISION TEACHER_WEIGHTS",
    "int": "ACCUMULATION BATCH_SIZE BOOTSTRAP DEVICES LEAK_IMAGES PHANTOM_PATIENTS PHASE_1_EPOCHS "
    "PHASE_2_EPOCHS PHASE_3_EPOCHS POSITIVE_FROM RESTARTS SEED STORED_SIZE STUDENT_BATCH_SIZE "
    "STUDENT_EPOCHS STUDENT_HEAD_EPOCHS STUDENT_IMAGE_SIZE TEACHER_IMAGE_SIZE TEST_VIEWS VIEWS "
    "WARMUP_EPOCHS",
    "float": "BRIGHTNESS CONTRAST COVERAGE CUTOUT DROPOUT FOCAL_GAMMA HARD_WEIGHT LABEL_SMOOTHING "
    "LABEL_SOFTENING PHASE_1_LEARNING_RATE PHASE_2_LEARNING_RATE PHASE_3_LEARNING_RATE ROTATION "
    "SHIFT STUDENT_HEAD_LEARNING_RATE STUDENT_LABEL_SOFTENING STUDENT_LEARNING_RATE "
    "TARGET_ACCURACY TEMPERATURE TEST_FRACTION UNFREEZE VAL_FRACTION ZOOM",
    "bool": "ALLOW_LEAKS EXPORT FLIP LABELS_ONLY LEAK_STUDY OPEN_TEST",
    "float | None": "MAX_HOURS",
    "str | bool": "JIT_COMPILE",
}
TYPES = {n: tuple(kind.split(" | ")) for kind, names in NAMES.items() for n in names.split()}


class ParameterError(ValueError):
    """A profile or a parameter that the series cannot run with; the message is for its user."""


def accepts(name: str, value: object) -> bool:
    """Whether a value has one of the types of the parameter `name`; an int serves as a float."""
    kind = type(value).__name__ if value is not None else "None"
    return kind in TYPES[name] or (kind == "int" and "float" in TYPES[name])


def one_of(*choices):
    return (lambda value: value in choices), "one of " + ", ".join(repr(c) for c in choices)


def within(low, high, *, above=False, below=False):
    def holds(value):
        return (value > low if above else value >= low) and (
            value < high if below else value <= high
        )

    return (
        holds,
        f"{'above' if above else 'at least'} {low}, {'below' if below else 'at most'} {high}",
    )


def weights_known(value: str) -> bool:
    """Whether weights are named as `models` takes them, or a file that is there."""
    return value in ("imagenet", "none") or any(
        (folder / Path(value).expanduser()).is_file() for folder in (Path(), ROOT)
    )


# The first pattern that matches a whole name decides what its value must be.
RULES = {
    r"RUN_DIR": (lambda value: bool(value.strip()), "the name of a folder"),
    r"(TEACHER|STUDENT)_WEIGHTS": (
        weights_known,
        '"imagenet", "none" or a weights file that exists',
    ),
    r"(TEACHER|STUDENT)_IMAGE_SIZE": (
        lambda value: value % 32 == 0 and 32 <= value <= 1024,
        "a multiple of 32 from 32 to 1024 (the backbones halve it five times)",
    ),
    r"STORED_SIZE": within(32, 2048),
    r"PHANTOM_PATIENTS": within(20, 100_000),
    r"(PHASE_\d|STUDENT)_EPOCHS": within(1, 10_000),
    r".*_EPOCHS": within(0, 10_000),
    r".*LEARNING_RATE": within(0, 1, above=True),
    r".*BATCH_SIZE": within(1, 4096),
    r"ACCUMULATION": within(1, 1024),
    r"DEVICES": within(0, 64),
    r"MAX_HOURS": within(0, 10_000, above=True),
    r"JIT_COMPILE": one_of("auto", True, False),
    r".*_PRECISION": one_of(*PRECISIONS),
    r".*_BACKBONE": one_of(*BACKBONES),
    r"BALANCE": one_of("none", "class_weight", "resample"),
    r"DECISION": one_of("argmax", "qwk"),
    r"(VAL|TEST)_FRACTION": within(0, 0.5, above=True),
    r"(DROPOUT|LABEL_SMOOTHING|SHIFT|ZOOM|BRIGHTNESS|CONTRAST|CUTOUT)": within(0, 1, below=True),
    r"ROTATION": within(0, 180),
    r".*LABEL_SOFTENING": within(0, 5),
    r"FOCAL_GAMMA": within(0, 10),
    r"RESTARTS": within(0, 100),
    r"UNFREEZE": within(0, 1, above=True),
    r"TEMPERATURE": within(0, 100, above=True),
    r"(HARD_WEIGHT|TARGET_ACCURACY)": within(0, 1),
    r"(TEST_)?VIEWS": within(1, 10_000),
    r"BOOTSTRAP": within(100, 1_000_000),
    r"POSITIVE_FROM": within(1, 1000),
    r"COVERAGE": within(0, 1, above=True),
    r"LEAK_IMAGES": within(50, 1_000_000),
    r"SEED": within(0, 2**31 - 1),
}


def parameter_cell(notebook: Path) -> str:
    """The source of the one cell tagged `parameters`.

    Raises:
        ParameterError: when the file is no notebook or has not exactly one such cell.
    """
    try:
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    except (OSError, ValueError, KeyError) as error:
        raise ParameterError(f"{notebook} cannot be read as a notebook: {error}") from error
    tagged = [c for c in cells if "parameters" in c.get("metadata", {}).get("tags", [])]
    if len(tagged) != 1:
        raise ParameterError(f"{notebook} has {len(tagged)} cells tagged 'parameters', not one.")
    return "".join(tagged[0]["source"])


def declared(root: Path | None = None) -> dict[str, dict[str, object]]:
    """What each notebook below `root`/notebooks declares: `{notebook: {NAME: default}}`.

    Notebooks of the series that are missing there are left out (on Kaggle one may stand alone).

    Raises:
        ParameterError: a notebook's cell of parameters cannot be read.
    """
    found = {}
    for notebook in NOTEBOOKS:
        path = Path(root or ROOT) / "notebooks" / f"{notebook}.ipynb"
        if path.exists():
            cell = parameter_cell(path)
            try:
                found[notebook] = read_cell(cell, TYPES)
            except (SyntaxError, ValueError) as error:
                raise ParameterError(f"{path}, cell of parameters: {error}") from error
    return found


def defaults(root: Path | None = None) -> dict[str, object]:
    """The value of every parameter as the notebooks below `root` declare it.

    Raises:
        ParameterError: all six notebooks are there, and none of them declares some parameter.
    """
    found = declared(root)
    values = {name: value for own in found.values() for name, value in own.items()}
    if len(found) == len(NOTEBOOKS) and (missing := sorted(set(TYPES) - set(values))):
        raise ParameterError(
            f"No notebook sets {', '.join(missing)}: write the line into its cell of parameters."
        )
    return values


def settings(values: Mapping[str, object], root: Path | None = None) -> dict[str, object]:
    """All parameters of a series, `values` over what the notebooks below `root` say, checked.

    Raises:
        ParameterError: as `check` and `check_together` do, of either.
    """
    check(values)
    found = check(defaults(root) | dict(values))
    for notebook in declared(root):
        check_together(notebook, found)
    return found


def looks_like_one(name: str) -> bool:
    """Whether a name is written as parameters are: a learner's own T = 4 is none."""
    return name.isupper() and name[0] != "_" and len(name) > 2


def unknown(name: str) -> str:
    """What is said of a name that is no parameter."""
    near = difflib.get_close_matches(str(name), TYPES, 1)
    hint = f" Did you mean {near[0]}?" if near else ""
    return f"{name} is no parameter of any notebook.{hint}"


def read_cell(source: str, names: Container[str] | None = None) -> dict[str, object]:
    """Parse `NAME = literal` lines without running them.

    names: what may be declared, if given; a learner's own lower-case names are left out then.

    Raises:
        ValueError: a parameter's value is an expression, which no profile could say, or a name
            that looks like a parameter's is none of `names`.
    """
    parameters = {}
    for node in ast.parse(source).body:
        if not isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign) or node.value is None:
            continue
        target = node.targets[0] if isinstance(node, ast.Assign) else node.target
        if not isinstance(target, ast.Name):
            continue
        if names is not None and target.id not in names:
            if looks_like_one(target.id):
                raise ValueError(unknown(target.id))
            continue
        try:
            if isinstance(node, ast.AugAssign):
                raise ValueError("computed")
            parameters[target.id] = ast.literal_eval(node.value)
        except ValueError as error:
            raise ValueError(
                f"{ast.unparse(node)} is an expression: write the value itself."
            ) from error
    return parameters


def load_profile(name: str, root: Path | None = None) -> dict:
    """A profile by its name in `notebooks/profiles/` or by its path: `{NAME: value}`.

    Raises:
        ParameterError: when there is none, or when it is not a flat YAML mapping.
    """
    folder = Path(root or ROOT) / "notebooks" / "profiles"
    path = folder / f"{name}.yaml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in folder.glob("*.yaml")))
        raise ParameterError(f"No profile {name!r}: it is neither a file nor one of: {known}.")
    try:
        profile = yaml.safe_load(path.read_text(encoding="utf-8")) or {}
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ParameterError(f"{path} is no valid YAML: {str(error).splitlines()[0]}") from error
    if not isinstance(profile, dict):
        raise ParameterError(
            f"{path} must hold `NAME: value` lines, not a {type(profile).__name__}."
        )
    return profile


def check(values: Mapping[str, object]) -> dict[str, object]:
    """Return `values` unchanged as a dict when the series can run with them.

    Raises:
        ParameterError: names that no notebook owns, wrong types, values out of range; at most ten
            findings, a line each.
    """
    faults = []
    for name, value in values.items():
        if name not in TYPES:
            faults.append(unknown(name))
        elif fault := fault_of(name, value):
            faults.append(fault)
    if faults:
        shown = faults[:10] + ([f"… and {len(faults) - 10} more"] if len(faults) > 10 else [])
        raise ParameterError("\n".join(shown))
    return dict(values)


def check_together(notebook: str, settings: Mapping[str, object]) -> None:
    """Refuse values that are good alone and not together.

    Args:
        notebook: the one that is about to run.
        settings: its parameters and those of the notebooks before it.

    Raises:
        ParameterError: a model that asks for larger images than are stored, or views that no epoch
            would see.
    """
    who = {"02": "TEACHER", "05": "STUDENT"}.get(notebook[:2])
    size, stored = settings.get(f"{who}_IMAGE_SIZE"), settings.get("STORED_SIZE")
    if size and stored and size > stored:
        raise ParameterError(
            f"{who}_IMAGE_SIZE = {size}, but notebook 01 stored {stored} px: lower it, or run 01 "
            f"with STORED_SIZE = {size}."
        )
    if who == "STUDENT":
        epochs = settings["STUDENT_HEAD_EPOCHS"] + settings["STUDENT_EPOCHS"]
        if settings["VIEWS"] > epochs:
            raise ParameterError(
                f"VIEWS = {settings['VIEWS']}, but the student trains {epochs} epochs, one view "
                f"each: the teacher would look in vain. Set VIEWS to {epochs} or less."
            )


def check_question(settings: Mapping[str, object], classes: int | None) -> None:
    """Refuse a yes-or-no question that every image answers alike, before anything trains.

    Nothing is asked where notebook 06 is not there or the number of classes is not known.

    Raises:
        ParameterError: no class counts as no, or none as yes.
    """
    positive_from = settings.get("POSITIVE_FROM")
    if classes and positive_from and not 1 <= positive_from < classes:
        raise ParameterError(
            f"POSITIVE_FROM = {positive_from} (notebook 06), but the classes run from 0 to "
            f"{classes - 1}: choose one from 1 to {classes - 1}."
        )


def as_yaml_number(value: object) -> str | None:
    """How YAML wants the number that a string such as "1e-4" means; None when it means none."""
    found = re.fullmatch(r"([+-]?\d+)(\.\d*)?[eE]([+-]?)(\d+)", str(value))
    if not isinstance(value, str) or not found:
        return None
    whole, fraction, sign, power = found.groups()
    return f"{whole}{fraction or '.0'}e{sign or '+'}{power}"


def fault_of(name: str, value: object) -> str | None:
    """What is wrong with one value, in a sentence; None when nothing is."""
    if not accepts(name, value):
        wanted = " or ".join(TYPES[name])
        hint = ""
        if "float" in TYPES[name] and (number := as_yaml_number(value)):
            hint = f" In YAML write this number with a point and a sign: {number}."
        return f"{name} = {value!r} is {type(value).__name__}, wanted {wanted}.{hint}"
    if isinstance(value, float) and not math.isfinite(value):
        return f"{name} = {value} is not a finite number."
    if value is None:
        return None
    for pattern, (holds, text) in RULES.items():
        if re.fullmatch(pattern, name):
            return None if holds(value) else f"{name} = {value!r} must be {text}."
    return None
