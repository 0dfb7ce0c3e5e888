"""`python notebooks/pretrain_shapes.py OUT`: teach MobileNetV3-Small drawn shapes, keep its weights.

ImageNet's weights need the internet; these are the project's own: 18 kinds of shapes at random
places, sizes, angles and contrasts among noise, learned in about ten minutes on two processors.
"""

import argparse
import hashlib
import json
import tempfile
from pathlib import Path

import h5py
import numpy as np

SIZE = 96
# How far inside a shape of radius 1 a point lies; r is its distance, m the larger of |u| and |v|.
SHAPES = {
    "disc": lambda u, v, r, m: 1 - r,
    "ring": lambda u, v, r, m: 0.22 - abs(r - 0.75),
    "rings": lambda u, v, r, m: 0.13 - abs(abs(r - 0.6) - 0.3),
    "arc": lambda u, v, r, m: np.minimum(0.22 - abs(r - 0.75), v),
    "two discs": lambda u, v, r, m: 0.42 - np.hypot(abs(u) - 0.55, v),
    "ellipse": lambda u, v, r, m: 0.45 * (1 - np.hypot(u, v / 0.45)),
    "star": lambda u, v, r, m: 0.65 + 0.3 * np.cos(5 * np.arctan2(v, u)) - r,
    "square": lambda u, v, r, m: 0.8 - m,
    "frame": lambda u, v, r, m: 0.2 - abs(m - 0.7),
    "triangle": lambda u, v, r, m: 0.5 - np.maximum(v, 0.866 * abs(u) - 0.5 * v),
    "corner": lambda u, v, r, m: np.minimum(0.8 - m, -0.2 - np.minimum(u, v)),
    "plus": lambda u, v, r, m: np.minimum(0.28 - np.minimum(abs(u), abs(v)), 1 - m),
    "bar": lambda u, v, r, m: np.minimum(0.28 - abs(v), 1 - abs(u)),
    "two bars": lambda u, v, r, m: np.minimum(0.16 - abs(abs(v) - 0.45), 1 - abs(u)),
    "stripes": lambda u, v, r, m: np.minimum(0.15 * np.sin(10 * v), 0.9 - m),
    "checks": lambda u, v, r, m: np.minimum(0.2 * np.sin(7 * u) * np.sin(7 * v), 0.9 - m),
    "dots": lambda u, v, r, m: np.minimum(0.16 - np.hypot(u % 0.5 - 0.25, v % 0.5 - 0.25), 1 - r),
    "rough": lambda u, v, r, m: np.minimum(0.3 * np.sin(1e5 * (u + 1.7 * v) * v), 1 - r),
}


def draw_shapes(count: int, seed: int, size: int = SIZE) -> tuple[np.ndarray, np.ndarray]:
    """Draw `count` images, uint8 (n, S, S, 1), and their kinds, int32 (n,), places in SHAPES."""
    rng = np.random.default_rng(seed)
    axis, names = (np.arange(size) + 0.5) * 2 / size - 1, list(SHAPES)
    u, v = axis[None, :], axis[:, None]
    kinds = rng.permutation(np.arange(count) % len(names)).astype(np.int32)
    images = np.empty((count, size, size, 1), np.uint8)
    for image, kind in zip(images, kinds, strict=True):
        a, b, c, d = rng.normal(0, 0.4, 4)
        field = a * u + b * v + c * u * v + d * v**2
        parts = [(names[kind], rng.uniform(0.22, 0.6), 1.0)]
        parts += [("bar", rng.uniform(0.05, 0.6), 0.4) for _ in range(rng.integers(4))]
        for shape, radius, strength in parts:
            angle, place = rng.uniform(0, 2 * np.pi), rng.uniform(-1, 1, 2) * (1 - 0.8 * radius)
            x, y = (u - place[0]) / radius, (v - place[1]) / radius
            cos, sin = np.cos(angle), np.sin(angle)
            x, y = cos * x + sin * y, cos * y - sin * x
            depth = radius * SHAPES[shape](x, y, np.hypot(x, y), np.maximum(abs(x), abs(y)))
            soft = np.clip(depth / rng.uniform(0.02, 0.08) + 0.5, 0, 1)
            field = field + strength * rng.choice([-1, 1]) * rng.uniform(0.6, 2.0) * soft
        field = field + rng.uniform(0.05, 0.5) * rng.standard_normal((size, size))
        gray = rng.uniform(80, 175) + rng.uniform(20, 50) * (field - field.mean())
        image[..., 0] = np.clip(gray, 0, 255)
    return images, kinds


def pretrain(images: int, epochs: int, seed: int):
    """Train from scratch: (backbone `keras.Model`, accuracy on shapes that it has not seen)."""
    import keras

    keras.utils.set_random_seed(seed)
    backbone = keras.applications.MobileNetV3Small((SIZE, SIZE, 3), include_top=False, weights=None)
    for layer in backbone.layers:
        layer.momentum = 0.9  # of BatchNorm: at Keras's .999 its statistics would lag behind
    gray = keras.Input((SIZE, SIZE, 1))
    features = backbone(keras.layers.Concatenate()([gray, gray, gray]))
    features = keras.layers.Dropout(0.2)(keras.layers.GlobalAveragePooling2D()(features))
    model = keras.Model(gray, keras.layers.Dense(len(SHAPES))(features))
    steps = -(-images // 64) * epochs
    rate = keras.optimizers.schedules.CosineDecay(
        4e-4, steps - steps // 10, warmup_target=4e-3, warmup_steps=steps // 10
    )
    loss = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(keras.optimizers.AdamW(rate, weight_decay=1e-4), loss, metrics=["accuracy"])
    unseen = draw_shapes(max(images // 16, 36), seed + 1)
    model.fit(*draw_shapes(images, seed), 64, epochs, validation_data=unseen, verbose=2)
    return backbone, model.evaluate(*unseen, verbose=0)[1]


def save_half(model, path: Path):
    """Save the weights in float16: half the bytes; `load_weights` reads them as they are."""
    with tempfile.TemporaryDirectory() as folder:
        full, names = Path(folder) / "full.weights.h5", []
        model.save_weights(full)
        with h5py.File(full) as source, h5py.File(path, "w") as target:
            source.visit(names.append)
            for name in (name for name in names if isinstance(source[name], h5py.Dataset)):
                target[name] = source[name][()].astype(np.float16)


def main() -> None:
    parser = argparse.ArgumentParser(description="Pretrain MobileNetV3-Small on drawn shapes.")
    parser.add_argument("out", type=Path, help="file to write, NAME.weights.h5")
    for name, value in {"--images": 12_000, "--epochs": 8, "--seed": 0}.items():
        parser.add_argument(name, type=int, default=value)
    arguments = parser.parse_args()
    if not arguments.out.name.endswith(".weights.h5"):
        parser.error(f"{arguments.out}: the name must end in .weights.h5")
    backbone, accuracy = pretrain(arguments.images, arguments.epochs, arguments.seed)
    save_half(backbone, arguments.out)
    numbers = f"--images {arguments.images} --epochs {arguments.epochs} --seed {arguments.seed}"
    facts = {
        "sha256": hashlib.sha256(arguments.out.read_bytes()).hexdigest(),
        "backbone": "keras.applications.MobileNetV3Small, include_top=False, any input size",
        "held_out_accuracy": round(accuracy, 4),
        "command": f"python notebooks/pretrain_shapes.py {arguments.out.name} {numbers}",
        "license": "Apache-2.0",
    }
    arguments.out.with_suffix("").with_suffix(".json").write_text(json.dumps(facts, indent=2))
    print(f"{arguments.out}: held-out accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
