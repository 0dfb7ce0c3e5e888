"""The student as LiteRT files: an 8-bit gray image goes in, calibrated probabilities come out.

Quantisation: Jacob et al., CVPR 2018, https://arxiv.org/abs/1712.05877. The conversion needs
TensorFlow, so it runs in a child process, whatever the Keras backend here.
"""

import os
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np

from utils import runs, settings

RUNTIMES = {  # by format; tried, and what the files themselves ask for
    "float16": "ai-edge-litert, TensorFlow or tflite-runtime 2.14",
    "dynamic_8bit": "ai-edge-litert or TensorFlow 2.17 and later; tflite-runtime 2.14 refuses it",
}


def convert(student: Path, folder: Path, temperature: float = 1.0) -> dict[str, Path]:
    """Write `student_<format>.tflite`, uint8 (1, S, S, 1) to float32 (1, K), for each format.

    student: a `.keras` file, gray 0 to 255 to logits, which are divided by the temperature.
    RuntimeError: the conversion failed; the message ends with what it said.
    """
    student, folder = Path(student).absolute(), Path(folder).absolute()
    command = [sys.executable, "-m", "utils.export", str(student), str(folder), str(temperature)]
    child = {"KERAS_BACKEND": "tensorflow", "CUDA_VISIBLE_DEVICES": "-1"}
    options = {"cwd": settings.ROOT, "env": os.environ | child, "errors": "replace"}
    done = subprocess.run(command, capture_output=True, check=False, **options)
    if done.returncode:
        raise RuntimeError(f"{student} could not be converted:\n{done.stderr[-2000:]}")
    return {name: folder / f"student_{name}.tflite" for name in RUNTIMES}


def _convert(student: str, folder: str, temperature: str) -> None:
    """What the child process does."""
    import keras
    import tensorflow as tf

    from utils import models

    model = models.load(student, precision="float32")
    image = keras.Input(batch_shape=(1, *model.input_shape[1:]), dtype="uint8", name="image")
    logits = model(keras.ops.cast(image, "float32")) / float(temperature)
    graded = keras.Model(image, keras.layers.Softmax(dtype="float32")(logits))
    with tempfile.TemporaryDirectory() as saved:
        graded.export(saved, format="tf_saved_model", verbose=False)
        for name in RUNTIMES:
            converter = tf.lite.TFLiteConverter.from_saved_model(saved)
            converter.optimizations = [tf.lite.Optimize.DEFAULT]
            if name == "float16":
                converter.target_spec.supported_types = [tf.float16]
            content = converter.convert()
            path = Path(folder) / f"student_{name}.tflite"
            runs.write_atomic(path, lambda part, content=content: part.write_bytes(content))


def open_file(path: Path) -> Callable[[np.ndarray], np.ndarray]:
    """A LiteRT file as a function: uint8 (n, S, S, 1) to probabilities, float32 (n, K).

    One thread, one image at a time. ValueError: damaged, or this runtime is too old for it.
    """
    try:
        from ai_edge_litert.interpreter import Interpreter
    except ImportError:
        import tensorflow as tf

        warnings.filterwarnings("ignore", r"\s*Warning: tf\.lite\.Interpreter is deprecated")
        Interpreter = tf.lite.Interpreter
    try:
        interpreter = Interpreter(str(path), num_threads=1)
        interpreter.allocate_tensors()
    except (RuntimeError, ValueError) as error:
        raise ValueError(f"{path} cannot be opened as a LiteRT file: {error}") from error
    image, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]

    def predict(pixels: np.ndarray) -> np.ndarray:
        found = np.empty((len(pixels), answer["shape"][-1]), "float32")
        for row, one in enumerate(pixels):
            interpreter.set_tensor(image["index"], one[None])
            interpreter.invoke()
            found[row] = interpreter.get_tensor(answer["index"])[0]
        return found

    return predict


if __name__ == "__main__":
    _convert(*sys.argv[1:])
