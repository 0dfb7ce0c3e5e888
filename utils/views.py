"""Augmented views and the tf.data input.

A view is a pure function of (seed, image index, view number): `view_parameters` draws all random
numbers with NumPy, in coordinates that do not depend on the image size, and `augment` only applies
them. So any view can be made again, byte for byte, for the teacher and for a student of another
input size (Beyer et al. 2022, "Knowledge distillation: a good teacher is patient and consistent").
"""

from collections.abc import Callable, Mapping

import keras
import numpy as np
import tensorflow as tf
from keras import ops

GRAY = 127.5  # fills the cutout, and is the pivot of contrast: no pass over the image for its mean
DEFAULTS = {
    "flip": False,  # mirror left and right in half of the views
    "rotation": 0.0,  # degrees, drawn from -r to r
    "shift": 0.0,  # fraction of the side, per axis
    "zoom": 0.0,  # the scale is drawn from 1 - z to 1 + z
    "brightness": 0.0,  # fraction of the full range, added
    "contrast": 0.0,  # the slope is drawn from 1 - c to 1 + c
    "cutout": 0.0,  # side of the square that is blanked (DeVries & Taylor 2017), fraction
}


def view_parameters(seed: int, count: int, view: int, augmentation: Mapping | None) -> np.ndarray:
    """Draw what view number `view` (0 or more) does to images 0 to count - 1.

    Returns float32 (count, 12); row i depends on (seed, i, view) alone, not on count. Columns:
    0-5 an affine map from output to input, x' = c0 x + c1 y + c2 and y' = c3 x + c4 y + c5, with
    the image from -0.5 to 0.5; 6 and 7 gain and offset of the gray values (0 to 255); 8-11 left,
    top, right and bottom of the cutout, with the image from 0 to 1. `augmentation` has the keys of
    `DEFAULTS`; None or {} gives the image itself. ValueError for a key that is not known.
    """
    unknown = set(augmentation or {}) - set(DEFAULTS)
    if unknown:
        raise ValueError(f"augmentation knows {sorted(DEFAULTS)}, not {sorted(unknown)}")
    a = {**DEFAULTS, **(augmentation or {})}
    draws = np.random.default_rng([seed, view]).random((count, 9))  # filled row by row
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


def augment(images, parameters):
    """Apply one row of `view_parameters` to each image.

    images: uint8 or float (B, S, S, 1), 0 to 255; parameters: float32 (B, 12).
    Returns float32 (B, S, S, 1), 0 to 255. What comes in from outside repeats the border.
    """
    size = images.shape[1]
    centre = (size - 1) / 2
    p = ops.cast(parameters, "float32")
    a0, a1, tx, b0, b1, ty = (p[:, i] for i in range(6))
    a2 = size * tx + centre * (1 - a0 - a1)
    b2 = size * ty + centre * (1 - b0 - b1)
    zero = ops.zeros_like(a0)
    matrix = ops.stack([a0, a1, a2, b0, b1, b2, zero, zero], axis=1)
    x = ops.image.affine_transform(
        ops.cast(images, "float32"),
        matrix,
        interpolation="bilinear",
        fill_mode="nearest",
        data_format="channels_last",
    )
    gain, offset = p[:, 6, None, None, None], p[:, 7, None, None, None]
    x = ops.clip(x * gain + offset, 0.0, 255.0)
    at = (ops.arange(size, dtype="float32") + 0.5) / size
    inside_x = (at >= p[:, 8, None]) & (at < p[:, 10, None])
    inside_y = (at >= p[:, 9, None]) & (at < p[:, 11, None])
    hidden = inside_y[:, :, None] & inside_x[:, None, :]
    return ops.where(hidden[..., None], GRAY, x)


def class_weights(labels: np.ndarray) -> np.ndarray:
    """Weight of each sample, n / (classes present * count of its class): float32 (n,), mean 1."""
    present, inverse, counts = np.unique(labels, return_inverse=True, return_counts=True)
    return (len(labels) / (len(present) * counts))[inverse].astype("float32")


def epoch_order(count, epoch, *, seed, shuffle=True, balance="none", labels=None) -> np.ndarray:
    """Rows in the order in which epoch number `epoch` sees them: int64 (count,), pure.

    With balance "resample" every class present gets the same number of places (give or take one),
    and within a class no image comes twice more often than another.
    """
    rng = np.random.default_rng([seed, epoch, 1])
    if balance != "resample":
        return rng.permutation(count) if shuffle else np.arange(count)
    members = [np.flatnonzero(labels == c) for c in rng.permutation(np.unique(labels))]
    quota = [count // len(members) + (k < count % len(members)) for k in range(len(members))]
    drawn = [
        np.concatenate([rng.permutation(rows) for _ in range(-(-q // len(rows)))])[:q]
        for rows, q in zip(members, quota, strict=True)
    ]
    return rng.permutation(np.concatenate(drawn)) if shuffle else np.sort(np.concatenate(drawn))


def training_batches(
    pixels: np.ndarray,
    targets: np.ndarray | Callable[[int], np.ndarray],
    *,
    batch_size: int,
    epochs: int,
    first_epoch: int = 0,
    seed: int,
    augmentation: Mapping | None,
    views: int | None = None,
    weights: np.ndarray | None = None,
    balance: str = "none",
    labels: np.ndarray | None = None,
    shuffle: bool = True,
    first_view: int = 0,
    order_seed: int | None = None,
    parallel_calls: int | None = None,
) -> tuple[tf.data.Dataset, int]:
    """All training batches from `first_epoch` to `epochs`, one after another.

    pixels: uint8 (n, S, S, 1). targets: float32 (n, C), or a function of the view number that
    returns them (what the teacher said to that view). Epoch e shows every image in view
    first_view + e, or in view e % views. Order and views of epoch e depend on (seed, e) alone, so
    a run that starts at first_epoch sees what an uninterrupted run would. The last batch is
    dropped if it is short. balance: "class_weight" multiplies `weights` (n,) by the weights of the
    classes in `labels` (n,), "resample" draws the classes equally often (an image that comes twice
    in an epoch comes in the same view), "none". `seed` makes the views and, unless order_seed is
    given, the order. parallel_calls changes the speed, not a byte.

    Returns (dataset, steps per epoch); it yields x float32 (B, S, S, 1) 0 to 255, y float32 (B, C)
    and, with weights or class weights, sample_weight float32 (B,).
    """
    count, steps = len(pixels), len(pixels) // batch_size
    if steps < 1:
        raise ValueError(f"{count} training images do not fill one batch of {batch_size}: lower it")
    if balance not in ("none", "class_weight", "resample"):
        raise ValueError(f'balance is "none", "class_weight" or "resample", not {balance!r}')
    if balance != "none" and labels is None:
        raise ValueError(f"balance={balance!r} needs labels (n,)")
    if balance == "class_weight":
        weights = class_weights(labels) * (1.0 if weights is None else weights)

    def view_of(epoch: int) -> int:
        return epoch % views if views else first_view + epoch

    def targets_of(view: int) -> np.ndarray:
        y = np.asarray(targets(view) if callable(targets) else targets, "float32")
        if y.ndim != 2 or len(y) != count:
            raise ValueError(f"targets have shape {y.shape}, the images need ({count}, classes)")
        return y

    def plan(epoch):
        """Everything about an epoch but the pixels, cut into (steps, batch_size, ...)."""
        epoch = int(epoch)
        view = view_of(epoch)
        order = epoch_order(
            count,
            epoch,
            seed=seed if order_seed is None else order_seed,
            shuffle=shuffle,
            balance=balance,
            labels=labels,
        )[: steps * batch_size]
        columns = [view_parameters(seed, count, view, augmentation), targets_of(view)]
        columns += [] if weights is None else [np.asarray(weights, "float32")]
        columns = [order, *(column[order] for column in columns)]
        return [c.reshape(steps, batch_size, *c.shape[1:]) for c in columns]

    width = targets_of(view_of(first_epoch)).shape[1]
    shapes = [(), (12,), (width,)] + ([] if weights is None else [()])
    types = [tf.int64] + [tf.float32] * (len(shapes) - 1)

    def epoch_batches(epoch):
        columns = tf.numpy_function(plan, [epoch], types, stateful=False)
        for column, shape in zip(columns, shapes, strict=True):
            column.set_shape((steps, batch_size, *shape))
        return tf.data.Dataset.from_tensor_slices(tuple(columns))

    store = _on_host(pixels)

    def batch(rows, parameters, *rest):
        return _augment(tf.gather(store, rows), parameters), *rest

    dataset = tf.data.Dataset.range(first_epoch, epochs).flat_map(epoch_batches)
    dataset = dataset.apply(
        tf.data.experimental.assert_cardinality(steps * max(0, epochs - first_epoch))
    )
    return _finish(dataset, batch, parallel_calls), steps


def view_batches(
    pixels: np.ndarray,
    *,
    view: int,
    seed: int,
    augmentation: Mapping | None,
    batch_size: int,
    parallel_calls: int | None = None,
) -> tf.data.Dataset:
    """One view of all images, in row order: batches of float32 (B, S, S, 1), the last one short."""
    parameters = view_parameters(seed, len(pixels), view, augmentation)
    store = _on_host(pixels)

    def batch(start):
        stop = start + batch_size
        return _augment(store[start:stop], tf.constant(parameters)[start:stop])

    return _finish(tf.data.Dataset.range(0, len(pixels), batch_size), batch, parallel_calls)


def evaluation_batches(
    pixels: np.ndarray, targets: np.ndarray | None = None, batch_size: int = 64
) -> tf.data.Dataset:
    """The images as they are, in row order: x float32 (B, S, S, 1), or (x, y) with targets."""
    arrays = [_on_host(pixels)]
    arrays += [] if targets is None else [_on_host(np.asarray(targets, "float32"))]

    def batch(start):
        x, *y = (array[start : start + batch_size] for array in arrays)
        x = tf.cast(x, tf.float32)
        return (x, *y) if y else x

    return _finish(tf.data.Dataset.range(0, len(pixels), batch_size), batch, None)


def _on_host(array: np.ndarray) -> tf.Tensor:
    """One copy in main memory: left alone, TensorFlow would put the data set on the GPU."""
    with tf.device("CPU:0"):
        return tf.constant(array)


def _augment(images, parameters):
    if keras.backend.backend() == "tensorflow":
        return augment(images, parameters)
    # Another backend's ops cannot run inside tf.data's graph: call them on arrays.
    out = tf.numpy_function(
        lambda x, p: np.asarray(augment(x, p)), [images, parameters], tf.float32, stateful=False
    )
    out.set_shape(images.shape)
    return out


def _finish(dataset, batch, parallel_calls):
    parallel_calls = parallel_calls or tf.data.AUTOTUNE
    dataset = dataset.map(batch, num_parallel_calls=parallel_calls, deterministic=True)
    return dataset.prefetch(tf.data.AUTOTUNE)
