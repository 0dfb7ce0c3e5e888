"""Write the series as folders that the `kaggle` client uploads: code, weights, one kernel each.

    OUT/code          a dataset: utils, notebooks, profiles
    OUT/00_weights    a kernel on the CPU, with internet: saves the ImageNet backbones
    OUT/01_data …     a kernel per notebook, each with the output of the one before attached
    OUT/series…       one kernel for all; pushed again with its own earlier output it goes on
    OUT/push.sh       uploads and pushes all that in order

Field names: https://github.com/Kaggle/kaggle-api/blob/main/docs/kernels_metadata.md
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import yaml

from utils import parameters, runs

# The notebooks' set-up cell looks for a dataset of this name.
PROJECT, CODE = "knee-distillation", "knee-distillation-code"
MACHINE = "NvidiaTeslaT4"  # the client's name for Kaggle's pair of T4
OWNER, SLUG = r"[a-z0-9]+(?:[_-][a-z0-9]+)*", r"[A-Za-z0-9]+(?:[_-]+[A-Za-z0-9]+)*"
USAGE = 2

WEIGHTS_SCRIPT = '''"""Save the ImageNet backbones, so that kernels without internet find them."""

import keras

for name in {backbones}:
    backbone = getattr(keras.applications, name)(
        include_top=False, weights="imagenet", input_shape=(224, 224, 3)
    )
    backbone.save_weights(f"{{name.lower()}}_notop.weights.h5")
    print(name, backbone.count_params(), "parameters")
'''

SERIES_SCRIPT = '''"""The series; the next session goes on with what MAX_HOURS leaves over."""

import os
import subprocess
import sys
from pathlib import Path

CONTINUES = {continues}  # whether an earlier session's output must be attached

attached = Path(os.environ.get("KAGGLE_INPUT_ROOT", "/kaggle/input"))
working = Path(os.environ.get("KAGGLE_WORKING_ROOT", "/kaggle/working"))
if CONTINUES and not any(attached.rglob("data/stage.json")):
    sys.exit("No earlier run is attached: nothing was begun, so that no GPU hours are lost.")
code = [path.parent.parent for path in attached.rglob("utils/__main__.py")]
if not code:
    sys.exit("No code is attached: choose Add Input > Datasets > knee-distillation-code.")
command = [sys.executable, "-m", "utils", "run", "--profile", "{profile}"]
status = subprocess.run(command, cwd=code[0]).returncode
(working / ("FINISHED" if status == 0 else "UNFINISHED")).touch()
sys.exit(0 if status == 3 else status)  # 3: out of time, to be continued
'''


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the options of `python -m utils kaggle`."""
    parser.add_argument("--user", required=True, metavar="NAME", help="your Kaggle user name")
    parser.add_argument(
        "--data",
        required=True,
        metavar="OWNER/SLUG",
        help="the dataset of images, as in kaggle.com/datasets/OWNER/SLUG",
    )
    parser.add_argument(
        "--out",
        default="runs/kaggle-upload",
        metavar="DIR",
        help="a folder that does not exist yet (default: runs/kaggle-upload)",
    )
    parser.add_argument("--profile", default="kaggle", metavar="NAME", help="default: kaggle")


def main(arguments: argparse.Namespace) -> int:
    """Write the folders as the command line asks; return the exit status."""
    try:
        out = generate(arguments.user, arguments.data, Path(arguments.out), arguments.profile)
    except parameters.ParameterError as error:
        print(error, file=sys.stderr)
        return USAGE
    print(f"Written to {out}. With an API token in place (kaggle.com/settings) and the client\n")
    print(f"    pip install kaggle && {out / 'push.sh'}\n")
    print(
        f"uploads and runs it, notebook by notebook; `{out / 'push.sh'} series` in one kernel. "
        "Either goes on where it stopped."
    )
    return 0


def generate(
    user: str, data: str, out: Path, profile: str = "kaggle", root: Path | None = None
) -> Path:
    """Write all folders below `out`, whole or not at all.

    Args:
        user: Kaggle user name, as in the profile's address.
        data: OWNER/SLUG of the dataset of images.
        out: a folder that does not exist yet.
        profile: name or path of a YAML file of parameters.
        root: the project; default the one that this file is part of.

    Returns:
        `out`.

    Raises:
        parameters.ParameterError: a name that Kaggle would not take, an `out` that exists, a
            profile that cannot run there.
    """
    root = Path(root or runs.root())
    values = checked(user, data, out, profile, root)
    part = out.with_name(f".{out.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    write_code(part / "code", user, root, profile, values)
    backbones = [
        values.get(f"{who}_BACKBONE")
        for who in ("TEACHER", "STUDENT")
        if values.get(f"{who}_WEIGHTS") == "imagenet"
    ]
    if backbones:
        write_kernel(
            part / "00_weights",
            kernel_metadata(user, "00-weights", "weights.py", gpu=False, internet=True),
            WEIGHTS_SCRIPT.format(backbones=json.dumps(backbones)),
        )
    weights = [f"{user}/{PROJECT}-00-weights"] if backbones else []
    before: list[str] = []
    for notebook, own in parameters.declared(root).items():
        needs_weights = any(name.endswith("_WEIGHTS") for name in own)
        metadata = kernel_metadata(
            user,
            notebook.replace("_", "-"),
            f"{notebook}.ipynb",
            gpu="DATA_DIR" not in own,
            datasets=[f"{user}/{CODE}"] + [data] * ("DATA_DIR" in own),
            kernels=before + weights * needs_weights,
        )
        write_kernel(part / notebook, metadata, with_parameters(root, notebook, values, own))
        before = [metadata["id"]]
    write_series(part, user, data, Path(profile).stem, weights)
    shutil.copy(Path(__file__).with_name("kaggle_push.sh"), part / "push.sh")
    (part / "push.sh").chmod(0o755)
    part.rename(out)
    return out


def checked(user: str, data: str, out: Path, profile: str, root: Path) -> dict[str, object]:
    """The profile's values, once everything that the command line gives is fit for Kaggle."""
    values = {"RUN_DIR": f"runs/{Path(profile).stem}"}
    values |= parameters.load_profile(profile, root)
    parameters.settings(values, root)
    faults = []
    if not re.fullmatch(OWNER, user):
        faults.append(
            f"--user {user!r}: a Kaggle user name is lower-case letters, digits and single "
            "hyphens, as in kaggle.com/NAME."
        )
    if not re.fullmatch(f"{SLUG}/{SLUG}", data):
        faults.append(
            f"--data {data!r}: give OWNER/SLUG, as in kaggle.com/datasets/OWNER/SLUG, such as "
            "shashwatwork/knee-osteoarthritis-dataset-with-severity."
        )
    if out.exists():
        faults.append(f"--out {out} exists: give a new folder, or move that one away.")
    for name in ("DATA_DIR", "TEACHER_WEIGHTS", "STUDENT_WEIGHTS"):
        if values.get(name) not in (None, "", "imagenet", "none"):
            faults.append(f"{name} = {values[name]!r}: Kaggle does not see this machine's files.")
    if Path(values["RUN_DIR"]).is_absolute():
        faults.append(f"RUN_DIR = {values['RUN_DIR']!r} must be relative to /kaggle/working.")
    if faults:
        raise parameters.ParameterError("\n".join(faults))
    return values


def kernel_metadata(
    user: str,
    name: str,
    code_file: str,
    *,
    gpu: bool = True,
    internet: bool = False,
    datasets: list[str] | tuple = (),
    kernels: list[str] | tuple = (),
) -> dict[str, object]:
    """`kernel-metadata.json` of a private kernel; its title resolves to its id, as Kaggle wants."""
    slug = f"{PROJECT}-{name}"
    metadata = {
        "id": f"{user}/{slug}",
        "title": slug.replace("-", " ").capitalize(),
        "code_file": code_file,
        "language": "python",
        "kernel_type": "notebook" if code_file.endswith(".ipynb") else "script",
        "is_private": True,
        "enable_gpu": gpu,
        "enable_tpu": False,
        "enable_internet": internet,
        "dataset_sources": list(datasets),
        "competition_sources": [],
        "kernel_sources": list(kernels),
        "model_sources": [],
    }
    return metadata | ({"machine_shape": MACHINE} if gpu else {})


def write_kernel(folder: Path, metadata: dict[str, object], source: str) -> None:
    """A kernel's folder: its metadata and its code."""
    folder.mkdir(parents=True)
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")
    (folder / metadata["code_file"]).write_text(source, encoding="utf-8")


def with_parameters(root: Path, notebook: str, values: dict, own: dict) -> str:
    """A notebook as JSON, with its share of `values` in a cell after its defaults, no outputs."""
    import nbformat
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    node = load_notebook_node(str(root / "notebooks" / f"{notebook}.ipynb"))
    node = parameterize_notebook(node, {n: v for n, v in values.items() if n in own})
    node.metadata.pop("papermill", None)
    for number, cell in enumerate(node.cells):
        cell["id"] = f"cell-{number}"  # papermill draws the new cell's at random
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    return nbformat.writes(node) + "\n"


def write_code(folder: Path, user: str, root: Path, profile: str, values: dict) -> None:
    """The code as a dataset; the profile goes with it, under its own name."""
    keep = {"utils": ("**/*.py", "**/*.sh"), "notebooks": ("*.ipynb", "profiles/*.yaml")}
    keep["."] = ("LICENSE", "README.md", "CITATION.cff", "requirements.txt")
    for name, patterns in keep.items():
        for pattern in patterns:
            for path in sorted((root / name).glob(pattern)):
                target = folder / path.relative_to(root)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target)
    profiles = folder / "notebooks" / "profiles"
    profiles.mkdir(parents=True, exist_ok=True)
    text = yaml.safe_dump(values, sort_keys=False)
    (profiles / f"{Path(profile).stem}.yaml").write_text(text)
    metadata = {
        "title": CODE.replace("-", " ").capitalize(),
        "id": f"{user}/{CODE}",
        "licenses": [{"name": "apache-2.0"}],
    }
    (folder / "dataset-metadata.json").write_text(json.dumps(metadata, indent=2) + "\n")


def write_series(part: Path, user: str, data: str, profile: str, weights: list[str]) -> None:
    """The one kernel for all, as it is first pushed and as it goes on.

    It goes on with its own earlier output attached (`series_again`). Should Kaggle refuse to attach
    a kernel to itself, it and a twin take turns (`series_b`, then `series_a`).
    """
    first, twin = (f"{user}/{PROJECT}-{name}" for name in ("series", "series-b"))
    for folder, name, earlier in (
        ("series", "series", None),
        ("series_again", "series", first),
        ("series_b", "series-b", first),
        ("series_a", "series", twin),
    ):
        metadata = kernel_metadata(
            user,
            name,
            "series.py",
            datasets=[f"{user}/{CODE}", data],
            kernels=weights + ([earlier] if earlier else []),
        )
        script = SERIES_SCRIPT.format(continues=earlier is not None, profile=profile)
        write_kernel(part / folder, metadata, script)
