"""LiteRT files against Keras and against quantisation by hand; the card against its report."""

import json
import re
import runpy
import subprocess
import sys
import types
import venv
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from sklearn.metrics import cohen_kappa_score

from utils import export, layers, litert

README = Path(__file__).parent.parent / "README.md"
NAMES = [str(k) for k in range(5)]
TEMPERATURE = 1.7


@pytest.fixture(scope="module")
def student():
    """Small, with the parts that matter: CBAM, global pooling, a dense layer worth quantising."""
    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 1))
    x = keras.layers.Rescaling(1 / 127.5, -1)(image)
    x = keras.layers.Conv2D(64, 3, strides=4, activation="relu", use_bias=False)(x)
    x = layers.CBAM(reduction=8, name="attention")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    x = keras.layers.Dense(64, activation="relu", name="head")(x)
    return keras.Model(image, keras.layers.Dense(5, dtype="float32")(x))


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return (rng.integers(20, 256, (40, 1, 1, 1)) * rng.random((40, 32, 32, 1))).astype("uint8")


@pytest.fixture(scope="module")
def wanted(student, pixels):
    logits = np.asarray(student(pixels.astype("float32")), "float64") / TEMPERATURE
    powers = np.exp(logits - logits.max(axis=1, keepdims=True))
    return powers / powers.sum(axis=1, keepdims=True)


@pytest.fixture(scope="module")
def files(student, pixels, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exports")
    return export.export(
        student,
        folder,
        calibration=pixels[:20],
        temperature=TEMPERATURE,
        class_names=NAMES,
        refer_below=0.4,
    )


@pytest.fixture(scope="module")
def labels(wanted):
    rng = np.random.default_rng(1)
    return np.where(rng.random(40) < 0.7, wanted.argmax(1), rng.integers(5, size=40))


@pytest.fixture(scope="module")
def made(files, pixels, labels, wanted):
    return export.table(files, pixels, labels, wanted, repeats=10)


def test_calibration_and_softmax_are_inside(files, pixels, wanted):
    expected = {"float32": 1e-5, "float16": 5e-3, "weights_8bit": 0.02, "dynamic_8bit": 0.05}
    for name, closeness in expected.items():
        interpreter, settings = litert.open_interpreter(files[name])
        assert litert.shapes(interpreter) == (32, 5)
        found = litert.predict(interpreter, pixels)
        assert (found.dtype, found.shape) == (np.float32, (40, 5))
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found, wanted, atol=closeness)
        assert settings == "default"


def test_full_integer_runs_and_agrees(made, wanted):
    rows, probabilities = made
    assert rows[-1]["name"] == "integer_8bit"
    assert rows[-1]["settings"] in ("default", litert.PLAIN)
    np.testing.assert_allclose(probabilities["integer_8bit"], wanted, atol=0.1)


def tensors(path):
    """Every tensor that a file stores, with its scale."""
    interpreter, _ = litert.open_interpreter(path)
    for detail in interpreter.get_tensor_details():
        try:
            yield (
                detail["quantization_parameters"]["scales"],
                interpreter.get_tensor(detail["index"]),
            )
        except ValueError:
            continue  # of a run, not stored


@pytest.mark.parametrize("name", ["weights_8bit", "dynamic_8bit"])
def test_weights_are_quantised_as_by_hand(name, student, files):
    """Dense weights are symmetric 8 bits: round(w / scale), scale = max |w| / 127."""
    kernel = np.asarray(student.get_layer("head").kernel).T
    stored = [(s, t) for s, t in tensors(files[name]) if t.shape == (64, 64) and t.dtype == np.int8]
    assert len(stored) == 1
    scales, quantised = stored[0]
    per_row = np.abs(kernel).max(axis=1) if len(scales) > 1 else np.abs(kernel).max(keepdims=True)
    np.testing.assert_allclose(scales, per_row.ravel() / 127, rtol=1e-3)
    by_hand = np.round(kernel / scales.reshape(-1, 1))
    assert np.abs(by_hand - quantised).max() <= 1
    assert (by_hand == quantised).mean() > 0.99


def test_weights_only_is_the_rounded_keras_model(student, files, pixels):
    """Rounding the large weights of the Keras model itself gives the same probabilities."""
    rounded = keras.models.clone_model(student)
    rounded.set_weights(student.get_weights())
    for variable in rounded.trainable_variables:
        weights = np.asarray(variable)
        if weights.size >= export.FEW:
            scale = np.abs(weights).max(axis=tuple(range(weights.ndim - 1))) / 127
            variable.assign(np.round(weights / scale) * scale)
    logits = rounded(pixels.astype("float32")) / TEMPERATURE
    interpreter, _ = litert.open_interpreter(files["weights_8bit"])
    found = litert.predict(interpreter, pixels)
    np.testing.assert_allclose(found, keras.ops.softmax(logits), atol=3e-3)


def test_sizes_and_sidecars(files):
    size = {name: path.stat().st_size for name, path in files.items()}
    assert size["weights_8bit"] < size["float16"] < size["float32"]
    for path in files.values():
        about = litert.read_sidecar(path)
        assert (about["class_names"], about["image_size"]) == (NAMES, 32)
        assert (about["temperature"], about["refer_below"]) == (1.0, 0.4)  # it is in the graph
    assert not [p for p in files["float32"].parent.iterdir() if p.name.startswith(".")]


def test_table_is_made_by_running(made, files, pixels, labels, wanted):
    rows, probabilities = made
    assert [row["name"] for row in rows] == list(export.FORMATS)
    for row in rows:
        found = probabilities[row["name"]]
        decided = found.argmax(axis=1)
        assert row["bytes"] == files[row["name"]].stat().st_size
        assert row["file"] == files[row["name"]].name
        assert row["accuracy"] == pytest.approx(np.mean(decided == labels), abs=1e-6)
        assert row["agreement"] == pytest.approx(np.mean(decided == wanted.argmax(1)), abs=1e-6)
        kappa = cohen_kappa_score(labels, decided, weights="quadratic", labels=range(5))
        assert row["qwk"] == pytest.approx(kappa, abs=1e-6)
        assert row["ms"] > 0
        gap = row["under_float32"]
        assert gap["difference"] == pytest.approx(row["accuracy"] - rows[0]["accuracy"], abs=1e-5)
        assert gap["ci95"][0] <= gap["difference"] <= gap["ci95"][1]
    assert rows[0]["agreement"] == 1
    json.dumps(rows, allow_nan=False)


def test_table_follows_the_decision_rule(files, pixels, labels, wanted):
    only = {"float32": files["float32"]}
    rows, _ = export.table(
        only, pixels, labels, wanted, decide=lambda p: np.full(len(p), 3), repeats=10
    )
    assert rows[0]["accuracy"] == pytest.approx(np.mean(labels == 3))


def test_a_file_that_nothing_runs_is_a_row_not_a_crash(tmp_path, pixels, labels, wanted):
    broken = tmp_path / "broken.tflite"
    broken.write_bytes(b"TFL3 and then nothing of use")
    (row,), probabilities = export.table({"broken": broken}, pixels, labels, wanted)
    assert row["accuracy"] is row["ms"] is None
    assert "no setting" in row["settings"]
    assert probabilities == {}
    assert litert.best_small([row]) is None


def test_tensorflows_interpreter_serves_where_litert_is_not(files, pixels, wanted, monkeypatch):
    monkeypatch.setitem(sys.modules, "ai_edge_litert", None)
    monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", None)
    for name, closeness in (("float32", 1e-5), ("weights_8bit", 0.02), ("integer_8bit", 0.1)):
        interpreter, _ = litert.open_interpreter(files[name])
        assert type(interpreter).__module__.startswith("tensorflow")
        np.testing.assert_allclose(litert.predict(interpreter, pixels), wanted, atol=closeness)


def test_best_small_file():
    rows = [
        {"name": "a", "bytes": 5_000_000, "accuracy": 0.9, "ms": 1.0},
        {"name": "b", "bytes": 1_400_000, "accuracy": 0.7, "ms": 9.0},
        {"name": "c", "bytes": 1_500_000, "accuracy": 0.7, "ms": 2.0},
        {"name": "d", "bytes": 1_000_000, "accuracy": None, "ms": None},
    ]
    assert litert.best_small(rows)["name"] == "c"
    assert litert.best_small(rows[:1]) is None


def test_bad_exports_are_refused(student, tmp_path):
    with pytest.raises(ValueError, match="Unknown formats"):
        export.export(student, tmp_path, formats=["float8"], class_names=NAMES)
    with pytest.raises(ValueError, match="Temperature 0"):
        export.export(student, tmp_path, formats=["float32"], temperature=0, class_names=NAMES)
    with pytest.raises(ValueError, match="calibration images from train"):
        export.export(student, tmp_path, class_names=NAMES)
    assert not list(tmp_path.iterdir())


def test_sidecars_missing_damaged_incomplete(tmp_path):
    model = tmp_path / "student.keras"
    assert litert.read_sidecar(model) is None
    for content, complaint in (("{", "damaged"), ('{"temperature": 1}', "lacks"), ("3", "damaged")):
        model.with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=complaint):
            litert.read_sidecar(model)
    litert.write_sidecar(
        model, class_names=["a", "b"], image_size=64, temperature=2, decision="qwk"
    )
    about = litert.read_sidecar(model)
    assert (about["class_names"], about["temperature"], about["decision"]) == (["a", "b"], 2, "qwk")
    with pytest.raises(FileNotFoundError, match=r"gone\.tflite"):
        litert.open_interpreter(tmp_path / "gone.tflite")


def snippet() -> str:
    """The lines of README that grade with three packages."""
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.S)
    (found,) = [block for block in blocks if "ai_edge_litert" in block]
    assert len(found.strip().splitlines()) <= 15
    return found


@pytest.fixture
def knee(tmp_path, pixels):
    path = tmp_path / "knee.png"
    Image.fromarray(pixels[3, ..., 0].repeat(2, 0).repeat(2, 1)).save(path)
    return path


def graded(output: str) -> tuple[str, list[float]]:
    name, *shares = output.strip().splitlines()[-1].replace("[", "").replace("]", "").split()
    return name, [float(share.strip(",")) for share in shares]


def right_answer(path, model):
    image = np.asarray(Image.open(path).convert("L").resize((32, 32), Image.Resampling.BICUBIC))
    interpreter, _ = litert.open_interpreter(model)
    return litert.predict(interpreter, image[None, ..., None])[0]


def test_readme_lines_grade(files, knee, monkeypatch, capfd, tmp_path):
    try:
        import ai_edge_litert.interpreter  # noqa: F401 - whether it is there
    except ImportError:  # the same lines with TensorFlow's interpreter of the same interface
        import tensorflow as tf

        stand_in = types.ModuleType("ai_edge_litert.interpreter")
        stand_in.Interpreter = tf.lite.Interpreter
        monkeypatch.setitem(sys.modules, "ai_edge_litert", types.ModuleType("ai_edge_litert"))
        monkeypatch.setitem(sys.modules, "ai_edge_litert.interpreter", stand_in)
    script = tmp_path / "grade.py"
    script.write_text(snippet())
    monkeypatch.setattr(sys, "argv", ["grade.py", str(knee), str(files["weights_8bit"])])
    runpy.run_path(str(script), run_name="__main__")
    name, shares = graded(capfd.readouterr().out)
    answer = right_answer(knee, files["weights_8bit"])
    assert name == NAMES[answer.argmax()]
    np.testing.assert_allclose(shares, answer, atol=1e-3)


@pytest.mark.slow
def test_readme_lines_grade_in_a_fresh_environment(files, knee, tmp_path):
    venv.create(tmp_path / "fresh", with_pip=True)
    python = tmp_path / "fresh" / "bin" / "python"
    packages = ["ai-edge-litert", "numpy", "pillow"]
    subprocess.run([python, "-m", "pip", "install", "-q", *packages], check=True)
    script = tmp_path / "grade.py"
    script.write_text(snippet())
    command = [python, script, knee, files["weights_8bit"]]
    done = subprocess.run(command, check=True, capture_output=True, text=True)
    name, shares = graded(done.stdout)
    answer = right_answer(knee, files["weights_8bit"])
    assert name == NAMES[answer.argmax()]
    np.testing.assert_allclose(shares, answer, atol=1e-3)


def report(seed: int, synthetic: bool = False) -> dict:
    """A report whose figures are drawn, so that no two seeds share one."""
    rng = np.random.default_rng(seed)

    def model(parameters):
        names = (
            "accuracy",
            "balanced_accuracy",
            "qwk",
            "mae",
            "sensitivity",
            "specificity",
            "auroc",
        )
        found = {n: float(rng.random()) for n in names}
        found |= {f"{n}_ci95": rng.random(2).tolist() for n in names}
        binary = {n: found.pop(n) for n in list(found) if n.startswith(("sens", "spec", "auroc"))}
        recall = {
            "recall": [*rng.random(4).tolist(), None],
            "recall_ci95": [*rng.random((4, 2)).tolist(), None],
        }
        return found | recall | {"parameters": parameters, "binary": {"cut": 2, **binary}}

    counts = {
        split: {str(k): int(rng.integers(9999)) for k in range(5)} for split in ("val", "test")
    }
    exports = [
        {"name": n, "file": f"student_{n}.tflite", "bytes": int(rng.integers(1e6, 1e7))}
        | {k: float(rng.random()) for k in ("accuracy", "qwk", "agreement", "ms")}
        | {"settings": "default"}
        for n in export.FORMATS
    ]
    falls = {"hottest_fall": float(rng.random()), "random_fall": float(rng.random())}
    return {
        "dataset": {
            "name": "knees",
            "synthetic": synthetic,
            "classes": [f"KL {k}" for k in range(5)],
            "counts": counts,
        },
        "models": {"teacher": model(54_000_000 + seed), "student": model(1_300_000 + seed)},
        "evaluated": {
            "split": "test",
            "opening": "The test split was opened 3 times in this run.",
            "intervals": {"resampled": "patients", "units": 400 + seed},
        },
        "target": {"accuracy": 0.85, "sentences": {"student": f"not met: 0.7{seed}"}},
        "differences": [{"sentence": f"the student gives up {seed}.25 points"}],
        "deletion": {"student": {"fraction": 0.1, **falls}},
        "exports": exports,
    }


def test_card_holds_no_figure_of_its_own():
    cards = [export.model_card(report(seed)) for seed in (1, 2)]
    decimals = [set(re.findall(r"\b\d+\.\d{2,3}\b", card)) for card in cards]
    assert min(map(len, decimals)) > 60
    shared = decimals[0] & decimals[1] - {"0.85", "10.17632", "10.03993"}
    assert len(shared) < 10  # three digits meet by chance
    known = report(1)
    student = known["models"]["student"]
    low, high = student["accuracy_ci95"]
    assert f"{student['accuracy']:.3f} ({low:.3f} to {high:.3f})" in cards[0]
    assert f"{student['recall'][3]:.3f}" in cards[0]
    assert "1,300,001" in cards[0]
    assert f"{known['exports'][2]['bytes'] / 1e6:.2f}" in cards[0]
    assert "0.85, is not met: 0.71." in cards[0]
    assert "opened 3 times" in cards[0]
    assert "over 401 patients" in cards[0]
    assert "The student gives up 1.25 points." in cards[0]
    assert f"by {known['deletion']['student']['hottest_fall']:.3f}" in cards[0]


def test_card_says_what_must_be_said():
    card = export.model_card(report(1))
    for words in ("no medical device", "Osteoarthritis Initiative", "Chen", "external set", "age"):
        assert words in card
    assert "Synthetic" not in card
    drawn = export.model_card(report(1, synthetic=True))
    assert "**Synthetic data.**" in drawn.split("## ")[0]
    with pytest.raises(ValueError, match=r"models\.student"):
        export.model_card({"dataset": {}, "models": {}})


def test_card_of_another_dataset_claims_no_knees():
    other = report(1)
    other["dataset"]["classes"] = list("abcde")
    assert "Osteoarthritis Initiative" not in export.model_card(other)


def test_card_names_the_file_to_carry_along_and_what_it_loses():
    known = report(1)
    for row in known["exports"]:
        row |= {"bytes": 2_000_000, "under_float32": None}
    known["exports"][3] |= {"bytes": 1_480_000}
    gap = {"figure": "accuracy", "difference": -0.006, "ci95": [-0.017, 0.005]}
    known["exports"][3]["under_float32"] = gap
    card = export.model_card(known)
    assert "student_dynamic_8bit.tflite is the most accurate: it gives up 0.6 points" in card
    assert 'path = "student_dynamic_8bit.tflite"' in card
    known["exports"][3]["bytes"] = 2_000_000
    assert "No file of at most 1.5 MB runs here." in export.model_card(known)
