"""What a training sees and minimises, put together from the parameters of a run."""

from __future__ import annotations

from collections.abc import Callable

import keras
import numpy as np

from utils import data, objectives, runs, views
from utils.distillation import ViewStore, distillation_targets
from utils.schedules import Leg
from utils.training import Recipe


def class_metrics(classes: int) -> Callable[[], list[keras.metrics.Metric]]:
    """Makes accuracy and quadratic weighted kappa, anew for every compilation."""
    return lambda: [
        objectives.Accuracy(classes),
        objectives.QuadraticWeightedKappa(classes),
    ]


def teacher(stage: runs.Stage, dataset: data.Dataset, phase: int) -> Recipe:
    """The teacher's training in one of its phases, 1 to 3.

    Every phase goes on with new views where the one before it ended.
    """
    settings, classes = stage.settings, len(dataset.class_names)
    size, batch_size = settings["TEACHER_IMAGE_SIZE"], settings["BATCH_SIZE"]
    leg = Leg(
        name=f"phase {phase}",
        part=("head", "tail", "all")[phase - 1],
        epochs=settings[f"PHASE_{phase}_EPOCHS"],
        learning_rate=settings[f"PHASE_{phase}_LEARNING_RATE"],
        pretrained=settings["TEACHER_WEIGHTS"] != "none",
        unfreeze=settings.get("UNFREEZE", 0.3),
        warmup_epochs=settings["WARMUP_EPOCHS"],
        restarts=settings["RESTARTS"],
        accumulation=settings["ACCUMULATION"],
    )
    pixels = dataset.pixels("train", size)
    softening = settings["LABEL_SOFTENING"]
    targets = objectives.hard_targets(
        dataset.labels("train"), classes, softening, settings["LABEL_SMOOTHING"]
    )
    seen = sum(settings[f"PHASE_{earlier}_EPOCHS"] for earlier in range(1, phase))

    def batches(first_epoch: int):
        return views.training_batches(
            pixels,
            targets,
            batch_size=batch_size,
            epochs=leg.epochs,
            first_epoch=first_epoch,
            first_view=seen,
            **drawing(dataset),
        )

    held_out = objectives.hard_targets(dataset.labels("val"), classes, softening)
    validation = views.evaluation_batches(dataset.pixels("val", size), held_out, batch_size)
    loss = objectives.HardLoss(settings["FOCAL_GAMMA"])
    return Recipe([leg], batches, validation, loss, class_metrics(classes), batch_size)


def student(stage: runs.Stage, dataset: data.Dataset, store: ViewStore | None) -> Recipe:
    """The student's training in two legs, head first: distilled from `store`, or on labels alone.

    With `store` None the same epochs see the same views, and the loss has labels only.
    """
    settings, classes = stage.settings, len(dataset.class_names)
    size, batch_size = settings["STUDENT_IMAGE_SIZE"], settings["STUDENT_BATCH_SIZE"]
    pretrained = settings["STUDENT_WEIGHTS"] != "none"
    common = {"pretrained": pretrained, "warmup_epochs": settings["WARMUP_EPOCHS"]}
    head, whole = settings["STUDENT_HEAD_EPOCHS"], settings["STUDENT_EPOCHS"]
    legs = [
        Leg("head", "head", head, settings["STUDENT_HEAD_LEARNING_RATE"], **common),
        Leg("all", "all", whole, settings["STUDENT_LEARNING_RATE"], **common),
    ]
    pixels = dataset.pixels("train", size)
    softening = settings["STUDENT_LABEL_SOFTENING"]
    hard = {
        split: objectives.hard_targets(dataset.labels(split), classes, softening)
        for split in ("train", "val")
    }
    targets, held_out = hard["train"], hard["val"]
    loss = objectives.HardLoss(settings["FOCAL_GAMMA"])
    if store is not None:
        targets = distillation_targets(hard["train"], store)
        held_out = np.concatenate([hard["val"], store.validation()], axis=1)
        loss = objectives.DistillationLoss(
            settings["TEMPERATURE"], settings["HARD_WEIGHT"], classes, settings["FOCAL_GAMMA"]
        )

    def batches(first_epoch: int):
        return views.training_batches(
            pixels,
            targets,
            batch_size=batch_size,
            epochs=head + whole,
            first_epoch=first_epoch,
            views=settings["VIEWS"],
            **drawing(dataset),
        )

    validation = views.evaluation_batches(dataset.pixels("val", size), held_out, batch_size)
    return Recipe(legs, batches, validation, loss, class_metrics(classes), batch_size)


def drawing(dataset: data.Dataset) -> dict:
    """How images are drawn, from what 01 decided: seed, augmentation, balance."""
    return {
        "seed": dataset.seed,
        "augmentation": dataset.augmentation,
        "balance": dataset.balance,
        "labels": dataset.labels("train"),
    }
