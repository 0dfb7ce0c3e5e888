"""The runner of the series, on a project of three small notebooks that take no time."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest

from utils import cli, runs, settings

# A notebook of the small project opens its stage as the real ones do. MINI_… steer it from outside.
OPEN = """
import os, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from utils import runs
stage = runs.open_stage({name!r}, globals(), {inputs!r})
pids = Path(RUN_DIR, "pids.txt")
before = pids.read_text().split() if pids.exists() else []
alive = [pid for pid in before if Path("/proc", pid).exists()]
pids.write_text(" ".join([*before, str(os.getpid())]))
"""
CLOSE = """
print("an epoch", alive, os.environ.get("MPLBACKEND") == "Agg", runs.batch_mode(), stage.deadline)
if not stage.finished:
    stage.pause("the time is up.") if os.environ.get("MINI_STOP") else stage.finish()
"""
PARAMETERS = {
    "01_data": 'RUN_DIR = "runs/tiny"\nDATA_DIR = ""\nSEED = 0',
    "02_teacher_phase_1": 'RUN_DIR = "runs/tiny"\nMAX_HOURS = None\nPHASE_1_LEARNING_RATE = 3e-3',
    "03_teacher_phase_2": 'RUN_DIR = "runs/tiny"\nUNFREEZE = 0.3',
    "A9_more": "ARMS = 2",
}
THREE = list(settings.SERIES)[:3]
MAIN = """
import signal; signal.signal(signal.SIGINT, signal.default_int_handler)
import sys; from pathlib import Path; from utils import cli, settings
settings.ROOT, settings.PROFILES = Path({root!r}), Path({root!r}, "notebooks/profiles")
status = cli.main(["run", "--only", "01,02,03"])
print("loaded:", [m for m in ("tensorflow", "keras", "jax") if m in sys.modules])
sys.exit(status)
"""


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with three small notebooks, an appendix and a profile."""
    folder = tmp_path / "project"
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    for name, cell in PARAMETERS.items():
        inputs = {"images": "drawn"} if name == "01_data" else None
        begin = OPEN.format(root=str(settings.ROOT), name=name, inputs=inputs)
        sources = [begin, 'exec(os.environ.get("MINI_WORK", ""))', CLOSE]
        sources = [cell, *(sources if name in settings.SERIES else ["print('arms', ARMS)"])]
        book = nbformat.v4.new_notebook(cells=list(map(nbformat.v4.new_code_cell, sources)))
        book.cells[0].metadata["tags"] = ["parameters"]
        book.metadata.kernelspec = {"name": "python3", "display_name": "x", "language": "python"}
        nbformat.write(book, folder / "notebooks" / f"{name}.ipynb")
    (folder / "notebooks/profiles/tiny.yaml").write_text("RUN_DIR: runs/tiny\n")
    monkeypatch.setattr(settings, "ROOT", folder)
    monkeypatch.setattr(settings, "PROFILES", folder / "notebooks/profiles")
    return folder


@pytest.fixture
def start(project, capfd, monkeypatch):
    """Run `python -m utils run …` on the small project: (exit status, output, errors)."""

    def run(*arguments, only="01,02,03"):
        monkeypatch.delenv("SERIES_STARTED", raising=False)
        status = cli.main(["run", "--only", only, *arguments])
        return status, *capfd.readouterr()

    return run


def ids(project):
    """Each stage's id, None for one that is not finished."""
    stages = [runs.read_stage(project / "runs/tiny", name) for name in THREE]
    return [stage["id"] if stage and stage["finished"] else None for stage in stages]


def test_runs_in_order_keeps_what_is_done_and_makes_anew_what_changed(project, start, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    status, out, err = start()
    assert status == 0, err
    wanted = {f"{name}.{ending}" for name in THREE for ending in ("ipynb", "html", "log")}
    assert {path.name for path in (project / "runs/tiny/notebooks").iterdir()} == wanted
    assert "index.html" in out and (project / "runs/tiny/index.html").exists()
    # Each kernel had ended before the next began; figures show, progress bars do not.
    assert out.count("an epoch [] False True inf") == 3
    assert len(set((project / "runs/tiny/pids.txt").read_text().split())) == 3
    first = ids(project)
    status, out, _ = start()
    assert status == 0 and ids(project) == first and out.count("kept, done before") == 3
    status, out, _ = start("-p", "PHASE_1_LEARNING_RATE", "2.0e-3")
    second = ids(project)
    assert status == 0 and second[0] == first[0]
    assert second[1] != first[1] and second[2] != first[2]
    aside = list((project / "runs/tiny/teacher").glob("phase_1.*"))
    assert len(aside) == 1 and aside[0].name in out and "PHASE_1_LEARNING_RATE was 0.003" in out
    status, out, _ = start("-p", "PHASE_1_LEARNING_RATE", "2.0e-3", "--fresh", only="01,02")
    third = ids(project)
    assert status == 0 and third[0] != second[0] and third[1] != second[1]
    assert third[2] == second[2], "--only left 03 alone"
    status, _, err = start("-p", "PHASE_1_LEARNING_RATE", "2.0e-3", "-p", "SEED", "5", only="03")
    assert status == 2 and "01_data" in err and "SEED was 0, is 5" in err and "--only" in err
    assert len(list((project / "runs/tiny").glob("data.*"))) == 1


def test_a_failing_cell_ends_in_one_screen_and_runs_again(project, start, monkeypatch):
    monkeypatch.setenv("MINI_WORK", "stage.finish(); raise ValueError('no\\nknees')")
    status, _, err = start(only="01")
    assert status == 1 and "Cell In [4] failed" in err and "exec(os.environ" in err
    assert "ValueError: no\nknees" in err and "\x1b" not in err and len(err.splitlines()) <= 24
    failed = project / "runs/tiny/notebooks/01_data.unfinished.ipynb"
    assert str(failed) in err and failed.exists()
    assert not failed.with_name("01_data.ipynb").exists()
    monkeypatch.delenv("MINI_WORK")
    status, out, _ = start(only="01")
    assert status == 0 and "an epoch" in out and not failed.exists()


def test_a_kernel_that_dies_is_reported_with_its_last_words(start, monkeypatch):
    work = "os.write(2, b'no room\\n'); import signal; os.kill(os.getpid(), signal.SIGKILL)"
    monkeypatch.setenv("MINI_WORK", work)
    status, _, err = start(only="01")
    assert status == 1 and "Kernel died" in err and "memory" in err and "no room" in err


def test_the_time_budget_ends_with_3_and_spans_the_series(project, start, monkeypatch):
    monkeypatch.setenv("MINI_STOP", "1")
    status, out, _ = start()
    assert status == 3 and "the time is up" in out and "The same command goes on" in out
    assert ids(project) == [None] * 3
    monkeypatch.delenv("MINI_STOP")
    began = time.time()
    _, out, _ = start("-p", "MAX_HOURS", "2", only="01,02")
    [deadline] = set(re.findall(r"False True (\d+\.\d+)", out))  # 01 and 03 declare no MAX_HOURS
    assert abs(float(deadline) - 7200 - began) < 10


def test_refusals_come_before_anything_runs(project, start):
    refused = ["--profile nowhere", "--data /no/x", "-p SEDE 1", "--out /dev/null/x", "--only 47"]
    for given in map(str.split, refused):
        status, _, err = start(*given, only="01")
        assert status in (1, 2) and given[1] in err and len(err.splitlines()) <= 12
    assert not (project / "runs").exists()


def test_what_is_missing_is_said_before_a_kernel_starts(start, tmp_path):
    (tmp_path / "images").mkdir()
    status, out, err = start("--data", str(tmp_path / "images"))
    assert status in (1, 2) and str(tmp_path / "images") in err and "an epoch" not in out
    status, out, err = start(only="A9")  # no stage
    assert status == 0 and "arms 2" in out, err
    status, _, err = start(only="02")
    assert status == 1 and "run notebook 01_data first" in err and len(err.splitlines()) == 1


def test_a_command_holds_its_run_between_notebooks_too(project, start):
    """01 is done while A9, which opens no stage, runs: a second command and a hand are refused."""
    book = nbformat.read(project / "notebooks/A9_more.ipynb", 4)
    book.cells[1].source = f"import time\nopen({str(project / 'here')!r}, 'w')\ntime.sleep(30)"
    nbformat.write(book, project / "notebooks/A9_more.ipynb")
    code = MAIN.format(root=str(project)).replace("01,02,03", "01,A9")
    options = {"cwd": Path(runs.__file__).parents[1], "stdout": -1, "stderr": -1}
    first = subprocess.Popen([sys.executable, "-c", code], **options)
    while first.poll() is None and not (project / "here").exists():
        time.sleep(0.1)
    status, out, err = start(only="01")
    assert status == 1 and "Another process is using" in err and "an epoch" not in out
    with pytest.raises(runs.StageError, match="Another process"):
        runs.open_stage("02_teacher_phase_1", {"RUN_DIR": "runs/tiny"})
    first.send_signal(signal.SIGINT)
    assert first.wait(60) == 130
    assert start(only="01,02")[0] == 0  # free again, and shared with both notebooks


def test_ctrl_c_ends_the_kernel_and_tensorflow_is_not_imported(project):
    work = os.environ | {"MINI_WORK": "import time; time.sleep(60)"}
    arguments = [sys.executable, "-c", MAIN.format(root=str(project))]
    options = {"cwd": Path(runs.__file__).parents[1], "env": work, "stderr": -1, "stdout": -1}
    runner = subprocess.Popen(arguments, text=True, **options)
    pids = project / "runs/tiny/pids.txt"
    while runner.poll() is None and not (pids.exists() and pids.read_text()):
        time.sleep(0.1)
    time.sleep(0.5)
    runner.send_signal(signal.SIGINT)
    out, err = runner.communicate(timeout=60)
    assert runner.returncode == 130 and "loaded: []" in out
    assert err.splitlines()[-1] == "Interrupted; the same command goes on from here."
    assert "Traceback" not in err
    assert not Path("/proc", pids.read_text().split()[-1]).exists()
