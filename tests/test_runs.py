"""Runs: stages in order, stale ones set aside, what Kaggle attaches, files that are whole."""

import errno
import json
import os
import resource
import shutil
import time
from pathlib import Path

import nbformat
import numpy as np
import psutil
import pytest

from utils import parameters, runs

CELLS = {
    "01_data": 'RUN_DIR = "runs/tiny"\nDATA_DIR = ""\nSEED = 0\nSTORED_SIZE = 64',
    "02_teacher_phase_1": 'RUN_DIR = "runs/tiny"\nTEACHER_IMAGE_SIZE = 64\nPHASE_1_EPOCHS = 3\n'
    "MAX_HOURS: float | None = None\nJIT_COMPILE: str | bool = 'auto'\nDEVICES = 0",
    "03_teacher_phase_2": 'RUN_DIR = "runs/tiny"\nPHASE_2_EPOCHS = 3',
}
ONE, TWO, THREE = CELLS


@pytest.fixture
def project(tmp_path, monkeypatch):
    """A project of three notebooks that are nothing but their parameters."""
    folder = tmp_path / "project"
    (folder / "notebooks").mkdir(parents=True)
    for name, cell in CELLS.items():
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell)])
        notebook.cells[0]["metadata"]["tags"] = ["parameters"]
        nbformat.write(notebook, folder / "notebooks" / f"{name}.ipynb")
    monkeypatch.setattr(parameters, "ROOT", folder)
    for name in ("SERIES_STARTED", "SERIES_PARAMETERS", "KAGGLE_KERNEL_RUN_TYPE"):
        monkeypatch.delenv(name, raising=False)
    return folder


@pytest.fixture
def enter(project):
    """Open a stage as its notebook does: with the defaults of its cell, some of them changed."""

    def enter(notebook, **changes):
        own = dict(parameters.declared()[notebook])
        return runs.open_stage(notebook, {"Path": Path, "keras": 1, **own, **changes})

    return enter


def test_a_learners_own_single_letters_are_no_parameters(enter):
    assert set(enter(ONE, T=4, W=0.3).planned).isdisjoint("TW")
    with pytest.raises(parameters.ParameterError, match="SEEED is no parameter"):
        enter(ONE, SEEED=1)


def test_stages_hand_on_their_settings_and_close_once(project, enter, capsys):
    first = enter(ONE, SEED=7)
    assert first.folder == project / "runs/tiny/data" and not first.finished
    first.finish(images=12)
    second = enter(TWO, MAX_HOURS=2.0)
    assert second.settings["SEED"] == 7 and second.settings["PHASE_1_EPOCHS"] == 3
    assert second.settings["JIT_COMPILE"] == "auto"
    assert second.deadline == pytest.approx(runs.started() + 7200)
    saved = runs.read_stage(project / "runs/tiny", ONE)
    assert saved["facts"] == {"images": 12} and saved["parameters"]["SEED"] == 7
    again = enter(ONE, SEED=7)
    assert again.finished and again.key == first.key
    again.finish(images=13)
    assert runs.read_stage(project / "runs/tiny", ONE) == saved, "closed once and for all"
    assert "was done before" in capsys.readouterr().out


def test_other_parameters_set_the_stage_aside_and_what_builds_on_it_is_told(enter, capsys):
    enter(ONE).finish()
    old = enter(TWO)
    (old.folder / "teacher.keras").write_text("old")
    old.finish()
    new = enter(TWO, PHASE_1_EPOCHS=4)
    assert new.key != old.key and not (new.folder / "teacher.keras").exists()
    [aside] = new.folder.parent.glob("phase_1.*")
    assert (aside / "teacher.keras").read_text() == "old"
    assert aside.name in capsys.readouterr().out
    new.finish()
    enter(THREE).finish()
    enter(TWO, PHASE_1_EPOCHS=5).finish()
    assert runs.state(new.run, THREE, {}) == "stale"
    enter(ONE, SEED=1).finish()
    with pytest.raises(runs.StageError, match=r"teacher/phase_1 was made from another 01_data"):
        enter(THREE)


@pytest.mark.parametrize("name", ["MAX_HOURS", "DEVICES", "JIT_COMPILE"])
def test_how_it_is_run_makes_no_stage_stale(enter, name):
    enter(ONE).finish()
    key = enter(TWO).key
    assert (
        enter(TWO, **{name: {"MAX_HOURS": 1.5, "DEVICES": 1, "JIT_COMPILE": False}[name]}).key
        == key
    )


def test_other_images_in_the_folder_make_the_data_stale(enter, tmp_path):
    images = tmp_path / "images"
    images.mkdir()
    (images / "a.png").write_bytes(b"123")
    key = enter(ONE, DATA_DIR=str(images)).key
    assert enter(ONE, DATA_DIR=str(images)).key == key
    (images / "b.png").write_bytes(b"12")
    assert enter(ONE, DATA_DIR=str(images)).key != key


def test_a_pause_is_said_to_whoever_comes_next_and_a_new_session_goes_on(enter):
    enter(ONE).finish()
    stage = enter(TWO)
    stage.opened -= 60
    stage.pause("teacher: 3 of 20 epochs fitted into the time.")
    assert stage.paused and stage.saved["seconds"] >= 60
    with pytest.raises(
        runs.StageError, match=r"02_teacher_phase_1 is unfinished.*3 of 20 epochs.*again"
    ):
        enter(THREE)
    again = enter(TWO)
    assert again.key == stage.key and not again.paused
    again.finish()
    assert again.saved["seconds"] >= 60 and again.saved["stopped"] is None
    assert enter(THREE).settings["PHASE_2_EPOCHS"] == 3


def test_openings_of_the_test_split_survive_a_folder_set_aside(tmp_path):
    folder = tmp_path / "report"
    folder.mkdir()
    (folder / "test_openings.json").write_text("[1]")
    (folder / "report.json").write_text("{}")
    first, second = runs.set_aside(folder), runs.set_aside(folder)
    assert first != second and (first / "report.json").exists()
    assert [p.name for p in folder.iterdir()] == ["test_openings.json"]


def test_a_damaged_stage_is_named(enter, project):
    enter(ONE).finish()
    path = project / "runs/tiny/data/stage.json"
    path.write_text(path.read_text()[:40])
    with pytest.raises(runs.StageError, match=r"stage.json is damaged .*move it away"):
        enter(TWO)


# --- the time limit


def test_the_clock_is_the_runners_else_the_containers_else_this_processs(monkeypatch, project):
    assert runs.deadline(None) == float("inf")
    assert runs.deadline(1.0) == runs.PROCESS_STARTED + 3600
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    hours = runs.KAGGLE_HOURS - runs.KAGGLE_MARGIN
    container = psutil.Process(1).create_time()
    assert runs.deadline(None) == pytest.approx(container + 3600 * hours)
    monkeypatch.setenv("SERIES_STARTED", "1000.5")
    assert runs.deadline(2.0) == 1000.5 + 7200


def test_the_outlook_counts_what_the_series_still_has_ahead(enter, monkeypatch):
    monkeypatch.setenv("SERIES_PARAMETERS", json.dumps({"PHASE_3_EPOCHS": 30, "VIEWS": 9}))
    monkeypatch.setattr(runs, "clock", lambda moment: str(round(moment / 60)))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    enter(ONE).finish()
    stage = enter(TWO)
    stage.deadline = 100 * 60
    text = stage.outlook("phase 1", left=120, here=120, seconds=60)
    # Two minutes here, then 3 epochs of phase 2 (its default), 30 of phase 3 and 9 looks.
    assert "phase 1 ends about 2, the series not before 38" in text
    assert "limit is 100" in text and "does not fit" not in text
    stage.deadline = 37 * 60
    assert "does not fit: it will stop at an epoch's end" in stage.outlook("phase 1", 120, 120, 60)
    stage.deadline = float("inf")
    assert "limit" not in stage.outlook("phase 1", 120, 120, 60)


def test_the_outlook_of_the_student_counts_the_one_on_labels_alone(tmp_path, monkeypatch):
    from standins import make_stage

    epochs = {"STUDENT_HEAD_EPOCHS": 1, "STUDENT_EPOCHS": 9}
    stage = make_stage(tmp_path, notebook="05_distillation", LABELS_ONLY=True, **epochs)
    monkeypatch.setattr(runs, "clock", lambda moment: str(round(moment / 60)))
    monkeypatch.setattr(time, "time", lambda: 0.0)
    assert "ends about 2, the series soon after 12." in stage.outlook("all", 120, 120, 60)
    stage.saved["facts"]["student"] = {"best_epoch": 3}
    assert "ends about 2, the series soon after 2." in stage.outlook("all", 120, 120, 60)


def test_the_outlook_of_a_notebook_alone_reads_the_profile_that_the_run_is_named_for(
    enter, project
):
    """As on Kaggle, where each notebook gets its own parameters and no runner tells the rest."""
    (project / "notebooks/profiles").mkdir()
    (project / "notebooks/profiles/full.yaml").write_text("PHASE_2_EPOCHS: 20\n")
    for run, epochs in (("runs/full", 20), ("runs/mine", 3)):
        enter(ONE, RUN_DIR=run).finish()
        assert enter(TWO, RUN_DIR=run).planned["PHASE_2_EPOCHS"] == epochs


# --- writing


def test_write_atomic_leaves_the_old_file_whatever_happens(tmp_path):
    path = runs.write_atomic(tmp_path / "a" / "x.txt", lambda p: p.write_text("old"))

    def half(temporary):
        temporary.write_text("ha")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.write_atomic(path, half)
    assert path.read_text() == "old" and [p.name for p in path.parent.iterdir()] == ["x.txt"]
    (path.parent / ".x.999.tmp.txt").write_text("left by a process that was killed")
    runs.write_atomic(path, lambda p: p.write_text("new"))
    assert path.read_text() == "new" and [p.name for p in path.parent.iterdir()] == ["x.txt"]


@pytest.mark.parametrize("kind", ["array", "model"])
def test_a_disk_that_fills_up_half_way_is_said_and_leaves_nothing(tmp_path, kind):
    """With a limit on the size of files, as the system itself reports a full disk."""
    from standins import make_model

    from utils import models

    model, path = make_model(), tmp_path / f"x.{'npy' if kind == 'array' else 'keras'}"
    write = lambda: models.save(model, path)  # noqa: E731
    if kind == "array":
        write = lambda: runs.write_atomic(path, lambda p: np.save(p, np.ones(10_000)))  # noqa: E731
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        with pytest.raises(OSError, match=r"x\.\w+ cannot be written.*Make room.*is kept"):
            write()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


def test_json_refuses_what_is_no_json(tmp_path):
    with pytest.raises(ValueError, match="JSON"):
        runs.write_json(tmp_path / "x.json", {"accuracy": float("nan")})


# --- Kaggle


@pytest.fixture
def kaggle(tmp_path, monkeypatch, project):
    """Kaggle's two folders, both empty, and a session in batch mode."""
    from utils import preflight

    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    monkeypatch.setenv("KAGGLE_WORKING_ROOT", str(tmp_path / "working"))
    monkeypatch.setattr(preflight, "check", lambda *_: None)
    (tmp_path / "input").mkdir()
    (tmp_path / "working").mkdir()
    return tmp_path


def attach(kaggle, name):
    """End this session: its output is attached to the next one, read-only."""
    place = kaggle / "input" / name
    shutil.copytree(kaggle / "working", place)
    shutil.rmtree(kaggle / "working")
    (kaggle / "working").mkdir()
    for path in (*place.rglob("*"), place):
        path.chmod(0o555 if path.is_dir() else 0o444)
    return {p: (p.read_bytes(), p.stat().st_mtime) for p in place.rglob("*") if p.is_file()}


def test_a_second_session_takes_up_the_first_ones_output(kaggle, enter):
    enter(ONE).finish()
    stage = enter(TWO)
    (stage.folder / "teacher.checkpoint.npz").write_bytes(b"epochs")
    stage.pause("teacher: 3 of 20 epochs fitted into the time.")
    attached = attach(kaggle, "first")
    again = enter(TWO)
    assert again.key == stage.key and again.run == kaggle / "working/runs/tiny"
    assert (again.folder / "teacher.checkpoint.npz").read_bytes() == b"epochs"
    again.finish()
    assert enter(THREE).key
    for folder in (again.run, *(p for p in again.run.rglob("*") if p.is_dir())):
        assert folder.stat().st_mode & 0o200, "copied from folders that are read-only"
    for path, (content, changed) in attached.items():
        assert path.read_bytes() == content and path.stat().st_mtime == changed


def test_an_empty_run_folder_gives_way_to_what_is_attached(kaggle, enter):
    """The runner makes the folder to see whether it can be written to."""
    enter(ONE).finish()
    attach(kaggle, "first")
    run = kaggle / "working/runs/tiny"
    run.mkdir(parents=True)
    runs.take_up(run)
    assert (run / "data/stage.json").exists() and list(run.parent.iterdir()) == [run]


def test_of_two_sessions_of_one_run_the_longer_one_is_taken_up(kaggle, enter, capsys):
    enter(ONE).finish()
    stage = enter(TWO)
    stage.opened -= 3600
    stage.pause("teacher: 3 of 20 epochs fitted into the time.")
    attach(kaggle, "z_first")
    stage = enter(TWO)
    stage.opened -= 3600
    stage.pause("teacher: 6 of 20 epochs fitted into the time.")
    attach(kaggle, "a_second")
    assert "6 of 20" in enter(TWO).saved["stopped"]


def test_a_run_of_the_same_name_comes_before_a_longer_one(kaggle, enter):
    enter(ONE).finish()
    key = enter(TWO).key
    attach(kaggle, "mine")
    for notebook in (ONE, TWO, THREE):
        enter(notebook, RUN_DIR="runs/other").finish()
    attach(kaggle, "other")
    assert enter(TWO).key == key


def test_a_run_that_cannot_be_read_is_passed_over(kaggle, enter, capsys):
    enter(ONE).finish()
    key = enter(ONE).key
    attach(kaggle, "good")
    broken = kaggle / "input/broken/runs/tiny/data/stage.json"
    broken.parent.mkdir(parents=True)
    broken.write_text("{")
    assert enter(ONE).key == key
    assert "broken" in capsys.readouterr().out


def test_a_copy_that_does_not_fit_leaves_nothing(kaggle, enter, monkeypatch):
    enter(ONE).finish()
    attach(kaggle, "first")

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shutil, "copyfile", full)
    with pytest.raises(OSError, match="cannot be written"):
        enter(ONE)
    assert not list((kaggle / "working").rglob("*.json"))
    assert not list((kaggle / "working").rglob(".*.part"))


def test_batch_mode_is_where_nobody_watches(monkeypatch):
    for name in ("KAGGLE_KERNEL_RUN_TYPE", "JPY_SESSION_NAME", "COLAB_RELEASE_TAG"):
        monkeypatch.delenv(name, raising=False)
    assert runs.batch_mode()
    monkeypatch.setenv("JPY_SESSION_NAME", "x")
    assert not runs.batch_mode()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    assert runs.batch_mode()
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert not runs.batch_mode()


def test_environment_tells_versions_and_machine():
    found = runs.environment()
    assert found["versions"]["keras"] and found["processors"] == os.cpu_count()
