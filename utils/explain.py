"""Where a model looks, and whether that means something.

Grad-CAM: Selvaraju et al., ICCV 2017, https://arxiv.org/abs/1610.02391, at the backbone's last map
of stride 8: the last map of all has 3 by 3 cells for an image of 96 pixels and shows nothing.
Deletion check: Petsiuk, Das & Saenko, "RISE", BMVC 2018, https://arxiv.org/abs/1806.07421.
"""

from collections.abc import Callable

import keras
import numpy as np
from scipy.special import softmax

from utils import metrics, models

HIDDEN = 0.1  # of an image, in the deletion check


def split(model: keras.Model, stride: int = 8) -> tuple[keras.Model, keras.Model]:
    """A teacher or student in two: images to feature maps, and feature maps to logits.

    The last map, the backbone's last of side S / stride, is explained; fusion needs finer ones too.
    """
    body, side = model.get_layer("backbone"), model.input_shape[1] // stride
    mapping = [x for x in body.layers if not isinstance(x, keras.layers.ZeroPadding2D)]
    tap = [x.output for x in mapping if x.output.shape[1:3] == (side, side)][-1]
    finer = [output for output in body.outputs if output.shape[1] > side]
    fused = {x.name.split("_")[1]: x.input for x in reversed(model.layers) if "fuse_" in x.name}
    starts = [fused[str(output.shape[1])] for output in body.outputs if fused]
    top = keras.Model(starts or model.get_layer("attention").input, model.output)
    deeper = keras.Model(tap, body.outputs[-1])
    maps = [keras.Input(output.shape[1:]) for output in (*finer, tap)]
    rgb = model.get_layer("gray_to_rgb").output
    below = keras.Model(model.input, keras.Model(body.input, [*finer, tap])(rgb))
    above = top([*maps, deeper(maps[-1])] if fused else deeper(maps[-1]))
    return below, keras.Model(maps if finer else maps[0], above)


def gradient(function: Callable) -> Callable:
    """(x, *rest) -> gradient by x of the sum of `function(x, *rest)`, on TensorFlow or JAX."""
    if keras.backend.backend() == "jax":
        import jax

        return jax.jit(jax.grad(lambda x, *rest: function(x, *rest).sum()))
    import tensorflow as tf

    def by_tape(x, *rest):
        with tf.GradientTape() as tape:
            tape.watch(x := tf.convert_to_tensor(x))
            result = function(x, *rest)
        return tape.gradient(result, x)

    return by_tape


def grad_cam(model: keras.Model, images, classes, batch_size: int = 64) -> np.ndarray:
    """What in each image speaks for a class: float32 (n, h, w), h = S / 8, at least 0.

    images: uint8 or float (n, S, S, 1), 0 to 255. classes: int (n,), whose logit is explained.
    """
    (below, above), maps = split(model), []
    slopes = gradient(lambda tap, finer, wanted: above([*finer, tap] if finer else tap) * wanted)
    for start in range(0, len(images), batch_size):
        wanted = np.eye(model.output_shape[1], dtype="float32")[classes[start : start + batch_size]]
        found = below(np.asarray(images[start : start + batch_size], "float32"))
        *finer, tap = found if isinstance(found, list) else [found]
        weights = np.asarray(slopes(tap, finer, wanted)).mean(axis=(1, 2), keepdims=True)
        maps.append(np.maximum((weights * np.asarray(tap)).sum(axis=-1), 0))
    return np.concatenate(maps)


def deletion_check(model: keras.Model, images, maps, classes, patients, seed: int = 0) -> dict:
    """How far a class's probability falls when the hottest tenth of the map is hidden.

    The comparison hides the same shape at four random places. Hidden pixels take the image's mean.
    images: uint8 (n, S, S, 1). maps: float (n, h, w). classes: int (n,). patients: (n,).

    Returns `{images, hottest, random, difference}`: how many maps have a peak (the others are left
    out), and falls in probability as `{value, ci95}`. ValueError: no map has a peak.
    """
    peaked = np.ptp(maps, axis=(1, 2)) > 0
    if not peaked.any():
        raise ValueError("No map has a peak, so there is no hottest part to hide.")
    images, maps, classes = images[peaked], maps[peaked], np.asarray(classes)[peaked]
    rows, side = np.arange(len(images)), images.shape[1]
    large = np.asarray(keras.ops.image.resize(maps[..., None], (side, side)))
    ranks = large.reshape(len(large), -1).argsort(axis=1, kind="stable").argsort(axis=1)
    hottest = (ranks >= round((1 - HIDDEN) * side**2)).reshape(large.shape)
    means = images.mean(axis=(1, 2, 3), keepdims=True)

    def probability(pixels):
        return softmax(models.predict_logits(model, pixels), axis=1)[rows, classes]

    def fall(hidden):
        return whole - probability(np.where(hidden, means, images).astype("uint8"))

    whole, rng = probability(images), np.random.default_rng(seed)
    moves = rng.integers(side, size=(4, len(images), 2))  # over the edge and in again
    elsewhere = [
        fall(np.stack([np.roll(h, m, (0, 1)) for h, m in zip(hottest, move, strict=True)]))
        for move in moves
    ]
    falls = {"hottest": fall(hottest), "random": np.mean(elsewhere, axis=0)}
    falls["difference"] = falls["hottest"] - falls["random"]
    drawn = metrics.Bootstrap(np.asarray(patients)[peaked], seed=seed)
    return {"images": len(images)} | {
        name: {"value": float(values.mean()), "ci95": metrics.interval(drawn.mean(values))}
        for name, values in falls.items()
    }
