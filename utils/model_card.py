"""The model card: `report/MODEL_CARD.md`, written from report.json alone.

Its headings follow Mitchell et al., "Model cards for model reporting", FAT* 2019,
https://arxiv.org/abs/1810.03993. Every figure comes from the report; none is typed by hand.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from utils import litert, metrics

SYNTHETIC = """\
> **Synthetic data.** This model was trained and measured on drawn phantoms, not on radiographs of
> anybody. It shows that the series runs. It says nothing about real knees: do not grade any.
"""
USE = """\
## Intended use

Research and teaching: how a small model learns from a large one, and how to say how good it is.
The input is one knee in a frontal, fixed-flexion radiograph, cropped to a square centred on the
joint and framed as in the data; the answer is one of the classes, with probabilities.

## What it must not be used for

**It is no medical device.** No authority has cleared it, nobody has tested it in a clinic. It must
not diagnose, triage, grade for treatment, or decide anything about a patient, and it must not be
fed other views, other joints, implants, children, or photographs of screens.
"""
KNEES = """\
Grades are those of Kellgren and Lawrence, "Radiological assessment of osteo-arthrosis", Annals of
the Rheumatic Diseases 16 (1957) 494-502. The public images that these notebooks are written for:

- Chen, "Knee osteoarthritis severity grading dataset", Mendeley Data, 2018,
  https://doi.org/10.17632/56rmx5bjcr.1, described in Chen, Gao, Shi, Allen and Yang, "Fully
  automatic knee osteoarthritis severity grading using deep neural networks with a novel ordinal
  loss", Computerized Medical Imaging and Graphics 75 (2019) 84-92.
- They were taken from the Osteoarthritis Initiative (OAI), a public-private partnership of the US
  National Institutes of Health and industry, https://nda.nih.gov/oai: Nevitt, Felson and Lester,
  "The Osteoarthritis Initiative: protocol for the cohort study", 2006. Whoever publishes results
  from OAI data must acknowledge it in the words that its data use terms give.
"""
LIMITS = """\
## Limits

- One cropped knee at a time, one view; no patient history, no second view, no earlier image.
- Measured on one data set. There is no external set: another clinic's machines, positioning and
  patients will give worse figures, by an unknown amount.
- The files carry no age, sex, origin or site, so nobody can say whom it serves badly.
- Grades are readers' judgements; readers disagree most where this model does, around the class
  between healthy and ill. It can be no more right than its labels.
- Whether an image is one well-framed knee is checked only coarsely; what passes gets a grade.
"""
FIGURES = {
    "accuracy": "accuracy",
    "balanced_accuracy": "balanced accuracy",
    "qwk": "quadratic weighted kappa",
    "mae": "mean absolute error, grades",
    "macro_auroc": "macro AUROC",
    "ece": "expected calibration error",
}


def model_card(report: Mapping) -> str:
    """Markdown of what the student is, what it is for, and how good it is.

    report: what report.json holds. `dataset` and `models.student` must be there; what else is
    missing is left out of the card.

    Raises:
        ValueError: report has no dataset or no student.
    """
    if "dataset" not in report or "student" not in report.get("models", {}):
        raise ValueError("A model card needs `dataset` and `models.student` in report.json.")
    dataset = report["dataset"]
    parts = [f"# Model card: a student that grades {_subject(dataset)}\n"]
    if dataset.get("synthetic"):
        parts.append(SYNTHETIC)
    parts += [_what(report), USE, _data(dataset), _figures(report), _exports(report), LIMITS]
    best = litert.best_small(report.get("exports") or [])
    parts.append(LOAD.replace("FILE", best["file"] if best else "student_float32.tflite"))
    return "\n".join(part for part in parts if part)


def _subject(dataset: Mapping) -> str:
    return "knee osteoarthritis" if _knees(dataset) else f"images of {dataset.get('name')}"


def _class_names(dataset: Mapping) -> list[str]:
    return list(map(str, dataset.get("classes", [])))


def _knees(dataset: Mapping) -> bool:
    names = _class_names(dataset)
    return not names or all(name.startswith("KL ") for name in names)


def _what(report: Mapping) -> str:
    lines = ["## What it is\n"]
    for name, model in report["models"].items():
        if "parameters" in model:
            size = f", {model['bytes'] / 1e6:.1f} MB" if model.get("bytes") else ""
            lines.append(f"- {name.replace('_', ' ')}: {model['parameters']:,} parameters{size}")
    student, teacher = report["models"]["student"], report["models"].get("teacher", {})
    if student.get("parameters") and teacher.get("parameters"):
        ratio = teacher["parameters"] / student["parameters"]
        lines.append(f"- the teacher is {ratio:.1f} times the student's size")
    versions = report.get("environment", {}).get("versions", {})
    if versions:
        lines.append("- made with " + ", ".join(f"{k} {v}" for k, v in versions.items()))
    return "\n".join(lines) + "\n"


def _data(dataset: Mapping) -> str:
    lines = ["## Data\n", f"`{dataset.get('name')}`, images in each class:\n"]
    rows = [[split, *counts.values()] for split, counts in dataset.get("counts", {}).items()]
    lines += _table(["split", *_class_names(dataset)], rows)
    if _knees(dataset):
        lines.append("")
        if dataset.get("synthetic"):
            lines.append("Drawn phantoms (`utils/phantoms.py`) stand in for radiographs.\n")
        lines.append(KNEES.rstrip())
    return "\n".join(lines) + "\n"


def _figures(report: Mapping) -> str:
    models = {n: m for n, m in report["models"].items() if m.get("accuracy") is not None}
    evaluated = report.get("evaluated", {})
    images = {m["images"] for m in models.values() if m.get("images")}
    over = f" of {images.pop()} images" if len(images) == 1 else ""
    drawn = evaluated.get("intervals", {})
    how = f" (bootstrap over {drawn['units']} {drawn['resampled']})" if drawn else ""
    lines = [
        "## How good it is\n",
        f"On {evaluated.get('split', 'test')}{over}, with 95 % intervals in brackets{how}.\n",
    ]
    rows = [
        [shown, *(_with_interval(m, figure) for m in models.values())]
        for figure, shown in FIGURES.items()
        if any(m.get(figure) is not None for m in models.values())
    ]
    for k, name in enumerate(_class_names(report["dataset"])):
        cells = [_with_interval(m, "recall", k) for m in models.values()]
        rows.append([f"recall, {name}", *cells])
    lines += _table(["", *(name.replace("_", " ") for name in models)], rows)
    binary = {n: m["binary"] for n, m in models.items() if m.get("binary")}
    for name, found in binary.items():
        told = ", ".join(
            f"{shown} {_with_interval(found, shown.lower())}"
            for shown in ("sensitivity", "specificity", "AUROC")
        )
        lines.append(f"\nGrade {found['cut']} or more, {name.replace('_', ' ')}: {told}.")
    if evaluated.get("opening"):
        lines.append(f"\n{evaluated['opening']}")
    verdict = (report.get("target") or {}).get("sentences", {}).get("student")
    if verdict:
        lines.append(f"\nThe target, an accuracy of {report['target']['accuracy']}, is {verdict}.")
    lines += [f"\n{_sentence(gap['sentence'])}" for gap in report.get("differences") or []]
    check = (report.get("deletion") or {}).get("student")
    if check:
        lines.append(
            f"\nHiding the hottest {check['fraction']:.0%} of its Grad-CAM maps lowers the "
            f"probability by {_with_interval(check, 'hottest_fall')}, a part of the same shape "
            f"elsewhere by {_with_interval(check, 'random_fall')}."
        )
    return "\n".join(lines) + "\n"


def _exports(report: Mapping) -> str:
    exports = report.get("exports") or []
    if not exports:
        return ""
    rows = [
        [
            f"`{row['file']}`",
            f"{row['bytes'] / 1e6:.2f}",
            *(_number(row.get(key)) for key in ("accuracy", "qwk", "agreement")),
            _number(row.get("ms"), 1),
            row.get("settings", ""),
        ]
        for row in exports
    ]
    head = ["file", "MB", "accuracy", "QWK", "agreement with Keras", "ms an image", "settings"]
    text = "## Files to carry along\n\nMeasured by running them, one thread, one image at a time.\n"
    return "\n".join([text, *_table(head, rows), f"\n{carried(exports)}"]) + "\n"


def carried(rows: Sequence[Mapping]) -> str:
    """Which export to carry along and what it loses, in words.

    rows: as `export.table` returns them.
    """
    best, limit = litert.best_small(rows), f"at most {litert.SMALL / 1e6:g} MB"
    if best is None:
        return f"No file of {limit} runs here."
    told = f"Of the files of {limit}, {best['file']} is the most accurate"
    gap = best.get("under_float32")
    return f"{told}: {metrics.sentence(gap, 'it', 'float32')}." if gap else f"{told}."


LOAD = """\
## How to load

```python
import json
import numpy as np
from PIL import Image, ImageOps
from ai_edge_litert.interpreter import Interpreter

path = "FILE"
about = json.load(open(path.replace(".tflite", ".json")))
side = about["image_size"]
image = ImageOps.pad(Image.open("knee.png").convert("L"), (side, side), Image.BICUBIC)
model = Interpreter(path)
model.allocate_tensors()
model.set_tensor(model.get_input_details()[0]["index"], np.asarray(image)[None, ..., None])
model.invoke()
chances = model.get_tensor(model.get_output_details()[0]["index"])[0]
print(dict(zip(about["class_names"], chances.round(3).tolist())))
```

Or with this project: `python -m utils grade knee.png --model student.keras`. `student.keras` gives
logits; its temperature, class names and when to ask a person stand in `student.json`.
"""


def _table(head: list, rows: list[list]) -> list[str]:
    lines = [f"| {' | '.join(map(str, head))} |", "|" + " --- |" * len(head)]
    return lines + [f"| {' | '.join(map(str, row))} |" for row in rows]


def _sentence(words: str) -> str:
    """With a capital and a full stop."""
    return f"{words[:1].upper()}{words[1:].rstrip('.')}."


def _number(value, digits: int = 3) -> str:
    return "not measured" if value is None else f"{value:.{digits}f}"


def _with_interval(figures: Mapping, name: str, k: int | None = None) -> str:
    """A figure and its interval, as "0.712 (0.690 to 0.734)"."""
    value, ends = figures.get(name), figures.get(f"{name}_ci95")
    if k is not None and value is not None:
        value, ends = value[k], ends[k] if ends else None
    if value is None:
        return "not defined"
    between = f" ({ends[0]:.3f} to {ends[1]:.3f})" if ends and None not in ends else ""
    return f"{value:.3f}{between}"
