"""`python -m utils run`: the notebooks in order, each by papermill in a kernel of its own."""

import argparse
import contextlib
import logging
import os
import re
import sys
import time
from pathlib import Path

import nbconvert
import papermill
import yaml

from utils import folders, kaggle, page, runs, settings  # no TensorFlow: GPU memory is for kernels


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add, pair = parser.add_argument, ("NAME", "VALUE")
    add("--profile", default="tiny", metavar="NAME", help="in notebooks/profiles, or a YAML file")
    add("--data", metavar="DIR", help="images in split/class/image (default: synthetic X-rays)")
    add("--out", metavar="DIR", help="the run's folder (default: runs/<profile>)")
    add("--only", metavar="01,05", help="these alone; also A3 and what else lies in notebooks/")
    add("--fresh", action="store_true", help="begin anew; what is there is renamed, never deleted")
    add("-p", dest="given", nargs=2, action="append", default=[], metavar=pair, help="a parameter")


def main(arguments: argparse.Namespace) -> int:
    """Run the notebooks; return 0, or 3 when a stage was stopped by MAX_HOURS."""
    notebooks, values = choose(arguments.only), gather(arguments)
    run = runs.run_folder(values["RUN_DIR"])
    if run.is_file():
        raise settings.SettingsError(f"{run} is a file: give --out a folder, new or of a run.")
    values["RUN_DIR"] = str(run)
    runs.take_up(run)
    runs.lock(run)  # to the end: what nobody can write, or another process uses, is refused at once
    os.environ["SERIES_RUN"] = str(run)  # the notebooks that start here share the lock
    for name in settings.SERIES:  # what --only leaves out
        saved = runs.read_stage(run, name) if name not in notebooks and name < notebooks[-1] else {}
        if saved and (other := runs.changes(saved, runs.identity(name, values), saved["inputs"])):
            raise settings.SettingsError(
                f"{name} in {run} was made with other parameters ({'; '.join(other)}): name it in "
                "--only too, or give the parameters that it was made with."
            )
    source, images = folders.check_folder(values, True) if "01_data" in notebooks else (None, {})
    own = {n: v for n, v in values.items() if settings.OWNER.get(n) in notebooks}
    kaggle.preflight(own, source)
    logging.getLogger("asyncio").setLevel(logging.CRITICAL)  # Ctrl-C is reported elsewhere
    os.environ.pop("MPLBACKEND", None)  # Agg would show no figures in the executed notebooks
    if not runs.on_kaggle():  # there, hours count from the start of the session
        os.environ.setdefault("SERIES_STARTED", str(time.time()))  # MAX_HOURS spans all notebooks
    for notebook in notebooks:
        if arguments.fresh and (folder := run / runs.STAGES.get(notebook, "-")).exists():
            runs.set_aside(folder, "is made anew")
        if is_done(run, notebook, values, images):
            print(f"{notebook}: kept, done before with these parameters")
            continue
        print(f"{notebook} …", flush=True)
        execute(run, notebook, values)
        saved = notebook in runs.STAGES and runs.read_stage(run, notebook)
        if saved and not saved["finished"]:
            print("The same command goes on from here.")
            return 3
    print(f"Open {page.write(run)} to see it all.")
    return 0


def choose(only: str | None) -> list[str]:
    """The notebooks to run, in order: the series, or all those whose names `only` begins."""
    known = sorted(path.stem for path in (settings.ROOT / "notebooks").glob("*.ipynb"))
    wanted = [part.strip() for part in (only or ",".join(settings.SERIES)).split(",")]
    for part in wanted:
        if not part or not any(name.startswith(part) for name in known):
            raise settings.SettingsError(f"--only {part!r} is none of {', '.join(known)}.")
    return [name for name in known if name.startswith(tuple(wanted))]


def gather(arguments: argparse.Namespace) -> dict[str, object]:
    """All parameters, checked and complete."""
    values = {"RUN_DIR": f"runs/{Path(arguments.profile).stem}"}
    values |= settings.load_profile(arguments.profile)
    for name, text in arguments.given:
        values[name] = text
        with contextlib.suppress(yaml.YAMLError):
            values[name] = yaml.safe_load(text)
    for name, folder in (("DATA_DIR", arguments.data), ("RUN_DIR", arguments.out)):
        if folder is not None:
            values[name] = str(Path(folder).expanduser().absolute())
    return settings.validate(values)


def is_done(run: Path, notebook: str, values: dict, images: dict) -> bool:
    """Whether a stage is as these parameters want it, and its notebook came to its end."""
    saved = notebook in runs.STAGES and runs.read_stage(run, notebook)
    ended = saved and saved["finished"] and (run / "notebooks" / f"{notebook}.ipynb").exists()
    if not ended or (notebook == "05_distillation" and values["MORE_TEACHERS"]):
        return False  # 05 itself compares the files of further teachers
    before = runs.BUILDS_ON.get(notebook)
    inputs = {"stage": (runs.read_stage(run, before) or {}).get("id")} if before else images
    return not runs.changes(saved, runs.identity(notebook, values), inputs)


def execute(run: Path, notebook: str, values: dict) -> None:
    """Run one notebook into `run`/notebooks, `.unfinished.ipynb` until its last cell has ended."""
    source = settings.ROOT / "notebooks" / f"{notebook}.ipynb"
    runs.earlier(run, notebook)
    executed = run / "notebooks" / source.name
    unfinished, log = executed.with_suffix(".unfinished.ipynb"), executed.with_suffix(".log")
    executed.parent.mkdir(parents=True, exist_ok=True)
    executed.unlink(missing_ok=True)
    with log.open("wb") as file, os.fdopen(os.dup(2), "wb") as terminal:
        os.dup2(file.fileno(), 2)  # of the kernel too, with TensorFlow's start-up messages
        try:
            papermill.execute_notebook(
                source,
                unfinished,
                {n: values[n] for n in papermill.inspect_notebook(source) if n in values},
                cwd=settings.ROOT,
                progress_bar=False,
                stdout_file=sys.stdout,  # so that a long cell shows its epochs
                shutdown_kernel="immediate",  # all is written; TensorFlow takes seconds to leave
            )
        except (papermill.PapermillExecutionError, RuntimeError) as error:  # or the kernel died
            raise runs.StageError(f"{explain(error, log)}\nSee {unfinished}") from error
        finally:
            os.dup2(terminal.fileno(), 2)
    unfinished.replace(executed)
    try:
        text = nbconvert.HTMLExporter().from_filename(str(executed))[0]
        executed.with_suffix(".html").write_text(text, encoding="utf-8")
    except Exception as error:  # nbconvert's versions differ in what they raise; no run fails
        print(f"No HTML of {notebook} ({type(error).__name__}: {str(error)[:200]}).")


def explain(error: Exception, log: Path) -> str:
    """Which cell failed and why, on one screen."""
    if not hasattr(error, "exec_count"):
        why = f"{error}, most often for lack of memory: try a smaller batch or image size."
        lines = [why, *log.read_text(errors="replace").splitlines()[-5:]]
    else:
        trace = re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(error.traceback))
        places = re.findall(r"(?m)^(?:File |Cell In|\S+\.py:\d)(?!.*site-packages).*", trace)
        lines = [f"Cell In [{error.exec_count}] failed:", *error.source.strip().splitlines()[:6]]
        lines += [*places[-3:], *f"{error.ename}: {error.evalue}".splitlines()[:11]]
    return "\n".join(line[:160] for line in lines)
