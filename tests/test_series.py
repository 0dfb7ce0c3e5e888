"""The runner of the series, on a project of three mini notebooks that take no time."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import nbformat
import pytest
import yaml

from utils import __main__ as command_line
from utils import parameters, runs
from utils.commands import series

# A notebook of the mini project: it opens its stage as the real ones do, but without `utils`.
OPEN = """
import json, os, secrets, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from utils import parameters, runs
parameters.TYPES |= {own}
values = {{n: v for n, v in globals().items() if n.isupper()}}
wanted = runs.identity(Path(RUN_DIR), {name!r}, values, Path.cwd())
path = Path(RUN_DIR, {folder!r}, "stage.json")
path.parent.mkdir(parents=True, exist_ok=True)
stage = {{"id": secrets.token_hex(4), "finished": False, "stopped": None, "opened": 0}}
path.write_text(json.dumps(stage | wanted))
pids = Path(RUN_DIR, "pids.txt")
before = pids.read_text().split() if pids.exists() else []
alive = [pid for pid in before if Path("/proc", pid).exists()]
pids.write_text(" ".join([*before, str(os.getpid())]))
"""
CLOSE = """
stage |= wanted | {"finished": not STOP, "stopped": "the time is up." if STOP else None}
path.write_text(json.dumps(stage))
print("an epoch", alive, os.environ.get("MPLBACKEND") == "Agg", os.environ["TF_CPP_MIN_LOG_LEVEL"])
"""
PARAMETERS = {
    "01_data": 'DATA_DIR: str = ""\nSEED: int = 0\nSTOP = False',
    "02_teacher_phase_1": "PHASE_1_LEARNING_RATE: float = 1e-3\nSTOP = False",
    "03_teacher_phase_2": 'WORK: str = ""\nSTOP = False',
}


OWN = {"STOP": ("bool",), "WORK": ("str",)}  # what the mini notebooks declare of their own


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A folder with three mini notebooks and two profiles."""
    monkeypatch.setattr(parameters, "TYPES", parameters.TYPES | OWN)
    folder = tmp_path / "project"
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    for name, cell in PARAMETERS.items():
        source = OPEN.format(root=str(runs.root()), name=name, folder=runs.FOLDERS[name], own=OWN)
        cells = [
            nbformat.v4.new_markdown_cell(f"# {name}"),
            nbformat.v4.new_code_cell(f'RUN_DIR: str = "runs/tiny"\n{cell}'),
            nbformat.v4.new_code_cell(source),
            nbformat.v4.new_code_cell("exec(WORK)" if "WORK" in cell else "pass"),
            nbformat.v4.new_code_cell(CLOSE),
        ]
        cells[1]["metadata"]["tags"] = ["parameters"]
        kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
        nbformat.write(
            nbformat.v4.new_notebook(cells=cells, metadata=kernel),
            folder / "notebooks" / f"{name}.ipynb",
        )
    (folder / "notebooks" / "profiles" / "tiny.yaml").write_text("RUN_DIR: runs/tiny\n")
    (folder / "notebooks" / "profiles" / "bad.yaml").write_text("RUN_DIR: r\nSEDE: 1\nSEED: 1e-3\n")
    return folder


@pytest.fixture
def command(project, monkeypatch, capfd):
    """Run `python -m utils run …` on the mini project: exit status, output, errors."""
    monkeypatch.setattr(parameters, "ROOT", project)
    monkeypatch.delenv("SERIES_STARTED", raising=False)

    def run(*arguments):
        status = command_line.main(["run", *arguments])
        return status, *capfd.readouterr()

    return run


def ids(project, run="runs/tiny"):
    """Each finished stage's id."""
    stages = (runs.read_stage(project / run, n) for n in PARAMETERS)
    return [stage and stage["id"] for stage in stages]


def test_runs_in_order_keeps_what_is_done_and_reruns_what_changed(project, command, monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "Agg")
    status, out, _ = command()
    assert status == 0
    shown = project / "runs" / "tiny" / "notebooks"
    assert sorted(p.name for p in shown.iterdir()) == sorted(
        f"{n}.{s}" for n in PARAMETERS for s in ("ipynb", "html")
    )
    # Each kernel had ended before the next began, and inherited the environment meant for it.
    assert out.count("an epoch [] False 3") == 3
    assert len(set((project / "runs" / "tiny" / "pids.txt").read_text().split())) == 3
    assert os.environ["MPLBACKEND"] == "Agg" and "SERIES_STARTED" not in os.environ

    first = ids(project)
    status, out, _ = command()
    assert status == 0 and ids(project) == first and out.count("kept, done before") == 3

    status, out, _ = command("-p", "PHASE_1_LEARNING_RATE", "2.0e-3")
    second = ids(project)
    assert status == 0 and second[0] == first[0]
    assert second[1] != first[1] and second[2] != first[2]
    aside = list((project / "runs/tiny/teacher").glob("phase_1.*"))
    assert len(aside) == 1 and aside[0].name in out
    assert json.loads((aside[0] / "stage.json").read_text())["id"] == first[1]
    assert len(list(shown.glob("02_teacher_phase_1.*.ipynb"))) == 1

    status, out, _ = command("-p", "PHASE_1_LEARNING_RATE", "2.0e-3", "--fresh", "--only", "01,02")
    third = ids(project)
    assert status == 0 and third[0] != second[0] and third[1] != second[1]
    assert third[2] == second[2], "--only left 03 alone"
    assert len(list((project / "runs/tiny").glob("data.*"))) == 1


def test_a_failing_cell_stops_the_series_in_one_screen(project, command):
    status, _, err = command("-p", "WORK", json.dumps("raise ValueError('no\\nknees')"))
    assert status == 1
    assert "03_teacher_phase_2 failed in cell In [4]" in err and "exec(WORK)" in err
    assert "ValueError: no\nknees" in err and "\x1b" not in err and len(err.splitlines()) <= 24
    failed = project / "runs/tiny/notebooks/03_teacher_phase_2.failed.ipynb"
    assert str(failed) in err and failed.exists()
    assert not failed.with_name("03_teacher_phase_2.ipynb").exists()
    assert command()[0] == 0 and not failed.exists()


def test_a_kernel_that_dies_is_said(command):
    status, _, err = command(
        "-p", "WORK", "import os, signal; os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert status == 1 and "kernel died" in err and "memory" in err and len(err.splitlines()) <= 4


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("Kernel died before replying to kernel_info"), "its kernel died or did not"),
        (OSError(28, "No space left on device"), "[Errno 28] No space left on device"),
    ],
)
def test_what_ends_a_notebook_from_outside_is_said_in_a_line_or_two(
    project, command, monkeypatch, error, said
):
    import papermill

    def ends(source, target, *_, **__):
        Path(target).write_text("{}")
        raise error

    monkeypatch.setattr(papermill, "execute_notebook", ends)
    status, _, err = command()
    assert status == 1 and said in err and len(err.splitlines()) <= 2


def test_a_stage_that_fails_after_it_finished_runs_again(project, command):
    assert command()[0] == 0
    (project / "runs/tiny/notebooks/03_teacher_phase_2.ipynb").unlink()
    status, out, _ = command()
    assert status == 0 and out.count("kept, done before") == 2


def test_the_time_budget_ends_with_3_and_says_what_is_left(project, command):
    status, out, _ = command("-p", "STOP", "true")
    assert status == 3
    assert "01_data: stopped: the time is up." in out
    assert "Left: 01_data, 02_teacher_phase_1, 03_teacher_phase_2." in out
    assert ids(project)[1] is None, "no later stage was started"


def test_html_that_cannot_be_made_fails_no_run(project, command, monkeypatch):
    import nbconvert

    monkeypatch.setattr(nbconvert, "HTMLExporter", lambda: 1 / 0)
    status, _, err = command("--only", "01")
    assert status == 0 and "No HTML of 01_data.ipynb (ZeroDivisionError" in err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--profile", "nowhere"], "nowhere"),
        (["--profile", "bad"], "SEDE"),
        (["--data", "/nowhere/at/all"], "/nowhere/at/all"),
        (["--only", "07"], "--only 07"),
        (["-p", "SEED", "many"], "SEED"),
        (["-p", "SEED", "{"], "SEED"),
        (["-p", "SEDE", "1"], "SEED"),
        (["-p", "PHASE_1_LEARNING_RATE", "1e-4"], "1.0e-4"),
        (["-p", "PHASE_1_LEARNING_RATE", ".nan"], "finite"),
        (["--out", "notebooks/01_data.ipynb"], "notebooks/01_data.ipynb"),
        (["--out", "/dev/null/run"], "/dev/null/run"),
    ],
)
def test_refusals_come_before_anything_runs(project, command, monkeypatch, arguments, said):
    monkeypatch.chdir(project)
    status, _, err = command(*arguments)
    assert status == 2 and said in err and len(err.splitlines()) <= 12
    assert not (project / "runs").exists()


def test_an_unknown_option_is_refused(command):
    with pytest.raises(SystemExit) as left:
        command("--profil", "tiny", "--nonsense")
    assert left.value.code == 2


def test_only_needs_the_stages_before(command):
    status, _, err = command("--only", "02")
    assert status == 1 and "run notebook 01_data first" in err and len(err.splitlines()) == 1


def test_ctrl_c_ends_the_kernel(project):
    code = (
        # A parent in the background may have left SIGINT ignored.
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "import sys; from pathlib import Path; from utils import __main__, parameters;"
        f"parameters.ROOT = Path({str(project)!r}); parameters.TYPES |= {OWN};"
        "sys.exit(__main__.main(['run', '-p', 'WORK', 'import time; time.sleep(60)']))"
    )
    runner = subprocess.Popen(
        [sys.executable, "-c", code], cwd=runs.root(), stderr=subprocess.PIPE, text=True
    )
    pids = project / "runs/tiny/pids.txt"
    for _ in range(600):
        if pids.exists() and len(pids.read_text().split()) == 3:
            break
        time.sleep(0.1)
    time.sleep(1)
    runner.send_signal(signal.SIGINT)
    _, err = runner.communicate(timeout=60)
    assert runner.returncode == 130
    assert err.splitlines()[-1] == "Interrupted; the same command goes on from here."
    assert "Traceback" not in err
    assert not Path("/proc", pids.read_text().split()[-1]).exists()


def test_the_runner_never_imports_tensorflow(project):
    code = (
        "import sys; from pathlib import Path; from utils import __main__, parameters;"
        f"parameters.ROOT = Path({str(project)!r}); parameters.TYPES |= {OWN};"
        f"status = __main__.main(['run']);"
        "print('loaded:', [m for m in ('tensorflow', 'keras', 'jax') if m in sys.modules]);"
        "sys.exit(status)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=runs.root(), capture_output=True, text=True
    )
    assert done.returncode == 0 and "loaded: []" in done.stdout


@pytest.mark.parametrize("name", ["tiny", "test", "cpu", "kaggle"])
def test_profiles_hold_what_the_notebooks_declare(name):
    assert list(parameters.declared()) == list(runs.NOTEBOOKS)
    profile = parameters.load_profile(name)
    parameters.check(profile)
    assert "RUN_DIR" in profile
    text = (runs.root() / "notebooks" / "profiles" / f"{name}.yaml").read_text()
    assert len(re.findall(r"^\w+:", text, re.M)) == len(yaml.safe_load(text)), "a name twice"
    comment = " ".join(re.findall(r"^# (.*)", text, re.M))
    assert "GPU hours" in comment, "what a run costs of Kaggle's weekly 30"


def test_tiny_is_the_notebooks_own_defaults():
    assert parameters.load_profile("tiny") == {"RUN_DIR": "runs/tiny"}
    for notebook, declared in parameters.declared().items():
        assert declared["RUN_DIR"] == "runs/tiny", notebook


def test_lines_of_a_notebook_stay_behind_the_bar():
    shown = []
    bar = type("Bar", (), {"disable": False, "set_postfix_str": lambda _, text: shown.append(text)})
    series.Ticker(bar()).write("epoch 1\n\x1b[1mepoch 2\x1b[0m\n")
    assert shown == ["epoch 2"]
