"""Precision belongs to one model, not to the program: the global policy is set and put back.

Mixed precision: Micikevicius et al., "Mixed Precision Training", ICLR 2018,
https://arxiv.org/abs/1710.03740.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping

import keras

PRECISIONS = ("float32", "mixed_float16", "mixed_bfloat16")
UNITS = {  # what makes a precision fast, and the first compute capability that has it
    "mixed_float16": ("float16 tensor cores", (7, 0)),
    "mixed_bfloat16": ("bfloat16 units", (8, 0)),
}


@contextlib.contextmanager
def precision_policy(precision: str):
    """Build models under `precision`, then give back the global dtype policy, also on an error.

    Raises:
        ValueError: for a precision other than float32, mixed_float16, mixed_bfloat16.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"Unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}.")
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def precision_of(model: keras.Model) -> str:
    """The policy that a model of this module was built under, read off its layers."""
    return model.get_layer("pool").dtype_policy.name


def precision_notes(precision: str, devices: Iterable[Mapping] = ()) -> list[str]:
    """What to know about `precision` on these devices, one sentence each.

    devices: one mapping per GPU, as `tf.config.experimental.get_device_details` gives it:
        "device_name" and "compute_capability" (major, minor). Empty means that there is no GPU.

    Raises:
        ValueError: for an unknown precision.
    """
    with precision_policy(precision):
        pass
    if precision == "float32":
        return [
            "float32 is the default because it needs nothing from the hardware and no loss scaling;"
            " mixed_float16 is safe here too, and fast on GPUs with tensor cores (notebook A1)."
        ]
    devices = list(devices)
    if not devices:
        return [
            f"Without a GPU, {precision} saves memory, but may cost time (notebook A1 measures)."
        ]
    units, since = UNITS[precision]
    notes = []
    for device in devices:
        capability = tuple(device.get("compute_capability") or ())
        if capability and capability < since:
            name = device.get("device_name", "This GPU")
            version = ".".join(map(str, capability))
            advice = "mixed_float16" if capability >= UNITS["mixed_float16"][1] else "float32"
            notes.append(
                f"{name} (compute capability {version}) has no {units}, so that {precision} gains"
                f" nothing there: prefer {advice}."
            )
    return list(dict.fromkeys(notes))


def with_precision(config, precision: str):
    """A model's configuration with every mixed or float32 policy replaced, the logits' excepted."""
    if isinstance(config, list):
        return [with_precision(entry, precision) for entry in config]
    if not isinstance(config, dict):
        return config
    if config.get("class_name") == "DTypePolicy":
        return {**config, "config": {"name": precision}}
    if config.get("class_name") == "InputLayer" or config.get("name") == "logits":
        return config
    return {key: with_precision(value, precision) for key, value in config.items()}
