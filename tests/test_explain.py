"""Maps against the formula on both backends, the deletion check where the evidence is known."""

import os
import subprocess
import sys

import keras
import numpy as np
import pytest

from utils import explain, models, settings


@pytest.fixture(scope="module")
def spot_model():
    """Class 1 is a bright image, class 0 a dark one; the map of stride 8 is the mean of 8 by 8."""
    image = keras.Input((32, 32, 1))
    rgb = keras.layers.Concatenate(name="gray_to_rgb")([image, image, image])
    inner = keras.Input((32, 32, 3))
    small = keras.layers.AveragePooling2D(8)(inner)
    body = keras.Model(inner, keras.layers.AveragePooling2D(4)(small), name="backbone")
    x = keras.layers.Activation("linear", name="attention")(body(rgb))
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    dense = keras.layers.Dense(2, name="logits")
    model = keras.Model(image, dense(x))
    dense.set_weights([np.array([[-0.1, 0.1]] * 3), np.array([5.0, -5.0])])
    return model


@pytest.fixture(scope="module")
def spots():
    """Black images (6, 32, 32, 1) with one white square of 8 px, each at another place."""
    pixels = np.zeros((6, 32, 32, 1), "uint8")
    for row, (y, x) in enumerate([(0, 0), (8, 24), (16, 8), (24, 0), (16, 24), (24, 24)]):
        pixels[row, y : y + 8, x : x + 8] = 255
    return pixels


def random_images(model, count=3):
    return np.random.default_rng(0).integers(0, 256, (count, *model.input_shape[1:]), "uint8")


@pytest.mark.parametrize(
    ("build", "size"), [(models.build_teacher, 32), (models.build_student, 64)]
)
def test_grad_cam_is_the_formula_of_the_two_halves(build, size):
    model = build("MobileNetV3Small", size, 3, "none", seed=1)
    images, classes = random_images(model), np.array([2, 0, 1])
    below, above = explain.split(model)
    maps = below(images.astype("float32"))
    np.testing.assert_allclose(above(maps), model(images.astype("float32")), atol=1e-5)
    *finer, tap = maps if isinstance(maps, list) else [maps]
    wanted = np.eye(3, dtype="float32")[classes]
    slopes = explain.gradient(lambda x: above([*finer, x] if finer else x) * wanted)
    slope = np.asarray(slopes(tap))
    heat = np.maximum((slope.mean(axis=(1, 2), keepdims=True) * np.asarray(tap)).sum(axis=-1), 0)
    found = explain.grad_cam(model, images, classes, batch_size=2)
    assert found.shape == (3, *[size // 8] * 2) and found.dtype == np.float32
    np.testing.assert_allclose(found, heat, rtol=1e-3, atol=1e-4 * heat.max())


def test_a_gradient_is_right():
    x = np.linspace(-1, 1, 12, dtype="float32").reshape(3, 4)
    found = explain.gradient(lambda x: keras.ops.sum(x**3) + keras.ops.sum(x))(x)
    np.testing.assert_allclose(found, 3 * x**2 + 1, rtol=1e-5)


def test_grad_cam_finds_the_evidence_and_nothing_where_there_is_none(spot_model, spots):
    heat = explain.grad_cam(spot_model, spots, np.ones(6, int))
    large = heat.repeat(8, axis=1).repeat(8, axis=2)
    assert (large[spots[..., 0] == 255] > 0).all() and not large[spots[..., 0] == 0].any()
    assert not explain.grad_cam(spot_model, spots, np.zeros(6, int)).any()


def test_deletion_falls_for_a_true_map_and_not_for_a_false_one(spot_model, spots):
    ones, patients = np.ones(6, int), np.array(list("aabbcc"))
    heat = explain.grad_cam(spot_model, spots, ones)
    found = explain.deletion_check(spot_model, spots, heat, ones, patients)
    low, high = found["difference"]["ci95"]
    assert 0 < low <= found["difference"]["value"] <= high
    assert found["hottest"]["value"] > 3 * abs(found["random"]["value"])
    away = explain.deletion_check(spot_model, spots, heat.max() - heat, ones, patients)
    assert away["difference"]["value"] < 0


def test_maps_without_a_peak_are_left_out(spot_model, spots):
    heat = explain.grad_cam(spot_model, spots, np.ones(6, int))
    heat[:2] = 0.5
    found = explain.deletion_check(spot_model, spots, heat, np.ones(6, int), range(6))
    assert found["images"] == 4
    assert found["hottest"]["value"] > 0
    with pytest.raises(ValueError, match="no hottest part"):
        explain.deletion_check(spot_model, spots, np.zeros_like(heat), np.ones(6, int), range(6))


@pytest.mark.slow
def test_grad_cam_is_the_same_on_jax(tmp_path):
    student = models.build_student("MobileNetV3Small", 64, 3, "none", seed=1)
    images, classes = random_images(student), np.array([2, 0, 1])
    models.save(student, tmp_path / "student.keras")
    np.save(tmp_path / "images.npy", images)
    program = """if True:
        import numpy as np
        from utils import explain, models
        model, images = models.load("student.keras"), np.load("images.npy")
        np.save("heat.npy", explain.grad_cam(model, images, np.array([2, 0, 1])))
    """
    child = os.environ | {"KERAS_BACKEND": "jax", "PYTHONPATH": str(settings.ROOT)}
    subprocess.run([sys.executable, "-c", program], cwd=tmp_path, env=child, check=True)
    heat = explain.grad_cam(student, images, classes)
    np.testing.assert_allclose(np.load(tmp_path / "heat.npy"), heat, atol=0.02 * heat.max())
