"""Notebooks 06 and 07 on a small run whose models never trained: what they write, and when."""

import json

import matplotlib.pyplot as plt
import nbformat
import numpy as np
import pandas as pd
import pytest

from utils import models, phantoms, runs, settings

MODELS = {"04_teacher_phase_3": ["teacher"], "05_distillation": ["student", "labels_only"]}
PARAMETERS = {
    "01_data": {"STORED_SIZE": 64, "PHANTOM_PATIENTS": 40},
    "02_teacher_phase_1": {"TEACHER_IMAGE_SIZE": 32, "TEACHER_WEIGHTS": "none"},
    "05_distillation": {"STUDENT_IMAGE_SIZE": 32, "STUDENT_WEIGHTS": "none"},
}
DATASET = {
    "name": "knees", "class_names": list("01234"), "names_shown": [f"KL {k}" for k in range(5)],
    "subject": settings.KNEES, "ordered": True, "seed": 0, "augmentation": {"flip": True},
    "balance": "none", "synthetic": True, "bayes_accuracy": 0.9, "digest": "d",
    "origin": {"colour": False, "aspect": [1.0, 1.0], "bits": 8},
}  # fmt: skip


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with finished stages 01 to 05."""
    folder = tmp_path_factory.mktemp("evaluation") / "run"
    images, grades, patients = phantoms.knees(60, seed=1, size=64)
    table = pd.DataFrame({"grade": grades, "patient": patients.astype(str), "class": grades})
    table["image"] = [f"{patient}_{row}.png" for row, patient in enumerate(patients)]
    table["split"] = np.repeat(["train", "val", "test"], [36, 12, 12])
    for notebook in list(settings.SERIES)[:5]:
        values = {"RUN_DIR": str(folder)} | PARAMETERS.get(notebook, {})
        inputs = {"images": "drawn"} if notebook == "01_data" else None
        stage = runs.open_stage(notebook, values, inputs=inputs)
        if notebook == "01_data":
            table.to_csv(stage.folder / "manifest.csv", index=False)
            np.save(stage.folder / "images.npy", images)
            runs.write_json(stage.folder / "dataset.json", DATASET)
        for seed, name in enumerate(MODELS.get(notebook, [])):
            build = models.build_teacher if name == "teacher" else models.build_student
            model = build("MobileNetV3Small", 32, 5, "none", seed=seed)
            models.save(model, stage.folder / f"{name}.keras")
        stage.finish()
    return folder


def execute(notebook, run, **parameters):
    """Run a notebook's code cells in one namespace; its variables."""
    found = {"display": lambda figure: None}
    for cell in nbformat.read(settings.ROOT / "notebooks" / f"{notebook}.ipynb", 4).cells:
        if cell.cell_type == "code" and "import sys" not in cell.source:
            exec(compile(cell.source, notebook, "exec"), found)
        if "parameters" in cell.metadata.get("tags", []):
            found |= {"RUN_DIR": str(run)} | parameters
    plt.close("all")
    return found


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_evaluation_opens_test_once(run):
    execute("06_evaluation", run, BOOTSTRAP=200)
    folder = run / "report/evaluation"
    report = json.loads((folder / "report.json").read_text("utf-8"))
    assert {"headline", "models", "differences", "target", "two_views", "openings"} <= set(report)
    assert (report["images"], report["patients"], report["openings"]) == (12, 6, 1)
    assert set(report["models"]) == {"teacher", "student", "labels_only"}
    for summary in report["models"].values():
        low, high = summary["ci95"]["accuracy"]
        assert low <= summary["accuracy"] <= high
        assert {"qwk", "ece", "recall", "confusion"} <= set(summary)
    assert {(d["first"], d["second"]) for d in report["differences"]} == {
        ("student", "teacher"), ("student", "labels only"),
    }  # fmt: skip
    assert report["target"]["met"] == {} and not report["alarm"]  # synthetic: not judged
    table = pd.read_csv(folder / "predictions.csv", dtype={"patient": str})
    assert table["split"].value_counts().to_dict() == {"val": 12, "test": 12}
    assert {"image", "patient", "truth", "teacher_0", "student_two_views_4"} <= set(table)

    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert {path.name for path in before} >= {"confusion.png", "differences.png", "intervals.png"}
    execute("06_evaluation", run, BOOTSTRAP=200)
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::UserWarning")
def test_trust_opens_nothing_and_another_evaluation_does(run):
    execute("06_evaluation", run, BOOTSTRAP=200)
    register, names = run / "report/test_openings.json", {"teacher", "student", "labels_only"}
    execute("07_trust", run, LEAK_IMAGES=60)
    trust = json.loads((run / "report/trust/trust.json").read_text("utf-8"))
    assert set(trust["temperature"]) == set(trust["refer_below"]) == names
    assert trust["leaks"][0]["way"] == "split by image"
    assert len(json.loads(register.read_text("utf-8"))) == 1

    execute("06_evaluation", run, BOOTSTRAP=300)
    assert len(json.loads(register.read_text("utf-8"))) == 2
    assert len(list((run / "report").glob("evaluation.*"))) == 1  # the old one is kept
