"""Augmented views and the `tf.data` input.

A view is a pure function of (seed, image, view number): `parameters` draws all random numbers with
NumPy, in coordinates that do not depend on the image size, and `augment` applies them. So any view
can be made again, for the teacher and for a student of another input size (Beyer et al. 2022,
"Knowledge distillation: a good teacher is patient and consistent",
https://arxiv.org/abs/2106.05237). `tf.data` runs on the processor, whatever backend Keras uses.
"""

from collections.abc import Callable, Mapping

import numpy as np
import tensorflow as tf

GRAY = 127.5  # fills the cutout, and is the pivot of contrast
DEFAULTS = {
    "flip": False,  # mirror left and right in half of the views
    "rotation": 0.0,  # degrees, drawn from -r to r
    "shift": 0.0,  # fraction of the side, per axis
    "zoom": 0.0,  # the scale is drawn from 1 - z to 1 + z
    "brightness": 0.0,  # fraction of the full range, added
    "contrast": 0.0,  # the slope is drawn from 1 - c to 1 + c
    "cutout": 0.0,  # side of the square that is blanked (DeVries & Taylor 2017), fraction
}


def parameters(seed: int, count: int, view: int, augmentation: Mapping | None) -> np.ndarray:
    """Draw what view number `view` (0 or more) does to images 0 to count - 1.

    Returns float32 (count, 12); row i depends on (seed, i, view) alone. Columns: 0-5 an affine map
    from output to input, x' = c0 x + c1 y + c2 and y' = c3 x + c4 y + c5, with the image from -0.5
    to 0.5; 6 and 7 gain and offset of the gray values (0 to 255); 8-11 left, top, right and bottom
    of the cutout, with the image from 0 to 1. `augmentation` has keys of `DEFAULTS` (ValueError for
    others); None gives the image itself.
    """
    a = DEFAULTS | dict(augmentation or {})
    if unknown := a.keys() - DEFAULTS:
        raise ValueError(f"augmentation knows {sorted(DEFAULTS)}, not {sorted(unknown)}")
    # Filled row by row. A new column would change every view: draw it from a second generator.
    draws = np.random.default_rng([seed, view]).random((count, 9))
    flip = np.where((draws[:, 0] < 0.5) & bool(a["flip"]), -1.0, 1.0)
    limits = [np.deg2rad(a["rotation"]), a["shift"], a["shift"], a["zoom"]]
    limits += [a["brightness"], a["contrast"]]
    angle, shift_x, shift_y, zoom, brightness, contrast = (2 * draws[:, 1:7] - 1).T * np.c_[limits]
    cos, sin = np.cos(angle) / (1 + zoom), np.sin(angle) / (1 + zoom)
    gain = 1 + contrast
    offset = GRAY * (1 - gain) + 255 * brightness
    left, top = draws[:, 7] - a["cutout"] / 2, draws[:, 8] - a["cutout"] / 2
    columns = [flip * cos, -flip * sin, shift_x, sin, cos, shift_y, gain, offset]
    columns += [left, top, left + a["cutout"], top + a["cutout"]]
    return np.stack(columns, axis=1).astype("float32")


def augment(images, parameters) -> tf.Tensor:
    """Apply one row of `parameters` to each image.

    images: uint8 or float (B, S, S, 1), 0 to 255; parameters: float32 (B, 12). Returns float32
    (B, S, S, 1), 0 to 255. What comes in from outside repeats the border.
    """
    size = images.shape[1]
    centre = (size - 1) / 2
    a0, a1, tx, b0, b1, ty = (parameters[:, i] for i in range(6))
    a2 = size * tx + centre * (1 - a0 - a1)
    b2 = size * ty + centre * (1 - b0 - b1)
    zero = tf.zeros_like(a0)
    x = tf.raw_ops.ImageProjectiveTransformV3(
        images=tf.cast(images, tf.float32),
        transforms=tf.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=1),
        output_shape=[size, size],
        fill_value=0.0,
        interpolation="BILINEAR",
        fill_mode="NEAREST",
    )
    gain, offset = (parameters[:, i, None, None, None] for i in (6, 7))
    x = tf.clip_by_value(x * gain + offset, 0.0, 255.0)
    at = (tf.range(size, dtype=tf.float32) + 0.5) / size
    inside_x = (at >= parameters[:, 8, None]) & (at < parameters[:, 10, None])
    inside_y = (at >= parameters[:, 9, None]) & (at < parameters[:, 11, None])
    hidden = inside_y[:, :, None, None] & inside_x[:, None, :, None]
    return tf.where(hidden, GRAY, x)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weight of each image, n / (classes present * count of its class): float32 (n,), mean 1."""
    present, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(present) * counts))[inverse].astype("float32")


def training_batches(
    pixels: np.ndarray,
    targets: np.ndarray | Callable[[int], np.ndarray],
    *,
    batch_size: int,
    seed: int,
    augmentation: Mapping | None,
    epoch: Callable[[], int],
    views: int | None = None,
    weights: np.ndarray | None = None,
    order_seed: int | None = None,
) -> tf.data.Dataset:
    """The batches of one epoch; `fit` goes through them again in each.

    pixels: uint8 (n, S, S, 1). targets: float32 (n, C), or a function of the view number that
    returns them (the teacher's logits for that view). epoch: tells which epoch begins; its images
    come in view number epoch, or epoch % views, and in an order that depends on (seed, epoch)
    alone, so that a resumed training sees what an undisturbed one would. order_seed: of the order,
    if not that of the views. weights: float32 (n,). The last batch is dropped if it is short.

    Yields x float32 (B, S, S, 1) 0 to 255, y float32 (B, C) and, with weights, float32 (B,).
    ValueError for fewer images than one batch, or targets of another length.
    """
    count, steps = len(pixels), len(pixels) // batch_size
    if steps < 1:
        raise ValueError(f"{count} training images do not fill one batch of {batch_size}: lower it")

    def plan():
        """Everything about the epoch that begins but the pixels, a tuple of arrays a batch."""
        now = epoch()
        view = now % views if views else now
        y = np.asarray(targets(view) if callable(targets) else targets, "float32")
        if len(y) != count:
            raise ValueError(f"targets have shape {y.shape}, the images need ({count}, classes)")
        rng = np.random.default_rng([seed if order_seed is None else order_seed, now, 1])
        order = rng.permutation(count)[: steps * batch_size]
        columns = [np.arange(count), parameters(seed, count, view, augmentation), y]
        columns += [] if weights is None else [np.asarray(weights, "float32")]
        for rows in order.reshape(steps, batch_size):
            yield tuple(column[rows] for column in columns)

    signature = tuple(tf.TensorSpec(part.shape, part.dtype) for part in next(plan()))
    store = _on_host(pixels)

    def batch(rows, view, *rest):
        return augment(tf.gather(store, rows), view), *rest

    dataset = tf.data.Dataset.from_generator(plan, output_signature=signature)
    dataset = dataset.apply(tf.data.experimental.assert_cardinality(steps))
    return _finish(dataset, batch)


def view_batches(
    pixels: np.ndarray, *, view: int, seed: int, augmentation: Mapping | None, batch_size: int = 64
) -> tf.data.Dataset:
    """One view of all images, in row order: batches of float32 (B, S, S, 1)."""
    drawn = parameters(seed, len(pixels), view, augmentation)
    return _in_order([pixels, drawn], augment, batch_size)


def evaluation_batches(
    pixels: np.ndarray, targets: np.ndarray | None = None, batch_size: int = 64
) -> tf.data.Dataset:
    """The images as they are, in row order: x float32 (B, S, S, 1), or (x, y) with targets."""

    def batch(x, *y):
        return (tf.cast(x, tf.float32), *y) if y else tf.cast(x, tf.float32)

    arrays = [pixels] if targets is None else [pixels, np.asarray(targets, "float32")]
    return _in_order(arrays, batch, batch_size)


def _in_order(arrays: list[np.ndarray], batch: Callable, batch_size: int) -> tf.data.Dataset:
    """Batches of almost equal size, at most `batch_size`: no device is left without an image."""
    stores = [_on_host(array) for array in arrays]
    count = len(arrays[0])
    edges = np.linspace(0, count, -(-count // batch_size) + 1).astype(int)
    dataset = tf.data.Dataset.from_tensor_slices((edges[:-1], edges[1:]))
    return _finish(dataset, lambda start, end: batch(*(store[start:end] for store in stores)))


def _on_host(array: np.ndarray) -> tf.Tensor:
    """One copy in main memory: left alone, TensorFlow would put the data set on the GPU."""
    with tf.device("CPU:0"):
        return tf.constant(array)


def _finish(dataset: tf.data.Dataset, batch: Callable) -> tf.data.Dataset:
    return dataset.map(batch, tf.data.AUTOTUNE, deterministic=True).prefetch(tf.data.AUTOTUNE)
