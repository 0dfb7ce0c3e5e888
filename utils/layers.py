"""Attention (CBAM: Woo et al., ECCV 2018, https://arxiv.org/abs/1807.06521) and fusion of scales.

In `keras.ops` alone: any backend. Keras makes `get_config` from the arguments of `__init__`.
"""

from collections.abc import Sequence

import keras
from keras import ops

PACKAGE = "knee_distillation"  # the registration name that stands in saved files


@keras.saving.register_keras_serializable(PACKAGE)
class StochasticDepth(keras.layers.Dropout):
    """Dropout that rests while it is frozen, as BatchNormalization does.

    Stock Dropout drops whenever `fit` runs: a frozen EfficientNetV2 would give other features in
    each pass (stochastic depth: Huang et al., ECCV 2016, https://arxiv.org/abs/1603.09382).
    """

    def call(self, inputs, training=False):
        return super().call(inputs, training=training and self.trainable)


@keras.saving.register_keras_serializable(PACKAGE)
class ChannelAttention(keras.layers.Layer):
    """Weigh channels by one shared MLP over their average and their maximum (CBAM, eq. 2).

    float (B, H, W, C) -> same shape and dtype. `reduction` divides C for the MLP's hidden layer.
    """

    def __init__(self, reduction: int = 16, **kwargs):
        super().__init__(**kwargs)
        self.reduction = reduction

    def build(self, input_shape):
        channels = input_shape[-1]
        hidden, dtype = max(channels // self.reduction, 1), self.dtype_policy
        self.squeeze = keras.layers.Dense(hidden, "relu", dtype=dtype, name="squeeze")
        self.excite = keras.layers.Dense(channels, dtype=dtype, name="excite")
        self.squeeze.build((None, channels))
        self.excite.build((None, hidden))

    def attention_map(self, x):
        """float (B, 1, 1, C) in [0, 1]: how much of each channel is kept."""
        average = self.excite(self.squeeze(ops.mean(x, axis=(1, 2))))
        maximum = self.excite(self.squeeze(ops.max(x, axis=(1, 2))))
        return ops.sigmoid(average + maximum)[:, None, None, :]

    def call(self, x):
        return x * self.attention_map(x)


@keras.saving.register_keras_serializable(PACKAGE)
class SpatialAttention(keras.layers.Layer):
    """Weigh positions by a convolution over channel average and maximum (CBAM, eq. 3).

    float (B, H, W, C) -> same shape and dtype. `kernel_size` is 7 in the paper.
    """

    def __init__(self, kernel_size: int = 7, **kwargs):
        super().__init__(**kwargs)
        self.kernel_size = kernel_size

    def build(self, input_shape):
        self.convolution = keras.layers.Conv2D(
            1, self.kernel_size, padding="same", dtype=self.dtype_policy, name="convolution"
        )
        self.convolution.build((*input_shape[:-1], 2))

    def attention_map(self, x):
        """float (B, H, W, 1) in [0, 1]: how much of each position is kept."""
        average = ops.mean(x, axis=-1, keepdims=True)
        maximum = ops.max(x, axis=-1, keepdims=True)
        return ops.sigmoid(self.convolution(ops.concatenate([average, maximum], axis=-1)))

    def call(self, x):
        return x * self.attention_map(x)


@keras.saving.register_keras_serializable(PACKAGE)
class CBAM(keras.layers.Layer):
    """Channel attention, then spatial attention, added to the input: x + spatial(channel(x)).

    float (B, H, W, C) -> same shape and dtype. Through the residual connection, attention that has
    not learned yet passes on what a pretrained backbone sends.
    """

    def __init__(self, reduction: int = 16, kernel_size: int = 7, **kwargs):
        super().__init__(**kwargs)
        self.reduction = reduction
        self.kernel_size = kernel_size

    def build(self, input_shape):
        self.channel = ChannelAttention(self.reduction, dtype=self.dtype_policy, name="channel")
        self.spatial = SpatialAttention(self.kernel_size, dtype=self.dtype_policy, name="spatial")
        self.channel.build(input_shape)
        self.spatial.build(input_shape)

    def attention_map(self, x):
        """float (B, H, W, 1) in [0, 1]: the spatial weights, for showing."""
        return self.spatial.attention_map(self.channel(x))

    def call(self, x):
        return x + self.spatial(self.channel(x))


def fuse_scales(taps: Sequence, channels: int = 256):
    """Bring feature maps of several strides to the coarsest grid, `channels` each, and join them.

    taps: symbolic (B, H, W, C), square; ValueError unless each side is a multiple of the smallest.
    Returns a symbolic (B, h, w, channels * len(taps)) on the smallest grid. Average pooling looks
    at every pixel; the gradient of bilinear resizing breaks XLA under mixed precision (A1).
    """
    coarsest = min(tap.shape[1] for tap in taps)
    fused = []
    for tap in taps:
        side = tap.shape[1]
        if side % coarsest:
            raise ValueError(f"No pooling from {side} to {coarsest}: use sizes a multiple of 32.")
        name = f"fuse_{side}"
        if side > coarsest:
            tap = keras.layers.AveragePooling2D(side // coarsest, name=f"{name}_pool")(tap)
        tap = keras.layers.Conv2D(channels, 1, use_bias=False, name=f"{name}_project")(tap)
        tap = keras.layers.BatchNormalization(momentum=0.9, name=f"{name}_norm")(tap)
        fused.append(keras.layers.Activation("relu", name=f"{name}_activation")(tap))
    return keras.layers.Concatenate(name="fuse")(fused) if len(fused) > 1 else fused[0]
