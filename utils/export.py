"""A student that travels: LiteRT files, and a table made by running them.

In every file calibration (Guo et al. 2017) and softmax are inside: an 8-bit gray image (1, S, S, 1)
goes in, probabilities (1, K) float32 come out. Quantisation: Jacob et al., "Quantization and
training of neural networks for efficient integer-arithmetic-only inference", CVPR 2018,
https://arxiv.org/abs/1712.05877.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import keras
import numpy as np
import tensorflow as tf
from tensorflow.lite.python import schema_py_generated as schema
from tensorflow.lite.tools import flatbuffer_utils

from utils import litert, metrics, runs
from utils.model_card import model_card

tf.get_logger().setLevel("ERROR")  # retracing and "assets written" tell a reader nothing

__all__ = ["FORMATS", "export", "milliseconds", "model_card", "table"]

# name: what it is. The order is the table's.
FORMATS = {
    "float32": "as trained",
    "float16": "weights in 16 bits, computed in float32",
    "weights_8bit": "weights in 8 bits, computed in float32 (weights only)",
    "dynamic_8bit": "weights in 8 bits, activations rounded to 8 as they come (dynamic range)",
    "integer_8bit": "weights and activations in 8 bits (full integer)",
}
CALIBRATION = 100  # images
FEW = 1024  # weights: a smaller tensor is not worth rounding to 8 bits


def export(
    model: keras.Model,
    folder: str | Path,
    *,
    calibration: np.ndarray | None = None,
    temperature: float = 1.0,
    formats: Sequence[str] = tuple(FORMATS),
    **sidecar,
) -> dict[str, Path]:
    """Write `student_<name>.tflite`, uint8 (1, S, S, 1) to float32 (1, K), each with its sidecar.

    model: takes float32 (B, S, S, 1), 0 to 255, gives logits (B, K); of precision float32.
    calibration: uint8 (n, S, S, 1) from train, from which "integer_8bit" learns the range of every
    activation: a hundred, evenly spaced, for images come sorted by class. temperature: logits are
    divided by it before the softmax. formats: keys of `FORMATS`. sidecar: what
    `litert.write_sidecar` takes beside image_size and temperature.

    Returns {name: path}, in the order of formats.

    Raises:
        ValueError: unknown format, temperature not above 0, or full integer without calibration.
    """
    if unknown := [name for name in formats if name not in FORMATS]:
        raise ValueError(f"Unknown formats {unknown}: choose of {', '.join(FORMATS)}.")
    if not temperature > 0:
        raise ValueError(f"Temperature {temperature} must be above 0.")
    if "integer_8bit" in formats and (calibration is None or not len(calibration)):
        raise ValueError("integer_8bit needs calibration images from train, uint8 (n, S, S, 1).")
    files, converted = {}, {}
    # By way of Keras's own SavedModel: handed the function alone, the converter of TF 2.21 leaves
    # the weights out without a word.
    with tempfile.TemporaryDirectory() as saved:
        _save_graph(model, temperature, saved)
        for name in formats:
            base = "float16" if name == "weights_8bit" else name
            if base not in converted:  # a conversion takes many seconds
                converted[base] = bytes(_converter(saved, base, calibration).convert())
            content = converted[base]
            content = weights_in_8_bits(content) if name == "weights_8bit" else content
            path = Path(folder) / f"student_{name}.tflite"
            files[name] = runs.write_atomic(path, lambda part, c=content: part.write_bytes(c))
            litert.write_sidecar(path, image_size=model.inputs[0].shape[1], **sidecar)
    return files


def _save_graph(model: keras.Model, temperature: float, folder: str) -> None:
    """SavedModel of the whole way from an 8-bit image to probabilities."""
    shape = (1, *model.inputs[0].shape[1:])

    @tf.function(input_signature=[tf.TensorSpec(shape, tf.uint8, name="image")])
    def grade(image):
        logits = model(tf.cast(image, tf.float32), training=False)
        return tf.nn.softmax(tf.cast(logits, tf.float32) / temperature)

    archive = keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", grade)
    archive.write_out(folder, verbose=False)


def _converter(saved: str, name: str, calibration: np.ndarray | None) -> tf.lite.TFLiteConverter:
    converter = tf.lite.TFLiteConverter.from_saved_model(saved)
    if name != "float32":
        converter.optimizations = [tf.lite.Optimize.DEFAULT]
    if name == "float16":
        converter.target_spec.supported_types = [tf.float16]
    if name == "integer_8bit":
        spaced = calibration[:: -(-len(calibration) // CALIBRATION)]
        converter.representative_dataset = lambda: ([image[None]] for image in spaced)
        converter.target_spec.supported_ops = [tf.lite.OpsSet.TFLITE_BUILTINS_INT8]
    return converter


def weights_in_8_bits(content: bytes) -> bytes:
    """Turn a float16 LiteRT file into one whose large weights are int8, computed in float32.

    TensorFlow's converter only offers dynamic range, which rounds every activation too: on a
    MobileNetV3Small of which only the head had been trained, that changed 37 % of 166 grades, and
    this 17 %. The float16 file already unpacks each weight before use; here what it unpacks becomes
    round(w / scale), one scale for each output channel, scale = max |w| / 127 (Jacob et al. 2018).
    """
    file = flatbuffer_utils.convert_bytearray_to_object(bytearray(content))
    graph = file.subgraphs[0]
    for operator in graph.operators:
        code = file.operatorCodes[operator.opcodeIndex]
        tensor = graph.tensors[operator.inputs[0]]
        data = file.buffers[tensor.buffer].data
        unpacks = code.builtinCode == schema.BuiltinOperator.DEQUANTIZE
        if not unpacks or tensor.type != schema.TensorType.FLOAT16 or len(data) < 2 * FEW:
            continue
        weights = np.frombuffer(bytes(data), "float16").astype("float32").reshape(tensor.shape)
        # Output channels come first, but for depthwise kernels, (1, height, width, channels).
        axis = 0 if weights.shape[0] > 1 else weights.ndim - 1
        others = tuple(a for a in range(weights.ndim) if a != axis)
        scale = np.maximum(np.abs(weights).max(axis=others, keepdims=True), 1e-9) / 127
        rounded = np.round(weights / scale).astype("int8")
        file.buffers[tensor.buffer].data = rounded.reshape(-1).view("uint8")
        tensor.type = schema.TensorType.INT8
        tensor.quantization = schema.QuantizationParametersT()
        tensor.quantization.scale = scale.ravel().tolist()
        tensor.quantization.zeroPoint = [0] * scale.size
        tensor.quantization.quantizedDimension = axis
        code.version = max(code.version, 5)  # of DEQUANTIZE, the first with scales by channel
    return bytes(flatbuffer_utils.convert_object_to_bytearray(file))


def table(
    files: Mapping[str, Path],
    pixels: np.ndarray,
    labels: np.ndarray,
    keras_probabilities: np.ndarray,
    *,
    drawn: metrics.Resamples | None = None,
    decide: Callable[[np.ndarray], np.ndarray] | None = None,
    repeats: int = 100,
) -> tuple[list[dict], dict[str, np.ndarray]]:
    """Run every file on a split and say what it costs and what it loses.

    files: {name: path}, as `export` returns. pixels: uint8 (n, S, S, 1); labels: int (n,).
    keras_probabilities: float (n, K) of the Keras student on the same images, calibrated.
    drawn: the split's resamples, for the paired intervals; drawn anew by image if None.
    decide: probabilities (n, K) -> int (n,), the headline's decision rule; None: the likeliest.
    repeats: images timed, after as many tenths to warm up.

    Returns (rows, probabilities). A row has name, file, bytes, accuracy, qwk, agreement (share of
    images with the Keras student's grade, 0 to 1), ms (median milliseconds an image, one thread,
    batch 1), settings (what runs the file, "default" if nothing is needed) and under_float32
    {figure, difference, ci95}: accuracy minus float32's on the same resamples. A file that runs
    with no setting has None in place of figures, and the reason as its settings. probabilities:
    {name: float32 (n, K)} of the files that run.
    """
    decide = decide or (lambda p: p.argmax(axis=1))
    drawn = drawn or metrics.resample(len(labels))
    reference = decide(keras_probabilities)
    rows, probabilities, evaluated = [], {}, {}
    for name, path in files.items():
        row = {"name": name, "file": Path(path).name, "bytes": Path(path).stat().st_size}
        row |= dict.fromkeys(("accuracy", "qwk", "agreement", "ms", "under_float32"))
        rows.append(row)
        try:
            interpreter, row["settings"] = litert.open_interpreter(path)
        except RuntimeError as error:
            row["settings"] = str(error)
            continue
        found = probabilities[name] = litert.predict(interpreter, pixels)
        evaluated[name] = metrics.evaluate(labels, found, decide(found), drawn)
        row["accuracy"] = metrics.plain(evaluated[name].figures["accuracy"])
        row["qwk"] = metrics.plain(evaluated[name].figures["qwk"])
        row["agreement"] = metrics.plain(np.mean(decide(found) == reference))
        row["ms"] = round(milliseconds(interpreter, pixels, repeats), 3)
        if "float32" in evaluated:
            row["under_float32"] = metrics.difference(evaluated["float32"], evaluated[name])
    return rows, probabilities


def milliseconds(interpreter, pixels: np.ndarray, repeats: int = 100) -> float:
    """Median time of one image, batch 1, after a tenth of `repeats` to warm up: milliseconds."""
    taken = []
    for number in range(-(repeats // 10), repeats):
        image = pixels[number % len(pixels)][None]
        start = time.perf_counter()
        litert.predict(interpreter, image)
        if number >= 0:
            taken.append(time.perf_counter() - start)
    return float(np.median(taken) * 1000)
