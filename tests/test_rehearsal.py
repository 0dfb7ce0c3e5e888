"""A rehearsal of Kaggle: the generated kernels, in order, in a tree like Kaggle's.

Input is mounted read-only, the code lies in it and not in the working folder, there is no network
where the system allows to take it away, and a kernel sees of another only its attached output.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from utils import kaggle, parameters, runs

pytestmark = pytest.mark.skipif(
    len(parameters.declared()) < len(runs.NOTEBOOKS), reason="the notebooks are not all there yet"
)
USER, DATA = "jane", "owner/knees"
# In a namespace of its own a process has no network but loopback, which it must switch on itself.
RUN = """
import fcntl, socket, struct, sys
if "alone" in sys.argv:
    fcntl.ioctl(socket.socket(), 0x8914, struct.pack("16sh14x", b"lo", 0x1))
if sys.argv[1].endswith(".py"):
    sys.argv = sys.argv[1:]
    exec(compile(open(sys.argv[0]).read(), sys.argv[0], "exec"), {"__name__": "__main__"})
else:
    import papermill
    papermill.execute_notebook(sys.argv[1], sys.argv[2], cwd=sys.argv[3], progress_bar=False)
"""


class Kaggle:
    """Kaggle's part: mounts what a kernel's metadata names, runs it, keeps its output."""

    def __init__(self, tmp_path, folders, images):
        self.root, self.folders, self.outputs = tmp_path, folders, {}
        self.datasets = {DATA: images, f"{USER}/{kaggle.CODE}": folders / "code"}
        alone = ["unshare", "--map-root-user", "--net"]
        possible = shutil.which("unshare") and not subprocess.call(
            [*alone, "true"], stderr=subprocess.DEVNULL
        )
        self.alone = alone if possible else []

    def session(self, kernel, old_layout=False):
        """Fresh mounts for one kernel: the environment that tells where they are."""
        attached, working = self.root / "kaggle" / "input", self.root / "kaggle" / "working"
        subprocess.run(["chmod", "-R", "u+w", str(self.root)], check=True)
        shutil.rmtree(self.root / "kaggle", ignore_errors=True)
        working.mkdir(parents=True)
        attached.mkdir()
        metadata = json.loads((self.folders / kernel / "kernel-metadata.json").read_text())
        kinds = [("datasets", metadata["dataset_sources"], self.datasets)]
        kinds += [("notebooks", metadata["kernel_sources"], self.outputs)]
        for kind, sources, known in kinds:
            for source in sources:
                slug = source.split("/")[1]
                place = attached / slug if old_layout else attached / kind / source
                shutil.copytree(known[source], place)
        subprocess.run(["chmod", "-R", "a-w", str(attached)], check=True)
        environment = {
            "KAGGLE_KERNEL_RUN_TYPE": "Batch",
            "KAGGLE_INPUT_ROOT": str(attached),
            "KAGGLE_WORKING_ROOT": str(working),
            "PYTHONDONTWRITEBYTECODE": "1",  # a read-only mount lets nobody write, root included
            "HTTPS_PROXY": "http://127.0.0.1:9",
            "SERIES_STARTED": str(time.time()),  # this container is older than a session
        }
        return metadata, attached, working, {**os.environ, **environment}

    def run(self, kernel, old_layout=False):
        """Run a kernel as a push would; return its working folder, kept as its output."""
        metadata, attached, working, environment = self.session(kernel, old_layout)
        environment = {
            n: v for n, v in environment.items() if n not in ("PYTHONPATH", "MPLBACKEND")
        }
        code = working.parent / metadata["code_file"]
        text = (self.folders / kernel / metadata["code_file"]).read_text()
        code.write_text(text.replace("/kaggle/input", str(attached)))
        before = tree(attached)
        executed = working.parent / "executed.ipynb"
        done = subprocess.run(
            [*self.alone, sys.executable, "-c", RUN, str(code), str(executed), str(working)]
            + ["alone"] * bool(self.alone),
            env=environment,
            cwd=working,
            capture_output=True,
            text=True,
        )
        assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
        assert tree(attached) == before, "the input was written to"
        output = self.root / "outputs" / kernel
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(working, output)
        self.outputs[metadata["id"]] = output
        return output


def tree(folder):
    """Names, sizes and times of all files."""
    return {p: (p.stat().st_size, p.stat().st_mtime) for p in folder.rglob("*") if p.is_file()}


@pytest.fixture
def rehearse(tmp_path, phantom_folder):
    """A Kaggle for a profile: `test` with some values changed."""

    def prepare(**changes):
        values = parameters.load_profile("test") | changes
        profile = tmp_path / "rehearsal.yaml"
        profile.write_text(yaml.safe_dump(values))
        folders = kaggle.generate(USER, DATA, tmp_path / "up", str(profile))
        images = tmp_path / "images"
        shutil.copytree(phantom_folder, images, ignore=shutil.ignore_patterns("*.json"))
        return Kaggle(tmp_path, folders, images)

    return prepare


def test_the_first_kernels_hand_on_what_they_made(rehearse):
    there = rehearse()
    first = there.run("01_data")
    assert runs.read_stage(first / "runs/test", "01_data")["finished"]
    second = there.run("02_teacher_phase_1", old_layout=True)
    assert runs.read_stage(second / "runs/test", "02_teacher_phase_1")["finished"]
    assert (second / "runs/test/data/images.npy").exists(), "what is attached comes along"


@pytest.mark.slow
def test_kernel_after_kernel_ends_in_the_report(rehearse):
    there = rehearse()
    for number, notebook in enumerate(runs.NOTEBOOKS):
        output = there.run(notebook, old_layout=number % 2 == 1)
    report = json.loads((output / "runs/test/report/report.json").read_text())
    assert set(report["models"]) >= {"teacher", "student"}


@pytest.mark.slow
def test_one_kernel_stopped_by_its_hours_goes_on_in_the_next_session(rehearse):
    there = rehearse(MAX_HOURS=0.01, PHASE_1_EPOCHS=40)
    output = there.run("series")
    assert (output / "UNFINISHED").exists()
    profile = there.folders / "code" / "notebooks" / "profiles" / "rehearsal.yaml"
    values = yaml.safe_load(profile.read_text())
    profile.write_text(yaml.safe_dump(values | {"MAX_HOURS": 11.5}))
    stopped = runs.read_stage(output / "runs/test", "02_teacher_phase_1")
    assert not stopped["finished"] and stopped["stopped"]
    output = there.run("series_again", old_layout=True)
    assert (output / "FINISHED").exists()
    assert runs.read_stage(output / "runs/test", "02_teacher_phase_1")["id"] == stopped["id"]
    assert (output / "runs/test/report/report.json").exists()
    assert (output / "runs/test/index.html").exists()


def test_a_kernel_that_goes_on_without_its_earlier_output_ends_at_once(rehearse):
    there = rehearse()
    metadata = json.loads((there.folders / "series_again/kernel-metadata.json").read_text())
    there.outputs |= {source: there.folders / "code" for source in metadata["kernel_sources"]}
    with pytest.raises(AssertionError, match="No earlier run is attached"):
        there.run("series_again")


@pytest.mark.parametrize(
    ("notebook", "missing", "said"),
    [
        ("01_data", "code", "Add Input > Datasets > knee-distillation-code"),
        ("02_teacher_phase_1", "kernel", "output of 01_data"),
    ],
)
def test_a_missing_attachment_is_said(rehearse, tmp_path, notebook, missing, said):
    there = rehearse()
    file = there.folders / notebook / "kernel-metadata.json"
    metadata = json.loads(file.read_text())
    metadata["kernel_sources"] = []
    if missing == "code":
        metadata["dataset_sources"].remove(f"{USER}/{kaggle.CODE}")
    file.write_text(json.dumps(metadata))
    with pytest.raises(AssertionError, match=said):
        there.run(notebook)
