"""Maps against the formula, the deletion check against a model whose evidence is known."""

import keras
import numpy as np
import pytest

from utils import explain, layers


@pytest.fixture(scope="module")
def student():
    """Small, with the parts that matter: CBAM, global pooling, logits (3 classes, 32 px)."""
    keras.utils.set_random_seed(3)
    image = keras.Input((32, 32, 1))
    x = keras.layers.Rescaling(1 / 255)(image)
    x = keras.layers.Conv2D(8, 3, strides=4, padding="same", activation="relu")(x)
    x = layers.CBAM(reduction=2, kernel_size=3, name="attention")(x)
    x = keras.layers.GlobalAveragePooling2D()(x)
    return keras.Model(image, keras.layers.Dense(3, name="logits")(x))


@pytest.fixture(scope="module")
def spot_model():
    """Class 1 is a bright image, class 0 a dark one, and nothing else counts."""
    image = keras.Input((32, 32, 1))
    x = keras.layers.AveragePooling2D(4)(image)
    x = keras.layers.GlobalAveragePooling2D()(x)
    logits = keras.layers.Dense(2)
    model = keras.Model(image, logits(x))
    logits.set_weights([np.array([[-0.3, 0.3]]), np.array([5.0, -5.0])])
    return model


@pytest.fixture(scope="module")
def images():
    return np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), "uint8")


@pytest.fixture(scope="module")
def spots():
    """Black images (6, 32, 32, 1) with one white square of 8 px, each at another place."""
    pixels = np.zeros((6, 32, 32, 1), "uint8")
    for row, (y, x) in enumerate([(0, 0), (4, 20), (12, 12), (24, 0), (16, 24), (24, 24)]):
        pixels[row, y : y + 8, x : x + 8] = 255
    return pixels


def test_grad_cam_is_the_formula_of_the_paper(student, images):
    """Under global pooling and one dense layer the gradient is the dense layer's weight."""
    features = keras.Model(student.input, student.get_layer("attention").output)
    x = images.astype("float32")
    maps, logits = np.asarray(features(x)), np.asarray(student(x))
    weights = np.asarray(student.get_layer("logits").kernel)
    for classes in (None, np.array([2, 1, 0, 1, 2])):
        found = explain.grad_cam(student, images, classes, batch_size=2)
        assert found.shape == (5, 32, 32)
        assert found.dtype == np.float32
        wanted = logits.argmax(1) if classes is None else classes
        for i, k in enumerate(wanted):
            heat = np.maximum((maps[i] * weights[:, k]).sum(-1), 0)
            large = np.asarray(keras.ops.image.resize(heat[..., None], (32, 32)))[..., 0]
            np.testing.assert_allclose(found[i], large / max(large.max(), 1e-30), atol=1e-4)


def test_grad_cam_points_at_the_evidence(spot_model, spots):
    maps = explain.grad_cam(spot_model, spots, np.ones(len(spots), int))
    for image, heat in zip(spots[..., 0], maps, strict=True):
        assert image[np.unravel_index(heat.argmax(), heat.shape)] == 255
        assert heat.max() == 1
        assert heat[image == 255].mean() > 10 * heat[image == 0].mean()


def test_grad_cam_of_a_class_that_nothing_speaks_for_is_empty(spot_model, spots):
    assert not explain.grad_cam(spot_model, spots, np.zeros(len(spots), int)).any()


def test_spatial_attention_is_what_the_layer_multiplies_by(student, images):
    found = explain.spatial_attention(student, images, batch_size=2)
    attention = student.get_layer("attention")
    x = keras.Model(student.input, attention.input)(images.astype("float32"))
    channel = attention.channel(x)
    ratio = np.asarray(attention(x) - x) / np.where(np.asarray(channel) == 0, np.nan, channel)
    small = np.nanmax(ratio, axis=-1)
    assert found.shape == (5, 32, 32)
    assert found.min() >= 0 <= found.max() <= 1
    large = np.asarray(keras.ops.image.resize(small[..., None], (32, 32)))[..., 0]
    np.testing.assert_allclose(found, large, atol=1e-4)


def test_models_without_the_parts_say_so(spot_model, images):
    with pytest.raises(ValueError, match="no CBAM"):
        explain.spatial_attention(spot_model, images)
    flat = keras.Sequential([keras.Input((32, 32, 1)), keras.layers.Flatten()])
    with pytest.raises(ValueError, match="GlobalAveragePooling2D"):
        explain.grad_cam(flat, images)


def test_deletion_falls_for_a_true_map_and_not_for_a_false_one(spot_model, spots):
    ones = np.ones(len(spots), int)
    maps = explain.grad_cam(spot_model, spots, ones)
    options = {"classes": ones, "fraction": 1 / 16, "draws": 4, "resamples": 200, "temperature": 2}
    found = explain.deletion_check(spot_model, spots, maps, **options)
    low, high = found["difference_ci95"]
    assert 0 < low <= found["difference"] <= high
    assert found["hottest_fall"] > 5 * abs(found["random_fall"])
    between = found["hottest_fall"] - found["random_fall"]
    assert found["difference"] == pytest.approx(between, abs=1e-5)
    assert (found["images"], found["share"], found["unit"]) == (6, 1.0, "images")
    away = explain.deletion_check(spot_model, spots, 1 - maps, **options)
    assert away["difference"] < 0


def test_deletion_by_hand(spot_model, spots):
    """The fall is p(image) - p(image with the hottest pixels at the mean), no more."""
    ones = np.ones(len(spots), int)
    maps = explain.grad_cam(spot_model, spots, ones)
    found = explain.deletion_check(
        spot_model, spots, maps, classes=ones, patients=np.array(list("aabbcc")), resamples=50
    )
    falls = []
    for image, heat in zip(spots.astype("float32"), maps, strict=True):
        hidden, order = image.copy(), np.argsort(-heat, axis=None, kind="stable")
        hidden.reshape(-1)[order[:102]] = image.mean()
        p = keras.ops.softmax(spot_model(np.stack([image, hidden])))
        falls.append(float(p[0, 1] - p[1, 1]))
    assert found["hottest_fall"] == pytest.approx(np.mean(falls), abs=2e-3)
    assert found["unit"] == "patients"


def test_deletion_counts_flat_maps_and_refuses_nothing_but_them(spot_model, spots):
    maps = explain.grad_cam(spot_model, spots, np.ones(len(spots), int))
    maps[:2] = 0.5
    found = explain.deletion_check(spot_model, spots, maps, draws=1, resamples=20)
    assert (found["flat_maps"], found["images"]) == (2, 4)
    with pytest.raises(ValueError, match="No map has a peak"):
        explain.deletion_check(spot_model, spots, np.zeros_like(maps))
    with pytest.raises(ValueError, match="shape"):
        explain.deletion_check(spot_model, spots, maps[:, :16])


def test_hottest_part_is_exactly_the_fraction():
    maps = np.random.default_rng(0).random((4, 20, 30))
    maps[3] = 0  # all equal: still exactly that many
    chosen = explain.hottest_part(maps, 0.1)
    assert (chosen.sum(axis=(1, 2)) == 60).all()
    for heat, part in zip(maps[:3], chosen[:3], strict=True):
        assert heat[part].min() > heat[~part].max()


LABELS = np.array([0, 0, 0, 1, 1, 2, 2, 2])
PROBABILITIES = np.array(
    [
        [0.9, 0.1, 0.0],  # 0, right
        [0.6, 0.3, 0.1],  # 0, right, the median of three
        [0.5, 0.3, 0.2],  # 0, right
        [0.7, 0.2, 0.1],  # 1, off by one
        [0.1, 0.1, 0.8],  # 1, off by one, surer
        [0.6, 0.2, 0.2],  # 2, off by two
        [0.4, 0.35, 0.25],  # 2, off by two, less sure
        [0.1, 0.2, 0.7],  # 2, right
    ]
)


def test_one_right_one_wrong_takes_the_typical_case():
    assert explain.one_right_one_wrong(LABELS, PROBABILITIES) == [
        {"grade": 0, "right": 1, "wrong": None},
        {"grade": 1, "right": None, "wrong": 4},
        {"grade": 2, "right": 7, "wrong": 5},
    ]


def test_errors_in_order():
    assert explain.worst_errors(LABELS, PROBABILITIES).tolist() == [5, 6, 4, 3]
    assert explain.worst_errors(LABELS, PROBABILITIES, 2).tolist() == [5, 6]
    assert explain.surest_errors(LABELS, PROBABILITIES).tolist() == [4, 3, 5, 6]
    decided = np.array([1, 0, 0, 1, 1, 2, 2, 0])
    assert explain.worst_errors(LABELS, PROBABILITIES, predictions=decided).tolist() == [7, 0]


def test_teacher_right_student_wrong():
    teacher = np.eye(3)[[0, 0, 0, 1, 0, 2, 1, 2]]
    found = explain.teacher_right_student_wrong(LABELS, teacher, PROBABILITIES)
    assert found.tolist() == [5, 3]
