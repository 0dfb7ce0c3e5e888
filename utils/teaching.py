"""What the notebooks measure only to show an idea: how much of a radiograph a cell sees.

It needs gradients with respect to pixels, so this module knows TensorFlow.
"""

from __future__ import annotations

from collections.abc import Sequence

import keras
import numpy as np
import tensorflow as tf


def receptive_fields(
    model: keras.Model, images: np.ndarray, strides: Sequence[int], share: float = 0.95
) -> list[int]:
    """What the centre cell of each of the backbone's taps sees, measured.

    It is the smallest square around the cell that holds `share` of the gradient of its channels
    with respect to the pixels: the effective receptive field (Luo et al., "Understanding the
    effective receptive field in deep convolutional neural networks", NeurIPS 2016). Squeeze and
    excitation let every cell know the whole image a little, so a square that holds all of the
    gradient would say nothing.

    Args:
        model: a teacher or a student, whose layer "backbone" has an output at each stride.
        images: uint8 or float (n, S, S, 1), 0 to 255; the gradients are averaged over them.
        strides: pixels from one cell to the next.

    Returns:
        A side in pixels for each stride, S at most, which stands for the whole image.

    Raises:
        ValueError: no output at one of the strides.
    """
    body, size = model.get_layer("backbone"), images.shape[1]
    slopes = {stride: np.zeros((size, size)) for stride in strides}
    for image in images:  # one by one: all activations of a large backbone are kept
        rgb = tf.repeat(tf.constant(image[None], "float32"), 3, axis=-1)
        with tf.GradientTape(persistent=True) as tape:
            tape.watch(rgb)
            outputs = tf.nest.flatten(body(rgb, training=False))
            taps = {size // tap.shape[1]: tap for tap in outputs}
            if missing := set(strides) - set(taps):
                raise ValueError(f"No output at strides {missing}: the backbone has {set(taps)}.")
            middles = {stride: size // stride // 2 for stride in strides}
            cells = {stride: taps[stride][:, m, m] for stride, m in middles.items()}
        for stride, cell in cells.items():
            slopes[stride] += np.abs(tape.gradient(cell, rgb).numpy()).sum(axis=(0, 3))
    centres = {stride: (middle + 0.5) * stride for stride, middle in middles.items()}
    return [square_around(slopes[stride], centres[stride], share) for stride in strides]


def square_around(weights: np.ndarray, centre: float, share: float) -> int:
    """Side of the smallest square around (centre, centre) with `share` of the weights (S, S)."""
    away = np.abs(np.arange(len(weights)) + 0.5 - centre) + 0.5  # of a pixel's far edge
    away = np.maximum(away[:, None], away[None, :])
    for side in range(1, len(weights)):
        if weights[away <= side / 2].sum() >= share * weights.sum():
            return side
    return len(weights)
