"""A rehearsal of Kaggle: the generated kernels, in order, in a tree like Kaggle's.

Input is mounted read-only, the code lies in it and not in the working folder, there is no network
where the system allows to take it away, packages that are not in Kaggle's image cannot be imported,
and a kernel sees of another only its attached output.
"""

import json
import os
import shutil
import subprocess
import sys
import time

import pytest
import yaml

from utils import parameters, runs
from utils.commands import kaggle

USER, DATA = "jane", "owner/knees"
NOT_ON_KAGGLE = ("nbval", "ai_edge_litert", "pytest")
# The profile `test`, and less of it: what else there is, nbval runs in test_notebooks.
SHORT = {"TEACHER_BACKBONE": "MobileNetV3Small", "LABELS_ONLY": False, "LEAK_STUDY": False}
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
        self.lacking = tmp_path / "lacking"
        self.lacking.mkdir()
        for name in NOT_ON_KAGGLE:
            (self.lacking / f"{name}.py").write_text(f"raise ImportError('no {name} on Kaggle')")

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
            "PYTHONPATH": str(self.lacking),
            "SERIES_STARTED": str(time.time()),  # this container is older than a session
        }
        environment = {**os.environ, **environment}
        environment.pop("MPLBACKEND", None)  # the tests' own
        return metadata, attached, working, environment

    def run(self, kernel, old_layout=False):
        """Run a kernel as a push would; return its working folder, kept as its output."""
        metadata, attached, working, environment = self.session(kernel, old_layout)
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
        values = parameters.load_profile("test") | SHORT | changes
        profile = tmp_path / "rehearsal.yaml"
        profile.write_text(yaml.safe_dump(values))
        folders = kaggle.generate(USER, DATA, tmp_path / "up", str(profile))
        images = tmp_path / "images"
        shutil.copytree(phantom_folder, images, ignore=shutil.ignore_patterns("*.json"))
        return Kaggle(tmp_path, folders, images)

    return prepare


def test_kernel_after_kernel_ends_in_the_report(rehearse):
    there = rehearse()
    for number, notebook in enumerate(runs.NOTEBOOKS):
        output = there.run(notebook, old_layout=number % 2 == 1) / "runs/test"
        assert runs.read_stage(output, notebook)["finished"]
        assert (output / "data/images.npy").exists(), "what is attached comes along"
    report = json.loads((output / "report/report.json").read_text())
    assert set(report["models"]) >= {"teacher", "student"}
    assert all(export["accuracy"] is not None for export in report["exports"])
    assert (output / "index.html").exists()


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
        ("01_data", f"{USER}/{kaggle.CODE}", "Add Input > Datasets > knee-distillation-code"),
        ("series", f"{USER}/{kaggle.CODE}", "Add Input > Datasets > knee-distillation-code"),
        ("01_data", DATA, "No images below .*choose Add Input > Datasets"),
        ("02_teacher_phase_1", f"{USER}/knee-distillation-01-data", "the output of 01_data"),
        (
            "05_distillation",
            f"{USER}/knee-distillation-00-weights",
            "MobileNetV3Small are not attached and the internet is off",
        ),
    ],
)
def test_whatever_is_not_attached_is_said_on_one_screen(rehearse, notebook, missing, said):
    there = rehearse(STUDENT_WEIGHTS="imagenet", STORED_SIZE=128)  # so large that images must be
    if "weights" in missing and not there.alone:
        pytest.skip("the network cannot be taken away here")
    file = there.folders / notebook / "kernel-metadata.json"
    metadata = json.loads(file.read_text())
    for sources in (metadata["dataset_sources"], metadata["kernel_sources"]):
        if missing in sources:
            sources.remove(missing)
    earlier = there.root / "earlier"
    stage = {"id": "a", "finished": True, "opened": 1.0, "seconds": 1.0, "parameters": {}}
    runs.write_json(earlier / "runs/test/data/stage.json", stage)
    (there.root / "weights").mkdir()
    for source in metadata["kernel_sources"]:
        there.outputs[source] = there.root / "weights" if "weights" in source else earlier
    file.write_text(json.dumps(metadata))
    with pytest.raises(AssertionError, match=said):
        there.run(notebook)
