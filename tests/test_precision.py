"""Mixed precision: the crash of other networks, and that ours compiles, computes and learns.

TensorFlow only, since the crash is one of its compiler. Compiling costs seconds of processor time
for each model, so that few are compiled, and all assertions on one are made in one test.
"""

import ast
import os
import re
import resource
import sys
import time
import warnings

# Before XLA's first use: tests need its checks, not its fast code, and get them in half the time.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0")

import keras
import nbformat
import numpy as np
import papermill
import pytest

from utils import models, objectives, parameters, training

tf = pytest.importorskip("tensorflow")
pytestmark = pytest.mark.skipif(keras.backend.backend() != "tensorflow", reason="TensorFlow's XLA")

CLASSES = 5
STEPS = 20
NAMES = {models.build_teacher: "teacher", models.build_student: "student"}


def policy():
    return keras.config.dtype_policy().name


# --- the crash ----------------------------------------------------------------------------------


def step_of_two_ways(bring):
    """One XLA step of a map that goes through `bring`, and also on: the error's text, or ""."""
    image = keras.Input((16, 16, 1))
    tap = keras.layers.Conv2D(4, 3, padding="same")(image)
    onward = keras.layers.Conv2D(4, 3, padding="same")(tap)
    pool = keras.layers.GlobalAveragePooling2D()
    joined = keras.layers.Concatenate()([pool(bring(tap)), pool(onward)])
    model = keras.Model(image, keras.layers.Dense(2, dtype="float32")(joined))
    model.compile("sgd", "mse", jit_compile=True)
    try:
        model.train_on_batch(np.zeros((2, 16, 16, 1), "float32"), np.zeros((2, 2), "float32"))
    except tf.errors.OpError as error:
        return error.message
    return ""


def test_canary_bilinear_resizing_still_breaks_the_compiler():
    """Reports, and does not fail, when a TensorFlow no longer shows the bug."""
    with models.precision_policy("mixed_float16"):
        message = step_of_two_ways(keras.layers.Resizing(4, 4))
    if not message:
        warnings.warn(f"TensorFlow {tf.__version__} mended ResizeBilinearGrad", stacklevel=1)
        pytest.skip(f"TensorFlow {tf.__version__} no longer shows the crash: see notebook A1")
    assert "mixed precision is disallowed" in message and "ResizeBilinearGrad" in message


def test_pooling_in_its_place_passes():
    with models.precision_policy("mixed_float16"):
        assert step_of_two_ways(keras.layers.AveragePooling2D(4)) == ""


# --- the series' own models ---------------------------------------------------------------------


def batch(size, count=8):
    images = np.random.default_rng(0).uniform(0, 255, (count, size, size, 1)).astype("float32")
    return tf.constant(images), tf.constant(
        objectives.hard_targets(np.arange(count) % CLASSES, CLASSES, softening=0.5)
    )


def prepare(build, precision):
    """A small model without dropout (whose masks depend on the type), compiled for training."""
    model = build("MobileNetV3Small", 32, weights="none", dropout=0.0, precision=precision)
    optimizer = keras.optimizers.SGD(3e-3)
    if precision == "mixed_float16":
        # Keras's own starts at 32768 and halves until nothing overflows, skipping those steps; a
        # scale that fits from the start keeps the steps of both precisions aligned.
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024)
    model.compile(optimizer, objectives.HardLoss(), auto_scale_loss=False)
    model.optimizer.build(model.trainable_variables)
    return model


def losses_of(model, step, images, labels):
    losses = []
    for _ in range(STEPS):
        model.reset_metrics()
        losses.append(float(step(images, labels)["loss"]))
    return np.array(losses)


@pytest.mark.parametrize("build", NAMES, ids=NAMES.get)
def test_models_train_in_float16_under_xla_as_they_do_in_float32(build):
    """Same start, 20 steps: each loss (from about 2 on) within 0.15, the last within 0.05."""
    images, labels = batch(32)
    mixed = prepare(build, "mixed_float16")
    assert policy() == "float32"
    step = tf.function(lambda x, y: mixed.train_step((x, y)), jit_compile=True)

    program = step.experimental_get_compiler_ir(images, labels)(stage="hlo")
    kinds = re.findall(r"= (\w+)\[[^\]]*\]\S* convolution\(", program)
    assert len(kinds) > 100 and set(kinds) == {"f16"}  # forward and backward, every one
    dots = re.findall(r"= (\w+)\[[^\]]*\]\S* dot\(", program)
    assert dots.count("f32") == 3 and dots.count("f16") > 3  # float32: the logits' layer alone

    found = losses_of(mixed, step, images, labels)
    # A gradient that is not finite makes Keras skip the step and halve the scale.
    assert float(mixed.optimizer.dynamic_scale) == 1024
    assert int(mixed.optimizer.step_counter) == STEPS
    assert all(np.isfinite(weight).all() for weight in mixed.get_weights())

    plain = prepare(build, "float32")
    expected = losses_of(plain, tf.function(lambda x, y: plain.train_step((x, y))), images, labels)
    assert expected[-1] < 0.8 * expected[0]  # it learns, so that equal losses mean something
    np.testing.assert_allclose(found, expected, atol=0.15)
    assert found[-1] == pytest.approx(expected[-1], abs=0.05)


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
@pytest.mark.parametrize("build", NAMES, ids=NAMES.get)
def test_layers_compute_in_half_and_logits_in_full(build, precision):
    model = build("MobileNetV3Small", 32, weights="none", precision=precision)
    half = precision.removeprefix("mixed_")
    computing = {
        layer.compute_dtype
        for layer in [*model.layers, *model.get_layer("backbone").layers]
        if layer.weights and layer.name != "logits"
    }
    assert computing == {half} and model.get_layer("logits").compute_dtype == "float32"
    assert {keras.backend.standardize_dtype(w.dtype) for w in model.weights} == {"float32"}
    assert model.output.dtype == "float32" and models.precision_of(model) == precision
    model.compile("sgd", objectives.HardLoss())
    scaled = isinstance(model.optimizer, keras.optimizers.LossScaleOptimizer)
    assert scaled == (precision == "mixed_float16")


# --- the policy belongs to a model --------------------------------------------------------------


def test_policy_comes_back_also_after_an_error():
    keras.config.set_dtype_policy("mixed_bfloat16")
    with pytest.raises(RuntimeError), models.precision_policy("mixed_float16"):
        assert policy() == "mixed_float16"
        raise RuntimeError
    assert policy() == "mixed_bfloat16"
    with pytest.raises(ValueError, match="multiple of 32"):
        models.build_student("MobileNetV3Small", 33, weights="none", precision="mixed_float16")
    assert policy() == "mixed_bfloat16"
    model = models.build_student("MobileNetV3Small", 32, weights="none")
    assert models.precision_of(model) == "float32" and policy() == "mixed_bfloat16"


def test_clear_session_resets_the_global_policy():
    """The trap: who sets the policy once and clears the session goes on in float32, unsaid."""
    keras.config.set_dtype_policy("mixed_float16")
    keras.utils.clear_session()
    assert policy() == "float32"
    model = models.build_student("MobileNetV3Small", 32, weights="none", precision="mixed_float16")
    keras.utils.clear_session()
    assert models.precision_of(model) == "mixed_float16"


def settle(model, images):
    """Let BatchNorm take these images' statistics: from random weights it else passes on zeros."""
    norms = [
        layer
        for layer in [*model.layers, *model.get_layer("backbone").layers]
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    momentum = [layer.momentum for layer in norms]
    for layer in norms:
        layer.momentum = 0.0
    model(images, training=True)
    for layer, value in zip(norms, momentum, strict=True):
        layer.momentum = value


@pytest.mark.parametrize(
    ("build", "saved", "other"),
    [
        (models.build_student, "float32", "mixed_float16"),
        (models.build_teacher, "mixed_float16", "float32"),
    ],
)
def test_a_file_of_one_policy_predicts_under_another(build, saved, other, tmp_path):
    model = build("MobileNetV3Small", 32, weights="none", precision=saved)
    images = np.random.default_rng(1).uniform(0, 255, (6, 32, 32, 1)).astype("float32")
    settle(model, images)
    answer = keras.ops.convert_to_numpy(model(images))
    assert np.abs(answer).max() > 0.1
    path = models.save(model, tmp_path / "model.keras")
    keras.config.set_dtype_policy("mixed_bfloat16")  # a global policy that must not matter
    for asked in (None, other):
        loaded = models.load(path, precision=asked)
        wanted = asked or saved
        assert models.precision_of(loaded) == wanted and policy() == "mixed_bfloat16"
        # The model's own policy too, by which Keras decides on loss scaling at compile.
        assert loaded.dtype_policy.name == wanted
        assert loaded.get_layer("logits").compute_dtype == "float32"
        assert all(map(np.array_equal, loaded.get_weights(), model.get_weights()))
        again = keras.ops.convert_to_numpy(loaded(images))
        if wanted == saved:
            np.testing.assert_array_equal(again, answer)
        else:
            np.testing.assert_allclose(again, answer, atol=0.1 * np.abs(answer).max())
    with pytest.raises(ValueError, match="Unknown precision 'half'"):
        models.load(path, precision="half")


# --- what is said -------------------------------------------------------------------------------

T4 = {"device_name": "Tesla T4", "compute_capability": (7, 5)}
L4 = {"device_name": "NVIDIA L4", "compute_capability": (8, 9)}
P100 = {"device_name": "Tesla P100", "compute_capability": (6, 0)}


def test_bfloat16_warns_on_a_t4_and_only_there():
    (note,) = models.precision_notes("mixed_bfloat16", [T4, T4])  # Kaggle's pair, said once
    assert "Tesla T4" in note and "no bfloat16" in note and "mixed_float16" in note
    assert models.precision_notes("mixed_bfloat16", [L4]) == []
    assert models.precision_notes("mixed_float16", [T4]) == []
    (note,) = models.precision_notes("mixed_float16", [P100])
    assert "no float16 tensor cores" in note and "float32" in note


@pytest.mark.parametrize(("notebook", "who"), [("02", "TEACHER"), ("05", "STUDENT")])
def test_the_notebooks_say_it(notebook, who, monkeypatch, capsys):
    [path] = (parameters.ROOT / "notebooks").glob(f"{notebook}_*.ipynb")
    sources = [cell.source for cell in nbformat.read(path, 4).cells if cell.cell_type == "code"]
    [cell] = [source for source in sources if "precision_notes" in source]
    loop = next(node for node in ast.parse(cell).body if isinstance(node, ast.For))
    monkeypatch.setattr(tf.config, "list_physical_devices", lambda kind: ["one", "two"])
    monkeypatch.setattr(tf.config.experimental, "get_device_details", lambda gpu: T4)
    given = {"models": models, "training": training, f"{who}_PRECISION": "mixed_bfloat16"}
    exec(ast.unparse(loop), given)
    out = capsys.readouterr().out
    assert out.count("Tesla T4") == 1 and "prefer mixed_float16" in out


def test_float32_says_why_and_a_processor_what_to_expect():
    (note,) = models.precision_notes("float32", [T4])
    assert "default because" in note and "safe" in note and "\n" not in note
    (note,) = models.precision_notes("mixed_float16")
    assert "Without a GPU" in note
    with pytest.raises(ValueError, match="Unknown precision"):
        models.precision_notes("float16")


# --- the lesson, and full size ------------------------------------------------------------------


def test_the_lesson_runs_and_its_table_names_every_remedy(tmp_path):
    """A1 as a user runs it; its own asserts stand at its end."""
    source = parameters.ROOT / "notebooks" / "A1_mixed_precision.ipynb"
    book = papermill.execute_notebook(
        source, tmp_path / "A1.ipynb", {"REPEATS": 1}, cwd=tmp_path, progress_bar=False
    )
    shown = [
        output["data"]["text/plain"]
        for cell in book.cells
        for output in cell.get("outputs", [])
        if "text/plain" in output.get("data", {})
    ]
    table = next(text for text in shown if "AveragePooling2D" in text and "outcome" in text)
    outcomes = re.findall(r"^(\S.*?)\s+(pass|fail)\s", table, flags=re.MULTILINE)
    assert len(outcomes) == 13 and ("AveragePooling2D", "pass") in outcomes
    printed = "".join(o.get("text", "") for c in book.cells for o in c.get("outputs", []))
    assert f"TensorFlow {tf.__version__} has the bug" in printed or "the\nbug is mended" in printed
    assert [path.name for path in tmp_path.iterdir()] == ["A1.ipynb"]  # it writes nothing else


def gigabytes():
    """Peak memory of this process so far."""
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9


@pytest.mark.slow
@pytest.mark.parametrize(
    ("precision", "steps", "jit_compile"), [("float32", 1, False), ("mixed_float16", 2, True)]
)
def test_full_size_teacher_trains(precision, steps, jit_compile, capsys):
    """EfficientNetV2-M, 384 px, batch 8, all of it training.

    By hand, each alone, for the peak memory is the process's:
    `XLA_FLAGS= pytest -m slow tests/test_precision.py -k "float32 and full_size"`.
    """
    model = models.build_teacher(weights="none", precision=precision)
    optimizer = keras.optimizers.AdamW(1e-4)
    if precision == "mixed_float16":  # a scale that fits at once, so that no step is skipped
        optimizer = keras.optimizers.LossScaleOptimizer(optimizer, initial_scale=1024)
    model.compile(
        optimizer, objectives.HardLoss(2.5), auto_scale_loss=False, jit_compile=jit_compile
    )
    model.optimizer.build(model.trainable_variables)  # else Keras traces the step twice
    images, labels = batch(384)
    for step in range(steps):
        start = time.perf_counter()
        loss = float(model.train_on_batch(images, labels))
        with capsys.disabled():
            print(
                f"\n{precision}, XLA {jit_compile}, step {step + 1}: loss {loss:.3f},"
                f" {time.perf_counter() - start:.0f} s, peak {gigabytes():.1f} GB so far"
            )
        assert np.isfinite(loss)
    if precision == "mixed_float16":
        assert int(model.optimizer.step_counter) == steps  # every step was taken
    assert policy() == "float32"
