"""Receptive fields, against networks whose fields follow from arithmetic."""

import keras
import numpy as np
import pytest

from utils import teaching

IMAGES = np.random.default_rng(0).integers(0, 256, (2, 32, 32, 1)).astype("uint8")


@pytest.fixture(scope="module")
def model():
    """Taps at strides 4 and 8 whose cells see 6 and 8 + 2 + 8 pixels, all weights alike."""

    def conv(kernel, stride):
        return keras.layers.Conv2D(2, kernel, stride, "same", kernel_initializer="ones")

    rgb = keras.Input((32, 32, 3))
    fine = conv(4, 4)(conv(3, 1)(rgb))
    coarse = conv(2, 2)(conv(3, 1)(fine))
    body = keras.Model(rgb, [fine, coarse], name="backbone")
    return keras.Sequential([keras.Input((32, 32, 3)), body])


def test_a_field_that_holds_everything_is_the_one_of_arithmetic(model):
    assert teaching.receptive_fields(model, IMAGES, (4, 8), share=1.0) == [6, 18]


def test_a_smaller_share_has_a_smaller_field_and_the_largest_is_the_image(model):
    inner = teaching.receptive_fields(model, IMAGES, (4, 8), share=0.5)
    assert inner == [4, 10]
    everywhere = np.ones((32, 32))
    assert teaching.square_around(everywhere, 16, 1.0) == 32
    assert teaching.square_around(everywhere, 24, 1.0) == 32  # off the middle: the whole image
    assert teaching.square_around(everywhere, 16, 0.25) == 16


def test_a_stride_without_an_output_is_said(model):
    with pytest.raises(ValueError, match=r"No output at strides \{32\}"):
        teaching.receptive_fields(model, IMAGES, (4, 32))
