"""Run LiteRT files, and the small JSON that travels beside a model. Needs no TensorFlow.

A model's sidecar is `<name>.json` next to `<name>.keras` or `<name>.tflite`:
{"class_names": [...], "image_size": S, "temperature": T, "refer_below": p, "decision": "argmax",
"thresholds": [...]}. A LiteRT file has the temperature and the softmax inside: its sidecar says 1.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from utils import runs

REFER_BELOW = 0.5  # without a figure from val: less sure than heads or tails goes to a person
SIDECAR = {"class_names", "image_size", "temperature", "refer_below", "decision", "thresholds"}
PLAIN = "BUILTIN_WITHOUT_DEFAULT_DELEGATES"
SMALL = 1_500_000  # bytes: what a student to carry along may weigh


def write_sidecar(
    model_path: str | Path,
    *,
    class_names: list[str],
    image_size: int,
    temperature: float = 1.0,
    refer_below: float = REFER_BELOW,
    decision: str = "argmax",
    thresholds: Sequence[float] = (),
) -> Path:
    """Write what a model file itself cannot say: names, input side, calibration, when to refer.

    temperature, refer_below, thresholds: as in `calibration.Calibration`, fitted on val for one
    view of an image, which is what a file is asked. decision: "argmax" or "qwk".
    """
    content = {
        "class_names": list(class_names),
        "image_size": int(image_size),
        "temperature": float(temperature),
        "refer_below": float(refer_below),
        "decision": decision,
        "thresholds": [float(cut) for cut in thresholds],
    }
    return runs.write_json(Path(model_path).with_suffix(".json"), content)


def read_sidecar(model_path: str | Path) -> dict | None:
    """What `write_sidecar` wrote, or None when there is none.

    Raises:
        ValueError: it is there, but damaged or incomplete.
    """
    path = Path(model_path).with_suffix(".json")
    if not path.exists():
        return None
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        missing = SIDECAR - set(content)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path} is damaged ({error}): export the model again") from error
    if missing:
        raise ValueError(f"{path} lacks {sorted(missing)}: export the model again")
    return content


def open_interpreter(path: str | Path, threads: int = 1):
    """Open a LiteRT file with ai-edge-litert, or with TensorFlow's interpreter where that is not.

    The default delegate (XNNPACK) is tried first. ai-edge-litert 2.3 refuses full-integer files
    with it and runs them with the built-in kernels alone, so those come second.

    Returns (interpreter, ready to be fed; settings: "default", or what had to be set to run it).

    Raises:
        FileNotFoundError: no such file.
        RuntimeError: no setting runs it.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing: notebook 06 writes exports")
    try:
        from ai_edge_litert.interpreter import Interpreter, OpResolverType
    except ImportError:
        import tensorflow as tf

        Interpreter, OpResolverType = tf.lite.Interpreter, tf.lite.experimental.OpResolverType
    errors = []
    for name, options in {
        "default": {},
        PLAIN: {"experimental_op_resolver_type": OpResolverType[PLAIN]},
    }.items():
        try:
            interpreter = Interpreter(str(path), num_threads=threads, **options)
            interpreter.allocate_tensors()
            interpreter.invoke()  # some refusals come only here
        except (RuntimeError, ValueError) as error:
            errors.append(f"{name}: {error}")
        else:
            return interpreter, name
    raise RuntimeError(f"{path} runs with no setting: {'; '.join(errors)}")


def predict(interpreter, pixels: np.ndarray) -> np.ndarray:
    """Probabilities of images, one at a time: uint8 (n, S, S, 1) -> float32 (n, K)."""
    feed = interpreter.get_input_details()[0]["index"]
    answer = interpreter.get_output_details()[0]
    out = np.empty((len(pixels), answer["shape"][-1]), "float32")
    for row, image in enumerate(pixels):
        interpreter.set_tensor(feed, image[None])
        interpreter.invoke()
        out[row] = interpreter.get_tensor(answer["index"])[0]
    return out


def shapes(interpreter) -> tuple[int, int]:
    """Image side S and number of classes K of an opened file.

    Raises:
        ValueError: it does not take uint8 (1, S, S, 1) and give float32 (1, K).
    """
    feed, answer = interpreter.get_input_details()[0], interpreter.get_output_details()[0]
    size, classes = int(feed["shape"][1]), int(answer["shape"][-1])
    fits = tuple(feed["shape"]) == (1, size, size, 1) and feed["dtype"] == np.uint8
    if not fits or answer["dtype"] != np.float32 or len(answer["shape"]) != 2:
        raise ValueError(
            f"The LiteRT file takes {feed['dtype'].__name__} {feed['shape'].tolist()}: "
            "uint8 (1, S, S, 1) is needed, as notebook 06 exports it."
        )
    return size, classes


def best_small(rows: Sequence[dict], limit: int = SMALL) -> dict | None:
    """The row of the most accurate file of at most `limit` bytes, or None; ties: the faster one."""
    small = [row for row in rows if row["bytes"] <= limit and row["accuracy"] is not None]
    return max(small, key=lambda row: (row["accuracy"], -row["ms"]), default=None)
