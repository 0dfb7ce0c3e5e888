"""What goes wrong before anything expensive runs: each bad input is refused with one message that
says what, where and what to do, and nothing half-written stays behind."""

import os
import resource
import shutil
from pathlib import Path

import keras
import numpy as np
import pytest
import standins
from PIL import Image
from test_distillation import SETTINGS, make_dataset

from utils import __main__ as command_line
from utils import (
    checkpoints,
    data,
    distillation,
    evaluation,
    folders,
    models,
    parameters,
    recipes,
    runs,
    training,
)

ONE, TWO, THREE, FOUR, FIVE, SIX = runs.NOTEBOOKS
NEVER = "it runs before it is refused"


class Run:
    """A run in which every notebook is done; the cases spoil parts of it."""

    def __init__(self, folder: Path):
        self.folder = folder

    def open(self, notebook: str, **changes) -> runs.Stage:
        """Open a stage as its notebook does, with the defaults of its cell but `changes`."""
        own = dict(parameters.declared()[notebook])
        return runs.open_stage(notebook, own | {"RUN_DIR": str(self.folder)} | changes)

    def spoil(self, notebook: str, **changes) -> None:
        """Change what a stage's `stage.json` says."""
        path = self.folder / runs.FOLDERS[notebook] / "stage.json"
        runs.write_json(path, runs.read_json(path) | changes)

    def teacher(self, phase: int) -> Path:
        """The file of a phase's teacher."""
        return self.folder / f"teacher/phase_{phase}/teacher.keras"


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """All six stages closed, without having trained anything."""
    run = Run(tmp_path_factory.mktemp("finished") / "run")
    model = standins.make_model()
    for notebook in runs.NOTEBOOKS:
        stage = run.open(notebook)
        name = "student" if notebook == FIVE else "teacher"
        if notebook not in (ONE, SIX):
            models.save(model, stage.folder / f"{name}.keras")
        stage.finish()
    return run


@pytest.fixture
def run(finished, tmp_path, monkeypatch):
    """A copy of the finished run; whatever costs time is refused to run."""

    def expensive(*_, **__):
        raise AssertionError(NEVER)

    import papermill

    monkeypatch.setattr(keras.Model, "fit", expensive)
    monkeypatch.setattr(keras.Model, "predict", expensive)
    monkeypatch.setattr(papermill, "execute_notebook", expensive)
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished.folder, tmp_path / "run")
    return Run(tmp_path / "run")


def write_images(folder: Path, splits=("train", "val", "test"), classes="01", count=6, start=0):
    """Noise as `split/class/<patient>L.png`, and the folder."""
    rng = np.random.default_rng(0)
    for s, split in enumerate(splits):
        for name in classes:
            (folder / split / name).mkdir(parents=True, exist_ok=True)
            for i in range(count):
                pixels = rng.integers(0, 255, (16, 16), "uint8")
                patient = 9_000_000 + start + 1000 * s + 100 * int(name) + i
                Image.fromarray(pixels).save(folder / split / name / f"{patient}L.png")
    return folder


def read(folder: Path):
    """Notebook 01 as far as its audit."""
    table, found = folders.scan(folder)
    images, facts = folders.decode(folder, table, 16)
    facts, left_out = data.leave_out(facts)
    facts, notes = data.complete_splits(facts, 0.2, 0.2, 0)
    report = data.audit(facts, images, found, left_out, notes)
    return data.check_leaks(report)


# --- the cases, by notebook: what is done, and what must be said


def no_folder(run):
    folders.find_dataset(run.folder / "nowhere")


def no_images(run):
    (run.folder / "empty").mkdir()
    folders.find_dataset(run.folder / "empty")


def two_datasets(run):
    write_images(run.folder / "a/one")
    write_images(run.folder / "a/two")
    folders.find_dataset(run.folder / "a")


def one_class(run):
    read(write_images(run.folder / "images", classes="0"))


def empty_split(run):
    images = write_images(run.folder / "images", splits=("train", "test"))
    (images / "val/0").mkdir(parents=True)
    read(images)


def class_missing_in_train(run):
    images = write_images(run.folder / "images")
    write_images(images, splits=("test",), classes="2")
    read(images)


def unreadable_files(run):
    images = write_images(run.folder / "images")
    (images / "train/0/9000001L.png").write_bytes(b"")
    (images / "val/1/text.png").write_text("no image")
    read(images)


def leak(run):
    images = write_images(run.folder / "images")
    shutil.copy(images / "train/0/9000000L.png", images / "test/0/9000000R.png")
    read(images)


def few_patients(run):
    read(write_images(run.folder / "images", splits=("train",), count=1))


def folder_is_a_file(run):
    (run.folder / "file").write_text("")
    run.open(ONE, RUN_DIR=str(run.folder / "file"))


def full_disk(run):
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (16, limit[1]))
    try:
        run.open(ONE, RUN_DIR=str(run.folder / "new"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)


def stage_missing(run):
    shutil.rmtree(run.folder / "data")
    run.open(TWO)


def stage_unfinished(run):
    run.spoil(THREE, finished=False, stopped="teacher: 3 of 20 epochs fitted into the time.")
    run.open(FOUR)


def stage_of_another(run):
    run.spoil(TWO, id="made again")
    run.open(FOUR)


def stage_damaged(run):
    (run.folder / "teacher/phase_1/stage.json").write_text("{")
    run.open(THREE)


def data_missing(run):
    data.load(run.folder / "data")


def data_damaged(run):
    write_images(run.folder / "images")
    table, found = folders.scan(run.folder / "images")
    images, facts = folders.decode(run.folder / "images", table, 16)
    about = {"source": run.folder, "found": found, "seed": 0, "augmentation": {}, "balance": "none"}
    data.save(run.folder / "data", facts, images, **about)
    np.save(run.folder / "data/images.npy", images[:-1])
    data.load(run.folder / "data")


def other_backbone(run):
    keras.Sequential([keras.Input((4,)), keras.layers.Dense(3)]).save_weights("x.weights.h5")
    models.build_student("MobileNetV3Small", 32, 3, weights="x.weights.h5")


def weights_that_are_none(run):
    Path("x.weights.h5").write_bytes(b"no weights")
    models.build_student("MobileNetV3Small", 32, 3, weights="x.weights.h5")


def stage_05(run, **changes):
    return standins.make_stage(run.folder / "other", notebook=FIVE, **SETTINGS | changes)


def batch_too_large(run):
    stage = stage_05(run, BATCH_SIZE=100, TEACHER_IMAGE_SIZE=standins.SIZE)
    recipe = recipes.teacher(stage, make_dataset(), phase=1)
    training.train(stage, "teacher", standins.make_model(), recipe)


def train_on(run, **changes):
    """Train the stand-in on other data than it was made for."""
    dataset = make_dataset(**changes.pop("dataset", {}))
    recipe = recipes.teacher(stage_05(run, **changes), dataset, phase=1)
    training.train(stage_05(run), "teacher", standins.make_model(), recipe)


def other_classes(run):
    train_on(run, dataset={"class_names": ["0", "1", "2", "3"]})


def other_size(run):
    train_on(run, TEACHER_IMAGE_SIZE=32)


def no_room(run):
    usage = shutil.disk_usage("/")._replace(free=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: usage)
        train_on(run)


def anothers_checkpoint(run):
    path = stage_05(run).folder / "teacher.checkpoint.npz"
    checkpoints.save(path, checkpoints.Progress("another"), {})
    train_on(run)


def teacher_missing(run):
    run.teacher(1).unlink()
    run.open(THREE)
    models.load(run.teacher(1))


def teacher_damaged(run):
    run.teacher(2).write_bytes(run.teacher(2).read_bytes()[:1000])
    run.open(FOUR)
    models.load(run.teacher(2))


def look(run, teacher=None, **changes):
    dataset = make_dataset(**changes)
    about = {"image_size": standins.SIZE, "count": 2, "batch_size": 8}
    model = teacher or models.load(run.teacher(3))
    distillation.teacher_views(stage_05(run), model, run.teacher(3), dataset, **about)


def teacher_of_other_classes(run):
    look(run, class_names=["0", "1", "2", "3", "4"])


def teacher_of_another_size(run):
    image = keras.Input((32, 32, 1))
    other = keras.layers.Dense(3)(keras.layers.GlobalAveragePooling2D()(image))
    look(run, teacher=keras.Model(image, other))


def student_damaged(run):
    path = run.folder / "student/student.keras"
    path.write_bytes(b"")
    run.open(SIX)
    models.load(path, precision="float32")


def no_test_views(run):
    evaluation.test_time_parameters(0)


def five_classes(run):
    run.spoil(ONE, facts={"classes": 5})
    run.open(TWO, POSITIVE_FROM=7)


def opened(notebook, **changes):
    """A case that is refused when the notebook opens its stage."""
    return lambda run: run.open(notebook, **changes)


P, S = parameters.ParameterError, runs.StageError
CASES = [
    # 01: the images
    (no_folder, FileNotFoundError, r"DATA_DIR: no folder .*nowhere"),
    (no_images, FileNotFoundError, r"no train/<class>/<image>.*empty; searched 1 folders"),
    (two_datasets, ValueError, r"2 datasets under .*set DATA_DIR to one of: .*one.*two"),
    (one_class, ValueError, r"one class or none \(\['0'\]\)"),
    (empty_split, ValueError, r"no image in split val: fill the folder or remove it"),
    (class_missing_in_train, ValueError, r"class 2 has no image in train"),
    (unreadable_files, ValueError, r"2 of 37 images .*mend or remove them: .*9000001L.png \(empty"),
    (leak, data.LeakError, r"2 leaks.*9000000 is in .*remove those files.*or set ALLOW_LEAKS"),
    (few_patients, ValueError, r"2 patients are too few to carve"),
    (opened(ONE, STORED_SIZE=16), P, r"STORED_SIZE = 16 must be at least 32"),
    (opened(ONE, VAL_FRACTION=0.0), P, r"VAL_FRACTION = 0.0 must be above 0"),
    (opened(ONE, ROTATION=float("nan")), P, r"ROTATION = nan is not a finite number"),
    (opened(ONE, SEDE=1), P, r"SEDE is no parameter of any notebook. Did you mean SEED"),
    (opened(ONE, RUN_DIR=""), P, r"RUN_DIR = '' must be the name of a folder"),
    (folder_is_a_file, P, r"RUN_DIR: .*/file is a file, no folder"),
    (full_disk, OSError, r"new/data/stage.json cannot be written .*Make room or choose another"),
    # 02: the teacher, from nothing
    (stage_missing, S, r"has no data: run notebook 01_data first"),
    (data_missing, FileNotFoundError, r"no dataset.json in .*data: run notebook 01_data"),
    (
        data_damaged,
        ValueError,
        r"35 images, but 36 rows in the manifest; run notebook 01_data",
    ),
    (opened(TWO, TEACHER_IMAGE_SIZE=50), P, r"TEACHER_IMAGE_SIZE = 50 must be a multiple of 32"),
    (
        opened(TWO, TEACHER_IMAGE_SIZE=96),
        P,
        r"but notebook 01 stored 64 px: lower it, or run 01",
    ),
    (opened(TWO, TEACHER_BACKBONE="ResNet50"), P, r"must be one of 'EfficientNetV2B0', "),
    (opened(TWO, TEACHER_WEIGHTS="gone.h5"), P, r"'gone.h5' must be .*a weights file that exists"),
    (opened(TWO, PHASE_1_EPOCHS=-3), P, r"PHASE_1_EPOCHS = -3 must be at least 1"),
    (opened(TWO, PHASE_1_LEARNING_RATE="1e-3"), P, r"is str, wanted float.*with a point.*1\.0e-3"),
    (opened(TWO, BATCH_SIZE=0), P, r"BATCH_SIZE = 0 must be at least 1"),
    (opened(TWO, JIT_COMPILE="yes"), P, r"JIT_COMPILE = 'yes' must be one of 'auto', True, False"),
    (opened(TWO, MAX_HOURS=0.0), P, r"MAX_HOURS = 0.0 must be above 0"),
    (batch_too_large, ValueError, r"24 training images do not fill one batch of 100: lower it"),
    (
        other_backbone,
        ValueError,
        r"x.weights.h5 does not fit the backbone.*choose the file's",
    ),
    (weights_that_are_none, ValueError, r"x.weights.h5 does not fit the backbone"),
    # 03 and 04: the teacher, from where it was
    (opened(THREE, UNFREEZE=0.0), P, r"UNFREEZE = 0.0 must be above 0"),
    (
        teacher_missing,
        FileNotFoundError,
        r"No model file .*phase_1/teacher.keras: run the note",
    ),
    (stage_damaged, S, r"phase_1/stage.json is damaged .*move it away and run its notebook"),
    (
        other_classes,
        ValueError,
        r"teacher tells 3 classes apart, .* 4 columns.*Run note",
    ),
    (other_size, ValueError, r"takes images of \(16, 16, 1\), the data are \(32, 32, 1\)"),
    (no_room, OSError, r"No room to train: .*0.0 GB are free. Free some, or choose another RUN_D"),
    (anothers_checkpoint, S, r"belongs to another run .*Move it away, or choose another RUN_DIR"),
    (
        stage_unfinished,
        S,
        r"03_teacher_phase_2 is unfinished.*3 of 20 .*Run 03.* again",
    ),
    (
        stage_of_another,
        S,
        r"phase_2 was made from another 02.*run notebook 03_teacher",
    ),
    (
        teacher_damaged,
        ValueError,
        r"phase_2/teacher.keras cannot be read .*make it again",
    ),
    # 06's question, before the teacher trains
    (five_classes, P, r"POSITIVE_FROM = 7 \(notebook 06\), but the classes run from 0 to 4"),
    # 05: the student
    (opened(FIVE, VIEWS=0), P, r"VIEWS = 0 must be at least 1"),
    (opened(FIVE, VIEWS=500), P, r"VIEWS = 500, but the student trains \d+ .*Set VIEWS to \d"),
    (opened(FIVE, TEMPERATURE=0.0), P, r"TEMPERATURE = 0.0 must be above 0"),
    (opened(FIVE, HARD_WEIGHT=30), P, r"HARD_WEIGHT = 30 must be at least 0, at most 1"),
    (opened(FIVE, STUDENT_IMAGE_SIZE=96), P, r"STUDENT_IMAGE_SIZE = 96, but notebook 01 stored 64"),
    (
        teacher_of_other_classes,
        ValueError,
        r"teacher tells 3 classes apart, the data have 5.*02 to",
    ),
    (teacher_of_another_size, ValueError, r"takes images of 32 px, not of 16: give the teacher's"),
    # 06: the evaluation
    (opened(SIX, TEST_VIEWS=0), P, r"TEST_VIEWS = 0 must be at least 1"),
    (opened(SIX, DECISION="median"), P, r"DECISION = 'median' must be one of 'argmax', 'qwk'"),
    (opened(SIX, TARGET_ACCURACY=85), P, r"TARGET_ACCURACY = 85 must be at least 0, at most 1"),
    (no_test_views, ValueError, r"TEST_VIEWS is 0: at least one view"),
    (student_damaged, ValueError, r"student.keras cannot be read as a model .*make it again"),
]


def named(case):
    if case.__name__ != "<lambda>":
        return case.__name__
    notebook, changes = (cell.cell_contents for cell in reversed(case.__closure__))
    return f"{notebook[:2]} {' '.join(f'{n}={v}' for n, v in changes.items())}"


@pytest.mark.parametrize(("case", "kind", "said"), CASES, ids=[named(c[0]) for c in CASES])
def test_a_bad_input_is_refused_before_it_costs_anything(run, case, kind, said):
    with pytest.raises(kind, match=f"(?s){said}") as caught:
        case(run)
    assert NEVER not in str(caught.value)
    message = str(caught.value)
    assert len(message.splitlines()) <= 12 and len(message) < 900
    left = [p for p in run.folder.parent.rglob(".*") if p.name != ".cache"]
    assert not left, "half-written"


@pytest.mark.skipif(not Path("/proc/version").exists(), reason="no folder that nobody may write to")
def test_a_run_folder_that_cannot_be_made_is_refused_for_root_too(run):
    with pytest.raises(OSError, match=r"/proc/runs.*cannot be written.*choose another RUN_DIR"):
        run.open(ONE, RUN_DIR="/proc/runs")


def test_a_run_folder_that_is_read_only_is_refused_when_a_stage_is_taken_up(run, monkeypatch):
    """Not after the first epoch, which is the first time that it would be written to again."""
    run.spoil(FOUR, finished=False)

    def read_only(*_, **__):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "fsync", read_only)
    with pytest.raises(OSError, match=r"phase_3/stage.json cannot be written \(Read-only file sys"):
        run.open(FOUR)


COMMANDS = [
    (["run", "--profile", "nowhere"], 2, "No profile 'nowhere'"),
    (["run", "--data", "nowhere"], 2, "There is no folder"),
    (["run", "--only", "07"], 2, "no notebook begins with 07"),
    (["run", "--only", "03"], 1, "run notebook 01_data first"),
    (["run", "-p", "SEDE", "1"], 2, "Did you mean SEED"),
    (["run", "-p", "PHASE_3_EPOCHS", "-1"], 2, "PHASE_3_EPOCHS = -1 must be at least 1"),
    (["run", "-p", "VIEWS", "0"], 2, "VIEWS = 0 must be at least 1"),
    (["run", "-p", "TEMPERATURE", ".nan"], 2, "TEMPERATURE = nan is not a finite number"),
    (["run", "-p", "STUDENT_WEIGHTS", "gone.h5"], 2, "a weights file that exists"),
    (["run", "-p", "STUDENT_LEARNING_RATE", "3e-4"], 2, "3.0e-4"),
    (["run", "-p", "STUDENT_BACKBONE", "ResNet50"], 2, "must be one of"),
    (["grade", "nowhere.png"], 2, "There is no file or folder nowhere.png"),
    (["grade", "--model", "gone.keras", "knee.png"], 2, "No model file gone.keras"),
    (["kaggle", "--user", "Jane Doe", "--data", "x/y"], 2, "--user 'Jane Doe'"),
]


@pytest.mark.parametrize(
    ("arguments", "status", "said"), COMMANDS, ids=[" ".join(c[0]) for c in COMMANDS]
)
def test_the_command_line_refuses_in_one_screen(run, capsys, arguments, status, said):
    Path("knee.png").write_bytes(b"")
    before = files(run.folder.parent)
    if arguments[0] == "run":
        arguments = [*arguments, "--out", str(run.folder / "new")]
    assert command_line.main(arguments) == status
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and len(error.splitlines()) <= 12
    assert files(run.folder.parent) == before


def files(folder: Path) -> list[Path]:
    """Every file below a folder."""
    return sorted(p for p in folder.rglob("*") if p.is_file())
