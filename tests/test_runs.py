"""Stages: kept when finished, set aside when changed, locked while in use, taken up on Kaggle."""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest

from utils import runs, settings

FIRST, SECOND, THIRD = "01_data", "02_teacher_phase_1", "03_teacher_phase_2"


@pytest.fixture
def run(tmp_path):
    yield tmp_path / "run"
    runs.unlock(tmp_path / "run")


def opened(notebook, run, **values):
    inputs = {"images": values.pop("images", "a")} if notebook == FIRST else None
    return runs.open_stage(notebook, {"RUN_DIR": str(run), **values}, inputs)


def finish(notebook, run, id=None, **values):
    stage = opened(notebook, run, **values)
    stage.finish(id=id, made_by="test")
    return stage


def test_a_finished_stage_is_kept_as_it_is(run):
    finish(FIRST, run)
    before = (run / "data/stage.json").read_bytes()
    stage = opened(FIRST, run)
    assert stage.finished and stage.facts == {"made_by": "test"}
    stage.finish(made_by="someone else")
    assert (run / "data/stage.json").read_bytes() == before


def test_a_changed_parameter_sets_the_stage_aside_and_says_what_changed(run, capsys):
    finish(FIRST, run)
    assert not opened(FIRST, run, SEED=7).finished
    said = capsys.readouterr().out
    assert "data is set aside (SEED was 0, is 7): kept as data." in said
    [aside] = [p for p in run.iterdir() if p.name.startswith("data.")]
    assert json.loads((aside / "stage.json").read_text())["finished"]


def test_a_parameter_that_is_new_since_changes_nothing_at_its_default(run):
    finish(FIRST, run)
    saved = runs.read_stage(run, FIRST)
    del saved["parameters"]["CUTOUT"]
    runs.write_json(run / "data/stage.json", saved)
    assert opened(FIRST, run).finished and not opened(FIRST, run, CUTOUT=0.2).finished


def test_shared_parameters_and_the_place_of_the_images_change_nothing(run, tmp_path):
    finish(FIRST, run)
    assert opened(FIRST, run, MAX_HOURS=1.0, DATA_DIR=str(tmp_path)).finished


def test_other_images_make_later_stages_stale_and_the_same_images_do_not(run, capsys):
    finish(FIRST, run, id="digest of a")
    finish(SECOND, run)
    finish(FIRST, run, id="digest of a", SEED=7)  # made again, with the same result
    assert opened(SECOND, run).finished
    finish(FIRST, run, id="digest of b", images="b")
    with pytest.raises(runs.StageError, match="made from another 01_data"):
        opened(THIRD, run)
    assert not opened(SECOND, run).finished
    said = capsys.readouterr().out
    assert "SEED was 7, is 0; other images)" in said and "(01_data was run again)" in said


def test_a_missing_or_unfinished_stage_is_named(run):
    with pytest.raises(runs.StageError, match="run notebook 01_data first"):
        opened(SECOND, run)
    opened(FIRST, run).pause("3 of 9 epochs.")
    with pytest.raises(runs.StageError, match="3 of 9 epochs"):
        opened(SECOND, run)


def test_a_damaged_stage_file_is_named(run):
    finish(FIRST, run)
    (run / "data/stage.json").write_text('{"finis')
    with pytest.raises(runs.StageError, match=r"stage\.json is damaged"):
        opened(SECOND, run)


def test_a_run_of_the_series_before_it_was_rebuilt_is_left_alone(run):
    (run / "data").mkdir(parents=True)
    (run / "data/stage.json").write_text(json.dumps({"finished": True, "parameters": {}}))
    with pytest.raises(runs.StageError, match="another version"):
        opened(FIRST, run)
    assert json.loads((run / "data/stage.json").read_text()) == {"finished": True, "parameters": {}}


def test_an_unknown_parameter_is_refused_and_a_learners_own_name_is_not(run):
    with pytest.raises(settings.SettingsError, match="PHASE_1_EPOCS"):
        opened(FIRST, run, PHASE_1_EPOCS=3)
    opened(FIRST, run, T=4, answer=None)


def test_values_of_two_notebooks_must_go_together(run):
    finish(FIRST, run, STORED_SIZE=64)
    with pytest.raises(settings.SettingsError, match="STORED_SIZE = 96"):
        opened(SECOND, run)


def test_a_path_means_the_same_to_the_check_and_to_the_notebook(run, tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    (tmp_path / "mine.h5").touch()
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    space = {"RUN_DIR": str(run), "DATA_DIR": "images", "T": 4}
    runs.open_stage(FIRST, space, {"images": "a"}).finish()
    assert space["DATA_DIR"] == str(tmp_path / "images") and space["T"] == 4
    space = {"RUN_DIR": str(run), "TEACHER_WEIGHTS": "~/mine.h5", "SEED": 9}
    assert runs.open_stage(SECOND, space).settings["TEACHER_WEIGHTS"] == space["TEACHER_WEIGHTS"]
    assert space["TEACHER_WEIGHTS"] == str(tmp_path / "mine.h5")
    assert space["SEED"] == 9  # another notebook decides it: left alone


def test_classes_without_an_order_have_no_softening_neither_by_hand_nor_by_command(run):
    finish(FIRST, run, ORDERED=False)
    space = {"RUN_DIR": str(run), "LABEL_SOFTENING": 0.6}
    stage = runs.open_stage(SECOND, space)
    stage.finish()
    assert space["LABEL_SOFTENING"] == stage.settings["LABEL_SOFTENING"] == 0
    assert opened(THIRD, run).settings["LABEL_SOFTENING"] == 0
    wanted = settings.validate({"ORDERED": False, "LABEL_SOFTENING": 0.6})
    assert runs.changes(stage.saved, runs.identity(SECOND, wanted), stage.saved["inputs"]) == []
    assert settings.validate({"LABEL_SOFTENING": 0.6})["LABEL_SOFTENING"] == 0.6


HOLD = """
import sys, time
from utils import runs
runs.open_stage("01_data", {"RUN_DIR": sys.argv[1]}, {"images": "a"})
print("open", flush=True)
time.sleep(60)
"""


def test_a_second_process_is_refused_until_the_first_dies(run, tmp_path):
    first = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(run)], cwd=settings.ROOT, stdout=subprocess.PIPE, text=True
    )
    assert first.stdout.readline() == "open\n"
    with pytest.raises(runs.StageError, match="Another process"):
        opened(FIRST, run)
    shutil.copytree(run, tmp_path / "copy")
    opened(FIRST, tmp_path / "copy")  # a copied folder is free
    runs.unlock(tmp_path / "copy")
    first.kill()
    first.wait()
    assert not opened(FIRST, run).finished


def test_a_later_session_takes_up_the_furthest_attached_run(tmp_path, monkeypatch):
    attached = tmp_path / "input"
    for name, notebooks in (("a/runs/tiny", [FIRST]), ("b/runs/tiny", [FIRST, SECOND])):
        for notebook in notebooks:
            finish(notebook, attached / name)
    for folder in (attached, *attached.rglob("*")):
        folder.chmod(0o555 if folder.is_dir() else 0o444)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", os.fspath(attached))
    monkeypatch.setenv("KAGGLE_WORKING_ROOT", os.fspath(tmp_path / "working"))
    stage = opened(SECOND, "runs/tiny")
    assert stage.finished and stage.run == tmp_path / "working/runs/tiny"
    opened(THIRD, "runs/tiny").finish()
    assert not (attached / "b/runs/tiny/teacher/phase_2").exists()
    for folder in (attached, *attached.rglob("*")):
        folder.chmod(0o755)


def test_the_deadline_counts_from_the_series_start(monkeypatch):
    monkeypatch.setenv("SERIES_STARTED", "1000")
    assert runs.deadline(2.0) == 1000 + 7200
    monkeypatch.delenv("SERIES_STARTED")
    assert runs.deadline(None) == float("inf")
    assert abs(runs.deadline(1.0) - time.time() - 3600) < 5


def test_nothing_half_written_stays(tmp_path):
    def fill_the_disk(path):
        path.write_text("half")
        raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="Make room"):
        runs.write_atomic(tmp_path / "a.txt", fill_the_disk)
    assert not list(tmp_path.iterdir())
