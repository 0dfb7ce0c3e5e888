"""LiteRT files against the Keras student, and what a reader does with them outside the project."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import keras
import numpy as np
import pytest
from PIL import Image
from scipy.special import softmax

from utils import export, images, layers, models, runs, settings

TEMPERATURE = 1.7
NAMES = ["0", "1", "2"]
SCRIPT = settings.ROOT / "utils" / "templates" / "use_litert.txt"


@pytest.fixture(scope="module")
def student():
    """Small, with the parts that matter: CBAM, global pooling, a dense layer worth rounding."""
    keras.utils.set_random_seed(3)
    model = keras.Sequential([
        keras.Input((32, 32, 1)), keras.layers.Rescaling(1 / 127.5, -1),
        keras.layers.Conv2D(64, 3, strides=4, activation="relu", use_bias=False),
        layers.CBAM(8, name="attention"), keras.layers.GlobalAveragePooling2D(name="pool"),
        keras.layers.Dense(64, activation="relu"), logits := keras.layers.Dense(3, name="logits"),
    ])  # fmt: skip
    logits.kernel.assign(40 * logits.kernel)  # so that images differ in their answers
    return keras.Model(model.inputs[0], model.outputs[0])


@pytest.fixture(scope="module")
def pixels():
    rng = np.random.default_rng(0)
    return (rng.integers(20, 256, (40, 1, 1, 1)) * rng.random((40, 32, 32, 1))).astype("uint8")


@pytest.fixture(scope="module")
def folder(student, tmp_path_factory):
    """What 08 ships, converted while this process asks for another backend than TensorFlow."""
    folder = tmp_path_factory.mktemp("deploy")
    models.save(student, folder / "student.keras")
    shutil.copy(Path(layers.__file__), folder / "layers.py")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("KERAS_BACKEND", "jax")
        files = export.convert(folder / "student.keras", folder, TEMPERATURE)
    about = {"class_names": NAMES, "sides": [48, 32], "bits": None}
    for path in files.values():
        runs.write_json(path.with_suffix(".json"), about)
    return folder


def answers(student, pixels):
    return softmax(np.asarray(student(pixels.astype("float32"))) / TEMPERATURE, axis=1)


def test_files_answer_as_the_calibrated_student(student, folder, pixels):
    wanted = answers(student, pixels)
    assert np.ptp(wanted, axis=0).min() > 0.05  # or it would agree whatever it did
    sizes = []
    for name, closeness in {"float16": 2e-3, "dynamic_8bit": 0.03}.items():
        path = folder / f"student_{name}.tflite"
        found = export.open_file(path)(pixels)
        assert (found.dtype, found.shape) == (np.float32, (40, 3))
        np.testing.assert_allclose(found.sum(axis=1), 1, atol=1e-5)
        np.testing.assert_allclose(found, wanted, atol=closeness)
        sizes.append(path.stat().st_size)
    assert sizes[1] < sizes[0]


def test_what_cannot_be_converted_or_opened_says_why(tmp_path):
    (tmp_path / "student.keras").write_bytes(b"PK no zip")
    with pytest.raises(RuntimeError, match="cannot be read as a model"):
        export.convert(tmp_path / "student.keras", tmp_path)
    (tmp_path / "broken.tflite").write_bytes(b"TFL3 and then nothing of use")
    with pytest.raises(ValueError, match="cannot be opened"):
        export.open_file(tmp_path / "broken.tflite")


def gray_files(folder: Path) -> list[Path]:
    """The kinds of file that a reader must treat as notebook 01 does."""
    gray = (np.linspace(0, 1, 40)[:, None] * np.linspace(0.2, 1, 60) * 255).astype("uint8")
    turned, picture = Image.Exif(), Image.fromarray(gray)
    turned[0x0112] = 6  # rotate by 90 degrees to see it upright
    picture.save(folder / "gray.png")
    picture.convert("RGB").save(folder / "colour.jpg")
    picture.save(folder / "turned.jpg", exif=turned)
    Image.fromarray(gray.astype("uint16") * 16).save(folder / "deep.png")
    return sorted(folder.glob("*.[pj]*"))


def test_the_script_without_keras_reads_images_as_01_does(folder, tmp_path):
    pytest.importorskip("ai_edge_litert")
    model = folder / "student_dynamic_8bit.tflite"
    predict = export.open_file(model)
    for path in gray_files(tmp_path):
        command = [sys.executable, SCRIPT, path, model]
        done = subprocess.run(command, capture_output=True, text=True, check=True)
        name, shares = done.stdout.strip().split(" ", 1)
        gray = images.square(images.square(images.read_image(path), 48), 32)
        wanted = predict(gray[None, ..., None])[0]
        np.testing.assert_allclose(np.fromstring(shares.strip("[]"), sep=","), wanted, atol=1e-3)
        assert name == NAMES[wanted.argmax()]


def test_readme_shows_the_script():
    blocks = re.findall(r"```python\n(.*?)```", (settings.ROOT / "README.md").read_text(), re.S)
    shown = [block for block in blocks if "ai_edge_litert" in block]
    assert shown in ([], [SCRIPT.read_text()])


def test_student_loads_without_the_project(folder, student, pixels):
    """The lines of the model card, in a folder that holds nothing but what 08 ships."""
    card = (SCRIPT.parent / "model_card.md.j2").read_text()
    (lines,) = re.findall(r"```python\n(import keras.*?)```", card, re.S)
    lines = re.sub(r"{{.*?temperature.*?}}", str(TEMPERATURE), lines)
    lines = re.sub(r"{{.*?}}", "32", lines)
    np.save(folder / "images.npy", pixels.astype("float32"))
    code = "import importlib.util, numpy as np\nassert not importlib.util.find_spec('utils')\n"
    code += f'images = np.load("images.npy")\n{lines}\n'
    code += 'np.save("found.npy", keras.ops.convert_to_numpy(probabilities))'
    environment = {n: v for n, v in os.environ.items() if n != "PYTHONPATH"}
    subprocess.run([sys.executable, "-c", code], cwd=folder, env=environment, check=True)
    np.testing.assert_allclose(np.load(folder / "found.npy"), answers(student, pixels), atol=1e-5)
