"""The report: what the figures mean in words, what humans reach, and `report.json` as a whole."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from utils import calibration, data, evaluation, leaks, metrics, models, runs

COMPARED = ("accuracy", "qwk", "balanced_accuracy", "mae")
# Subject, reference: who is held against whom.
PAIRS = (("student", "teacher"), ("student", "student_labels_only"))
CALLED = {
    "teacher": "the teacher",
    "student": "the student",
    "student_labels_only": "the student of labels only",
}
SYNTHETIC = "Synthetic: drawn phantoms, not radiographs. Nothing here says anything about knees."
READERS_NOTE = (
    "Not like for like: other films, other readers, other shares of the grades and other weights. "
    "Kappa rises with the share of extreme grades and with the weights, and a model is held here "
    "against the very readers whose labels it learned from."
)
# Only figures whose source was read; `value` is [lowest, highest] of what it gives.
HUMAN_READERS = (
    {
        "readers": "5 radiologists, mean of all pairs",
        "figure": "kappa",
        "weighting": "quadratic",
        "value": [0.748, 0.748],
        "population": "part of the test split of 503 MOST patients, frontal and lateral views",
        "source": "Swiecicki et al., Computers in Biology and Medicine, 2021",
        "url": "https://scholars.duke.edu/publication/1478359",
    },
    {
        "readers": "3 trained non-clinicians, each pair",
        "figure": "kappa",
        "weighting": "weighted, scheme not stated in the abstract",
        "value": [0.66, 0.97],
        "population": "both knees of 36 patients before a knee replacement",
        "source": "Klara et al., Journal of Rheumatology 43 (2016) 1421-1426",
        "url": "https://doi.org/10.3899/jrheum.151300",
    },
    {
        "readers": "3 trained non-clinicians, each against a radiologist",
        "figure": "kappa",
        "weighting": "weighted, scheme not stated in the abstract",
        "value": [0.56, 0.85],
        "population": "both knees of 36 patients before a knee replacement",
        "source": "Klara et al., Journal of Rheumatology 43 (2016) 1421-1426",
        "url": "https://doi.org/10.3899/jrheum.151300",
    },
    {
        "readers": "an orthopaedic surgeon and a rheumatologist, two sessions",
        "figure": "kappa",
        "weighting": "not stated in the abstract",
        "value": [0.458, 0.499],
        "population": "140 patients of 50 to 72 years",
        "source": "Journal of Knee Surgery, 2017, four grading scales compared",
        "url": "https://doi.org/10.1055/s-0037-1602249",
    },
    {
        "readers": "the same two, each against himself two weeks later",
        "figure": "kappa",
        "weighting": "not stated in the abstract",
        "value": [0.573, 0.753],
        "population": "140 patients of 50 to 72 years",
        "source": "Journal of Knee Surgery, 2017, four grading scales compared",
        "url": "https://doi.org/10.1055/s-0037-1602249",
    },
    {
        "readers": "the better of 2 radiologists against a committee's reading",
        "figure": "accuracy",
        "weighting": "none",
        "value": [0.60, 0.60],
        "population": "50 images of the Osteoarthritis Initiative",
        "source": "Thomas et al., Radiology: Artificial Intelligence 2 (2020) e190065",
        "url": "https://doi.org/10.1148/ryai.2020190065",
    },
)


def readers_table() -> pd.DataFrame:
    """`HUMAN_READERS` to be shown beside the models' figures."""
    table = pd.DataFrame(HUMAN_READERS)
    table["value"] = [f"{a:.2f}" if a == b else f"{a:.2f} to {b:.2f}" for a, b in table["value"]]
    return table


def judge(
    labels,
    logits: Mapping[str, np.ndarray],
    fitted: Mapping[str, calibration.Calibration],
    rule: str,
    drawn: metrics.Resamples,
    cut: int | None = None,
) -> dict[str, metrics.Evaluation]:
    """Evaluate every model under one decision rule, on the same resamples.

    Args:
        labels: int (n,).
        logits: model to float (n, K).
        fitted: model to its calibration, from val.
        rule: "argmax" or "qwk".
        cut: first class of the positive side, see `metrics.figures`.
    """
    found = {}
    for name, values in logits.items():
        probabilities = fitted[name].probabilities(values)
        decided = fitted[name].decide(probabilities, rule)
        found[name] = metrics.evaluate(labels, probabilities, decided, drawn, cut)
    return found


def differences(results: Mapping[str, metrics.Evaluation]) -> list[dict]:
    """Paired differences in `COMPARED` of every pair that is there, each with its sentence."""
    found = []
    for subject, reference in PAIRS:
        if subject not in results or reference not in results:
            continue
        for figure in COMPARED:
            gap = metrics.difference(results[reference], results[subject], figure)
            words = metrics.sentence(gap, CALLED[subject], CALLED[reference])
            found.append({"subject": subject, "reference": reference, **gap, "sentence": words})
    return found


def differences_table(found: list[Mapping], figures=("accuracy", "balanced_accuracy")):
    """Differences in points as `plots.differences` wants them."""
    rows = [
        (
            f"{row['subject']} minus {row['reference'].replace('_', ' ')}, "
            + metrics.SHOWN[row["figure"]][0],
            row["difference"],
            *row["ci95"],
        )
        for row in found
        if row["figure"] in figures
    ]
    return pd.DataFrame(rows, columns=["name", "value", "low", "high"])


def target(accuracy: float, results: Mapping, dataset: data.Dataset, split: str) -> dict:
    """Whether the target is met; the point estimate decides, its interval stands beside it.

    Returns:
        `{accuracy, teacher_met, student_met, sentences}`: null on synthetic data and while test is
        closed.
    """
    judged = split == "test" and not dataset.synthetic
    found = {"accuracy": accuracy, "teacher_met": None, "student_met": None, "sentences": {}}
    for name in ("teacher", "student"):
        value = results[name].figures["accuracy"]
        low, high = metrics.interval(results[name].samples["accuracy"])
        met = bool(value >= accuracy)
        why = "synthetic data" if dataset.synthetic else "test is closed"
        verdict = ("met" if met else "not met") if judged else f"not judged ({why})"
        found[f"{name}_met"] = met if judged else None
        found["sentences"][name] = f"{verdict}: {value:.2f}, {low:.2f} to {high:.2f}"
    return found


def headline(results: Mapping, dataset: data.Dataset, split: str, found: Mapping | None) -> str:
    """The report in a sentence, withheld where a figure is too good to be true."""
    if found is not None:
        best = max(result.figures["accuracy"] for result in results.values())
        return (
            f"An accuracy of {best:.3f} on five grades is above {leaks.TOO_GOOD}: no headline. "
            + found["verdict"]
        )
    told = []
    for name in ("teacher", "student"):
        value = results[name].figures["accuracy"]
        low, high = metrics.interval(results[name].samples["accuracy"])
        kappa = results[name].figures["qwk"]
        told.append(f"{CALLED[name]} {value:.3f} ({low:.3f} to {high:.3f}), kappa {kappa:.3f}")
    images = int(results["student"].confusion.sum())
    text = f"Accuracy on {images} {split} images: " + "; ".join(told) + "."
    return f"{text} {SYNTHETIC}" if dataset.synthetic else text


def calibration_section(labels, logits: Mapping, fitted: Mapping, drawn) -> dict:
    """Before and after temperature scaling, for every model: quality and reliability bins."""
    found = {}
    for name, values in logits.items():
        before = calibration.softmax(values)
        after = fitted[name].probabilities(values)
        bins = calibration.reliability(labels, after).round(6)
        found[name] = {
            "temperature": metrics.plain(fitted[name].temperature),
            "fitted_on": "val",
            "before": calibration.quality(labels, before, drawn),
            "after": calibration.quality(labels, after, drawn),
            "reliability": bins.to_dict("records"),
        }
    return found


def selective_section(labels, logits: Mapping, fitted: Mapping, rule: str, drawn) -> dict:
    """Accuracy against coverage for every model, and what val's threshold does."""
    found = {}
    for name, values in logits.items():
        probabilities = fitted[name].probabilities(values)
        decided = fitted[name].decide(probabilities, rule)
        arrays = (labels, probabilities, decided)
        found[name] = {
            "curve": calibration.selective(*arrays, drawn),
            "referred": calibration.referred(*arrays, fitted[name].refer_below, drawn),
        }
    return found


def decision_section(rule: str, fitted: Mapping, by_rule: Mapping[str, Mapping]) -> dict:
    """Both rules' figures; which one is the headline was fixed before test was opened."""
    kept = ("accuracy", "balanced_accuracy", "qwk", "mae")
    rules = {}
    for name, results in by_rule.items():
        rules[name] = {}
        for model, result in results.items():
            summary = result.summary()
            rules[name][model] = {k: v for k, v in summary.items() if k.startswith(kept)}
    return {
        "headline": rule,
        "fixed_before_test": True,
        "fitted_on": "val",
        "thresholds": {name: list(found.thresholds) for name, found in fitted.items()},
        "rules": rules,
    }


def model_section(results: Mapping, paths: Mapping[str, Path], loaded: Mapping) -> dict:
    """Size and all figures of every model."""
    return {
        name: {
            "file": Path(paths[name]).name,
            "parameters": int(models.describe(loaded[name])["parameters"]),
            "bytes": Path(paths[name]).stat().st_size,
            **result.summary(),
        }
        for name, result in results.items()
    }


def dataset_section(dataset: data.Dataset, audit: Mapping) -> dict:
    """What the figures are about."""
    return {
        "name": dataset.name,
        "synthetic": dataset.synthetic,
        "label": SYNTHETIC if dataset.synthetic else None,
        "classes": list(dataset.names_shown),
        "counts": audit["counts"],
        "bayes_accuracy": dataset.bayes_accuracy,
        "digest": dataset.digest,
        "audit": dict(audit),
    }


def travelling(dataset: data.Dataset, fitted: calibration.Calibration, rule: str) -> dict:
    """What goes into a model's sidecar, see `litert.write_sidecar`, beside size and temperature."""
    return {
        "class_names": dataset.class_names,
        "refer_below": fitted.refer_below,
        "decision": rule,
        "thresholds": list(fitted.thresholds),
    }


def evaluated_section(split: str, opening: Mapping | None, drawn: metrics.Resamples) -> dict:
    """What was evaluated: the split, how often test was opened, and what the intervals draw."""
    return {
        "split": split,
        "opening": evaluation.opening_sentence(opening),
        "changed_model": bool(opening and opening["changed_model"]),
        "intervals": {
            "level": 0.95,
            "method": "percentile bootstrap",
            "resampled": drawn.unit,
            "units": drawn.units,
            "draws": len(drawn.weights),
        },
    }


def stage_seconds(stage: runs.Stage) -> dict[str, dict[str, float]]:
    """How long each notebook of this run took, this one until now: {notebook: {seconds}}."""
    found = {}
    for notebook in runs.NOTEBOOKS:
        saved = runs.read_stage(stage.run, notebook)
        if saved is not None:
            found[notebook] = {"seconds": float(saved["seconds"])}
    if not stage.finished:
        spent = stage.saved["seconds"] + time.time() - stage.opened
        found[stage.notebook] = {"seconds": round(spent, 1)}
    return found


def write(stage: runs.Stage, **sections) -> dict:
    """Write `report.json`: the sections given, and what every report has.

    Raises:
        ValueError: a section holds a value that JSON cannot, such as NaN.
    """
    found = {
        **sections,
        "human_readers": {"note": READERS_NOTE, "rows": [dict(row) for row in HUMAN_READERS]},
        "stages": stage_seconds(stage),
        "environment": runs.environment(),
    }
    runs.write_json(stage.folder / "report.json", found)
    return found


def model_paths(stage: runs.Stage) -> dict[str, Path]:
    """Files of the models to evaluate: teacher, student, and the labels-only student if made."""
    found = {
        "teacher": stage.path("teacher/phase_3/teacher.keras"),
        "student": stage.path("student/student.keras"),
        "student_labels_only": stage.path("student/student_labels_only.keras"),
    }
    return {n: p for n, p in found.items() if n != "student_labels_only" or p.exists()}


def look(loaded: Mapping, dataset: data.Dataset, split: str, count: int, **options) -> dict:
    """Every model's logits of all test-time views of a split: {name: float32 (n, count, K)}."""
    found = {}
    for name, model in loaded.items():
        pixels = dataset.pixels(split, model.inputs[0].shape[1])
        options = {"augmentation": dataset.augmentation} | options
        found[name] = evaluation.view_logits(model, pixels, count, **options)
    return found


def maps(
    loaded: Mapping, dataset: data.Dataset, split: str, rows, decided: Mapping
) -> dict[str, np.ndarray]:
    """Where teacher and student look: Grad-CAM and CBAM's spatial map of the chosen images.

    Args:
        rows: (n,) places in the split.
        decided: model to the class it gave every image of the split, which Grad-CAM explains.

    Returns:
        Column title to float32 (n, S, S), S the model's own size.
    """
    from utils import explain

    found = {}
    for name in ("teacher", "student"):
        pixels = dataset.pixels(split, loaded[name].inputs[0].shape[1])[rows]
        found[f"{name}\nGrad-CAM"] = explain.grad_cam(loaded[name], pixels, decided[name][rows])
        found[f"{name}\nattention"] = explain.spatial_attention(loaded[name], pixels)
    return found


def deletion_checks(
    loaded: Mapping, dataset: data.Dataset, split: str, fitted: Mapping, patients, images: int = 200
) -> dict[str, dict]:
    """Whether Grad-CAM of teacher and student means something, on images spread over a split.

    A model whose maps have no peak (its last grid is a single cell, at 32 px) is left out.
    """
    from utils import explain

    found, count = {}, len(dataset.rows(split))
    rows = np.linspace(0, count - 1, min(images, count)).astype(int)  # they come sorted by class
    for name in ("teacher", "student"):
        model = loaded[name]
        pixels = dataset.pixels(split, model.inputs[0].shape[1])[rows]
        maps = explain.grad_cam(model, pixels)
        if np.ptp(maps, axis=(1, 2)).max() == 0:
            continue
        found[name] = explain.deletion_check(
            model,
            pixels,
            maps,
            temperature=fitted[name].temperature,
            patients=None if patients is None else patients[rows],
            seed=dataset.seed,
        )
    return found


def deletion_sentence(found: Mapping) -> str:
    """What a deletion check says about a model's maps."""
    falls = (
        f"hiding the hottest tenth lowers the probability by {found['hottest_fall']:.3f}, "
        f"a random tenth by {found['random_fall']:.3f}"
    )
    low, high = found["difference_ci95"]
    if low > 0:
        return f"{falls}: the map marks what the answer rests on"
    return (
        f"{falls}: the map does {'not' if high < 0 else 'not surely'} show what the answer rests on"
    )


def deletion_table(checks: Mapping[str, Mapping]) -> pd.DataFrame:
    """The deletion checks as `plots.deletion` wants them."""
    rows = [
        (name, f"{kind} tenth", found[f"{kind}_fall"], *found[f"{kind}_fall_ci95"])
        for name, found in checks.items()
        for kind in ("hottest", "random")
    ]
    return pd.DataFrame(rows, columns=["model", "hidden", "value", "low", "high"])
