"""A leg of a training: what trains, for how long, and how fast."""

from __future__ import annotations

from dataclasses import dataclass

import keras
import numpy as np
from keras.optimizers import AdamW, LossScaleOptimizer

from utils import devices


@dataclass(frozen=True)
class Leg:
    """Epochs that share what trains and how fast.

    Attributes:
        name: shown in the history.
        part: what trains: "head", "tail" (the last `unfreeze` of the backbone too) or "all".
        epochs: how many.
        learning_rate: the peak rate of AdamW.
        pretrained: whether the backbone came with weights; else everything trains always.
        unfreeze: share of the backbone's layers that "tail" trains.
        warmup_epochs: epochs of linear warm-up, at most half of the leg.
        restarts: how often the cosine starts anew (Loshchilov & Hutter 2017); 0 for a single one.
        weight_decay: AdamW's, on kernels only.
        accumulation: batches whose gradients are added up before a step (one device only).
    """

    name: str
    part: str
    epochs: int
    learning_rate: float
    pretrained: bool
    unfreeze: float = 0.3
    warmup_epochs: int = 0
    restarts: int = 0
    weight_decay: float = 1e-4
    accumulation: int = 1


@keras.saving.register_keras_serializable("knee_distillation")
class WarmUpCosine(keras.optimizers.schedules.LearningRateSchedule):
    """Linear warm-up, then cosine decay to 1 % of the peak, started anew `restarts` times.

    All cycles are equally long and the peak shrinks by 0.8 with each (Loshchilov & Hutter 2017,
    "SGDR"). Takes the step number, gives a float32 rate.
    """

    def __init__(self, peak: float, steps: int, warmup_steps: int = 0, restarts: int = 0):
        self.peak, self.steps = peak, steps
        self.warmup_steps, self.restarts = warmup_steps, restarts

    def __call__(self, step):
        step = keras.ops.cast(step, "float32")
        cycle_steps = max(1.0, (self.steps - self.warmup_steps) / (self.restarts + 1))
        position = keras.ops.maximum(step - self.warmup_steps, 0.0) / cycle_steps
        cycle = keras.ops.minimum(keras.ops.floor(position), float(self.restarts))
        part = keras.ops.minimum(position - cycle, 1.0)
        cosine = 0.5 * (1.0 + keras.ops.cos(np.pi * part))
        rate = self.peak * keras.ops.power(0.8, cycle) * (0.01 + 0.99 * cosine)
        warm = self.peak * (step + 1.0) / max(1, self.warmup_steps)
        return keras.ops.where(step < self.warmup_steps, warm, rate)

    def get_config(self):
        return {n: getattr(self, n) for n in ("peak", "steps", "warmup_steps", "restarts")}


def make_schedule(leg: Leg, steps: int) -> WarmUpCosine:
    """The learning rate of a leg of `steps` batches an epoch."""
    updates = max(1, steps // leg.accumulation)
    warmup = min(leg.warmup_epochs, leg.epochs / 2) * updates
    return WarmUpCosine(leg.learning_rate, leg.epochs * updates, int(warmup), leg.restarts)


def make_optimizer(
    leg: Leg, steps: int, *, float16: bool = False, replicas: int = 1
) -> keras.optimizers.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) for one leg of `steps` batches an epoch.

    float16: whether the loss is scaled, by Keras's own `LossScaleOptimizer`.
    replicas: how many devices share the batch.
    """
    shared = replicas > 1
    kind = (devices.PlainAdamW if float16 else devices.SharedAdamW) if shared else AdamW
    optimizer = kind(
        make_schedule(leg, steps),
        weight_decay=leg.weight_decay,
        global_clipnorm=1.0,
        gradient_accumulation_steps=leg.accumulation if leg.accumulation > 1 else None,
    )
    optimizer.exclude_from_weight_decay(var_names=["bias", "gamma", "beta"])
    if not float16:
        return optimizer
    return (devices.SharedLossScale if shared else LossScaleOptimizer)(optimizer)


def rates(leg: Leg, steps: int) -> np.ndarray:
    """The learning rate at every update of a leg of `steps` batches an epoch: float (updates,)."""
    schedule = make_schedule(leg, steps)
    return keras.ops.convert_to_numpy(schedule(np.arange(schedule.steps)))
