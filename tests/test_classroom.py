"""The students' copy: whole, without solutions and outputs; a ready run is taken up."""

import nbformat
import pytest

from utils import cli, runs, settings


@pytest.fixture
def run(tmp_path):
    """What notebooks 01 to 03 leave, as files: finished, with the notebooks' own parameters."""
    folder, before = tmp_path / "made", {}
    for name in list(settings.SERIES)[:3]:
        saved = {"format": runs.FORMAT, "id": name, "finished": True, "inputs": before}
        saved |= {"parameters": runs.identity(name, {}), "seconds": 1.0, "facts": {}}
        runs.write_json(folder / runs.STAGES[name] / "stage.json", saved)
        before = {"stage": name}
    (folder / "teacher/phase_1/teacher.keras").write_bytes(b"model")
    return folder


def test_the_copy_has_all_that_students_need_and_no_answer(tmp_path):
    out = tmp_path / "class"
    assert cli.main(["class", "--out", str(out)]) == 0
    there = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_file()}
    assert {"README.md", "requirements.txt", "LICENSE", "utils/runs.py"} <= there
    assert {f"notebooks/{name}.ipynb" for name in settings.SERIES} <= there
    assert not any("__pycache__" in name or name == "notebooks/README.md" for name in there)
    for path in sorted((out / "notebooks").glob("*.ipynb")):
        book = nbformat.read(path, 4)
        original = nbformat.read(settings.ROOT / "notebooks" / path.name, 4)
        kept = [c.source for c in original.cells if "solution" not in c.metadata.get("tags", [])]
        assert [c.source for c in book.cells] == kept
        assert not any(c.get("outputs") or c.get("execution_count") for c in book.cells)


def test_a_ready_run_is_one_that_the_next_notebook_takes_up(tmp_path, run):
    out = ["--out", str(tmp_path / "class")]
    assert cli.main(["class", "--ready", str(run), "--before", "04", *out]) == 0
    copied = tmp_path / "class/runs/tiny"
    assert runs.earlier(copied, "04_teacher_phase_3")[1] == "03_teacher_phase_2"
    assert (copied / "teacher/phase_1/teacher.keras").read_bytes() == b"model"


def test_what_cannot_be_given_away_is_refused(tmp_path, run, capsys):
    command = ["class", "--out", str(tmp_path / "class"), "--ready", str(run)]
    assert cli.main(command) == 2 and "04_teacher_phase_3" in capsys.readouterr().err
    saved = runs.read_stage(run, "01_data")
    saved["parameters"]["SEED"] = 7
    runs.write_json(run / "data/stage.json", saved)
    assert cli.main([*command, "--before", "02"]) == 2
    assert "other parameters" in capsys.readouterr().err
    assert cli.main([*command, "--out", str(run)]) == 2
    assert {path.name for path in tmp_path.iterdir()} == {"made"}
