"""Building, freezing, saving and loading; small backbones at 32 and 64 px, weights made here."""

import random
import warnings

import keras
import numpy as np
import pytest

from utils import models, runs

SMALL = {"backbone": "MobileNetV3Small", "image_size": 32, "weights": "none"}


@pytest.fixture(scope="module")
def student():
    return models.build_student(**SMALL)


@pytest.fixture(scope="module")
def teacher():
    return models.build_teacher("EfficientNetV2B0", 64, weights="none")


@pytest.fixture(scope="module")
def weights_file(tmp_path_factory):
    """A MobileNetV3Small weights file whose first kernel is all 0.5, so that it is recognised."""
    base = keras.applications.MobileNetV3Small(
        include_top=False, weights=None, input_shape=(32, 32, 3)
    )
    base.get_layer("conv").set_weights([np.full((3, 3, 3, 16), 0.5, "float32")])
    path = tmp_path_factory.mktemp("weights") / "mobilenetv3small_notop.weights.h5"
    base.save_weights(path)
    return path


def pixels(size, count=4, seed=0):
    return np.random.default_rng(seed).uniform(0, 255, (count, size, size, 1)).astype("float32")


def answers(model, images):
    """Eagerly: a compiled `predict` would cost seconds here for each model."""
    return keras.ops.convert_to_numpy(model(images, training=False))


def norms(model):
    """The backbone's BatchNorm layers."""
    body = model.get_layer("backbone")
    return [x for x in body.layers if isinstance(x, keras.layers.BatchNormalization)]


# --- building -----------------------------------------------------------------------------------


def test_full_size_counts_and_taps():
    big = models.build_teacher(weights="none")
    taps = [tap.shape for tap in big.get_layer("backbone").output]
    assert taps == [(None, 96, 96, 48), (None, 48, 48, 320), (None, 12, 12, 1280)]
    assert big.get_layer("fuse").output.shape == (None, 12, 12, 768)
    assert big.count_params() == pytest.approx(54e6, rel=0.01)
    small = models.build_student(weights="none")
    assert small.count_params() == pytest.approx(1.3e6, rel=0.02)
    facts = models.describe(small)
    assert facts == {"parameters": small.count_params(), "bytes": 4 * small.count_params()}


@pytest.mark.parametrize(
    ("build", "backbone"),
    [(models.build_teacher, "MobileNetV3Large"), (models.build_student, "EfficientNetV2B1")],
)
def test_either_family_serves_either_model(build, backbone):
    model = build(backbone, 32, classes=3, weights="none")
    assert model.output.shape == (None, 3) and model.output.dtype == "float32"


def test_gray_values_in_float32_logits_out(student, teacher):
    for model, size in ((student, 32), (teacher, 64)):
        assert model.input.shape == (None, size, size, 1) and model.input.dtype == "float32"
        logits = answers(model, pixels(size))
        assert logits.shape == (4, 5) and logits.dtype == np.float32 and np.isfinite(logits).all()
        assert not np.allclose(logits.sum(axis=1), 1)  # logits, no probabilities
        assert not any(isinstance(layer, keras.layers.Lambda) for layer in model.layers)


def test_taps_of_small_images_are_feature_maps_not_padding_or_squeezes():
    taps = models.build_teacher(**SMALL).get_layer("backbone").output
    assert [tap.shape[1:] for tap in taps] == [(8, 8, 72), (4, 4, 96), (1, 1, 576)]


def test_seed_decides_weights_and_dropout_and_leaves_python_alone():
    state = random.getstate()
    one, same, other = (models.build_student(**SMALL, seed=s) for s in (1, 1, 2))
    assert random.getstate() == state
    assert all(map(np.array_equal, one.get_weights(), same.get_weights()))
    assert not all(map(np.array_equal, one.get_weights(), other.get_weights()))
    seeds = [m.get_layer("head_1_dropout").seed for m in (one, same, other)]
    assert seeds[0] == seeds[1] != seeds[2]
    assert one.get_layer("head_2_dropout").seed != seeds[0]


def test_random_batch_norm_arrives_soon(student, weights_file):
    """MobileNetV3's 0.999 would leave moving statistics at their start for thousands of steps."""
    assert {layer.momentum for layer in norms(student)} == {0.9}
    pretrained = models.build_student(**{**SMALL, "weights": str(weights_file)})
    assert {layer.momentum for layer in norms(pretrained)} == {0.999}


def test_names_are_those_of_keras():
    names = models.backbones()
    assert {"EfficientNetV2B0", "EfficientNetV2M", "MobileNetV3Small"} <= set(names)
    assert all(hasattr(keras.applications, name) for name in names)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"backbone": "ResNet50"}, "choose one of .*EfficientNetV2M.*MobileNetV3Small"),
        ({"image_size": 100}, "multiple of 32.* try 96 or 128"),
        ({"image_size": 0}, "multiple of 32"),
        ({"precision": "float16"}, "float32, mixed_float16, mixed_bfloat16"),
    ],
)
def test_wrong_choices_say_the_right_ones(change, message):
    with pytest.raises(ValueError, match=message):
        models.build_student(**{**SMALL, **change})


# --- weights ------------------------------------------------------------------------------------


def test_a_file_reaches_the_backbone_without_noise(weights_file):
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model = models.build_teacher(**{**SMALL, "weights": str(weights_file)})
    assert np.all(model.get_layer("backbone").get_layer("conv").get_weights()[0] == 0.5)


def test_another_backbones_file_names_both(weights_file):
    with pytest.raises(
        ValueError, match=r"notop.* does not fit the backbone MobileNetV3Large"
    ) as e:
        models.build_student(**{**SMALL, "backbone": "MobileNetV3Large", "weights": weights_file})
    assert "holds 939,120 values, the backbone has 2,996,352" in str(e.value)


def test_a_file_that_is_none_and_a_missing_one(tmp_path):
    broken = tmp_path / "broken.weights.h5"
    broken.write_bytes(b"not HDF5")
    with pytest.raises(ValueError, match="does not fit the backbone MobileNetV3Small"):
        models.build_student(**{**SMALL, "weights": str(broken)})
    with pytest.raises(FileNotFoundError, match=r"No weights file .*absent"):
        models.build_student(**{**SMALL, "weights": str(tmp_path / "absent.weights.h5")})


def test_imagenet_takes_an_attached_file_before_it_downloads(monkeypatch, weights_file):
    monkeypatch.setattr(runs, "kaggle_input", lambda: weights_file.parent)
    model = models.build_student(**{**SMALL, "weights": "imagenet"})
    assert np.all(model.get_layer("backbone").get_layer("conv").get_weights()[0] == 0.5)


def test_imagenet_without_internet_says_what_to_attach(monkeypatch, tmp_path):
    def offline(*args, weights, **kwargs):
        assert weights == "imagenet"
        raise Exception("URL fetch failure")

    (tmp_path / "knees").mkdir()
    monkeypatch.setattr(runs, "kaggle_input", lambda: tmp_path)
    monkeypatch.setattr(keras.applications, "EfficientNetV2M", offline)
    with pytest.raises(FileNotFoundError) as error:
        models.build_teacher(weights="imagenet")
    for part in ("efficientnetv2-m_notop.h5", str(tmp_path), "'knees'", "attach", "URL fetch"):
        assert part in str(error.value)


# --- what trains --------------------------------------------------------------------------------


@pytest.mark.parametrize("part", ["head", "tail", "all"])
def test_pretrained_batch_norm_is_frozen_in_every_phase(teacher, part):
    models.set_trainable(teacher, part, pretrained=True)
    assert not any(layer.trainable for layer in norms(teacher))
    assert teacher.get_layer("head_1_norm").trainable and teacher.get_layer("attention").trainable
    convolutions = [
        layer.trainable for layer in teacher.get_layer("backbone").layers if "conv" in layer.name
    ]
    share = {"head": 0, "tail": 0.3, "all": 1}[part]
    assert np.mean(convolutions) == pytest.approx(share, abs=0.05)
    assert convolutions == sorted(convolutions)  # frozen below, trained above


@pytest.mark.parametrize("backbone", ["EfficientNetV2B0", "MobileNetV3Small"])
def test_tail_starts_with_a_block(backbone):
    model = models.build_student(backbone, 32, weights="none")
    models.set_trainable(model, "tail", pretrained=True)
    body = model.get_layer("backbone").layers
    first = next(layer.name for layer in body if layer.trainable and layer.weights)
    assert first in ("block6d_expand_conv", "expanded_conv_8_expand")
    block = first.removesuffix("conv").removesuffix("expand_").removesuffix("expand")
    kernels = [x for x in body if x.name.startswith(block) and isinstance(x, keras.layers.Conv2D)]
    assert kernels and all(layer.trainable for layer in kernels)


def test_random_weights_freeze_nothing(teacher):
    for part in ("head", "tail", "all"):
        models.set_trainable(teacher, part, pretrained=False)
        assert all(layer.trainable for layer in teacher.get_layer("backbone").layers)


@pytest.mark.parametrize("pretrained", [True, False])
def test_frozen_batch_norm_runs_in_inference_mode(pretrained):
    """In training mode, frozen statistics neither move nor give way to the batch's own."""
    model = models.build_student(**SMALL)
    models.set_trainable(model, "all", pretrained=pretrained)
    body = model.get_layer("backbone")
    before = [keras.ops.convert_to_numpy(layer.moving_mean) for layer in norms(model)]
    rgb = np.repeat(pixels(32), 3, axis=-1)
    training, inference = body(rgb, training=True), body(rgb, training=False)
    same = np.allclose(training, inference, atol=1e-6)
    after = [keras.ops.convert_to_numpy(layer.moving_mean) for layer in norms(model)]
    unmoved = all(map(np.array_equal, before, after))
    assert (same, unmoved) == (pretrained, pretrained)


def test_set_trainable_refuses_what_it_does_not_know(student):
    for arguments in ({"part": "body"}, {"part": "tail", "unfreeze": 1.5}):
        with pytest.raises(ValueError, match="head, tail or all"):
            models.set_trainable(student, pretrained=True, **arguments)


@pytest.mark.parametrize("part", ["head", "tail", "all"])
def test_table_adds_up(teacher, part):
    models.set_trainable(teacher, part, pretrained=True)
    table = models.trainable_table(teacher)
    assert table["parameters"].sum() == teacher.count_params()
    trained = sum(int(np.prod(v.shape)) for v in teacher.trainable_variables)
    assert table["trainable"].sum() == trained
    modes = table.set_index("part")["batch_norm"]
    assert modes["backbone block5"] == "inference" and modes["head"] == "trains"


# --- files --------------------------------------------------------------------------------------


@pytest.mark.parametrize("which", ["student", "teacher"])
def test_round_trip_gives_the_same_outputs(which, request, tmp_path):
    model = request.getfixturevalue(which)
    images = pixels(model.input.shape[1])
    path = models.save(model, tmp_path / "sub" / "model.keras")
    loaded = models.load(path)
    np.testing.assert_array_equal(answers(loaded, images), answers(model, images))
    assert loaded.name == model.name and not loaded.compiled
    assert loaded.output.shape == model.output.shape  # one tensor, not a list of one
    assert [p.name for p in path.parent.iterdir()] == ["model.keras"]  # nothing temporary is left


def test_optimizer_stays_out_of_the_file(student, tmp_path):
    bare = models.save(student, tmp_path / "bare.keras").stat().st_size
    model = models.build_student(**SMALL)
    model.compile("adam", "mse")
    model.optimizer.build(model.trainable_variables)
    size = models.save(model, tmp_path / "model.keras").stat().st_size
    assert size == pytest.approx(bare, rel=0.01) and model.compiled


def test_a_failed_save_keeps_the_old_file(student, tmp_path, monkeypatch):
    path = models.save(student, tmp_path / "model.keras")
    before = path.read_bytes()

    def full(self, path, *args, **kwargs):
        path.write_bytes(before[:1000])
        raise OSError("No space left on device")

    monkeypatch.setattr(keras.Model, "save", full)
    with pytest.raises(OSError, match="No space"):
        models.save(student, path)
    assert path.read_bytes() == before and len(list(tmp_path.iterdir())) == 1


def test_damaged_and_missing_files_are_one_clear_error(student, tmp_path):
    path = models.save(student, tmp_path / "model.keras")
    whole = path.read_bytes()
    for damage in (whole[: len(whole) // 2], b"", b"text"):
        path.write_bytes(damage)
        with pytest.raises(ValueError, match=r"model\.keras cannot be read as a model"):
            models.load(path)
    x = keras.Input((3,))
    keras.Model(x, keras.layers.Dense(2)(x)).save(path)  # a model, but none of ours
    with pytest.raises(ValueError, match="another kind"):
        models.load(path)
    with pytest.raises(FileNotFoundError, match="No model file"):
        models.load(tmp_path / "absent.keras")
