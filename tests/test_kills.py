"""Killed at any moment (SIGKILL, as by a power cut), a training ends as if nothing had been.

The harness over the whole series takes long and is off by default: `pytest -m slow`.
"""

import contextlib
import json
import os
import random
import re
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pandas as pd
import psutil
import pytest
import yaml
from standins import without_times

from utils import parameters, runs

# One process imports TensorFlow and splits off a life for every kill, so that each life is short.
LIVES = """
import json, os, random, signal, sys
from pathlib import Path
import numpy as np
import standins
from utils import checkpoints, models, runs, training
folder, points = Path(sys.argv[1]), json.loads(sys.argv[2])

def die():
    os.kill(os.getpid(), signal.SIGKILL)

def dies(function, on, before=True, half=False):
    # `function`, which ends the process before or after its call number `on`.
    calls = [0]
    def run(*arguments, **options):
        calls[0] += 1
        if calls[0] == on and half:
            file = arguments[0]
            file.write(b"PK half a checkpoint")
            file.flush()
        if calls[0] == on and before:
            die()
        result = function(*arguments, **options)
        if calls[0] == on:
            die()
        return result
    return run

def one_life(point):
    import keras, tensorflow as tf
    tf.config.experimental.enable_op_determinism()
    stage = standins.make_stage(folder)
    if point == "while a checkpoint is written":
        np.savez = dies(np.savez, 1, half=True)
    elif point == "between the two names of a checkpoint":
        Path.replace = dies(Path.replace, 2, before=False)  # its first is the history's or older
    elif point == "in the midst of an epoch":
        Keeper = training.Keeper
        Keeper.on_train_batch_end = dies(Keeper.on_train_batch_end, 5)
    elif point == "before the model is saved":
        models.save = dies(models.save, 1)
    elif point == "before the stage knows of the model":
        type(stage).write = dies(type(stage).write, 1)
    elif point == "before the checkpoints are removed":
        checkpoints.remove = dies(checkpoints.remove, 1)
    elif point == "damage":
        files = sorted(stage.folder.glob("teacher.checkpoint*.npz"))
        for file in files[:1]:
            file.write_bytes(file.read_bytes()[: file.stat().st_size // 3])
        return
    recipe = standins.make_recipe(standins.make_legs(1, 2))
    training.train(stage, "teacher", standins.make_model(), recipe)

ends = {}
for point in points:
    life = os.fork()
    if not life:
        one_life(point)
        sys.stdout.flush()
        os._exit(0)
    _, status = os.waitpid(life, 0)
    ends[point] = os.WTERMSIG(status) if os.WIFSIGNALED(status) else os.WEXITSTATUS(status)
    left = len(list((folder / "teacher/phase_1").glob(".*.tmp*")))
    print(point, "->", ends[point], "temporary files left:", left, flush=True)
print(json.dumps(ends))
"""
POINTS = [
    "while a checkpoint is written",
    "in the midst of an epoch",
    "between the two names of a checkpoint",
    "damage",
    "before the model is saved",
    "before the stage knows of the model",
    "before the checkpoints are removed",
]


def live(folder, points):
    """Lives that end at `points`; how each ended: 9 for a kill, 0 for its own end."""
    done = subprocess.run(
        [sys.executable, "-c", LIVES, str(folder), json.dumps(points)],
        env=os.environ | {"PYTHONPATH": f"{runs.root()}:{runs.root() / 'tests'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
    return done.stdout, json.loads(done.stdout.splitlines()[-1])


def weights_of(path):
    """All weights of a saved model."""
    import keras

    return keras.saving.load_model(path, compile=False).get_weights()


def test_killed_at_the_worst_points_a_training_ends_the_same(tmp_path):
    _, ends = live(tmp_path / "whole", ["never"])
    assert ends == {"never": 0}
    out, ends = live(tmp_path / "pieces", [*POINTS, "never"])
    assert ends == {point: signal.SIGKILL for point in POINTS} | {"damage": 0, "never": 0}
    assert "while a checkpoint is written -> 9 temporary files left: 1" in out
    assert "never -> 0 temporary files left: 0" in out
    whole, pieces = (tmp_path / name / "teacher/phase_1" for name in ("whole", "pieces"))
    histories = [without_times(pd.read_csv(f / "history.csv")) for f in (whole, pieces)]
    assert list(histories[1]["epoch"]) == [1, 2, 3]
    assert histories[0].equals(histories[1])
    both = (weights_of(f / "teacher.keras") for f in (whole, pieces))
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)
    facts = [runs.read_json(f / "stage.json")["facts"] for f in (whole, pieces)]
    assert facts[0] == facts[1]
    assert not [p.name for p in pieces.iterdir() if "checkpoint" in p.name]


# --- the whole series

KILLS = int(os.environ.get("KILLS", "20"))
# Enough epochs to be killed between, and nothing that takes long and trains nothing.
SHORT = {
    "PHASE_1_EPOCHS": 3,
    "PHASE_2_EPOCHS": 40,
    "PHASE_3_EPOCHS": 3,
    "STUDENT_HEAD_EPOCHS": 1,
    "STUDENT_EPOCHS": 3,
    "LEAK_STUDY": False,
    "EXPORT": False,
}


class Series:
    """`python -m utils run` in processes that can be killed with their kernels."""

    def __init__(self, folder: Path, **changes):
        self.folder, self.profile = folder, folder / "short.yaml"
        values = parameters.load_profile("test") | SHORT | changes
        values = {n: v for n, v in values.items() if n != "RUN_DIR"}
        self.profile.write_text(yaml.safe_dump(values))

    def start(self, name: str, *more: str, **environment) -> subprocess.Popen:
        """Begin, or go on with, the run `name`."""
        command = [sys.executable, "-m", "utils", "run", "--profile", str(self.profile)]
        return subprocess.Popen(
            [*command, "--out", str(self.folder / name), *more],
            cwd=runs.root(),
            env=os.environ | {"TF_DETERMINISTIC_OPS": "1", **environment},
            stdout=(self.folder / f"{name}.log").open("a"),
            stderr=subprocess.STDOUT,
        )

    def run(self, name: str, *more: str, **environment) -> int:
        """Run to the end; its exit status."""
        return self.start(name, *more, **environment).wait()


def children_spent() -> float:
    """Processor-seconds of all children that have ended, and of theirs."""
    spent = resource.getrusage(resource.RUSAGE_CHILDREN)
    return spent.ru_utime + spent.ru_stime


def wait(runner: subprocess.Popen, limit: float) -> int | None:
    """The runner's exit status, or None once it and its kernels spent `limit` processor-seconds.

    Not seconds of the clock: these would fall elsewhere on a busy machine.
    """
    while (status := runner.poll()) is None:
        spent = 0.0
        with contextlib.suppress(psutil.NoSuchProcess):  # it just came to its own end
            itself = psutil.Process(runner.pid)
            for process in (itself, *itself.children(recursive=True)):
                spent += sum(process.cpu_times()[:4])
        if spent > limit:
            return None
        time.sleep(0.05)
    return status


def kill(runner: subprocess.Popen, what: str) -> None:
    """Kill the runner, its kernel (where there is one yet), or both; wait until neither is left."""
    runner_itself = psutil.Process(runner.pid)
    kernels = runner_itself.children(recursive=True)
    victims = {"runner": [runner_itself], "kernel": kernels, "both": [runner_itself, *kernels]}
    for process in victims[what] or [runner_itself]:
        with contextlib.suppress(psutil.NoSuchProcess):  # it just came to its own end
            process.kill()
    runner.wait()
    _, alive = psutil.wait_procs(kernels, timeout=120)
    assert not alive, "a kernel outlived its runner"


def truncate_one(run: Path, rng: random.Random) -> str | None:
    """Cut one checkpoint of a run anywhere; its name."""
    files = sorted(run.rglob("*.checkpoint*.npz"))
    if not files:
        return None
    file = rng.choice(files)
    file.write_bytes(file.read_bytes()[: rng.randrange(file.stat().st_size)])
    return file.name


def outcome(run: Path) -> dict:
    """What must be equal: histories, views, weights, predictions and the report's figures."""
    found = {}
    for path in sorted(run.rglob("history*.csv")):
        history = pd.read_csv(path)
        assert list(history["epoch"]) == list(range(1, len(history) + 1)), path
        found[str(path.relative_to(run))] = without_times(history).to_csv()
    for path in sorted(run.glob("views/*/*.npy")):
        found[path.name] = path.read_bytes()
    for path in sorted(run.rglob("*.keras")):
        found[str(path.relative_to(run))] = [w.tobytes() for w in weights_of(path)]
    assert not [p for p in run.rglob("*") if ".tmp" in p.name or ".checkpoint" in p.name]
    found["predictions"] = (run / "report/predictions.csv").read_text()
    report = runs.read_json(run / "report/report.json")
    found["models"] = {
        name: {n: v for n, v in model.items() if "sha" not in n and "file" not in n}
        for name, model in report["models"].items()
    }
    return found


def assert_same(one: dict, other: dict) -> None:
    assert one.keys() == other.keys()
    assert not [name for name in one if one[name] != other[name]]


def test_the_notebooks_stop_by_max_hours_and_what_is_left_is_said(tmp_path):
    """The budget is over before notebook 02 trains: it comes to its end and closes nothing."""
    series = Series(tmp_path, MAX_HOURS=1e-4)
    assert series.run("run", "--only", "01,02,03") == 3
    log = (tmp_path / "run.log").read_text()
    said = "teacher: 0 of 3 epochs fitted into the time limit."
    assert f"02_teacher_phase_1: stopped: {said}" in log
    assert "Left: 02_teacher_phase_1, 03_teacher_phase_2. Run the same command again" in log
    shown = sorted(p.name for p in (tmp_path / "run/notebooks").glob("*.ipynb"))
    assert shown == ["01_data.ipynb", "02_teacher_phase_1.ipynb"], "papermill ended with 0"
    assert runs.read_stage(tmp_path / "run", "03_teacher_phase_2") is None
    assert series.run("run", "--only", "03") == 1
    unfinished = f"02_teacher_phase_1 is unfinished in {tmp_path / 'run'}: {said} Run 02_teacher"
    assert unfinished in (tmp_path / "run.log").read_text()


# --- by hand


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """The series run undisturbed, which all else must equal: its outcome, its processor-seconds."""
    series, before = Series(tmp_path_factory.mktemp("whole")), children_spent()
    assert series.run("whole") == 0
    return outcome(series.folder / "whole"), children_spent() - before


@pytest.mark.slow
@pytest.mark.parametrize("damage", [False, True], ids=["killed", "killed and truncated"])
def test_the_series_killed_at_random_moments_ends_like_one_that_was_not(whole, tmp_path, damage):
    series, rng, (expected, took) = Series(tmp_path), random.Random(int(damage)), whole
    kills, completed = 0, []
    while kills < KILLS:  # one run after the other, should the first end before
        name = f"pieces_{len(completed) + 1}"
        runner = series.start(name)
        if (status := wait(runner, rng.uniform(0, 0.25) * took)) is None:
            what = rng.choice(["runner", "kernel", "both"])
            kill(runner, what)
            kills += 1
            cut = truncate_one(tmp_path / name, rng) if damage else None
            print(f"{name}, kill {kills}: {what}, cut: {cut}", flush=True)
        else:
            assert status == 0, (tmp_path / f"{name}.log").read_text()[-3000:]
            completed.append(name)
    if name not in completed:
        assert series.run(name) == 0
        completed.append(name)
    print(f"{kills} kills in {len(completed)} runs; undisturbed {took:.0f} processor-seconds")
    for name in completed:
        assert_same(expected, outcome(tmp_path / name))


@pytest.mark.slow
def test_a_stop_in_phase_2_and_a_second_session_end_in_the_same_report(whole, tmp_path):
    """The first session's output is mounted read-only where Kaggle would."""
    series, limit = Series(tmp_path, MAX_HOURS=10.0), 36_000  # seconds
    root = tmp_path / "first"
    assert series.run("first", "--only", "01") == 0
    begun = time.time()
    assert series.run("first", "--only", "02") == 0
    took = time.time() - begun
    # In the time of all of 02 notebook 03 starts, compiles and trains some of its epochs, not all;
    # on a machine that was less busy before, in twice or four times as much.
    for times in (1, 2, 4):
        started = time.time() - limit + times * took
        assert series.run("first", SERIES_STARTED=str(started)) == 3
        stopped = runs.read_stage(root, "03_teacher_phase_2")
        if not stopped["stopped"].startswith("teacher: 0 of"):
            break
    assert re.match(r"teacher: [1-9]\d* of 40 epochs fitted into the time", stopped["stopped"])
    log = (tmp_path / "first.log").read_text()
    assert "Left: 03_teacher_phase_2, 04_teacher_phase_3, 05_distillation, 06_evaluation." in log
    assert series.run("first", "--only", "04") == 1
    assert "03_teacher_phase_2 is unfinished" in (tmp_path / "first.log").read_text()

    mounted, working = tmp_path / "input/notebooks/jane/first", tmp_path / "working"
    mounted.parent.mkdir(parents=True)
    working.mkdir()
    root.rename(mounted)
    subprocess.run(["chmod", "-R", "a-w", str(mounted)], check=True)
    before = {p: p.stat().st_mtime for p in mounted.rglob("*")}
    kaggle = {
        "KAGGLE_KERNEL_RUN_TYPE": "Batch",
        "KAGGLE_INPUT_ROOT": str(tmp_path / "input"),
        "KAGGLE_WORKING_ROOT": str(working),
        "SERIES_STARTED": str(time.time()),
    }
    assert series.run("working/first", "--only", "03,04", **kaggle) == 0
    late = kaggle | {"SERIES_STARTED": str(time.time() - limit)}
    assert series.run("working/first", **late) == 3, "05 as well stops in good order"
    assert runs.read_stage(working / "first", "05_distillation")["stopped"].startswith("0 of 2")
    assert series.run("working/first", **kaggle) == 0
    assert sorted(p.name for p in working.iterdir()) == ["first", "first.log"]
    assert {p: p.stat().st_mtime for p in mounted.rglob("*")} == before
    second = working / "first"
    assert runs.read_stage(second, "03_teacher_phase_2")["id"] == stopped["id"]
    assert_same(whole[0], outcome(second))
