"""Run the notebooks in order with papermill: each in a kernel of its own that ends before the next.

This process never imports TensorFlow: a parent that has touched it would hold the accelerator's
memory that its kernels need.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

import yaml
from tqdm import tqdm

from utils import pages, parameters, runs

# Exit statuses: a cell failed; a wrong argument; the time budget ended; Ctrl-C.
FAILED, USAGE, UNFINISHED, INTERRUPTED = 1, 2, 3, 130
ANSI = re.compile(r"\x1b\[[0-9;]*[A-Za-z]")


class SeriesError(RuntimeError):
    """A notebook that could not be run to its end; the message fits one screen."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m utils run`."""
    parser.add_argument(
        "--profile",
        default="tiny",
        metavar="NAME",
        help="a YAML file of parameters in notebooks/profiles, or a path (default: tiny)",
    )
    parser.add_argument("--data", metavar="DIR", help="images in split/class/image")
    parser.add_argument("--out", metavar="DIR", help="the run's folder (default: runs/<profile>)")
    parser.add_argument("--only", metavar="05,06", help="these notebooks alone")
    parser.add_argument(
        "-p",
        dest="parameters",
        nargs=2,
        action="append",
        default=[],
        metavar=("NAME", "VALUE"),
        help="one parameter over the profile's; repeatable",
    )
    parser.add_argument(
        "--fresh",
        action="store_true",
        help="begin anew; what is there is renamed to <stage>.<time>, never deleted",
    )


def main(arguments: argparse.Namespace) -> int:
    """Run the series as the command line asks; return the exit status."""
    try:
        return run(
            arguments.profile,
            data=arguments.data,
            out=arguments.out,
            only=arguments.only,
            given=[tuple(pair) for pair in arguments.parameters],
            fresh=arguments.fresh,
        )
    except parameters.ParameterError as error:
        print(error, file=sys.stderr)
        return USAGE
    except (SeriesError, runs.StageError, OSError) as error:
        print(error, file=sys.stderr)
        return FAILED
    except KeyboardInterrupt:
        print("Interrupted; the same command goes on from here.", file=sys.stderr)
        return INTERRUPTED


def run(
    profile: str = "tiny",
    *,
    data: str | None = None,
    out: str | None = None,
    only: str | None = None,
    given: Iterable[tuple[str, str]] = (),
    fresh: bool = False,
    root: Path | None = None,
) -> int:
    """Run the notebooks below `root`/notebooks in order; stages that are done are kept.

    Args:
        profile: name or path of a YAML file of parameters.
        data: image folder (`split/class/image`), relative to the working directory.
        out: the run's folder, relative to the working directory; default `runs/<profile>`.
        only: comma-separated numbers or names of the notebooks to run.
        given: parameters over the profile's, their values as YAML text.
        fresh: set aside what these stages made before.
        root: the project; default the one that this file is part of.

    Returns:
        0, or 3 when a stage was stopped by MAX_HOURS.

    Raises:
        parameters.ParameterError: an argument that the series cannot run with.
        SeriesError: a cell failed or the kernel died.
        runs.StageError: a stage before those of `only` is missing or unfinished.
    """
    root = Path(root or runs.root()).resolve()
    notebooks = chosen(only, root)
    values = gather(profile, data, out, given, root)
    run_dir = writable(root / values["RUN_DIR"])
    if runs.on_kaggle():
        from utils import preflight

        runs.take_up(run_dir)
        preflight.check(notebooks, parameters.defaults(root) | values, run_dir)
    refuse_stale(run_dir, notebooks, values, root)
    print(f"{len(notebooks)} notebooks into {run_dir}, profile {Path(profile).stem}.")
    if fresh:
        set_aside(run_dir, notebooks, "is begun anew")
    form = "{desc}: {n_fmt}/{total_fmt} |{bar:20}| {elapsed}{postfix}"
    with kernel_environment(), tqdm(total=len(notebooks), bar_format=form, disable=None) as bar:
        os.environ["SERIES_PARAMETERS"] = json.dumps(values)  # for a look at what is still to come
        for notebook in notebooks:
            bar.set_description(notebook)
            begun = time.time()
            if not is_done(run_dir, notebook, values, root):
                execute(run_dir, notebook, values, root, bar)
                took = f"{(time.time() - begun) / 60:.1f} min"
            else:
                took = "kept, done before with these parameters"
            bar.update()
            stopped = unfinished(run_dir, notebook)
            bar.write(f"{notebook}: {stopped or took}")
            if stopped:
                left = notebooks[notebooks.index(notebook) :]
                bar.write(f"Left: {', '.join(left)}. Run the same command again to go on.")
                break
    try:
        print(f"Open {pages.build(run_dir)} to see it all.")
    except Exception as error:  # the page only joins what is there: no run fails for it
        print(f"No index.html ({type(error).__name__}: {error}); the notebooks are in {run_dir}.")
    return UNFINISHED if stopped else 0


def chosen(only: str | None, root: Path) -> list[str]:
    """The notebooks to run, in the series' order: all, or those whose names `only` begins."""
    there = list(parameters.declared(root))
    if only is None:
        return there
    wanted = [part.strip() for part in only.split(",") if part.strip()]
    unknown = [w for w in wanted if not any(n.startswith(w) for n in there)]
    if unknown or not wanted:
        raise parameters.ParameterError(
            f"--only {only}: no notebook begins with {', '.join(unknown) or 'that'}; "
            f"there are {', '.join(there)}."
        )
    return [n for n in there if any(n.startswith(w) for w in wanted)]


def refuse_stale(run_dir: Path, notebooks: list[str], values: Mapping, root: Path) -> None:
    """Refuse to build on earlier stages, left out by --only, made with other parameters."""
    for earlier in list(parameters.declared(root))[: runs.NOTEBOOKS.index(notebooks[-1])]:
        if earlier not in notebooks and runs.state(run_dir, earlier, values, root) == "stale":
            raise parameters.ParameterError(
                f"{earlier} in {run_dir} was made with other parameters than these: name it in "
                "--only too, or give the parameters that it was made with."
            )


def gather(profile, data, out, given, root: Path) -> dict[str, object]:
    """All parameters as the notebooks get them, checked; RUN_DIR is set, relative if in `root`."""
    values = {"RUN_DIR": f"runs/{Path(profile).stem}"} | parameters.load_profile(profile, root)
    for name, text in given:
        try:
            values[name] = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise parameters.ParameterError(f"-p {name} {text}: no YAML value.") from error
    if data is not None:
        values["DATA_DIR"] = str(Path(data).expanduser().resolve())
    if out is not None:
        values["RUN_DIR"] = str(Path(out).expanduser().resolve())
    parameters.settings(values, root)
    if values.get("DATA_DIR"):
        values["DATA_DIR"] = str(root / Path(values["DATA_DIR"]).expanduser())
        if not Path(values["DATA_DIR"]).is_dir():
            raise parameters.ParameterError(
                f"There is no folder {values['DATA_DIR']}: --data (DATA_DIR) wants one that holds "
                "split/class/image, such as train/0/9001695L.png."
            )
    run_dir = runs.run_folder(values["RUN_DIR"]) if runs.on_kaggle() else root / values["RUN_DIR"]
    inside = run_dir.is_relative_to(root)
    return values | {"RUN_DIR": str(run_dir.relative_to(root) if inside else run_dir)}


def writable(run_dir: Path) -> Path:
    """Make the run's folder and see that it can be written to, before hours are spent.

    Raises:
        parameters.ParameterError: it cannot.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=run_dir).close()
    except OSError as error:
        reason = error.strerror or str(error)
        raise parameters.ParameterError(
            f"Nothing can be written to the run's folder {run_dir} ({reason}): give another --out."
        ) from error
    return run_dir


@contextlib.contextmanager
def kernel_environment() -> Iterator[None]:
    """Environment that the kernels inherit; this process gets its own back at the end."""
    before = dict(os.environ)
    # What the caller's own notebook set would reach ours: its plotting backend, its live bars.
    for name in ("MPLBACKEND", "JPY_SESSION_NAME"):
        os.environ.pop(name, None)
    started = runs.started() if runs.on_kaggle() else time.time()
    os.environ.setdefault("SERIES_STARTED", str(started))
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)


def executed(run_dir: Path, notebook: str, mark: str = "", suffix: str = ".ipynb") -> Path:
    """Where an executed notebook lies."""
    return run_dir / "notebooks" / f"{notebook}{mark}{suffix}"


def is_done(run_dir: Path, notebook: str, values: Mapping, root: Path) -> bool:
    """Whether a stage is finished and its notebook came to its end, closing asserts included."""
    if runs.state(run_dir, notebook, values, root) != "done":
        return False
    shown = executed(run_dir, notebook)
    return shown.exists() and shown.stat().st_mtime >= runs.read_stage(run_dir, notebook)["opened"]


def unfinished(run_dir: Path, notebook: str) -> str | None:
    """Why a stage is not finished; None when it is.

    Raises:
        SeriesError: when the notebook ended without a word on it.
    """
    saved = runs.read_stage(run_dir, notebook) or {}
    if saved.get("finished"):
        return None
    if saved.get("stopped"):
        return f"stopped: {saved['stopped']}"
    raise SeriesError(f"{notebook} came to its end without finishing its stage in {run_dir}.")


def set_aside(run_dir: Path, notebooks: Iterable[str], why: str) -> None:
    """Rename what these notebooks made before and say why; nothing is deleted."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    for notebook in notebooks:
        if (folder := run_dir / runs.FOLDERS[notebook]).exists():
            runs.set_aside(folder, why)
        for suffix in (".ipynb", ".html"):
            if (shown := executed(run_dir, notebook, suffix=suffix)).exists():
                shown.rename(executed(run_dir, notebook, f".{stamp}", suffix))


def execute(run_dir: Path, notebook: str, values: Mapping, root: Path, bar: tqdm) -> None:
    """Run one notebook to RUN/notebooks, as .ipynb and .html; the kernel has ended on return.

    Raises:
        SeriesError: a cell failed (the notebook is kept as `<name>.failed.ipynb`).
        runs.StageError: an earlier stage is missing or unfinished.
    """
    import papermill
    from papermill.exceptions import PapermillExecutionError

    runs.earlier_settings(run_dir, notebook)
    if runs.state(run_dir, notebook, values, root) == "stale":
        with bar.external_write_mode():
            set_aside(run_dir, [notebook], "was made with other settings")
    own = parameters.declared(root)[notebook]
    running = executed(run_dir, notebook, ".running")
    running.parent.mkdir(parents=True, exist_ok=True)
    try:
        papermill.execute_notebook(
            root / "notebooks" / f"{notebook}.ipynb",
            running,
            parameters={name: value for name, value in values.items() if name in own},
            cwd=root,
            start_timeout=600,  # seconds; a busy machine is no reason to lose a run
            progress_bar={"desc": notebook, "position": 1, "leave": False, "disable": bar.disable},
            stdout_file=Ticker(bar),
            extra_arguments=["--IPKernelApp.log_level=50"],  # its own log would break the bar
        )
    except (PapermillExecutionError, RuntimeError) as error:  # the kernel's death is such a one
        failed = running.replace(executed(run_dir, notebook, ".failed"))
        raise SeriesError(failure(notebook, failed, error)) from error
    running.replace(executed(run_dir, notebook))
    executed(run_dir, notebook, ".failed").unlink(missing_ok=True)
    export_html(executed(run_dir, notebook))


class Ticker:
    """Takes a notebook's printed lines: behind the bar, or as they are where there is none."""

    def __init__(self, bar: tqdm) -> None:
        self.bar = bar

    def write(self, text: str) -> None:
        """Show the text, or its last line."""
        lines = [ANSI.sub("", line).strip() for line in text.splitlines() if line.strip()]
        if not self.bar.disable:
            self.bar.set_postfix_str(lines[-1][:60] if lines else "")
            return
        for line in lines:
            print(f"    {line}", flush=True)

    def flush(self) -> None:
        """Nothing is held back."""


def failure(notebook: str, failed: Path, error: Exception) -> str:
    """Which cell failed and why, on one screen (at most 24 lines of 160 characters)."""
    if not hasattr(error, "exec_count"):
        reason = " ".join(str(error).split())[:100]
        return (
            f"{notebook}: its kernel died or did not start ({reason}), most often because memory "
            "ran out. Less is needed with a smaller batch or image size.\n"
            f"As far as it came: {failed}"
        )
    trace = ANSI.sub("", "\n".join(error.traceback)).splitlines()
    frames = [line for line in trace if re.match(r"(File |Cell In|\S+\.py:\d+|\S+\.py in )", line)]
    ours = [line for line in frames if "site-packages" not in line]
    source = error.source.strip().splitlines()
    message = ANSI.sub("", f"{error.ename}: {error.evalue}").splitlines()
    lines = [
        f"{notebook} failed in cell In [{error.exec_count}]:",
        *(f"    {line}" for line in source[:6] + ["…"] * (len(source) > 6)),
        *(f"  {line}" for line in ours[-3:] or frames[-1:]),
        *message[:11],
        *(["…"] if len(message) > 11 else []),
        f"The notebook as far as it came: {failed}",
    ]
    return "\n".join(line[:160] for line in lines[:-1]) + f"\n{lines[-1]}"


def export_html(notebook: Path) -> Path | None:
    """Write a notebook beside itself as HTML; a failure is said and does no harm."""
    try:
        import nbconvert
        import nbformat

        page, _ = nbconvert.HTMLExporter().from_notebook_node(nbformat.read(notebook, 4))
        return runs.write_atomic(
            notebook.with_suffix(".html"), lambda path: path.write_text(page, encoding="utf-8")
        )
    except Exception as error:  # nbconvert's versions differ in what they raise
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        print(f"No HTML of {notebook.name} ({reason[:200]}).", file=sys.stderr)
        return None
