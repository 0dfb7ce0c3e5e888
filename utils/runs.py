"""Where a run lives, what each stage of it saved, and clear errors when a stage is missing.

A run is a folder. Each notebook owns one folder in it and closes it with `stage.json`: what it was
made with, by which notebook, from which earlier stage. Data flows one way, so a stage is good as
long as its own parameters and the stage before it are the ones it was made with. Nothing here
imports TensorFlow.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import secrets
import shutil
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path

import psutil

from utils import parameters
from utils.files import (  # others find them here
    StageError,
    cannot_write,
    read_json,
    write_atomic,  # noqa: F401
    write_json,
)

FOLDERS = {
    "01_data": "data",
    "02_teacher_phase_1": "teacher/phase_1",
    "03_teacher_phase_2": "teacher/phase_2",
    "04_teacher_phase_3": "teacher/phase_3",
    "05_distillation": "student",
    "06_evaluation": "report",
}
NOTEBOOKS = parameters.NOTEBOOKS
# Openings of the test split are counted over the life of a run, whatever is made anew.
KEPT_FOREVER = ("test_openings.json",)
KAGGLE_HOURS, KAGGLE_MARGIN = 12.0, 0.5
PROCESS_STARTED = time.time()


def root() -> Path:
    """The folder that holds `utils` and `notebooks`."""
    return parameters.ROOT


def on_kaggle() -> bool:
    """Whether this runs in a Kaggle session."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def kaggle_input() -> Path:
    """Where Kaggle mounts what is attached, read-only."""
    return Path(os.environ.get("KAGGLE_INPUT_ROOT", "/kaggle/input"))


def kaggle_working() -> Path:
    """The only folder that Kaggle keeps of a session."""
    return Path(os.environ.get("KAGGLE_WORKING_ROOT", "/kaggle/working"))


def batch_mode() -> bool:
    """Whether nobody watches (papermill, a Kaggle batch run): live bars would only fill the log."""
    kaggle = os.environ.get("KAGGLE_KERNEL_RUN_TYPE")
    if kaggle is not None and "SERIES_STARTED" not in os.environ:
        return kaggle != "Interactive"
    return "JPY_SESSION_NAME" not in os.environ and "COLAB_RELEASE_TAG" not in os.environ


def run_folder(run_dir: str | Path) -> Path:
    """RUN_DIR as an absolute path; a relative one lies in the project, or where Kaggle keeps it."""
    return (kaggle_working() if on_kaggle() else root()) / Path(run_dir).expanduser()


def read_stage(run: Path, notebook: str) -> dict | None:
    """What a notebook's `stage.json` says, or None when it has never been opened."""
    path = Path(run) / FOLDERS[notebook] / "stage.json"
    return read_json(path) if path.exists() else None


def set_aside(folder: Path, why: str = "was made with other settings") -> Path:
    """Rename a folder to `<name>.<time>`, say so, and return the new path: nothing is deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    aside = folder.with_name(f"{folder.name}.{stamp}")
    number = 1
    while aside.exists():
        number += 1
        aside = folder.with_name(f"{folder.name}.{stamp}-{number}")
    folder.rename(aside)
    for name in KEPT_FOREVER:
        if (aside / name).exists():
            folder.mkdir(exist_ok=True)
            shutil.copy2(aside / name, folder / name)
    print(f"{folder} {why}: kept as {aside.name}.")
    return aside


def own_parameters(notebook: str, values: Mapping, root_folder: Path | None = None) -> dict:
    """The parameters that `notebook` decides, with `values` over its defaults."""
    own = parameters.declared(root_folder)[notebook]
    return {n: values.get(n, v) for n, v in own.items() if n not in parameters.SHARED}


def signature(folder: str) -> str | None:
    """A cheap mark of a data folder: its files' names and sizes; None for no folder."""
    if not folder or not Path(folder).is_dir():
        return None
    digest = hashlib.sha256()
    for path in sorted(p for p in Path(folder).rglob("*") if p.is_file()):
        digest.update(f"{path.relative_to(folder)}\0{path.stat().st_size}\n".encode())
    return digest.hexdigest()[:16]


def identity(run: Path, notebook: str, values: Mapping, root_folder: Path | None = None) -> dict:
    """What decides whether a stage must be made anew: parameters, data and the stage before."""
    own = own_parameters(notebook, values, root_folder)
    before = NOTEBOOKS.index(notebook) - 1
    upstream = read_stage(run, NOTEBOOKS[before]) if before >= 0 else None
    return {
        "notebook": notebook,
        "parameters": json.loads(json.dumps(own)),
        "data": signature(own.get("DATA_DIR", "")),
        "upstream": upstream and upstream["id"],
    }


def state(run: Path, notebook: str, values: Mapping, root_folder: Path | None = None) -> str:
    """How a stage stands: "missing", "done", "unfinished", or "stale".

    Stale means made with other parameters or from another earlier stage than there is now.
    """
    saved = read_stage(Path(run), notebook)
    if saved is None:
        return "missing"
    wanted = identity(Path(run), notebook, values, root_folder)
    if any(saved.get(key) != value for key, value in wanted.items()):
        return "stale"
    return "done" if saved["finished"] else "unfinished"


def attached_runs() -> list[Path]:
    """Runs among what is attached on Kaggle (either mount layout), the furthest one last.

    One that cannot be read is left out, and said.
    """
    found = {}
    for path in kaggle_input().rglob("data/stage.json"):
        run = path.parent.parent
        try:
            saved = [s for notebook in NOTEBOOKS if (s := read_stage(run, notebook))]
            # Sessions of one run share when its stages were opened, not how long they worked.
            found[run] = (
                sum(s["finished"] for s in saved),
                max(s["opened"] for s in saved),
                sum(s["seconds"] for s in saved),
            )
        except (StageError, KeyError, TypeError) as error:
            print(f"The run attached at {run} cannot be read ({error}): passed over.")
    return sorted(found, key=found.get)


def take_up(run: Path) -> None:
    """Copy the furthest attached run to `run` when there is none yet; the input stays untouched.

    Runs of the same name come before others.

    Raises:
        OSError: it cannot be written; nothing is left of it.
    """
    if (run / "data" / "stage.json").exists() or not (found := attached_runs()):
        return
    furthest = ([f for f in found if f.name == run.name] or found)[-1]
    print(f"Taking up the run attached at {furthest}.")
    part = run.with_name(f".{run.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    try:
        shutil.copytree(furthest, part, copy_function=shutil.copyfile)
        for folder in (part, *(p for p in part.rglob("*") if p.is_dir())):
            folder.chmod(0o755)  # copied from folders that nobody may write to
    except (OSError, shutil.Error) as error:
        shutil.rmtree(part, ignore_errors=True)
        raise cannot_write(run, error) from error
    if run.exists() and any(run.iterdir()):
        set_aside(run, "has no notebook 01")
    part.rename(run)  # over an empty folder, too


def started() -> float:
    """When the clock of MAX_HOURS began (Unix seconds): the runner's, the container's, or now."""
    if "SERIES_STARTED" in os.environ:
        return float(os.environ["SERIES_STARTED"])
    if on_kaggle():
        return psutil.Process(1).create_time()
    return PROCESS_STARTED


def clock(seconds: float) -> str:
    """Weekday and time of day of a moment (Unix seconds)."""
    return time.strftime("%a %H:%M", time.localtime(seconds))


def deadline(max_hours: float | None) -> float:
    """When training must have stopped (Unix seconds); infinity without a limit."""
    if max_hours is None:
        if not on_kaggle():
            return float("inf")
        max_hours = KAGGLE_HOURS - KAGGLE_MARGIN
    return started() + 3600 * max_hours


@dataclass
class Stage:
    """One notebook's part of a run, opened by `open_stage`."""

    notebook: str
    run: Path
    settings: dict
    saved: dict
    deadline: float
    planned: dict
    opened: float = field(default_factory=time.time)
    paused: bool = False

    @property
    def folder(self) -> Path:
        """The folder that this notebook owns."""
        return self.run / FOLDERS[self.notebook]

    @property
    def finished(self) -> bool:
        """Whether everything that this stage makes is there."""
        return self.saved["finished"]

    @property
    def key(self) -> str:
        """Marks this very stage: its checkpoints carry it, so that no other run's are taken up."""
        return self.saved["id"]

    def path(self, *parts: str) -> Path:
        """A path in the run."""
        return self.run.joinpath(*parts)

    def outlook(self, what: str, left: float, here: float, seconds: float) -> str:
        """When `what` ends, in `left` seconds, and the series; and what the time limit makes of it.

        After `here` seconds more the training in hand is over; `seconds` is its pace an epoch.
        """
        now, plan = time.time(), self.planned
        if self.folder.parent.name == "teacher":
            later = [p for p in (2, 3) if self.folder.name < f"phase_{p}"]  # train more layers
            looks = plan.get("VIEWS", 0) / 3  # the third of an epoch each
            epochs = sum(plan.get(f"PHASE_{p}_EPOCHS", 0) for p in later) + looks
            ends = "not before {} (the student begins then)"
        else:  # the student on labels alone comes after the distilled one
            again = plan.get("LABELS_ONLY", False) and "student" not in self.saved["facts"]
            both = ("STUDENT_HEAD_EPOCHS", "STUDENT_EPOCHS")
            epochs, ends = again * sum(plan.get(name, 0) for name in both), "soon after {}"
        end = now + here + epochs * seconds
        text = f"{what} ends about {clock(now + left)}, the series {ends.format(clock(end))}"
        if self.deadline < float("inf"):
            text += f"; the time limit is {clock(self.deadline)}"
        if end > self.deadline:
            text += ". That does not fit: it will stop at an epoch's end, to go on when run again"
        return f"{text}."

    def write(self, **changes) -> None:
        """Change `stage.json`."""
        self.saved |= changes
        write_json(self.folder / "stage.json", self.saved)

    def finish(self, **facts) -> None:
        """Close the stage: `facts` (plain values) are kept with it and its time is noted once."""
        if not self.finished:
            seconds = self.saved["seconds"] + time.time() - self.opened
            facts = self.saved["facts"] | facts
            self.write(finished=True, stopped=None, seconds=round(seconds, 1), facts=facts)
        minutes = self.saved["seconds"] / 60
        print(f"{self.notebook} is done: {self.folder} ({minutes:.1f} min).")

    def pause(self, reason: str) -> None:
        """Leave the stage unfinished, to go on in a later session."""
        seconds = self.saved["seconds"] + time.time() - self.opened
        self.write(stopped=reason, seconds=round(seconds, 1))
        self.opened, self.paused = time.time(), True
        print(f"{self.notebook} stopped: {reason} Run it again to go on.")


def open_stage(notebook: str, namespace: Mapping[str, object]) -> Stage:
    """Check a notebook's parameters and what it builds on, and make its folder ready.

    Args:
        notebook: the notebook's name, such as "03_teacher_phase_2".
        namespace: its `globals()`; an upper-case name of three letters or more is a parameter.

    Returns:
        The stage; a folder made with other parameters has been set aside.

    Raises:
        parameters.ParameterError: a parameter that no notebook owns, a bad value, or values that
            do not go together.
        StageError: an earlier stage is missing, unfinished, or newer than what builds on it; on
            Kaggle also a missing GPU, attachment or the like.
        OSError: the run's folder cannot be written.
    """
    values = {n: v for n, v in namespace.items() if parameters.looks_like_one(n)}
    parameters.check(values)
    run = run_folder(values["RUN_DIR"])
    if run.exists() and not run.is_dir():
        raise parameters.ParameterError(f"RUN_DIR: {run} is a file, no folder.")
    if on_kaggle():
        from utils import preflight

        take_up(run)
        preflight.check([notebook], values, run)
    settings = earlier_settings(run, notebook) | own_parameters(notebook, values)
    shared = {n: values[n] for n in parameters.SHARED if n in values}
    parameters.check_together(notebook, settings)
    plan = planned(run) | values
    if notebook != NOTEBOOKS[0]:
        facts = read_stage(run, NOTEBOOKS[0])["facts"]
        parameters.check_question(plan, facts.get("classes"))
    wanted = identity(run, notebook, values)
    folder = run / FOLDERS[notebook]
    condition = state(run, notebook, values)
    if condition == "stale":
        set_aside(folder)
    if condition in ("stale", "missing"):
        fresh = {"id": secrets.token_hex(8), "finished": False, "stopped": None, "seconds": 0.0}
        saved = fresh | wanted | {"opened": time.time(), "facts": {}}
        write_json(folder / "stage.json", saved)
    saved = read_stage(run, notebook)
    if saved["finished"]:
        print(f"{notebook} was done before with these parameters: {folder} is kept.")
    else:
        write_json(folder / "stage.json", saved)  # better now than after an epoch
    limit = deadline(values.get("MAX_HOURS"))
    return Stage(notebook, run, settings | shared, saved, limit, plan)


def planned(run: Path) -> dict[str, object]:
    """What the whole series will run with: what the runner was told, else the run's profile."""
    plan = parameters.defaults()
    with contextlib.suppress(parameters.ParameterError):  # not every run is named for a profile
        plan |= parameters.load_profile(run.name)
    return plan | json.loads(os.environ.get("SERIES_PARAMETERS", "{}"))


def earlier_settings(run: Path, notebook: str) -> dict:
    """All parameters of the stages before `notebook`, which must be finished and fit together."""
    settings, last, before = {}, None, None
    for earlier in NOTEBOOKS[: NOTEBOOKS.index(notebook)]:
        saved = read_stage(run, earlier)
        if saved is None:
            raise StageError(f"{run} has no {FOLDERS[earlier]}: run notebook {earlier} first.")
        if not saved["finished"]:
            raise StageError(
                f"{earlier} is unfinished in {run}"
                f"{': ' + saved['stopped'] if saved['stopped'] else '.'} Run {earlier} again first."
            )
        if saved["upstream"] != last:
            raise StageError(
                f"{run / FOLDERS[earlier]} was made from another {before} than the one there now: "
                f"run notebook {earlier} again."
            )
        settings |= saved["parameters"]
        last, before = saved["id"], earlier
    return settings


def environment() -> dict[str, object]:
    """Versions and machine, for reports: names to versions, processors, accelerators."""
    versions, accelerators = {}, []
    if tf := sys.modules.get("tensorflow"):  # not imported for this
        versions["tensorflow"] = tf.__version__
        details = map(
            tf.config.experimental.get_device_details, tf.config.list_physical_devices("GPU")
        )
        accelerators = [found.get("device_name", "GPU") for found in details]
    for name in ("keras", "numpy", "scikit-learn", "papermill"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "python": platform.python_version(),
        "system": platform.platform(),
        "processors": os.cpu_count(),
        "accelerators": accelerators,
        "versions": versions,
    }
