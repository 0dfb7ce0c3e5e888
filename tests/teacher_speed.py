"""Images a second of the teacher's training step and of its inference, on JAX.

By hand, where JAX has a GPU: `KERAS_BACKEND=jax python -m tests.teacher_speed mixed_float16 8`,
with the matmul precision as an option ("highest" keeps float32 from becoming TF32). One JSON line.
The models are pure Keras, so that no TensorFlow is needed; compiling the full size takes minutes.
"""

import argparse
import json
import time

import jax
import keras
import numpy as np

from utils import models, objectives

CLASSES, WARM_UP = 5, 5


def programs(model, batch: int):
    """Training step and inference, compiled, with the state and one batch of random images."""
    scaled = any(layer.compute_dtype == "float16" for layer in model.layers)
    optimizer = keras.optimizers.AdamW(1.5e-4, weight_decay=1e-4, global_clipnorm=1.0)
    optimizer = keras.optimizers.LossScaleOptimizer(optimizer) if scaled else optimizer
    optimizer.build(model.trainable_variables)
    generator, hard = np.random.default_rng(0), objectives.HardLoss()
    images = generator.integers(0, 256, (batch, *model.input_shape[1:])).astype("float32")
    targets = objectives.hard_targets(generator.integers(0, CLASSES, batch), CLASSES, 0.6)

    def loss_of(weights, other, slots, images, targets):
        logits, other = model.stateless_call(weights, other, images, training=True)
        loss = to_descend = hard.call(targets, logits).mean()
        if scaled:
            with keras.StatelessScope(list(zip(optimizer.variables, slots, strict=True))):
                to_descend = optimizer.scale_loss(loss)
        return to_descend, (other, loss)

    def step(weights, other, slots, images, targets):
        down = jax.value_and_grad(loss_of, has_aux=True)
        (_, (other, loss)), gradients = down(weights, other, slots, images, targets)
        weights, slots = optimizer.stateless_apply(slots, gradients, weights)
        return weights, other, slots, loss

    def infer(weights, other, images):
        return model.stateless_call(weights, other, images, training=False)[0]

    parts = (model.trainable_variables, model.non_trainable_variables, optimizer.variables)
    state = [[jax.numpy.array(one.value, copy=True) for one in part] for part in parts]
    data = jax.device_put(images), jax.device_put(targets)
    train = jax.jit(step, donate_argnums=(0, 1, 2)).lower(*state, *data).compile()
    return train, jax.jit(infer).lower(*state[:2], data[0]).compile(), state, data


def seconds(call, times: int) -> list[float]:
    """How long each of `times` calls takes until its result is there, after a warm-up."""
    taken = []
    for _ in range(WARM_UP + times):
        start = time.perf_counter()
        jax.block_until_ready(call())
        taken.append(time.perf_counter() - start)
    return taken[WARM_UP:]


def measure(model, batch: int, steps: int) -> dict:
    """Medians over `steps` training steps and twice as many batches of inference."""
    start = time.perf_counter()
    train, infer, state, (images, targets) = programs(model, batch)
    compiled, losses = time.perf_counter() - start, []

    def one_step():
        *state[:], loss = train(*state, images, targets)
        losses.append(loss)
        return loss

    trained = seconds(one_step, steps)
    inferred = seconds(lambda: infer(*state[:2], images), 2 * steps)
    memory = jax.devices()[0].memory_stats() or {}
    return {
        "device": jax.devices()[0].device_kind,
        "compiling, s": round(compiled),
        "training, images a second": round(batch / float(np.median(trained)), 1),
        "training, ms, quartiles": [round(q, 1) for q in 1e3 * np.quantile(trained, [0.25, 0.75])],
        "inference, images a second": round(batch / float(np.median(inferred)), 1),
        "peak GiB": round(memory.get("peak_bytes_in_use", 0) / 2**30, 1),
        "losses finite": bool(np.isfinite(losses).all()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("precision", choices=["float32", "mixed_float16", "mixed_bfloat16"])
    parser.add_argument("batch", type=int)
    parser.add_argument("--matmul", choices=["default", "highest"], default="default")
    parser.add_argument("--backbone", default="EfficientNetV2M")
    parser.add_argument("--size", type=int, default=384)
    parser.add_argument("--steps", type=int, default=30)
    asked = parser.parse_args()
    if keras.backend.backend() != "jax":
        parser.error(f"the backend is {keras.backend.backend()}: set KERAS_BACKEND=jax")
    jax.config.update("jax_default_matmul_precision", asked.matmul)
    model = models.build_teacher(
        asked.backbone, asked.size, CLASSES, weights="none", precision=asked.precision
    )
    models.set_trainable(model, "all", pretrained=False)
    print(json.dumps(vars(asked) | measure(model, asked.batch, asked.steps)))


if __name__ == "__main__":
    main()
