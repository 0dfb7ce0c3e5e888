"""CBAM against the paper's equations in NumPy, and fusion that really averages."""

import keras
import numpy as np
import pytest

from utils import layers


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


@pytest.fixture
def features():
    return np.random.default_rng(0).normal(size=(2, 6, 6, 32)).astype("float32")


def test_channel_attention_is_one_mlp_over_average_and_maximum(features):
    layer = layers.ChannelAttention(reduction=8)
    answer = layer(features)
    w1, b1, w2, b2 = (w.astype("float64") for w in layer.get_weights())
    assert w1.shape == (32, 4) and w2.shape == (4, 32)  # one MLP, shared: no further weights

    def mlp(x):
        return np.maximum(x @ w1 + b1, 0) @ w2 + b2

    scale = sigmoid(mlp(features.mean(axis=(1, 2))) + mlp(features.max(axis=(1, 2))))
    np.testing.assert_allclose(answer, features * scale[:, None, None], rtol=1e-5, atol=1e-6)


def test_spatial_attention_convolves_channel_average_and_maximum(features):
    layer = layers.SpatialAttention()
    layer(features)
    kernel = np.zeros((7, 7, 2, 1), "float32")
    kernel[3, 3] = [[0.7], [-0.4]]  # the centre alone, so that the convolution is a weighted sum
    layer.set_weights([kernel, np.array([0.1], "float32")])
    pooled = 0.7 * features.mean(-1) - 0.4 * features.max(-1) + 0.1
    np.testing.assert_allclose(
        layer.attention_map(features)[..., 0], sigmoid(pooled), rtol=1e-5, atol=1e-6
    )


def test_cbam_is_residual_and_maps_stay_between_zero_and_one(features):
    block = layers.CBAM(reduction=4)
    answer = keras.ops.convert_to_numpy(block(features))
    attended = block.spatial(block.channel(features))
    np.testing.assert_allclose(answer, features + attended, rtol=1e-6)
    shown = keras.ops.convert_to_numpy(block.attention_map(features))
    assert shown.shape == (2, 6, 6, 1) and shown.min() >= 0 and shown.max() <= 1


def test_cbam_keeps_its_policy_through_a_file_whatever_the_global_one(tmp_path, features):
    x = keras.Input((6, 6, 32))
    model = keras.Model(x, layers.CBAM(dtype="mixed_float16")(x))
    model.save(tmp_path / "cbam.keras")
    loaded = keras.saving.load_model(tmp_path / "cbam.keras", safe_mode=True)
    block = loaded.layers[-1]
    inner = (block.channel.squeeze, block.channel.excite, block.spatial.convolution)
    assert {part.compute_dtype for part in inner} == {"float16"}
    np.testing.assert_array_equal(loaded(features), model(features))


def test_fusion_averages_every_pixel_of_the_finer_map():
    fine, coarse = keras.Input((8, 8, 3)), keras.Input((2, 2, 5))
    model = keras.Model([fine, coarse], layers.fuse_scales([fine, coarse], channels=4))
    assert model.output.shape == (None, 2, 2, 8)
    pool = model.get_layer("fuse_8_pool")
    image = np.random.default_rng(1).normal(size=(1, 8, 8, 3)).astype("float32")
    blocks = image.reshape(1, 2, 4, 2, 4, 3).mean(axis=(2, 4))
    np.testing.assert_allclose(pool(image), blocks, rtol=1e-5, atol=1e-6)


def test_fusion_refuses_sides_that_do_not_divide():
    with pytest.raises(ValueError, match="side 7 cannot be pooled to side 2"):
        layers.fuse_scales([keras.Input((7, 7, 3)), keras.Input((2, 2, 3))])
