"""A killed run goes on, loses at most the epoch in hand, and ends as an undisturbed one would."""

import os
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

from utils import runs, settings

EPOCHS = 3  # of the small training below
TRAIN = """
import os, sys
from pathlib import Path
from utils import runs

folder, name, epoch, where = Path(sys.argv[1]), *sys.argv[2:]
write_atomic = runs.write_atomic

def deadly(path, write):
    hit = name in path.name and runs_done["epoch"] == int(epoch)
    if hit and where == "before":
        os._exit(9)
    def half(temporary):
        write(temporary)
        temporary.write_bytes(temporary.read_bytes()[: temporary.stat().st_size // 2])
        os._exit(9)
    write_atomic(path, half if hit and where == "inside" else write)
    if hit and where == "after":
        os._exit(9)

runs_done = {"epoch": 0}
runs.write_atomic = deadly
import keras
from tests import test_training as t
begin = t.training.EpochClock.on_epoch_begin
def note(self, epoch, logs=None):
    runs_done["epoch"] = epoch + 1
    begin(self, epoch, logs)
t.training.EpochClock.on_epoch_begin = note
model, resume = t.fit(t.a_stage(folder), 3)
runs.write_atomic = write_atomic
resume.finish()
"""


def train(folder, name="none", epoch=0, where="never"):
    command = [sys.executable, "-c", TRAIN, str(folder), name, str(epoch), where]
    return subprocess.run(command, cwd=settings.ROOT, capture_output=True, text=True)


def same_training(one, other):
    columns = ["epoch", "loss", "val_loss", "val_qwk"]
    histories = [pd.read_csv(f / "teacher.history.csv")[columns] for f in (one, other)]
    assert list(histories[0]["epoch"]) == list(range(1, EPOCHS + 1))
    pd.testing.assert_frame_equal(*histories, check_exact=True)
    import keras

    weights = [keras.saving.load_model(f / "teacher.keras").get_weights() for f in (one, other)]
    assert all(np.array_equal(a, b) for a, b in zip(*weights, strict=True))
    assert not list(other.glob("*.weights.h5"))


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    folder = tmp_path_factory.mktemp("undisturbed")
    assert train(folder).returncode == 0
    return folder


POINTS = [
    (name, where, epoch)
    for name in ("best", "history", "state")
    for where in ("before", "inside", "after")
    for epoch in (1, 2)
    if name != "best" or epoch == 1  # the second is not the best: nothing is written
]


@pytest.mark.parametrize(
    ("name", "where", "epoch"),
    [
        pytest.param(*point, marks=() if point == ("state", "inside", 1) else pytest.mark.slow)
        for point in POINTS
    ],
)
def test_a_kill_at_a_named_point(undisturbed, tmp_path, name, where, epoch):
    done = train(tmp_path, name, epoch, where)
    assert done.returncode == 9, done.stderr[-2000:]
    done = train(tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    same_training(undisturbed, tmp_path)


# --- the whole series --------------------------------------------------------------------------

SERIES = ["--profile", "test", "--only", "01,02,03,04,05,06"]
SERIES += ["-p", "PHASE_3_EPOCHS", "3", "-p", "STUDENT_EPOCHS", "4", "-p", "VIEWS", "2"]
HISTORIES = [
    *(f"teacher/phase_{phase}/teacher.history.csv" for phase in (1, 2, 3)),
    "student/student.history.csv",
    "student/labels_only.history.csv",
]


def series(out, *more, attached="nothing"):
    command = [sys.executable, "-m", "utils", "run", *SERIES, "--out", str(out), *more]
    return subprocess.Popen(
        command,
        cwd=settings.ROOT,
        env={**os.environ, "KAGGLE_INPUT_ROOT": str(attached)},
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def equal_runs(one, other):
    for name in HISTORIES:
        pair = [pd.read_csv(run / name).drop(columns="seconds") for run in (one, other)]
        pd.testing.assert_frame_equal(*pair, check_exact=True)
    pair = [pd.read_csv(run / "report/evaluation/predictions.csv") for run in (one, other)]
    pd.testing.assert_frame_equal(*pair, check_exact=True)


@pytest.fixture(scope="module")
def whole_run(tmp_path_factory):
    out = tmp_path_factory.mktemp("whole") / "run"
    began = time.time()
    process = series(out)
    assert process.wait() == 0, process.stderr.read()[-2000:]
    return out, time.time() - began


@pytest.mark.slow
def test_twenty_random_kills(whole_run, tmp_path):
    whole, seconds = whole_run
    chance, hit, run = random.Random(0), [], 0
    while len(hit) < 20:
        process = series(out := tmp_path / f"run_{run}")
        try:
            # Long enough to get past the start of a kernel, short enough for several in a run.
            status = process.wait(timeout=chance.uniform(0.02, 0.22) * seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            at = sorted(out.glob("notebooks/*.unfinished.ipynb"))
            hit.append(at[-1].name[:2] if at else "-")
        else:  # it ended before the next kill: another one begins
            assert status == 0, process.stderr.read()[-2000:]
            equal_runs(whole, out)
            run += 1
    process = series(out)
    assert process.wait() == 0, process.stderr.read()[-2000:]
    equal_runs(whole, out)
    print(f"{len(hit)} kills, in notebooks {' '.join(hit)}; {run + 1} runs")


@pytest.mark.slow
def test_the_hours_end_and_a_second_session_goes_on_from_read_only_output(whole_run, tmp_path):
    whole, seconds = whole_run
    first, second = tmp_path / "first/run", tmp_path / "second/run"
    process = series(first, "-p", "MAX_HOURS", f"{0.35 * seconds / 3600:.6f}")
    assert process.wait() == 3, process.stderr.read()[-2000:]
    for path in (first, *first.rglob("*")):
        path.chmod(0o555 if path.is_dir() else 0o444)
    before = {path: path.stat().st_mtime_ns for path in first.rglob("*")}
    process = series(second, attached=first.parent)
    assert process.wait() == 0, process.stderr.read()[-2000:]
    assert {path: path.stat().st_mtime_ns for path in first.rglob("*")} == before
    ids = [runs.read_stage(run, "02_teacher_phase_1")["id"] for run in (first, second)]
    assert ids[0] == ids[1]
    equal_runs(whole, second)


@pytest.mark.slow
def test_the_series_runs_on_jax(tmp_path):
    command = [sys.executable, "-m", "utils", "run", "--profile", "test", "--out", str(tmp_path)]
    done = subprocess.run(
        command,
        cwd=settings.ROOT,
        env={**os.environ, "KERAS_BACKEND": "jax"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "index.html").exists()
    assert list((tmp_path / "report/deploy").glob("*.tflite"))
