"""Where a run lives, and what each of its stages saved.

A run is a folder; each notebook owns one folder in it, its stage, described by `stage.json`: the
parameters and inputs it was made with. A finished stage is never rewritten; one made with others is
renamed, never deleted.
"""

import os
import secrets
import shutil
import time
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from utils import settings

# Notebooks and modules use these as `runs.write_json`, and so on.
from utils.files import StageError, read_json, set_aside, write_atomic, write_json  # noqa: F401

try:
    import fcntl
except ImportError:  # Windows has no flock: there, nothing guards against a second run
    fcntl = None

FORMAT = 2  # of stage.json; 1 was the series before it was rebuilt
STAGES = {
    "01_data": "data",
    "02_teacher_phase_1": "teacher/phase_1",
    "03_teacher_phase_2": "teacher/phase_2",
    "04_teacher_phase_3": "teacher/phase_3",
    "05_distillation": "student",
    "06_evaluation": "report/evaluation",
    "07_trust": "report/trust",
    "08_deploy": "report/deploy",
    "A3_does_distillation_pay": "trials",
}
BUILDS_ON = dict(zip(list(STAGES)[1:], list(STAGES), strict=False))
BUILDS_ON |= {"08_deploy": "06_evaluation", "A3_does_distillation_pay": "05_distillation"}
NOT_IDENTITY = {"DATA_DIR", "MORE_TEACHERS"}  # what they hold is an input, wherever it lies
_locks: dict[Path, object] = {}


def on_kaggle() -> bool:
    """Whether this runs in a Kaggle session."""
    return "KAGGLE_KERNEL_RUN_TYPE" in os.environ


def kaggle_input() -> Path:
    """Where Kaggle mounts what is attached, read-only."""
    return Path(os.environ.get("KAGGLE_INPUT_ROOT", "/kaggle/input"))


def batch_mode() -> bool:
    """Whether nobody watches (papermill, a Kaggle batch run): no progress bars then."""
    watched = "JPY_SESSION_NAME" in os.environ or "COLAB_RELEASE_TAG" in os.environ
    watched |= os.environ.get("KAGGLE_KERNEL_RUN_TYPE") == "Interactive"
    return "SERIES_STARTED" in os.environ or not watched


def run_folder(run_dir: str) -> Path:
    """RUN_DIR as an absolute path; a relative one lies in the project, or where Kaggle keeps it."""
    working = Path(os.environ.get("KAGGLE_WORKING_ROOT", "/kaggle/working"))
    return (working if on_kaggle() else settings.ROOT) / Path(run_dir).expanduser()


def deadline(max_hours: float | None) -> float:
    """When training must have stopped (Unix seconds); infinity without a limit.

    The clock began with the command that runs the series, else with Kaggle's container, else now.
    """
    if max_hours is None and not on_kaggle():
        return float("inf")
    began = psutil.Process(1).create_time() if on_kaggle() else time.time()
    began = float(os.environ.get("SERIES_STARTED", began))
    return began + 3600 * (max_hours or 11.5)  # of the 12 that a session on Kaggle has


def take_up(run: Path) -> None:
    """Copy the furthest run attached on Kaggle to `run`, unless one is there already."""
    attached = {path.parents[1] for path in kaggle_input().rglob("data/stage.json")}
    if not attached or (run / "data" / "stage.json").exists():
        return

    def finished(other: Path) -> tuple:
        texts = [path.read_text(errors="replace") for path in other.rglob("stage.json")]
        return other.name == run.name, sum('"finished": true' in text for text in texts), other

    furthest, part = max(attached, key=finished), run.with_name(f".{run.name}.part")
    print(f"Going on with the run attached at {furthest}.")
    shutil.rmtree(part, ignore_errors=True)
    shutil.copytree(furthest, part, copy_function=shutil.copyfile)
    for folder in (part, *(p for p in part.rglob("*") if p.is_dir())):
        folder.chmod(0o755)  # copied from folders that nobody may write to
    if run.exists() and any(run.iterdir()):
        set_aside(run, "holds no data stage")
    part.rename(run)


def read_stage(run: Path, notebook: str) -> dict | None:
    """What a notebook's `stage.json` says, or None; StageError: damaged, or of another version."""
    path = Path(run) / STAGES[notebook] / "stage.json"
    saved = read_json(path, None)
    if saved is not None and saved.get("format") != FORMAT:
        raise StageError(f"{path} is of another version and left alone: choose another RUN_DIR.")
    return saved


def identity(notebook: str, values: Mapping[str, object]) -> dict[str, object]:
    """The parameters that decide what a stage is: the notebook's own, without paths of inputs."""
    own = settings.validate({n: v for n, v in values.items() if n in settings.OWNER}, notebook)
    return {n: v for n, v in own.items() if n in settings.OWNER and n not in NOT_IDENTITY}


def earlier(run: Path, notebook: str) -> tuple[dict[str, object], str | None]:
    """(parameters of the stages that `notebook` builds on, id of the last of them).

    StageError: one is missing, unfinished, or made from something that has changed since.
    """
    if notebook not in BUILDS_ON:
        return {}, None
    before = BUILDS_ON[notebook]
    saved, attach = read_stage(run, before), " (Add Input > Your Work)" if on_kaggle() else ""
    if saved is None:
        raise StageError(f"{run} has no {STAGES[before]}: run notebook {before} first{attach}.")
    if not saved["finished"]:
        stopped = saved["stopped"] or "it was interrupted."
        raise StageError(f"{before} is unfinished in {run}: {stopped} Run {before} again first.")
    parameters, upstream = earlier(run, before)
    if saved["inputs"].get("stage") != upstream:
        raise StageError(
            f"{run / STAGES[before]} was made from another {BUILDS_ON[before]} than the one there "
            f"now: run notebook {before} again."
        )
    return parameters | saved["parameters"], saved["id"]


def changes(saved: Mapping, parameters: Mapping, inputs: Mapping) -> list[str]:
    """What differs between a saved stage and what is wanted now; empty when nothing does."""
    old, before = settings.validate({}) | saved["parameters"], saved["inputs"]  # one may be new
    found = [f"{n} was {old.get(n)!r}, is {v!r}" for n, v in parameters.items() if old.get(n) != v]
    words = {"stage": f"{BUILDS_ON.get(saved['notebook'])} was run again", "images": "other images"}
    changed = [name for name in before | inputs if before.get(name) != inputs.get(name)]
    return found + [words.get(name, f"another teacher in {name}") for name in changed]


def lock(run: Path) -> None:
    """Hold `run` until its stage or command ends; StageError when another process has it."""
    if fcntl is None or run in _locks:
        return
    run.mkdir(parents=True, exist_ok=True)
    file = (run / ".lock").open("w+")
    try:
        if os.environ.get("SERIES_RUN") != str(run):  # a command shares it with its notebooks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except OSError as error:
        message = f"Another process is using {run}: wait for it, or choose another RUN_DIR."
        raise StageError(message) from error
    _locks[run] = file


def unlock(run: Path) -> None:
    """Let other processes have `run`."""
    if file := _locks.pop(run, None):
        file.close()


@dataclass
class Stage:
    """One notebook's part of a run, opened by `open_stage`."""

    notebook: str
    run: Path
    settings: dict  # the parameters of this and all earlier stages, and the shared ones
    saved: dict  # what `stage.json` says
    deadline: float  # when training must have stopped (Unix seconds)
    default: bool  # whether this is the embedded default at its own parameters, on its own images
    opened: float = field(default_factory=time.time)

    @property
    def folder(self) -> Path:
        """The folder that this notebook owns."""
        return self.run / STAGES[self.notebook]

    @property
    def finished(self) -> bool:
        """Whether everything that this stage makes is there."""
        return self.saved["finished"]

    @property
    def facts(self) -> dict:
        """What the stage was closed with, or keeps while it is open."""
        return self.saved["facts"]

    def path(self, *parts: str) -> Path:
        """A path in the run."""
        return self.run.joinpath(*parts)

    def write(self, **changed) -> None:
        """Change `stage.json`; the time since the stage was opened, or last written, is added."""
        now = time.time()
        self.saved |= {"seconds": round(self.saved["seconds"] + now - self.opened, 1)} | changed
        self.opened = now
        write_json(self.folder / "stage.json", self.saved)

    def finish(self, id: str | None = None, **facts) -> None:
        """Close the stage, keeping plain values; `id` is what later stages depend on."""
        if not self.finished:
            facts = self.facts | facts
            self.write(finished=True, stopped=None, facts=facts, id=id or self.saved["id"])
        unlock(self.run)
        print(f"{self.notebook} is done: {self.folder} ({self.saved['seconds'] / 60:.1f} min).")

    def pause(self, reason: str) -> None:
        """Leave the stage unfinished, to go on in a later session."""
        self.write(stopped=reason)
        unlock(self.run)
        print(f"{self.notebook} stopped: {reason} Run it again to go on.")


def open_stage(
    notebook: str, namespace: MutableMapping, inputs: Mapping[str, object] | None = None
) -> Stage:
    """Check a notebook's parameters and what it builds on; make its folder ready.

    namespace: its `globals()`; upper-case names (3 letters or more) get the value that applies.
    inputs: further plain values that the stage depends on, such as a digest of the images.
    SettingsError: a parameter that no notebook owns, or a bad value. StageError: an earlier stage
    is missing, unfinished or changed, or the run is in use.
    """
    given = {n: v for n, v in namespace.items() if n.isupper() and n[0] != "_" and len(n) > 2}
    values = settings.validate(given, notebook)
    run = run_folder(values["RUN_DIR"])
    if on_kaggle():
        take_up(run)
    before, upstream = earlier(run, notebook)
    everything = settings.settle(before | values)
    namespace.update({name: everything[name] for name in given if name in values})
    parameters = identity(notebook, everything)
    inputs = ({"stage": upstream} if upstream else {}) | dict(inputs or {})
    folder, saved = run / STAGES[notebook], read_stage(run, notebook)
    changed = changes(saved, parameters, inputs) if saved else ["new"]
    if changed or not saved["finished"]:
        lock(run)
        if saved and changed:
            set_aside(folder, f"is set aside ({'; '.join(changed)})")
        if changed:
            saved = {"format": FORMAT, "notebook": notebook, "id": secrets.token_hex(8)}
            saved |= {"finished": False, "stopped": None, "seconds": 0.0, "facts": {}}
            saved |= {"parameters": parameters, "inputs": inputs}
        write_json(folder / "stage.json", saved)  # better refused now than after an epoch
    else:
        print(f"{notebook} was done before with these parameters: {folder} is kept.")
    drawn = read_stage(run, "01_data")["inputs"].get("images") == "drawn"
    tiny = settings.validate({})
    default = drawn and all(everything.get(n, tiny[n]) == tiny[n] for n in settings.OWNER)
    return Stage(notebook, run, everything, saved, deadline(values["MAX_HOURS"]), default)
