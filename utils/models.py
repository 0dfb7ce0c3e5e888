"""Teacher and student: built, frozen in part, saved and loaded; each with its own precision.

Both take float32 (B, S, S, 1), gray values 0 to 255, and give float32 logits (B, K). The backbone,
one of `settings.BACKBONES`, scales its input itself and is the nested model "backbone". Any
backend. Mixed precision: Micikevicius et al., ICLR 2018, https://arxiv.org/abs/1710.03740.
"""

import contextlib
import os
import re
import warnings
from collections.abc import Sequence
from pathlib import Path

import keras
import numpy as np
import pandas as pd

from utils import kaggle, layers, runs, settings, views

STRIDES = (4, 8)  # taps beside the backbone's last layer, whose stride is 32
SHAPES = Path(__file__).parent / "weights" / "mobilenetv3small_shapes.weights.h5"


@contextlib.contextmanager
def precision_policy(precision: str):
    """Build models under `precision`, then give back the global dtype policy, also on an error."""
    before = keras.config.dtype_policy()
    keras.config.set_dtype_policy(precision)
    try:
        yield
    finally:
        keras.config.set_dtype_policy(before)


def build_teacher(
    backbone: str = "EfficientNetV2M",
    image_size: int = 384,
    classes: int = 5,
    weights: str = "imagenet",
    dropout: float = 0.4,
    precision: str = "float32",
    seed: int = 0,
) -> keras.Model:
    """Backbone tapped at strides 4, 8 and 32, fused on the coarsest grid, CBAM, head (512, 256).

    image_size: S in pixels, a multiple of 32.
    weights: "imagenet", "shapes" (of MobileNetV3Small, learned on drawn shapes), "none" (random),
        or a file of the backbone's weights.
    dropout: rate after the head's first layer, half of it after the second.
    precision: "float32", "mixed_float16" or "mixed_bfloat16"; the logits are float32 in each.
    seed: of every random weight and every dropout mask.

    ValueError: the weights do not fit. FileNotFoundError: "imagenet" without file and internet.
    """
    keras.utils.set_random_seed(seed)
    with precision_policy(precision):
        base = _backbone(backbone, image_size, weights)
        taps = [_last_layer_at(base, image_size // stride).output for stride in STRIDES]
        body = keras.Model(base.input, [*taps, base.output], name="backbone")
        return _assemble("teacher", body, (512, 256), classes, dropout, seed)


def build_student(
    backbone: str = "MobileNetV3Small",
    image_size: int = 224,
    classes: int = 5,
    weights: str = "imagenet",
    dropout: float = 0.2,
    precision: str = "float32",
    seed: int = 0,
) -> keras.Model:
    """Backbone, CBAM, head (384, 192). Arguments and errors as for `build_teacher`."""
    keras.utils.set_random_seed(seed)
    with precision_policy(precision):
        base = _backbone(backbone, image_size, weights)
        body = keras.Model(base.input, base.output, name="backbone")
        return _assemble("student", body, (384, 192), classes, dropout, seed)


def _backbone(name: str, image_size: int, weights: str) -> keras.Model:
    file, downloaded = {"shapes": SHAPES, "none": None}.get(weights, weights), None
    if weights == "imagenet":
        file = kaggle.attached_weights(name)
        downloaded = None if file else "imagenet"
    size = (image_size, image_size, 3)
    try:
        make = getattr(keras.applications, name)
        base = make(include_top=False, weights=downloaded, input_shape=size)
        if file:
            with warnings.catch_warnings():
                # Keras 3.15 warns of containers that older files lack; a missing weight raises.
                warnings.filterwarnings("ignore", message="Skipping nested container")
                base.load_weights(file)
    except Exception as error:  # a bare one of Keras's download; by file format of its reading
        if downloaded:
            raise FileNotFoundError(
                f"No ImageNet weights for {name}: no {name.lower()}_notop.weights.h5 is attached,"
                f" and the download failed ({str(error)[:200]}). On Kaggle, switch Internet on or"
                " attach that file; elsewhere, give a file's path or 'none' as the weights."
            ) from error
        raise ValueError(
            f"Weights file {file} does not fit the backbone {name} ({str(error)[:200]}): give the"
            " file of this backbone without its top, or choose the file's backbone."
        ) from error
    copy = keras.models.clone_model(base, clone_function=lambda layer: _clone(layer, weights))
    copy.set_weights(base.get_weights())
    return copy


def _clone(layer: keras.layers.Layer, weights: str) -> keras.layers.Layer:
    """The same layer; but stochastic depth can be frozen, BatchNorm can start from nothing."""
    config = layer.get_config()
    if isinstance(layer, keras.layers.Dropout):
        return layers.StochasticDepth.from_config(config)
    if weights == "none" and isinstance(layer, keras.layers.BatchNormalization):
        # MobileNetV3's 0.999 takes thousands of steps to reach the data: until then the model
        # trains well and predicts at chance.
        config["momentum"] = min(config["momentum"], 0.9)
    return type(layer).from_config(config)


def _last_layer_at(base: keras.Model, side: int) -> keras.layers.Layer:
    """The last layer whose feature map has this side: the one before the next halving."""
    return [layer for layer in base.layers if layer.output.shape[1:3] == (side, side)][-1]


def _assemble(
    name: str, body: keras.Model, units: Sequence[int], classes: int, dropout: float, seed: int
) -> keras.Model:
    """Gray images through backbone, fusion (where it has several outputs), CBAM and head."""
    image = keras.Input((*body.input_shape[1:3], 1), name="image", dtype="float32")
    x = body(keras.layers.Concatenate(name="gray_to_rgb")([image, image, image]))
    x = layers.fuse_scales(x) if isinstance(x, list) else x
    x = layers.CBAM(name="attention")(x)
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    for i, width in enumerate(units, start=1):
        x = keras.layers.Dense(width, use_bias=False, name=f"head_{i}")(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"head_{i}_norm")(x)
        x = keras.layers.Activation("relu", name=f"head_{i}_activation")(x)
        x = keras.layers.Dropout(dropout / i, seed=seed + i, name=f"head_{i}_dropout")(x)
    # float32 whatever the policy: float16 logits would lose the softmax its small differences.
    logits = keras.layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(image, logits, name=name)


def _blocks(body: keras.Model) -> list[str]:
    """The block of each layer, such as "block4a"; without a telling name, as the one before."""
    known = re.compile("|".join(dict.fromkeys(settings.BACKBONES.values())))
    names = ["input"]
    for layer in body.layers:
        found = known.match(layer.name)
        names.append(found.group() if found else names[-1])
    return names[1:]


def set_trainable(model: keras.Model, part: str, unfreeze: float = 0.3, pretrained: bool = True):
    """Choose what trains; compile again afterwards. What is frozen runs as in inference.

    part: "head" (all but the backbone), "tail" (and the last `unfreeze` of the backbone's layers,
        from the nearest start of a block) or "all"; ValueError for any other.
    unfreeze: share of the backbone's layers, 0 to 1.
    pretrained: if so, the backbone's BatchNorm stays frozen in every part: its statistics are worth
        more than a small batch's. If not, it trains with its block.
    """
    if part not in ("head", "tail", "all"):
        raise ValueError(f"part={part!r} must be head, tail or all.")
    body = model.get_layer("backbone")
    start = {"head": len(body.layers), "tail": _tail_start(body, unfreeze), "all": 0}[part]
    # One by one: setting a model's flag to the True that it already has changes nothing inside.
    for layer in (model, *model.layers, *body.layers):
        layer.trainable = True
    for i, layer in enumerate(body.layers):
        norm = isinstance(layer, keras.layers.BatchNormalization)
        layer.trainable = i >= start and not (norm and pretrained)


def _tail_start(body: keras.Model, unfreeze: float) -> int:
    blocks = _blocks(body)
    starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1]] + [len(blocks)]
    return min(starts, key=lambda i: abs(i - (1 - unfreeze) * len(blocks)))


def trainable_table(model: keras.Model) -> pd.DataFrame:
    """What trains, from input to output: part, parameters, trainable (of these).

    Backbone rows are its stages, such as "backbone block4".
    """
    body = model.get_layer("backbone")
    stages = [re.sub(r"(?<=[0-9])[a-z]+$", "", block) for block in _blocks(body)]
    parts = [(f"backbone {stage}", layer) for stage, layer in zip(stages, body.layers, strict=True)]
    for layer in model.layers:
        part = layer.name.split("_")[0]
        part = {"logits": "head", "fuse": "fusion"}.get(part, part)
        parts += [] if layer is body else [(part, layer)]
    rows = [
        (part, layer.count_params(), sum(int(np.prod(v.shape)) for v in layer.trainable_variables))
        for part, layer in parts
        if layer.count_params()
    ]
    table = pd.DataFrame(rows, columns=["part", "parameters", "trainable"])
    return table.groupby("part", sort=False).sum().reset_index()


def predict_logits(model: keras.Model, pixels: np.ndarray, batch_size: int = 64) -> np.ndarray:
    """The model's logits for images as they are: uint8 (n, S, S, 1) to float32 (n, K).

    ValueError: the model takes another image size, or its logits are not finite.
    """
    if tuple(pixels.shape[1:]) != tuple(model.input_shape[1:]):
        raise ValueError(
            f"{model.name} takes images of {model.input_shape[1:]}, these are {pixels.shape[1:]}."
        )
    batches = views.evaluation_batches(pixels, batch_size=batch_size)
    logits = np.asarray(model.predict(batches, verbose=0), "float32")
    if not np.isfinite(logits).all():
        raise ValueError(f"The logits of {model.name} are not finite: train it again.")
    return logits


def save(model: keras.Model, path: str | os.PathLike) -> Path:
    """Write a `.keras` file without optimizer, whole or not at all; return its path."""
    bare = keras.Model(model.input, model.output, name=model.name)  # same layers, not compiled
    return runs.write_atomic(Path(path), bare.save)


def load(path: str | os.PathLike, precision: str | None = None) -> keras.Model:
    """Read a `.keras` file that `save` wrote, in safe mode, not compiled.

    precision: None keeps the file's own; another rebuilds the model under it with equal weights.
    FileNotFoundError: no such file. ValueError: it is damaged or no model of this module.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"No model file {path}: run the notebook that writes it.")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        saved = model.get_layer("pool").dtype_policy.name  # the logits are float32 anyway
    except Exception as error:  # of ZIP, HDF5, JSON or Keras
        raise ValueError(
            f"{path} cannot be read as a model ({str(error)[:200]}): it is damaged or of another"
            " kind; make it again, or copy it again."
        ) from error
    # A functional model's own policy, which decides loss scaling, is not in the file: it is the
    # global one at loading. So the model is rebuilt under the policy that it shall have.
    wanted = precision or saved
    same = wanted == saved == model.dtype_policy.name
    return model if same else with_precision(model, wanted)


def with_precision(model: keras.Model, precision: str) -> keras.Model:
    """The same model with the same weights under another policy."""

    def clone(layer):
        config = layer.get_config()
        if "dtype" in config and layer.name != "logits":
            config["dtype"] = precision
        return type(layer).from_config(config)

    with precision_policy(precision):
        copy = keras.models.clone_model(model, clone_function=clone, recursive=True)
    copy.set_weights(model.get_weights())
    return copy
