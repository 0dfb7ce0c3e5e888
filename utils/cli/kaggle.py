"""`python -m utils kaggle`: the series as folders for Kaggle; `--push` uploads and runs them.

    OUT/code          a dataset: utils, notebooks, profiles
    OUT/00_weights    a kernel on the processor, internet on: saves the ImageNet backbones
    OUT/01_data …     a kernel per notebook, the output of the one before attached
    OUT/series        one kernel for all; `series_2` goes on with its output when time runs out

OUT/pushed.json holds what is done, so that the same command goes on from there.
"""

import argparse
import contextlib
import hashlib
import json
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path

import nbformat
import requests
import yaml

from utils import runs, settings

PROJECT, TEMPLATES = "knee-distillation", settings.ROOT / "utils/templates"
ON_CPU = {"00-weights", "01-data", "08-deploy"}  # these would waste GPU hours
NAMES = "/".join([r"[A-Za-z0-9]+(?:[_-]+[A-Za-z0-9]+)*"] * 3)  # user/owner/slug
POLL, TRIES, SESSIONS = 30, 10, 6  # seconds; failures in a row; of the one kernel for all
# What is fetched: not the images, nor the models of the first phases.
RESULTS = r"/(report|student|notebooks|phase_3)/|/(data|phase_.)/[^/]*(png|csv)|/index|^FINISHED"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--user", required=True, metavar="NAME", help="your Kaggle user name")
    add("--data", required=True, metavar="OWNER/SLUG", help="the dataset of images on Kaggle")
    add("--profile", default="kaggle", metavar="NAME", help="quick, kaggle (default), original …")
    add("--out", metavar="DIR", help="where the folders go (default: runs/kaggle-<profile>)")
    add("--push", nargs="?", const="notebooks", choices=("notebooks", "series"), help="upload, run")


def main(arguments: argparse.Namespace) -> int:
    """Write the folders, and push them if asked; a push that was cut off goes on."""
    profile = Path(arguments.profile).stem
    out = Path(arguments.out or settings.ROOT / "runs" / f"kaggle-{profile}").expanduser()
    order = {"user": arguments.user, "data": arguments.data, "profile": profile}
    values = settings.load_profile(arguments.profile)
    begun = arguments.push and (out / "order.json").exists()
    if not (begun and runs.read_json(out / "order.json") == order | {"made_of": made_of(values)}):
        write(out, order, values)
        print(f"Written to {out}: upload its notebooks by hand, or let --push do it all.")
    if arguments.push:
        push(out, order, arguments.push)
    return 0


def write(out: Path, order: dict[str, str], values: dict[str, object]) -> None:
    """Write all folders below `out`, a new folder, whole or not at all."""
    (user, data, profile), content = order.values(), made_of(values)
    values = values | {"RUN_DIR": f"runs/{profile}"}
    full = settings.validate(values)
    if not re.fullmatch(NAMES, f"{user}/{data}"):
        raise settings.SettingsError(f"--user {user} --data {data}: give NAME and OWNER/SLUG.")
    if out.exists():
        message = "exists, of other parameters or code: move it away or give another --out."
        raise settings.SettingsError(f"{out} {message}")
    for name in ("DATA_DIR", "MORE_TEACHERS", "TEACHER_WEIGHTS", "STUDENT_WEIGHTS"):
        if full[name] and full[name] not in ("imagenet", "shapes", "none"):
            raise settings.SettingsError(f"{name}: Kaggle does not see this machine's files.")
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    ignore = shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "*.png")
    for name in ("utils", "notebooks"):
        shutil.copytree(settings.ROOT / name, part / "code" / name, ignore=ignore)
    shutil.copy(settings.ROOT / "LICENSE", part / "code")
    text = yaml.safe_dump(values, sort_keys=False)
    (part / "code/notebooks/profiles" / f"{profile}.yaml").write_text(text, encoding="utf-8")
    code = f"{user}/{PROJECT}-code"
    about = {"id": code, "title": "Knee distillation code", "licenses": [{"name": "apache-2.0"}]}
    runs.write_json(part / "code/dataset-metadata.json", about)
    weights, before = [], []
    wanted = [w for w in ("TEACHER", "STUDENT") if full[f"{w}_WEIGHTS"] == "imagenet"]
    if wanted:
        script = f"BACKBONES = {sorted({full[f'{w}_BACKBONE'] for w in wanted})}\n"
        script += (TEMPLATES / "kaggle_weights.txt").read_text()
        weights = [write_kernel(part, user, "00_weights.py", script, [], [], internet=True)]
    for notebook, model in settings.SERIES.items():
        datasets = [code] + [data] * (notebook == "01_data")
        kernels = before + weights * any(n.endswith("_WEIGHTS") for n in model.model_fields)
        source = with_parameters(notebook, values)
        before = [write_kernel(part, user, f"{notebook}.ipynb", source, datasets, kernels)]
    write_series(part, order, weights)
    runs.write_json(part / "order.json", order | {"made_of": content})
    part.rename(out)


def made_of(values: dict[str, object]) -> str:
    """A mark of these parameters and of the project's code: with others, folders are old."""
    files = [f for name in ("utils", "notebooks") for f in (settings.ROOT / name).rglob("*.*")]
    files = [f for f in sorted(files) if ".ipynb_checkpoints" not in f.parts]
    code = [f.read_bytes() for f in files if f.suffix in (".py", ".ipynb", ".txt")]
    return hashlib.sha256(repr(values).encode() + b"".join(code)).hexdigest()


def write_kernel(out: Path, user: str, file: str, source: str, datasets, kernels, internet=False):
    """Write the folder of a private kernel, its metadata and its code `file`; return its id."""
    folder, name = out / Path(file).stem, Path(file).stem.replace("_", "-")
    about = {
        "id": f"{user}/{PROJECT}-{name}",
        "title": f"Knee distillation {name.replace('-', ' ')}",  # it must resolve to the id
        "code_file": file,
        "language": "python",
        "kernel_type": "notebook" if file.endswith(".ipynb") else "script",
        "is_private": True,
        "enable_gpu": name not in ON_CPU,
        "enable_internet": internet,
        "dataset_sources": datasets,
        "kernel_sources": kernels,
    }
    if about["enable_gpu"]:
        about["machine_shape"] = "NvidiaTeslaT4"  # the client's name for a T4
    runs.write_json(folder / "kernel-metadata.json", about)
    (folder / file).write_text(source, encoding="utf-8")
    return about["id"]


def with_parameters(notebook: str, values: dict) -> str:
    """A notebook as JSON, `values` in the lines of its parameters cell, without outputs."""
    book = nbformat.read(settings.ROOT / "notebooks" / f"{notebook}.ipynb", 4)
    for cell in (cell for cell in book.cells if cell.cell_type == "code"):
        cell.outputs, cell.execution_count = [], None
        for name, value in values.items() if "parameters" in cell.metadata.get("tags", []) else ():
            line = rf"(?m)^({name}(?:: [^=]+?)?) = [^#\n]*?(?=\s*(?:#|$))"
            cell.source = re.sub(line, lambda old, v=value: f"{old[1]} = {v!r}", cell.source)
    return nbformat.writes(book) + "\n"


def write_series(out: Path, order: dict[str, str], kernels: list[str], session: int = 1) -> str:
    """Write the kernel of one session of the series, `kernels` attached; return its name."""
    user, data, profile = order.values()
    name = "series" if session == 1 else f"series_{session}"
    script = f"SESSION, PROFILE = {session}, {profile!r}\n"
    script += (TEMPLATES / "kaggle_series.txt").read_text()
    write_kernel(out, user, f"{name}.py", script, [f"{user}/{PROJECT}-code", data], kernels)
    return name


def push(out: Path, order: dict[str, str], what: str) -> None:
    """Upload the code, run the kernels ("notebooks", or "series" in one), fetch the results."""
    try:
        import kaggle  # logs in; prints help where it cannot
    except ImportError:
        kaggle = None
    if not kaggle or [int(n) for n in re.findall(r"\d+", kaggle.__version__)[:3]] < [2, 2, 5]:
        raise runs.StageError("No Kaggle client, or too old: pip install -U 'kaggle>=2.2.5'.")
    api, user = kaggle.api, kaggle.api.get_config_value("username") or "nobody"
    if user.lower() != order["user"].lower():
        raise runs.StageError(f"On Kaggle you are {user}: `kaggle auth login` as {order['user']}.")
    done = runs.read_json(out / "pushed.json", {})
    if "code" not in done:
        upload_code(api, out / "code")
        note(out, done, "code", "ready")
    for path in sorted(out.glob("0*_*" if what == "notebooks" else "00_*")):
        last = run_kernel(api, out, path.name, done)
    kernels = weights = runs.read_json(out / "series/kernel-metadata.json")["kernel_sources"]
    for session in range(1, SESSIONS + 1):
        if what == "series":
            last = run_kernel(api, out, write_series(out, order, kernels, session), done)
            kernels = [*weights, last.rsplit("/", 1)[0]]
        target = out / "results"
        ask(api.kernels_output, last, str(target), RESULTS, force=True, page_size=200)
        if what == "notebooks" or (target / "FINISHED").exists():
            print(f"Results: {target}")
            return
    raise runs.StageError(f"{SESSIONS} sessions did not finish the series: see what takes so long.")


def note(out: Path, done: dict, folder: str, state: str | None) -> None:
    """Say and remember how far a folder came; None forgets it."""
    done[folder] = state
    runs.write_json(out / "pushed.json", done)
    print(f"{time.strftime('%H:%M')}  {folder}: {state or 'failed'}", flush=True)


def ask(call: Callable, *arguments, **named):
    """Call the client, again if network or server fail; StageError for what Kaggle refuses."""
    for left in reversed(range(TRIES)):
        try:
            reply = call(*arguments, **named)
            break
        except (requests.RequestException, ValueError) as error:  # or the client's own refusal
            code = getattr(getattr(error, "response", None), "status_code", 0)
            network = isinstance(error, requests.RequestException)
            if not left or not network or not (code in (0, 404, 429) or code >= 500):
                raise runs.StageError(f"Kaggle: {error}") from error
            time.sleep(POLL)
    left_out = {n: getattr(reply, n) for n in dir(reply) if n.startswith("invalid_")}
    faults = [f"{n.replace('_', ' ')}: {', '.join(v)}" for n, v in left_out.items() if v]
    if faults or getattr(reply, "error", None):
        raise runs.StageError(f"Kaggle refused {arguments[0]}: {'; '.join(faults) or reply.error}")
    return reply


def upload_code(api, folder: Path) -> None:
    """Make the code dataset, or a new version of it, and wait until Kaggle has unpacked it."""
    name, before = runs.read_json(folder / "dataset-metadata.json")["id"], 0
    options = {"dir_mode": "zip", "quiet": True}  # by default the client leaves folders out
    with contextlib.suppress(requests.HTTPError):  # 403 or 404: there is none yet
        before = json.loads(api.dataset_status(name, format="json"))["current_version_number"]
    if before:
        ask(api.dataset_create_version, str(folder), time.strftime("%F %H:%M"), **options)
    else:
        ask(api.dataset_create_new, str(folder), **options)
    found = {"status": "pending"}
    while found["status"] != "ready" or (found["current_version_number"] or 0) <= before:
        if found["status"] in ("failed", "deleted"):
            raise runs.StageError(f"Kaggle could not unpack {name}: {found['status']}.")
        time.sleep(POLL)
        found = json.loads(ask(api.dataset_status, name, format="json"))


def run_kernel(api, out: Path, folder: str, done: dict) -> str:
    """Push a kernel unless that was done, and wait until it has ended: its `owner/slug/version`."""
    name = runs.read_json(out / folder / "kernel-metadata.json")["id"]
    if not done.get(folder):
        reply = ask(api.kernels_push, str(out / folder))
        note(out, done, folder, f"pushed {name}/{reply.version_number}")
    state, kernel = done[folder].split()
    while state == "pushed":
        time.sleep(POLL)
        reply = ask(api.kernels_status, kernel)
        if reply.status.name in ("ERROR", "CANCEL_ACKNOWLEDGED"):
            note(out, done, folder, None)
            why = f"{reply.status.name} {reply.failure_message or ''}".strip()
            raise runs.StageError(f"{folder} failed: {why}; see kaggle.com/code/{name}")
        if reply.status.name == "COMPLETE":
            state = "complete"
            note(out, done, folder, f"{state} {kernel}")
    return kernel
