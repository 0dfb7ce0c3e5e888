"""What distillation gives a student, over seeds, on the data and the teacher of a finished run.

By hand: `python -m tests.distillation_trial RUN_DIR STUDENT_WEIGHTS OUT.json`, with the student's
pixels, epochs, rate and seeds as options. Every arm has the same student from the same pretrained
weights, epochs, images and schedule; a seed changes the head's first weights, dropout and order.
"online" looks at a new view in every epoch, which is what `keras.distillation.Distiller` does.
Each student's answers are kept beside OUT.json and taken up again, so that a run cut short goes on,
and seeds can run side by side. Val only.
"""

import argparse
import dataclasses
from pathlib import Path

import keras
import numpy as np

from utils import data, distillation, metrics, models, objectives, recipes, runs, views
from utils.schedules import Leg, make_optimizer


@dataclasses.dataclass(frozen=True)
class Arm:
    """How a student is taught: softening of its labels, views, temperature, weight of the labels.

    With `views` None the labels teach alone.
    """

    softening: float = 0.0
    views: int | None = None
    temperature: float = 4.0
    hard_weight: float = 0.3


def arms(epochs: int) -> dict[str, Arm]:
    """The arms, those first that matter most."""
    return {
        "labels": Arm(),
        "stored views": Arm(views=4),
        "online": Arm(views=epochs),
        "labels, softened": Arm(softening=0.6),
        "stored views, softened labels": Arm(softening=0.6, views=4),
        "eight views": Arm(views=8),
        "online, no labels": Arm(views=epochs, hard_weight=0.0),
        "one view": Arm(views=1),
        "stored views, T 2": Arm(views=4, temperature=2.0),
        "stored views, no labels": Arm(views=4, hard_weight=0.0),
    }


def teacher_says(teacher, dataset: data.Dataset, count: int, folder: Path) -> list[np.ndarray]:
    """The teacher's logits for views 0 to count - 1, kept in `folder`: float32 (n, K) each."""
    size = teacher.input_shape[1]
    pixels, folder = dataset.pixels("train", size), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    said = []
    for view in range(count):
        path = folder / f"view_{view:04d}.npy"
        logits = distillation.read_view(path, len(pixels))
        if logits is None:
            logits = distillation.look(teacher, pixels, (view, dataset), 32)
            distillation.save_array(path, logits)
            print(f"view {view + 1} of {count}", flush=True)
        said.append(logits)
    return said


def student_of(
    arm: Arm,
    dataset: data.Dataset,
    said: list[np.ndarray],
    *,
    seed: int,
    weights: str,
    side: int,
    epochs: int,
    rate: float = 1e-4,
    warmup: int = 1,
    batch_size: int = 32,
) -> dict:
    """Train one student: val logits of its last and its best epoch, and QWK epoch by epoch."""
    classes, pretrained = len(dataset.class_names), weights != "none"
    student = models.build_student(
        "MobileNetV3Small", side, classes=classes, weights=weights, seed=seed
    )
    keras.utils.set_random_seed(seed)
    hard = objectives.hard_targets(dataset.labels("train"), classes, arm.softening)
    targets, loss = hard, objectives.HardLoss()
    if arm.views:
        loss = objectives.DistillationLoss(arm.temperature, arm.hard_weight, classes)

        def targets(view):
            return np.concatenate([hard, said[view]], axis=1)

    pixels, held_out = dataset.pixels("train", side), dataset.pixels("val", side)
    labels, kappas, best = dataset.labels("val"), [], None
    legs = [
        Leg("head", "head", 1, 1e-3, pretrained),
        Leg("all", "all", epochs - 1, rate, pretrained, warmup_epochs=warmup),
    ]
    for leg, first in zip(legs, (0, 1), strict=True):
        batches, steps = views.training_batches(
            pixels,
            targets,
            batch_size=batch_size,
            epochs=first + leg.epochs,
            first_epoch=first,
            views=arm.views or 4,
            order_seed=seed,
            **recipes.drawing(dataset),
        )
        models.set_trainable(student, leg.part, pretrained=pretrained)
        student.compile(make_optimizer(leg, steps), loss, jit_compile=False)
        stream = iter(batches)
        for _ in range(leg.epochs):
            for _ in range(steps):
                student.train_on_batch(*next(stream))
            logits = student.predict(views.evaluation_batches(held_out), verbose=0)
            kappas.append(float(scores(labels, logits)["qwk"]))
            if kappas[-1] == max(kappas):
                best = logits
    return {"qwk_by_epoch": kappas, "last": logits, "best": best}


def scores(labels, logits) -> dict:
    """Accuracy and quadratic weighted kappa of logits (n, K)."""
    return metrics.figures(labels, distillation.soften(logits, 1.0), logits.argmax(axis=1))


def compare(kept: dict, dataset) -> dict:
    """Mean and spread over seeds by arm; differences, paired on images and seeds, by patient.

    The interval of a difference resamples patients; the students of all seeds are averaged in it.
    """
    labels = dataset.labels("val")
    drawn = metrics.resample(len(labels), dataset.patients("val"))
    found, evaluations = {}, {}
    for arm, students in kept.items():
        found[arm] = {}
        for which in ("last", "best"):
            each = [scores(labels, s[which]) for s in students]
            for figure in ("accuracy", "qwk"):
                found[arm][f"{which}_{figure}"] = [float(e[figure]) for e in each]
        evaluations[arm] = [
            metrics.evaluate(
                labels, distillation.soften(s["last"], 1.0), s["last"].argmax(axis=1), drawn
            )
            for s in students
        ]
        found[arm]["qwk_by_epoch"] = [list(map(float, s["qwk_by_epoch"])) for s in students]
    for arm in kept:
        for figure in ("accuracy", "qwk"):
            pairs = list(zip(evaluations[arm], evaluations["labels"], strict=False))
            gaps = np.mean([a.samples[figure] - b.samples[figure] for a, b in pairs], axis=0)
            gap = np.mean([a.figures[figure] - b.figures[figure] for a, b in pairs])
            low, high = metrics.interval(gaps)
            found[arm][f"last_{figure}_over_labels"] = [float(gap), float(low), float(high)]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("student_weights")
    parser.add_argument("out", type=Path)
    parser.add_argument("--side", type=int, default=128)
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--rate", type=float, default=1e-4)
    parser.add_argument("--warmup", type=int, default=1)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="*")
    asked = parser.parse_args()
    dataset = data.load(asked.run_dir / "data")
    chosen = {k: v for k, v in arms(asked.epochs).items() if not asked.arms or k in asked.arms}
    teacher = models.load(asked.run_dir / "teacher/phase_3/teacher.keras")
    count = max(arm.views or 0 for arm in chosen.values())
    said = teacher_says(teacher, dataset, count, asked.out.parent / "views")
    kept, settings = {}, {k: str(v) for k, v in vars(asked).items()}
    for seed in asked.seeds:
        for name, arm in chosen.items():
            path = asked.out.parent / f"{name}, seed {seed}.npz"
            if not path.exists():
                one = student_of(
                    arm,
                    dataset,
                    said,
                    seed=seed,
                    weights=asked.student_weights,
                    side=asked.side,
                    epochs=asked.epochs,
                    rate=asked.rate,
                    warmup=asked.warmup,
                )
                np.savez(path, **one)
            one = dict(np.load(path))
            kept.setdefault(name, []).append(one)
            course = " ".join(f"{kappa:.3f}" for kappa in one["qwk_by_epoch"])
            accuracy = scores(dataset.labels("val"), one["last"])["accuracy"]
            print(f"{name}, seed {seed}: {accuracy:.3f}, QWK {course}", flush=True)
    runs.write_json(asked.out, compare(kept, dataset) | {"setting": settings})


if __name__ == "__main__":
    main()
