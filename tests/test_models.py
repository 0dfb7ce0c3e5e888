"""Teacher and student: shapes, what trains, precision, files, errors."""

import os

import keras
import numpy as np
import pytest

from utils import layers, models

SIZE = 32
IMAGES = np.random.default_rng(0).integers(0, 256, (8, SIZE, SIZE, 1), dtype="uint8")


@pytest.fixture(scope="module")
def teacher():
    return models.build_teacher("MobileNetV3Small", SIZE, 4, "none", seed=1)


def test_models_take_gray_images_and_give_logits(teacher):
    student = models.build_student("MobileNetV3Small", SIZE, 3, "none")
    assert teacher.output_shape == (None, 4) and student.output_shape == (None, 3)
    logits = models.predict_logits(student, IMAGES)
    assert logits.shape == (8, 3) and logits.dtype == np.float32
    with pytest.raises(ValueError, match="takes images"):
        models.predict_logits(student, IMAGES[:, :16])


def test_the_teacher_reads_three_scales(teacher):
    sides = [tap.shape[1] for tap in teacher.get_layer("backbone").outputs]
    assert sides == [SIZE // 4, SIZE // 8, SIZE // 32]
    assert teacher.get_layer("attention").input.shape[1:] == (1, 1, 3 * 256)


def test_one_seed_gives_one_model(teacher):
    again = models.build_teacher("MobileNetV3Small", SIZE, 4, "none", seed=1)
    other = models.build_teacher("MobileNetV3Small", SIZE, 4, "none", seed=2)
    weights = zip(teacher.get_weights(), again.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in weights)
    assert not np.array_equal(teacher.get_weights()[0], other.get_weights()[0])


def test_each_part_trains_what_it_names(teacher):
    counts = {}
    for part in ("head", "tail", "all"):
        models.set_trainable(teacher, part)
        table = models.trainable_table(teacher).set_index("part")
        counts[part] = int(table["trainable"].sum())
        backbone = table[table.index.str.startswith("backbone")]
        assert (backbone["trainable"].sum() == 0) == (part == "head")
        assert table["parameters"].sum() == teacher.count_params()
    assert counts["head"] < counts["tail"] < counts["all"] < teacher.count_params()
    norms = [
        layer
        for layer in teacher.get_layer("backbone").layers
        if isinstance(layer, keras.layers.BatchNormalization)
    ]
    assert not any(norm.trainable for norm in norms)
    models.set_trainable(teacher, "all", pretrained=False)
    assert all(norm.trainable for norm in norms)
    with pytest.raises(ValueError, match="head, tail or all"):
        models.set_trainable(teacher, "tial")


def test_a_tail_begins_at_a_block(teacher):
    body = teacher.get_layer("backbone")
    models.set_trainable(teacher, "tail", unfreeze=0.3)
    trains = [layer.name for layer in body.layers if layer.trainable]
    assert trains[0].startswith("expanded_conv_") and 0.2 < len(trains) / len(body.layers) < 0.4


def test_a_saved_model_gives_the_same_logits(teacher, tmp_path):
    path = models.save(teacher, tmp_path / "teacher.keras")
    again = models.load(path)
    assert np.array_equal(
        models.predict_logits(teacher, IMAGES), models.predict_logits(again, IMAGES)
    )
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("precision", ["mixed_float16", "mixed_bfloat16"])
def test_a_model_keeps_its_precision_and_can_change_it(precision, tmp_path):
    student = models.build_student("MobileNetV3Small", SIZE, 3, "none", precision=precision)
    assert keras.config.dtype_policy().name == "float32"  # of the program: untouched
    assert student.get_layer("attention").compute_dtype == precision.removeprefix("mixed_")
    assert student.get_layer("logits").compute_dtype == "float32"
    path = models.save(student, tmp_path / "student.keras")
    again = models.load(path)
    built = again.get_layer("pool").dtype_policy.name
    assert built == again.dtype_policy.name == precision
    plain = models.load(path, "float32")
    assert plain.get_layer("pool").dtype_policy.name == "float32"
    pairs = zip(student.get_weights(), plain.get_weights(), strict=True)
    assert all(np.array_equal(a, b) for a, b in pairs)
    again.compile("sgd", keras.losses.CategoricalCrossentropy(from_logits=True))
    assert ("LossScale" in type(again.optimizer).__name__) == (precision == "mixed_float16")


@pytest.mark.parametrize("content", [None, b"no model"])
def test_a_file_that_is_no_model_is_refused_with_its_name(tmp_path, content):
    path = tmp_path / "teacher.keras"
    if content is None:
        with pytest.raises(FileNotFoundError, match=r"teacher\.keras"):
            models.load(path)
    else:
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"teacher\.keras cannot be read"):
            models.load(path)


def test_weights_of_another_backbone_are_refused(tmp_path):
    other = keras.applications.MobileNetV3Large(
        include_top=False, weights=None, input_shape=(SIZE, SIZE, 3)
    )
    path = tmp_path / "large.weights.h5"
    other.save_weights(path)
    with pytest.raises(ValueError, match="does not fit the backbone MobileNetV3Small"):
        models.build_student("MobileNetV3Small", SIZE, 3, str(path))


def test_imagenet_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    def offline(**_):
        raise Exception("URL fetch failure")

    monkeypatch.setenv("KAGGLE_INPUT_ROOT", os.fspath(tmp_path))
    monkeypatch.setattr(keras.applications, "MobileNetV3Small", offline)
    with pytest.raises(FileNotFoundError, match="Internet on"):
        models.build_student("MobileNetV3Small", SIZE, 3, "imagenet")


def test_attention_multiplies_by_its_maps_and_adds():
    x = np.random.default_rng(0).normal(size=(2, 4, 4, 32)).astype("float32")
    cbam = layers.CBAM()
    out = np.asarray(cbam(x))
    channel = x * np.asarray(cbam.channel.attention_map(x))
    assert np.allclose(out, x + channel * np.asarray(cbam.attention_map(x)), atol=1e-6)
    again = layers.CBAM.from_config(cbam.get_config())
    assert again.reduction == 16 and again.kernel_size == 7


def test_taps_that_do_not_divide_are_refused():
    taps = [keras.Input((side, side, 8)) for side in (5, 2)]
    with pytest.raises(ValueError, match="multiple of 32"):
        layers.fuse_scales(taps)


@pytest.mark.slow
def test_the_full_size_teacher_is_built():
    teacher = models.build_teacher("EfficientNetV2M", 384, 5, "none")
    assert 53e6 < teacher.count_params() < 56e6
