"""Teacher and student: built, frozen in part, saved and loaded; each with its own precision.

Both take float32 (B, S, S, 1), gray values 0 to 255, and give float32 logits (B, K). The backbone,
any EfficientNetV2 or MobileNetV3 of `keras.applications`, does its own preprocessing and stands
inside as the nested model "backbone". Pure Keras 3: any backend.
"""

from __future__ import annotations

import contextlib
import math
import os
import random
import re
import warnings
import zipfile
from collections.abc import Sequence
from pathlib import Path

import h5py
import keras
import pandas as pd

from utils import folders, layers, runs
from utils.precision import precision_notes, precision_of, precision_policy, with_precision

__all__ = [
    "backbones",
    "build_student",
    "build_teacher",
    "describe",
    "load",
    "precision_notes",
    "precision_of",
    "precision_policy",
    "save",
    "set_trainable",
    "trainable_table",
]

STRIDES = (4, 8)  # taps beside the backbone's last layer, whose stride is 32


# --- the two models ----------------------------------------------------------------------------


def backbones() -> list[str]:
    """Names that `build_teacher` and `build_student` take."""
    family = re.compile(r"EfficientNetV2(B\d|S|M|L)|MobileNetV3(Small|Large)")
    return sorted(name for name in dir(keras.applications) if family.fullmatch(name))


def build_teacher(
    backbone: str = "EfficientNetV2M",
    image_size: int = 384,
    classes: int = 5,
    weights: str = "imagenet",
    dropout: float = 0.6,
    precision: str = "float32",
    seed: int = 0,
) -> keras.Model:
    """Backbone tapped at strides 4, 8 and 32, fused on the coarsest grid, CBAM, head (512, 256).

    weights: "imagenet", a backbone's weights file, or "none" (random).
    dropout: rate after the head's first layer, half of it after the second.
    seed: of every random weight and every dropout mask.

    Raises:
        ValueError: unknown backbone or precision, image size not a multiple of 32, wrong weights.
        FileNotFoundError: no such weights file, or "imagenet" and neither a file nor internet.
    """
    with precision_policy(precision), _seeded(seed):
        base = _backbone(backbone, image_size, weights)
        taps = [_last_layer_at(base, image_size // stride).output for stride in STRIDES]
        body = keras.Model(base.input, [*taps, base.output], name="backbone")
        image, x = _from_gray(image_size)
        x = layers.fuse_scales(body(x))
        x = layers.CBAM(name="attention")(x)
        return _with_head(image, x, (512, 256), classes, dropout, seed, name="teacher")


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
    with precision_policy(precision), _seeded(seed):
        base = _backbone(backbone, image_size, weights)
        body = keras.Model(base.input, base.output, name="backbone")
        image, x = _from_gray(image_size)
        x = layers.CBAM(name="attention")(body(x))
        return _with_head(image, x, (384, 192), classes, dropout, seed, name="student")


@contextlib.contextmanager
def _seeded(seed: int):
    """Random weights from `seed`: Keras draws its seeds from Python's generator, put back after."""
    state = random.getstate()
    random.seed(seed)
    try:
        yield
    finally:
        random.setstate(state)


def _backbone(name: str, image_size: int, weights: str) -> keras.Model:
    if name not in backbones():
        raise ValueError(f"Unknown backbone {name!r}: choose one of {', '.join(backbones())}.")
    if image_size < 32 or image_size % 32:
        below = max(image_size // 32 * 32, 32)
        raise ValueError(
            f"Image size {image_size} is not a multiple of 32 (at least 32), which the backbone's"
            f" five halvings need: try {below} or {below + 32}."
        )
    make = getattr(keras.applications, name)
    arguments = {"include_top": False, "input_shape": (image_size, image_size, 3)}
    if weights == "imagenet" and (found := folders.attached_weights(name)) is not None:
        weights = str(found)
    if weights == "imagenet":
        try:
            return make(weights="imagenet", **arguments)
        except Exception as error:  # Keras raises a bare Exception when it cannot download
            raise FileNotFoundError(_no_imagenet(name, error)) from error
    base = make(weights=None, **arguments)
    if weights == "none":
        for layer in _batch_norms(base):
            # MobileNetV3's 0.999 takes thousands of steps to reach the data: until then the model
            # trains well and predicts at chance.
            layer.momentum = min(layer.momentum, 0.9)
    else:
        _load_backbone(base, name, Path(weights))
    return base


def _no_imagenet(name: str, error: Exception) -> str:
    folder = runs.kaggle_input()
    there = sorted(p.name for p in folder.iterdir()) if folder.is_dir() else None
    listing = "which does not exist" if there is None else f"which holds {there or 'nothing'}"
    reason = (str(error).splitlines() or [type(error).__name__])[0][:200]
    names = " or ".join(folders.weights_names(name))
    return (
        f"No ImageNet weights for {name}: no {names} below {folder},"
        f" {listing}, and the download failed ({reason}). On Kaggle, switch Internet on"
        " in the notebook's settings, or attach a dataset that holds one of these files;"
        " elsewhere, give a file's path or 'none' as the weights."
    )


def _load_backbone(base: keras.Model, name: str, path: Path) -> None:
    if not path.is_file():
        raise FileNotFoundError(
            f"No weights file {path} for {name}: give a file's path, 'imagenet' or 'none'."
        )
    try:
        with warnings.catch_warnings():
            # Keras 3.15 warns of containers that older files lack; a missing weight still raises.
            warnings.filterwarnings("ignore", message="Skipping nested container")
            base.load_weights(path)
    except Exception as error:  # shape, layer count or HDF5 errors, by file format
        raise ValueError(
            f"Weights file {path} does not fit the backbone {name}: {_misfit(base, path, error)}."
            " Give the file of this backbone without its top, or choose the file's backbone."
        ) from error


def _misfit(base: keras.Model, path: Path, error: Exception) -> str:
    """Why a file could not be loaded: by its size where that tells, else in Keras's words."""
    sizes = []
    with contextlib.suppress(OSError), h5py.File(path) as file:
        file.visititems(lambda _, entry: sizes.append(getattr(entry, "size", 0)))
    if sizes and sum(sizes) != base.count_params():
        return f"it holds {sum(sizes):,} values, the backbone has {base.count_params():,}"
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200].rstrip(".: ")


def _last_layer_at(base: keras.Model, side: int) -> keras.layers.Layer:
    """The last layer whose feature map has this side: what stands before the next halving."""

    def fits(layer):
        shape = getattr(layer.output, "shape", ())
        padding = isinstance(layer, keras.layers.ZeroPadding2D)
        return len(shape) == 4 and shape[1] == shape[2] == side and not padding

    return [layer for layer in base.layers if fits(layer)][-1]


def _from_gray(image_size: int):
    """Symbolic gray input, float32 (B, S, S, 1), and the RGB that backbones want."""
    image = keras.Input((image_size, image_size, 1), name="image", dtype="float32")
    return image, keras.layers.Concatenate(name="gray_to_rgb")([image, image, image])


def _with_head(image, x, units: Sequence[int], classes: int, dropout: float, seed: int, name: str):
    x = keras.layers.GlobalAveragePooling2D(name="pool")(x)
    for i, width in enumerate(units, start=1):
        x = keras.layers.Dense(width, use_bias=False, name=f"head_{i}")(x)
        x = keras.layers.BatchNormalization(momentum=0.9, name=f"head_{i}_norm")(x)
        x = keras.layers.Activation("relu", name=f"head_{i}_activation")(x)
        x = keras.layers.Dropout(dropout / i, seed=seed + i, name=f"head_{i}_dropout")(x)
    # float32 whatever the policy: float16 logits would lose the softmax its small differences.
    logits = keras.layers.Dense(classes, dtype="float32", name="logits")(x)
    return keras.Model(image, logits, name=name)


# --- what trains -------------------------------------------------------------------------------


def _batch_norms(model: keras.Model) -> list[keras.layers.BatchNormalization]:
    return [layer for layer in model.layers if isinstance(layer, keras.layers.BatchNormalization)]


def _block(layer_name: str) -> str | None:
    """The block that a backbone's layer name tells, e.g. "block4a" or "expanded_conv_7"."""
    found = re.match(
        r"block\d+[a-z]+|expanded_conv(_\d+)?(?=_)|(stem|top)(?=_)|conv(_1)?(?=_|$)", layer_name
    )
    return found.group() if found else None


def _blocks(body: keras.Model) -> list[str]:
    """Each backbone layer's block; unnamed activations belong to the block before them."""
    names, current = [], "input"
    for layer in body.layers:
        current = _block(layer.name) or current
        names.append(current)
    return names


def set_trainable(
    model: keras.Model, part: str, *, pretrained: bool, unfreeze: float = 0.3
) -> None:
    """Choose what trains; compile anew afterwards.

    part: "head" (all but the backbone), "tail" (and the last `unfreeze` of the backbone's layers,
        from the nearest start of a block) or "all".
    pretrained: if so, the backbone's BatchNorm stays frozen throughout, which in Keras also means
        inference mode: its statistics are worth more than a small batch's. If not, there is
        nothing to protect: everything trains, whatever the part.

    Raises:
        ValueError: for an unknown part, or `unfreeze` outside 0 to 1.
    """
    if part not in ("head", "tail", "all") or not 0 <= unfreeze <= 1:
        raise ValueError(
            f"part={part!r} must be head, tail or all, and unfreeze={unfreeze} from 0 to 1."
        )
    body = model.get_layer("backbone")
    # One by one: TensorFlow skips an assignment that changes nothing, so that setting a model's
    # flag to the True that it already has does not reach the layers inside.
    for layer in (model, *model.layers, *body.layers):
        layer.trainable = True
    if not pretrained:
        return
    start = {"head": len(body.layers), "tail": _tail_start(body, unfreeze), "all": 0}[part]
    for layer in body.layers[:start]:
        layer.trainable = False
    for layer in _batch_norms(body):
        layer.trainable = False


def _tail_start(body: keras.Model, unfreeze: float) -> int:
    blocks = _blocks(body)
    starts = [i for i in range(len(blocks)) if i == 0 or blocks[i] != blocks[i - 1]] + [len(blocks)]
    return min(starts, key=lambda i: abs(i - (1 - unfreeze) * len(blocks)))


def trainable_table(model: keras.Model) -> pd.DataFrame:
    """What trains, in reading order: part, layers, parameters, trainable (parameters), batch_norm.

    Backbone rows are its stages ("backbone block4"); batch_norm says "trains", "inference" or "".
    """
    body = model.get_layer("backbone")
    parts = [
        (f"backbone {re.sub(r'(?<=[0-9])[a-z]+$', '', block)}", layer)
        for block, layer in zip(_blocks(body), body.layers, strict=True)
    ]
    for layer in model.layers:
        part = layer.name.split("_")[0]
        if layer is not body:
            parts.append(({"logits": "head", "fuse": "fusion"}.get(part, part), layer))
    rows = [
        {
            "part": part,
            "layers": 1,
            "parameters": layer.count_params(),
            "trainable": sum(math.prod(v.shape) for v in layer.trainable_variables),
            "norms": isinstance(layer, keras.layers.BatchNormalization),
            "training": isinstance(layer, keras.layers.BatchNormalization) and layer.trainable,
        }
        for part, layer in parts
    ]
    table = pd.DataFrame(rows).groupby("part", sort=False).sum().reset_index()
    table = table[table["parameters"] > 0].reset_index(drop=True)
    modes = zip(table.pop("norms"), table.pop("training"), strict=True)
    return table.assign(batch_norm=["trains" if t else "inference" if n else "" for n, t in modes])


def describe(model: keras.Model) -> dict[str, int]:
    """How large a model is: {"parameters": number of weights, "bytes": their size in memory}."""
    size = sum(keras.ops.convert_to_numpy(weight).nbytes for weight in model.weights)
    return {"parameters": model.count_params(), "bytes": size}


# --- files -------------------------------------------------------------------------------------


def save(model: keras.Model, path: str | os.PathLike) -> Path:
    """Write a `.keras` file without optimizer, under a temporary name first; return its path."""
    bare = keras.Model(model.input, model.output, name=model.name)  # same layers, not compiled
    return runs.write_atomic(Path(path), bare.save)


def load(path: str | os.PathLike, precision: str | None = None) -> keras.Model:
    """Read a `.keras` file that `save` wrote, in safe mode, not compiled.

    precision: None keeps the file's own; another rebuilds the model under it with equal weights.
        Neither reads nor moves the global dtype policy.

    Raises:
        FileNotFoundError: no such file.
        ValueError: the file is damaged or no model of this module, or the precision is unknown.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"No model file {path}: run the notebook that writes it.")
    try:
        model = keras.saving.load_model(path, compile=False, safe_mode=True)
        saved = precision_of(model)
    except (zipfile.BadZipFile, OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
        raise ValueError(
            f"{path} cannot be read as a model ({reason}): it is damaged or of another kind; make"
            " it again, or copy it again."
        ) from error
    wanted = precision or saved
    if wanted == saved == model.dtype_policy.name:
        return model
    # A functional model's own policy, which decides loss scaling, is not in the file: it is the
    # global one at loading. So the model is rebuilt under the policy that it shall have.
    config = with_precision(model.get_config(), wanted)
    with precision_policy(wanted):
        rebuilt = keras.Model.from_config(config)
    rebuilt.set_weights(model.get_weights())
    return rebuilt
