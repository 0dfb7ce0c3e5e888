"""Where a model looks, whether that means something, and which cases are worth showing.

Grad-CAM: Selvaraju et al., "Grad-CAM: visual explanations from deep networks via gradient-based
localization", ICCV 2017, https://arxiv.org/abs/1610.02391, taken at the fused map just before
global pooling. It needs gradients, so this module knows TensorFlow; choosing cases is NumPy.

The deletion check follows Petsiuk, Das & Saenko, "RISE", BMVC 2018: if a map marks what the answer
rests on, hiding the marked part must lower the answer's probability more than hiding another part.
"""

from __future__ import annotations

import keras
import numpy as np
import tensorflow as tf

from utils import metrics

tf.get_logger().setLevel("ERROR")  # retracing and "assets written" tell a reader nothing


def fused_map(model: keras.Model):
    """The symbolic (B, h, w, C) map that the model pools globally, last before its head.

    Raises:
        ValueError: the model has no global average pooling of its own.
    """
    pools = [x for x in model.layers if isinstance(x, keras.layers.GlobalAveragePooling2D)]
    if not pools:
        raise ValueError(f"{model.name} has no GlobalAveragePooling2D: Grad-CAM has no map to read")
    return pools[-1].input


def grad_cam(
    model: keras.Model,
    images: np.ndarray,
    classes: np.ndarray | None = None,
    batch_size: int = 32,
) -> np.ndarray:
    """Grad-CAM of many images at once.

    images: uint8 or float (n, S, S, 1), 0 to 255. classes: int (n,), whose logit is explained;
    None explains each image's likeliest class.

    Returns float32 (n, S, S): 0 where nothing speaks for the class, 1 at the map's own peak; all 0
    where nothing in the image does.
    """
    both = keras.Model(model.inputs[0], [fused_map(model), model.outputs[0]])

    @tf.function(reduce_retracing=True)
    def maps_of(x, wanted):
        with tf.GradientTape() as tape:
            tape.watch(x)  # so that a frozen model's way to the map is recorded too
            features, logits = both(x, training=False)
            wanted = tf.where(wanted < 0, tf.argmax(logits, -1, output_type=tf.int32), wanted)
            score = tf.gather(logits, wanted, batch_dims=1)
        slopes = tf.cast(tape.gradient(score, features), tf.float32)
        weights = tf.reduce_mean(slopes, axis=(1, 2), keepdims=True)
        heat = tf.nn.relu(tf.reduce_sum(weights * tf.cast(features, tf.float32), -1, keepdims=True))
        return tf.image.resize(heat, x.shape[1:3])[..., 0]

    classes = np.full(len(images), -1) if classes is None else np.asarray(classes)
    heat = _in_batches(maps_of, batch_size, images, classes.astype("int32"))
    peak = heat.max(axis=(1, 2), keepdims=True)
    return np.divide(heat, peak, out=np.zeros_like(heat), where=peak > 0)


def spatial_attention(model: keras.Model, images: np.ndarray, batch_size: int = 32) -> np.ndarray:
    """CBAM's own spatial weights (Woo et al. 2018), what the forward pass multiplies by.

    images: uint8 or float (n, S, S, 1), 0 to 255.

    Returns float32 (n, S, S), 0 to 1, not stretched: nearly flat where attention chose nothing.

    Raises:
        ValueError: the model has no CBAM layer.
    """
    found = [x for x in model.layers if hasattr(x, "attention_map")]
    if not found:
        raise ValueError(f"{model.name} has no CBAM layer: it has no spatial attention to show")
    trunk = keras.Model(model.inputs[0], found[-1].input)

    @tf.function(reduce_retracing=True)
    def maps_of(x):
        weights = tf.cast(found[-1].attention_map(trunk(x, training=False)), tf.float32)
        return tf.image.resize(weights, x.shape[1:3])[..., 0]

    return _in_batches(maps_of, batch_size, images)


def deletion_check(
    model: keras.Model,
    images: np.ndarray,
    maps: np.ndarray,
    *,
    classes: np.ndarray | None = None,
    temperature: float = 1.0,
    fraction: float = 0.1,
    draws: int = 8,
    patients: np.ndarray | None = None,
    resamples: int = 2000,
    seed: int = 0,
    batch_size: int = 32,
) -> dict:
    """How far a class's probability falls when the hottest part of the map is hidden.

    The comparison hides a region of the very same shape moved to a random place (over the edge
    and in again at the other side), `draws` times, so that only the place differs. Hidden pixels
    take the image's mean. Maps without any peak (all equal) are left out and counted.

    images: uint8 or float (n, S, S, 1), 0 to 255. maps: float (n, S, S). classes: int (n,); None
    takes each image's likeliest class. patients: (n,), who are drawn again for the intervals; None
    draws images.

    Returns plain values: images, flat_maps, fraction, draws, unit ("patients" or "images"),
    hottest_fall, random_fall and difference (in probability, -1 to 1), each with its `_ci95` as
    [low, high], and share (0 to 1) of the images where the hottest part mattered more.

    Raises:
        ValueError: no map has a peak, or shapes do not fit.
    """
    images = np.asarray(images, "float32")
    if maps.shape != images.shape[:3]:
        raise ValueError(f"maps have shape {maps.shape}, the images need {images.shape[:3]}")
    peaked = maps.max(axis=(1, 2)) > maps.min(axis=(1, 2))
    if not peaked.any():
        raise ValueError("No map has a peak: there is no hottest part to hide")
    images, maps = images[peaked], maps[peaked]

    @tf.function(reduce_retracing=True)
    def probabilities(x):
        return tf.nn.softmax(tf.cast(model(x, training=False), tf.float32) / temperature)

    whole = _in_batches(probabilities, batch_size, images)
    classes = whole.argmax(1) if classes is None else np.asarray(classes)[peaked]
    rows = np.arange(len(images))
    hottest = hottest_part(maps, fraction)
    means = images.mean(axis=(1, 2, 3), keepdims=True)

    def fall(masks):
        hidden = np.where(masks[..., None], means, images)
        return whole[rows, classes] - _in_batches(probabilities, batch_size, hidden)[rows, classes]

    rng = np.random.default_rng(seed)
    side = maps.shape[1]
    elsewhere = [
        fall(np.stack([np.roll(m, rng.integers(side, size=2), (0, 1)) for m in hottest]))
        for _ in range(draws)
    ]
    at_peak, at_random = fall(hottest), np.mean(elsewhere, axis=0)
    patients = None if patients is None else np.asarray(patients)[peaked]
    drawn = metrics.resample(len(images), patients, draws=resamples, seed=seed)
    found = {
        "images": len(images),
        "flat_maps": int((~peaked).sum()),
        "fraction": fraction,
        "draws": draws,
        "unit": drawn.unit,
        "share": float((at_peak > at_random).mean()),
    }
    weights = drawn.point_first
    falls = {"hottest_fall": at_peak, "random_fall": at_random, "difference": at_peak - at_random}
    for name, values in falls.items():
        found |= metrics.told(name, weights @ values / weights.sum(axis=1))
    return found


def hottest_part(maps: np.ndarray, fraction: float = 0.1) -> np.ndarray:
    """Bool (n, h, w): exactly the `fraction` of each map's pixels with the highest values."""
    flat = maps.reshape(len(maps), -1)
    count = max(1, round(fraction * flat.shape[1]))
    top = np.argpartition(-flat, count - 1, axis=1)[:, :count]
    chosen = np.zeros(flat.shape, bool)
    np.put_along_axis(chosen, top, True, axis=1)
    return chosen.reshape(maps.shape)


def _in_batches(function, batch_size: int, images, *others) -> np.ndarray:
    """`function` of float32 images and what goes with them, batch by batch, as one NumPy array."""
    out = []
    for start in range(0, len(images), batch_size):
        part = slice(start, start + batch_size)
        x = tf.constant(np.asarray(images[part], "float32"))
        out.append(function(x, *(tf.constant(other[part]) for other in others)).numpy())
    return np.concatenate(out)


def one_right_one_wrong(
    labels: np.ndarray, probabilities: np.ndarray, predictions: np.ndarray | None = None
) -> list[dict]:
    """A typical right and a typical wrong case of each grade, not the prettiest ones.

    labels: int (n,); probabilities: float (n, K); predictions: int (n,), None for the likeliest
    class. Typical is the case whose confidence in its answer is the median of its kind.

    Returns [{"grade", "right": row or None, "wrong": row or None}], one for each of the K grades.
    """
    predictions, sureness = _answers(probabilities, predictions)

    def typical(chosen):
        rows = np.flatnonzero(chosen)
        rows = rows[np.argsort(sureness[rows], kind="stable")]
        return int(rows[len(rows) // 2]) if len(rows) else None

    right = predictions == labels
    return [
        {
            "grade": grade,
            "right": typical((labels == grade) & right),
            "wrong": typical((labels == grade) & ~right),
        }
        for grade in range(probabilities.shape[1])
    ]


def worst_errors(labels, probabilities, count: int = 8, predictions=None) -> np.ndarray:
    """Rows (int, at most `count`) of the errors furthest off in grades, the surest first."""
    predictions, sureness = _answers(probabilities, predictions)
    off = np.abs(predictions - labels)
    order = np.lexsort((-sureness, -off))
    return order[off[order] > 0][:count]


def surest_errors(labels, probabilities, count: int = 8, predictions=None) -> np.ndarray:
    """Rows (int, at most `count`) of the errors with the highest confidence, highest first."""
    predictions, sureness = _answers(probabilities, predictions)
    order = np.argsort(-sureness, kind="stable")
    return order[predictions[order] != labels[order]][:count]


def teacher_right_student_wrong(
    labels, teacher, student, count: int = 8, teacher_predictions=None, student_predictions=None
) -> np.ndarray:
    """Rows (int, at most `count`) that the student lost: its worst errors among the teacher's hits.

    teacher, student: probabilities, float (n, K).
    """
    teacher_predictions, _ = _answers(teacher, teacher_predictions)
    rows = worst_errors(labels, student, len(labels), student_predictions)
    return rows[teacher_predictions[rows] == labels[rows]][:count]


def _answers(probabilities, predictions):
    """Predictions (n,) and how probable each was held to be (n,)."""
    probabilities = np.asarray(probabilities)
    predictions = probabilities.argmax(1) if predictions is None else np.asarray(predictions)
    return predictions, probabilities[np.arange(len(predictions)), predictions]
