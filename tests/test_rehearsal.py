"""A rehearsal of Kaggle: the generated kernels, in order, in a tree like Kaggle's.

Input is mounted read-only, the code lies in it, there is no network where the system allows to
take it away, packages that Kaggle's image lacks cannot be imported, and a kernel sees of another
only its attached output.
"""

import os
import shutil
import subprocess
import sys
import time

import pytest

from utils import runs, settings
from utils.cli import kaggle

DATA, CODE = "owner/knees", "jane/knee-distillation-code"
ORDER = {"user": "jane", "data": DATA, "profile": "test"}
SHORT = {"LABELS_ONLY": False, "LEAK_IMAGES": 50, "BOOTSTRAP": 100}
# In a namespace of its own a process has no network but loopback, which it must switch on itself.
RUN = """
import fcntl, socket, struct, sys
if "alone" in sys.argv:
    fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x1))
if sys.argv[1].endswith(".py"):
    exec(compile(open(sys.argv[1]).read(), sys.argv[1], "exec"), {"__name__": "__main__"})
else:
    import papermill
    papermill.execute_notebook(sys.argv[1], sys.argv[2], cwd=sys.argv[3], progress_bar=False)
"""


class Kaggle:
    """Kaggle's part: mounts what a kernel's metadata names, runs it, keeps its output."""

    def __init__(self, tmp_path):
        self.root, self.folders, self.outputs = tmp_path, tmp_path / "up", {}
        self.datasets = {DATA: tmp_path / "images", CODE: self.folders / "code"}
        self.alone = ["unshare", "--map-root-user", "--net"]
        if subprocess.run([*self.alone, "true"], capture_output=True).returncode:
            self.alone = []
        (tmp_path / "lacking").mkdir()
        for name in ("nbval", "ai_edge_litert", "pytest"):
            (tmp_path / f"lacking/{name}.py").write_text("raise ImportError('not on Kaggle')")

    def run(self, kernel, old_layout=False, without=()):
        """Run a kernel as a push would; return its working folder, kept as its output."""
        attached, working = self.root / "kaggle" / "input", self.root / "kaggle" / "working"
        subprocess.run(["chmod", "-R", "u+w", str(self.root)], check=True)
        shutil.rmtree(self.root / "kaggle", ignore_errors=True)
        working.mkdir(parents=True)
        about = runs.read_json(self.folders / kernel / "kernel-metadata.json")
        attached.mkdir()
        for source in {*about["dataset_sources"], *about["kernel_sources"]} - {*without}:
            kind = "datasets" if source in self.datasets else "notebooks"
            place = attached / source.split("/")[1] if old_layout else attached / kind / source
            shutil.copytree((self.datasets | self.outputs)[source], place)
        subprocess.run(["chmod", "-R", "a-w", str(attached)], check=True)
        before = tree(attached)
        environment = os.environ | {
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_INPUT_ROOT": str(attached),
            "KAGGLE_WORKING_ROOT": str(working),
            "PYTHONDONTWRITEBYTECODE": "1",  # a read-only mount lets nobody write, root included
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "PYTHONPATH": str(self.root / "lacking"),
            "SERIES_STARTED": str(time.time()),  # this machine is older than a session
        }
        files = [self.folders / kernel / about["code_file"], working.parent / "executed.ipynb"]
        command = [*self.alone, sys.executable, "-c", RUN, *map(str, files), str(working)]
        command += ["alone"] * bool(self.alone)
        options = {"env": environment, "cwd": working, "stdout": -1, "stderr": -2, "text": True}
        done = subprocess.run(command, **options)
        assert done.returncode == 0, done.stdout[-3000:]
        assert tree(attached) == before, "the input was written to"
        self.outputs[about["id"]] = output = self.root / "outputs" / kernel
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(working, output)
        return output


def tree(folder):
    return {p: (p.stat().st_size, p.stat().st_mtime) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def rehearse(tmp_path, synthetic):
    """A Kaggle for the profile `test`, with some values changed."""

    def prepare(**changes):
        kaggle.write(tmp_path / "up", ORDER, settings.load_profile("test") | SHORT | changes)
        shutil.copytree(synthetic, tmp_path / "images")
        (tmp_path / "images/SYNTHETIC.json").unlink()
        return Kaggle(tmp_path)

    return prepare


@pytest.mark.parametrize("count", [3, pytest.param(8, marks=pytest.mark.slow)])
def test_kernel_after_kernel_takes_up_what_is_attached(rehearse, count):
    there = rehearse()
    for number, notebook in enumerate(list(settings.SERIES)[:count]):
        output = there.run(notebook, old_layout=number % 2 == 1) / "runs/test"
        assert runs.read_stage(output, notebook)["finished"]
        assert (output / "data/images.npy").exists(), "what is attached comes along"
    assert (output / "index.html").exists() == (count == len(settings.SERIES))


@pytest.mark.slow
def test_one_kernel_stopped_by_its_hours_goes_on_in_the_next_session(rehearse):
    there = rehearse(MAX_HOURS=0.001)
    output = there.run("series")
    stopped = runs.read_stage(output / "runs/test", "02_teacher_phase_1")
    assert (output / "UNFINISHED").exists() and not stopped["finished"] and stopped["stopped"]
    profile = there.folders / "code/notebooks/profiles/test.yaml"
    profile.write_text(profile.read_text().replace("MAX_HOURS: 0.001", "MAX_HOURS: 11.5"))
    again = kaggle.write_series(there.folders, ORDER, list(there.outputs), 2)
    output = there.run(again, old_layout=True)
    assert (output / "FINISHED").exists() and (output / "runs/test/index.html").exists()
    assert runs.read_stage(output / "runs/test", "02_teacher_phase_1")["id"] == stopped["id"]


def test_what_is_not_attached_is_said(rehearse):
    there = rehearse()
    for kernel, missing, said in (
        ("01_data", CODE, "attach the code dataset"),
        ("series", CODE, "No code is attached: Add Input > Datasets"),
        ("02_teacher_phase_1", "jane/knee-distillation-01-data", "run notebook 01_data first"),
    ):
        with pytest.raises(AssertionError, match=said):
            there.run(kernel, without=[missing])
