"""A distillation carried out in two ways, to be timed side by side: stored views, and online.

Compilation is left out for both alike: whatever is timed has run once before.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import keras
import numpy as np

from utils import checkpoints, data, distillation, objectives, recipes, views
from utils.schedules import Leg, make_optimizer


def cost_ratio(epochs, views, teacher_pass, student_epoch, students=1) -> float:
    """E(T + S) / (V·T + E·S): how many times dearer it is to ask the teacher in every epoch.

    With several students the store of views is made once. T and S in any one unit of time.
    """
    online = students * epochs * (teacher_pass + student_epoch)
    return online / (views * teacher_pass + students * epochs * student_epoch)


@dataclass(frozen=True)
class Setting:
    """One distillation that both ways carry out.

    Attributes:
        dataset: whose train split is learnt and whose val split is scored.
        teacher: trained; gives logits.
        student: makes a student, alike at every call.
        epochs, views: E and V.

    Raises:
        ValueError: images that do not fill whole batches; an epoch would leave the rest out.
    """

    dataset: data.Dataset
    teacher: keras.Model
    student: Callable[[], keras.Model]
    epochs: int
    views: int
    batch_size: int = 32
    temperature: float = 4.0
    hard_weight: float = 0.3
    learning_rate: float = 3e-3

    def __post_init__(self):
        count = len(self.dataset.rows("train"))
        if count % self.batch_size:
            raise ValueError(
                f"{count} training images do not fill batches of {self.batch_size}: the teacher "
                "would look at images that no epoch trains on. Change either number."
            )

    @property
    def hard(self) -> np.ndarray:
        """One-hot labels of the train split: float32 (n, K)."""
        return objectives.hard_targets(self.dataset.labels("train"), len(self.dataset.class_names))

    def batches(self, size: int, targets, views_used: int | None):
        """Training batches of all epochs at `size` px, and steps an epoch."""
        return views.training_batches(
            self.dataset.pixels("train", size),
            targets,
            batch_size=self.batch_size,
            epochs=self.epochs,
            views=views_used,
            **recipes.drawing(self.dataset),
        )

    def optimizer(self, steps: int) -> keras.optimizers.Optimizer:
        """The same for both ways."""
        leg = Leg("all", "all", self.epochs, self.learning_rate, pretrained=False, warmup_epochs=1)
        return make_optimizer(leg, steps)


class Clock(keras.callbacks.Callback):
    """Notes the seconds of every epoch."""

    def __init__(self):
        super().__init__()
        self.seconds = []

    def on_epoch_begin(self, epoch, logs=None):
        self.began = time.perf_counter()

    def on_epoch_end(self, epoch, logs=None):
        self.seconds.append(time.perf_counter() - self.began)


class Way:
    """A compiled model that trains on demand, always from the same start."""

    def begin(self, model: keras.Model, batches, steps: int) -> None:
        """Run one step, so that all is compiled, and put everything back."""
        self.model, self.steps = model, steps
        model.optimizer.build(model.trainable_variables)
        self.start = self.state()
        model.fit(batches, epochs=1, steps_per_epoch=1, shuffle=False, verbose=0)
        self.reset()

    def variables(self):
        return self.model.variables, self.model.optimizer.variables

    def state(self) -> list:
        """Weights and optimizer as they are."""
        return [checkpoints.arrays_of(variables) for variables in self.variables()]

    def reset(self, state: list | None = None) -> None:
        """Back to a state, or to that of the start."""
        for variables, arrays in zip(self.variables(), state or self.start, strict=True):
            checkpoints.assign(variables, arrays, "start")

    def fit(self, batches, epochs: int) -> list[float]:
        """Seconds of each epoch."""
        clock = Clock()
        fixed = {"steps_per_epoch": self.steps, "shuffle": False, "verbose": 0}
        self.model.fit(batches, epochs=epochs, callbacks=[clock], **fixed)
        return clock.seconds

    def prepare(self) -> None:
        """What must be done before the first epoch."""

    def run(self) -> dict[str, float]:
        """Carry out the whole distillation.

        Returns:
            Seconds: `{whole, before, first_epoch, other_epochs, around}`. The first epoch also
            starts the input; `around` is what `fit` does beside its epochs.
        """
        self.reset()
        began = time.perf_counter()
        self.prepare()
        before = time.perf_counter() - began
        first, *others = self.fit(self.batches()[0], self.setting.epochs)
        whole = time.perf_counter() - began
        parts = {"before": before, "first_epoch": first, "other_epochs": sum(others)}
        return {"whole": whole, **parts, "around": whole - sum(parts.values())}


class StoredViews(Way):
    """This project's way: the teacher looks at V views once, the student trains on its logits."""

    def __init__(self, setting: Setting, folder: Path):
        self.setting = setting
        self.side = setting.teacher.input_shape[1]
        count = len(setting.dataset.rows("train"))
        self.store = distillation.ViewStore(Path(folder), setting.views, count)
        self.student = setting.student()
        self.look(0)
        for view in range(1, setting.views):  # a stand-in until `run`
            distillation.save_array(self.store.path(view), self.store.logits(0))
        batches, steps = self.batches()
        loss = objectives.DistillationLoss(
            setting.temperature, setting.hard_weight, setting.hard.shape[1]
        )
        self.student.compile(setting.optimizer(steps), loss, auto_scale_loss=False)
        self.begin(self.student, batches, steps)

    def batches(self):
        """Batches with labels and stored logits, and steps an epoch."""
        targets = distillation.distillation_targets(self.setting.hard, self.store)
        return self.setting.batches(self.student.input_shape[1], targets, self.setting.views)

    def look(self, view: int) -> None:
        """A teacher pass: one view of all training images, stored."""
        setting = self.setting
        pixels = setting.dataset.pixels("train", self.side)
        seen = (view, setting.dataset)
        logits = distillation.look(setting.teacher, pixels, seen, setting.batch_size)
        distillation.save_array(self.store.path(view), logits)

    def pace(self, epochs: int = 5) -> tuple[float, float]:
        """Seconds of a teacher pass and of a student epoch, each alone; leaves no trace."""
        held, began = self.state(), time.perf_counter()
        self.look(0)
        look = time.perf_counter() - began
        self.reset()
        seconds = self.fit(self.batches()[0], min(epochs + 1, self.setting.epochs))
        self.reset(held)
        return look, float(np.mean(seconds[1:]))  # a sum of epochs follows the mean

    def prepare(self) -> None:
        """V looks."""
        for view in range(self.setting.views):
            self.look(view)


class Online(Way):
    """Keras's way: `keras.distillation.Distiller` asks the teacher about every batch.

    It hands one input to both models, so the images have the teacher's size and the student stands
    behind average pooling. The loss is the right one: logits, softened once, and a loss *instance*
    (by the default name the probabilities would not be made).
    """

    def __init__(self, setting: Setting):
        self.setting = setting
        inside, side = setting.student(), setting.teacher.input_shape[1]
        image = keras.Input((side, side, 1), name="image", dtype="float32")
        pool = keras.layers.AveragePooling2D(side // inside.input_shape[1])
        self.student = keras.Model(image, inside(pool(image)), name="student_behind_pooling")
        soft = keras.distillation.LogitsDistillation(
            setting.temperature, keras.losses.KLDivergence()
        )
        model = keras.distillation.Distiller(
            setting.teacher, self.student, soft, student_loss_weight=setting.hard_weight
        )
        batches, steps = self.batches()
        hard = keras.losses.CategoricalCrossentropy(from_logits=True)
        model.compile(setting.optimizer(steps), hard, auto_scale_loss=False)
        self.begin(model, batches, steps)

    def batches(self):
        """Batches with labels alone, every epoch a new view, and steps an epoch."""
        return self.setting.batches(self.setting.teacher.input_shape[1], self.setting.hard, None)
