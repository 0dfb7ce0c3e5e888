"""report.json against its schema, the target, the headline and the sentences."""

import json
import time
from pathlib import Path
from types import SimpleNamespace

import jsonschema
import keras
import numpy as np
import pytest

from tests.test_evaluation import dataset
from utils import calibration, evaluation, leaks, metrics, report, runs

SCHEMA = json.loads((Path(__file__).parent / "report.schema.json").read_text(encoding="utf-8"))
CLASSES, COUNT = 5, 200
AUDIT = {"counts": {s: dict.fromkeys("01234", 4) for s in ("train", "val", "test")}}
AUDIT |= {"patient_rule": 1.0, "shared_patients": {}}


def knees(noise, seed, views=3):
    """Logits of a made-up model whose noise says how bad it is: (labels, float (n, views, K))."""
    rng = np.random.default_rng(seed)
    labels = np.arange(COUNT) % CLASSES
    seen = labels[:, None] + rng.normal(size=(COUNT, 1)) * noise + rng.normal(size=(1, views)) / 9
    return labels, -2 * (seen[..., None] - np.arange(CLASSES)) ** 2


@pytest.fixture(scope="module")
def judged():
    """Everything that notebook 06 has before it writes: three models, from bad to good."""
    looks = {"teacher": knees(0.5, 0)[1], "student": knees(0.7, 1)[1]}
    looks["student_labels_only"] = knees(0.9, 2)[1]
    labels, logits = knees(1, 0)[0], {name: v.mean(axis=1) for name, v in looks.items()}
    fitted = {name: calibration.fit(labels, values) for name, values in logits.items()}
    drawn = metrics.resample(COUNT, np.arange(COUNT) // 2, draws=200)
    rules = {r: report.judge(labels, logits, fitted, r, drawn, 2) for r in calibration.RULES}
    return SimpleNamespace(
        labels=labels, looks=looks, logits=logits, fitted=fitted, drawn=drawn, rules=rules
    )


def sections(judged, data, tmp_path, opening=None):
    """The sections of a report as notebook 06 gives them to `report.write`."""
    labels, logits, fitted, drawn = judged.labels, judged.logits, judged.fitted, judged.drawn
    results, split = judged.rules["argmax"], "test" if opening else "val"
    model = keras.Sequential([keras.Input((2,)), keras.layers.Dense(CLASSES)])
    paths = {name: tmp_path / f"{name}.keras" for name in logits}
    for path in paths.values():
        path.write_bytes(b"model")
    features = np.random.default_rng(0).normal(size=(COUNT, 3, 8)) + labels[:, None, None]
    protocols = leaks.study(features, labels, np.arange(COUNT) // 2, draws=100)
    return {
        "headline": report.headline(results, data, split, None),
        "dataset": report.dataset_section(data, AUDIT),
        "evaluated": report.evaluated_section(split, opening, drawn),
        "test_openings": opening["count"] if opening else 0,
        "models": report.model_section(results, paths, dict.fromkeys(logits, model)),
        "target": report.target(0.85, results, data, split),
        "differences": report.differences(results),
        "decision": report.decision_section("argmax", fitted, judged.rules),
        "calibration": report.calibration_section(labels, logits, fitted, drawn),
        "selective": report.selective_section(labels, logits, fitted, "argmax", drawn),
        "test_time_views": {
            name: evaluation.views_pay(labels, views, fitted[name], "argmax", drawn)
            for name, views in judged.looks.items()
        },
        "deletion": {},
        "leak_hunt": None,
        "leak_study": {
            "protocols": protocols,
            "sentences": leaks.study_sentences(protocols),
            "images": COUNT,
            "features": "made up",
            "classifier": "support vector machine",
        },
        "exports": [],
    }


def stage(tmp_path):
    """A run in which notebooks 01 and 06 have been opened."""
    saved = {"seconds": 2.5, "finished": False}
    for folder in ("data", "report"):
        runs.write_json(tmp_path / folder / "stage.json", saved)
    return SimpleNamespace(
        notebook="06_evaluation",
        run=tmp_path,
        folder=tmp_path / "report",
        finished=False,
        saved=saved,
        opened=time.time() - 60,
    )


def test_the_report_fits_its_schema(judged, tmp_path):
    opening = {"count": 2, "changed_model": True, "history": []}
    given = sections(judged, dataset(digest="a" * 64), tmp_path, opening)
    written = report.write(stage(tmp_path), **given)
    assert json.loads((tmp_path / "report/report.json").read_text(encoding="utf-8")) == written
    jsonschema.validate(written, SCHEMA, jsonschema.Draft202012Validator)
    assert written["stages"]["01_data"] == {"seconds": 2.5}
    assert 62 <= written["stages"]["06_evaluation"]["seconds"] < 90
    assert written["target"]["teacher_met"] is False and written["evaluated"]["changed_model"]
    for name, model in written["models"].items():
        low, high = model["accuracy_ci95"]
        assert low <= model["accuracy"] <= high, name
        assert model["support"] == [COUNT // CLASSES] * CLASSES


@pytest.mark.parametrize(
    "spoil",
    [
        lambda r: r["models"]["teacher"].pop("qwk_ci95"),
        lambda r: r["models"]["student"].update(accuracy=71.0),
        lambda r: r["target"].update(student_met="yes"),
        lambda r: r["human_readers"]["rows"][0].pop("weighting"),
        lambda r: r["dataset"].update(synthetic=True, label=None),
        lambda r: r.update(extra=1),
    ],
)
def test_the_schema_refuses_what_is_no_report(judged, tmp_path, spoil):
    given = sections(judged, dataset(digest="a" * 64), tmp_path)
    written = report.write(stage(tmp_path), **given)
    spoil(written)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(written, SCHEMA, jsonschema.Draft202012Validator)


def test_the_point_estimate_decides_and_its_interval_stands_beside_it(judged):
    results, data = judged.rules["argmax"], dataset()
    value = results["student"].figures["accuracy"]
    for aim, verdict in [(value, "met"), (value + 0.001, "not met")]:
        found = report.target(aim, results, data, "test")
        assert found["student_met"] == (verdict == "met")
        low, high = metrics.interval(results["student"].samples["accuracy"])
        told = f"{verdict}: {value:.2f}, {low:.2f} to {high:.2f}"
        assert found["sentences"]["student"] == told


def test_nothing_is_judged_on_phantoms_or_while_test_is_closed(judged):
    results, drawn = judged.rules["argmax"], dataset()
    object.__setattr__(drawn, "synthetic", True)
    for data, split in [(drawn, "test"), (dataset(), "val")]:
        found = report.target(0.1, results, data, split)
        assert found["student_met"] is None and found["teacher_met"] is None
    assert "Synthetic" in report.headline(results, drawn, "test", None)
    assert report.dataset_section(drawn, AUDIT)["label"].startswith("Synthetic")


def test_a_figure_too_good_to_be_true_is_no_headline(judged):
    results = judged.rules["argmax"]
    verdict = {"verdict": "A leak was found: close it."}
    told = report.headline(results, dataset(), "test", verdict)
    assert "no headline" in told and told.endswith("A leak was found: close it.")


def test_differences_are_the_figures_differences_with_a_sentence(judged):
    results = judged.rules["argmax"]
    found = report.differences(results)
    assert {(row["subject"], row["reference"]) for row in found} == set(report.PAIRS)
    for row in found:
        subject, reference = results[row["subject"]], results[row["reference"]]
        gap = subject.figures[row["figure"]] - reference.figures[row["figure"]]
        assert row["difference"] == pytest.approx(gap, abs=1e-6)
    told = found[0]["sentence"]
    assert told.startswith("the student gives up") and "points (" in told
    table = report.differences_table(found)
    assert list(table.columns) == ["name", "value", "low", "high"] and len(table) == 4


def test_without_a_labels_only_student_one_pair_is_compared(judged):
    results = {k: v for k, v in judged.rules["argmax"].items() if k != "student_labels_only"}
    assert {row["reference"] for row in report.differences(results)} == {"teacher"}


def test_both_rules_are_reported(judged):
    found = report.decision_section("qwk", judged.fitted, judged.rules)
    assert found["headline"] == "qwk" and set(found["rules"]) == {"argmax", "qwk"}
    for rule, results in judged.rules.items():
        for name, result in results.items():
            kept = found["rules"][rule][name]
            assert kept["qwk"] == pytest.approx(result.figures["qwk"], abs=1e-6)


def test_every_human_figure_has_source_weighting_and_population():
    for row in report.HUMAN_READERS:
        assert all(row[key] for key in ("source", "weighting", "population", "url"))
    assert "0.56 to 0.85" in set(report.readers_table()["value"])


@pytest.mark.parametrize(
    ("ends", "said"),
    [
        ([0.1, 0.2], "the map marks what"),
        ([-0.2, -0.1], "the map does not show"),
        ([-0.1, 0.1], "not surely show"),
    ],
)
def test_a_deletion_check_is_said_in_words(ends, said):
    found = {"hottest_fall": 0.25, "random_fall": 0.125, "difference_ci95": ends}
    sentence = report.deletion_sentence(found)
    assert said in sentence and "by 0.250, a random tenth by 0.125" in sentence
