"""One device or several: where a model is built, what a batch means there, when memory is full."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import keras
import tensorflow as tf


def strategy(devices: int = 0, names: Sequence[str] | None = None) -> tf.distribute.Strategy:
    """Where to build and train: all GPUs by `MirroredStrategy`, or the one device there is.

    Args:
        devices: how many to use at most; 0 for all.
        names: logical devices, such as ["CPU:0", "CPU:1"]; by default the GPUs.

    Returns:
        A strategy whose `scope()` the model must be built or loaded in. When several devices cannot
        be set up, that is said and one is used.
    """
    names = list(names or [d.name for d in tf.config.list_logical_devices("GPU")])
    there = max(1, len(names))
    if devices > there:
        print(f"DEVICES = {devices}, but there {'is one' if there == 1 else f'are {there}'}.")
    names = names[:devices] if devices else names
    if len(names) > 1:
        try:
            mirrored = tf.distribute.MirroredStrategy(names)
            add_up(mirrored)
            return mirrored
        except (ValueError, RuntimeError, tf.errors.OpError) as error:
            print(f"{len(names)} devices cannot be used together ({str(error)[:120]}): one is.")
    return tf.distribute.get_strategy()


def gpus() -> list[dict]:
    """What TensorFlow knows of each GPU: its `device_name`, its `compute_capability`."""
    details = tf.config.experimental.get_device_details
    return [details(gpu) for gpu in tf.config.list_physical_devices("GPU")]


def add_up(mirrored: tf.distribute.Strategy) -> None:
    """Let the devices add numbers up once, as they will add gradients up in every step."""

    def on_each():
        return tf.distribute.get_replica_context().all_reduce("SUM", tf.ones(1))

    tf.function(lambda: mirrored.run(on_each))()


def replicas_of(model: keras.Model) -> int:
    """Over how many devices a model trains."""
    return model.distribute_strategy.num_replicas_in_sync if model.distribute_strategy else 1


def resolve_jit(jit_compile: bool | str, replicas: int) -> bool | str:
    """What to hand to `compile`: "auto" means off with several devices, where XLA fails.

    Raises:
        ValueError: XLA asked for by True with several devices.
    """
    if replicas == 1:
        return jit_compile
    if jit_compile is True:
        raise ValueError(
            f"JIT_COMPILE = True does not work with {replicas} devices (TensorFlow's "
            'MirroredStrategy fails in the first step): use "auto", or DEVICES = 1 with XLA.'
        )
    return False


def check_shares(parameter: str, batch_size: int, accumulation: int, replicas: int) -> None:
    """Whether a global batch can be divided over the devices.

    Args:
        parameter: the batch size's name, for the message.
        batch_size: images a batch, over all devices.
        accumulation: batches per step.
        replicas: how many devices.

    Raises:
        ValueError: a batch that leaves a rest, or accumulation with several devices.
    """
    if batch_size % replicas:
        below = batch_size // replicas * replicas
        nearest = f"{below} or {below + replicas}" if below else f"{replicas}"
        raise ValueError(
            f"{parameter} = {batch_size} cannot be divided over {replicas} devices: set it to "
            f"{nearest}, or DEVICES = 1."
        )
    if replicas > 1 and accumulation > 1:
        raise ValueError(
            f"ACCUMULATION = {accumulation} works on one device only (Keras refuses it under "
            f"MirroredStrategy), and there are {replicas}: set DEVICES = 1, or ACCUMULATION = 1."
        )


def share_size(count: int, batch_size: int, replicas: int) -> int:
    """The batch size nearest to `batch_size` that suits several devices, smaller ones first.

    Every batch but the last must be shared evenly, which Keras relies on when it builds a model's
    metrics, and the last must leave no device without an image, on which models fail. TensorFlow
    gives each ceil(batch / replicas) as long as there are any.

    Args:
        count: images to go through once, the last batch being what remains.
        batch_size: the size that is wanted.
        replicas: how many devices.

    Raises:
        ValueError: no size does, because there are few images and many devices.
    """

    def suits(size: int) -> bool:
        last = count % size
        return size % replicas == 0 and (not last or (replicas - 1) * -(-last // replicas) < last)

    top = min(batch_size, count)
    for size in (*range(top, 0, -1), *range(top + 1, count + 1)):
        if suits(size):
            return size
    raise ValueError(f"{count} images cannot be shared by {replicas} devices: set DEVICES = 1.")


def shared(batches: tf.data.Dataset, batch_size: int, replicas: int) -> tf.data.Dataset:
    """`batches` of (x, y) cut anew, so that no device gets an empty share of the last one."""
    if replicas == 1:
        return batches
    sizes = batches.map(lambda x, y: tf.shape(y)[0])
    count = int(sizes.reduce(0, lambda total, size: total + size))
    size = share_size(count, batch_size, replicas)
    known = tf.data.experimental.assert_cardinality(-(-count // size))  # lest Keras warns
    return batches.rebatch(size).apply(known)


class SumFirst:
    """Lets an optimizer see the whole batch's gradient: the sum over all devices.

    Keras sums later, so that it clips each device's share on its own, and skips a step under
    float16 only where the first device's share has overflown (3.13 to 3.15).
    """

    def apply(self, grads, trainable_variables=None):
        context = tf.distribute.get_replica_context()
        there = [gradient for gradient in grads if gradient is not None]
        total = iter(context.all_reduce("SUM", there))
        grads = [gradient if gradient is None else next(total) for gradient in grads]
        super().apply(grads, trainable_variables)


class PlainAdamW(keras.optimizers.AdamW):
    """AdamW for gradients that were summed over the devices before."""

    def _all_reduce_sum_gradients(self, grads_and_vars):
        return grads_and_vars


class SharedAdamW(SumFirst, PlainAdamW):
    """AdamW for several devices."""


class SharedLossScale(SumFirst, keras.optimizers.LossScaleOptimizer):
    """Loss scaling for several devices, around a `PlainAdamW`."""


def synchronize_norms(model: keras.Model, on: bool) -> None:
    """Let BatchNorm layers that train share their statistics between devices, or no longer."""
    for layer in model._flatten_layers(include_self=False):
        if isinstance(layer, keras.layers.BatchNormalization):
            layer.synchronized = on


@contextlib.contextmanager
def memory_advice(where: str) -> Iterator[None]:
    """Turn TensorFlow's out-of-memory errors into one that says what to change.

    Raises:
        MemoryError: the device's memory is full in `where`; with the peak where devices tell it.
    """
    kinds = tf.errors.ResourceExhaustedError, tf.errors.InternalError, tf.errors.UnknownError
    try:
        yield
    except kinds as error:
        full = isinstance(error, tf.errors.ResourceExhaustedError)
        if not full and "memory" not in str(error).lower():
            raise
        peaks = [
            f"{tf.config.experimental.get_memory_info(d.name)['peak'] / 2**30:.1f} GiB on {d.name}"
            for d in tf.config.list_logical_devices("GPU")
        ]
        peak = f" (peak {', '.join(peaks)})" if peaks else ""
        reasons = [s.strip() for s in str(error).splitlines() if "memory" in s or "OOM" in s]
        # TensorFlow's own traceback fills a screen and tells nothing more than its message.
        raise MemoryError(
            f"The device's memory is full in {where}{peak}. "
            "Lower BATCH_SIZE or STUDENT_BATCH_SIZE (the teacher's on one device with ACCUMULATION "
            "raised by the same factor, which keeps the recipe) or the image size, or set "
            'TEACHER_PRECISION / STUDENT_PRECISION = "mixed_float16". What was trained is kept.'
            + (f" TensorFlow says: {reasons[0][:200]}" if reasons else "")
        ) from None
