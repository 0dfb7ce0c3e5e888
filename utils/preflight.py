"""What Kaggle must offer, found out before the first minute of GPU is spent. No TensorFlow here."""

from __future__ import annotations

import shutil
import socket
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil

from utils import folders, runs

# Below this many pixels a processor is enough: the embedded default and the rehearsal.
FULL_SIZE = 128
OUTPUT_GB, NEEDED_GB, MEMORY_GB = 20, 4, 4
GB = 1e9


def check(notebooks: Sequence[str], values: Mapping[str, object], run: Path) -> None:
    """Print what there is; refuse to begin when something is missing.

    Args:
        notebooks: those about to run in this session, in order.
        values: their parameters, by name.
        run: RUN_DIR.

    Raises:
        runs.StageError: with all findings, each with the click that mends it.
    """
    print(figures(run))
    found = findings(notebooks, values, run)
    if found:
        lines = "\n".join(f"- {finding}" for finding in found)
        raise runs.StageError(f"Kaggle is not ready for {notebooks[0]}:\n{lines}")


def findings(notebooks: Sequence[str], values: Mapping[str, object], run: Path) -> list[str]:
    """What is missing, a sentence each with its remedy; empty when all is there."""
    settings = earlier_parameters(notebooks[0], run) | dict(values)
    sizes = [v for n, v in settings.items() if n == "STORED_SIZE" or n.endswith("_IMAGE_SIZE")]
    full = max(sizes, default=0) >= FULL_SIZE
    trains = any(not notebook.startswith(("01", "06")) for notebook in notebooks)
    found = []
    if full and trains and not accelerators():
        found.append(
            f"No GPU, and {max(sizes)} px would take days without: choose Settings > Accelerator > "
            "GPU T4 x2 (the first time, kaggle.com/settings asks for a phone number)."
        )
    if notebooks[0].startswith("01"):
        found += [no_images(str(settings.get("DATA_DIR", "")))] if full else []
    elif runs.read_stage(run, runs.NOTEBOOKS[0]) is None:
        before = runs.NOTEBOOKS[runs.NOTEBOOKS.index(notebooks[0]) - 1]
        found.append(
            f"No earlier stage: choose Add Input > Notebooks > Your Work and attach the output of "
            f"{before} (looked in {run} and {runs.kaggle_input()})."
        )
    wanted = imagenet_backbones(notebooks, settings)
    missing = [backbone for backbone in wanted if not folders.attached_weights(backbone)]
    if missing and not online():
        found.append(
            f"ImageNet weights of {' and '.join(missing)} are not attached and the internet is "
            "off: choose Settings > Turn on internet, or Add Input > Notebooks > Your Work and "
            "attach the output of knee-distillation-00-weights."
        )
    if full and free_disk() < NEEDED_GB * GB:
        found.append(
            f"{free_disk() / GB:.1f} GB of disk are free, {NEEDED_GB} are needed: delete what "
            f"{runs.kaggle_working()} does not need, or choose Run > Factory reset."
        )
    if full and size_of(run) > (OUTPUT_GB - NEEDED_GB) * GB:
        found.append(
            f"{run} holds {size_of(run) / GB:.1f} GB, Kaggle keeps {OUTPUT_GB}: delete the folders "
            "named <stage>.<time> in it."
        )
    if full and memory()[0] < MEMORY_GB * GB:
        found.append(
            f"{memory()[0] / GB:.1f} GB of memory are free, {MEMORY_GB} are needed: choose Run > "
            "Restart & clear outputs, and shut other notebooks down."
        )
    return [finding for finding in found if finding]


def figures(run: Path) -> str:
    """One line: GPUs, disk, output and memory."""
    free, total = memory()
    return (
        f"Kaggle: {accelerators()} GPU, {free_disk() / GB:.0f} GB of disk free, the run holds "
        f"{size_of(run) / GB:.1f} of {OUTPUT_GB} GB of output, {free / GB:.0f} of "
        f"{total / GB:.0f} GB of memory free."
    )


def earlier_parameters(notebook: str, run: Path) -> dict[str, object]:
    """The parameters of the stages before `notebook`, as far as they are there."""
    settings: dict[str, object] = {}
    for earlier in runs.NOTEBOOKS[: runs.NOTEBOOKS.index(notebook)]:
        settings |= (runs.read_stage(run, earlier) or {}).get("parameters", {})
    return settings


def no_images(data_dir: str) -> str | None:
    """What is wrong with the images, or None."""
    try:
        if folders.find_dataset(data_dir) is not None:
            return None
    except (FileNotFoundError, ValueError) as error:
        return f"{error} (parameter DATA_DIR of notebook 01)."
    return (
        f"No images below {runs.kaggle_input()}, and a full-size run on drawn phantoms would be a "
        "waste: choose Add Input > Datasets, such as "
        "shashwatwork/knee-osteoarthritis-dataset-with-severity."
    )


def imagenet_backbones(notebooks: Sequence[str], settings: Mapping) -> list[str]:
    """The backbones that these notebooks want with ImageNet weights."""
    builds = {"02": "TEACHER", "05": "STUDENT"}
    who = [builds[notebook[:2]] for notebook in notebooks if notebook[:2] in builds]
    return [settings[f"{w}_BACKBONE"] for w in who if settings[f"{w}_WEIGHTS"] == "imagenet"]


def accelerators() -> int:
    """How many NVIDIA GPUs the session has."""
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def online() -> bool:
    """Whether Keras could download weights."""
    try:
        socket.create_connection(("storage.googleapis.com", 443), timeout=3).close()
    except OSError:
        return False
    return True


def free_disk() -> int:
    """Bytes that can still be written where Kaggle keeps results."""
    return shutil.disk_usage(runs.kaggle_working()).free


def size_of(folder: Path) -> int:
    """Bytes of all files below a folder; 0 when it is not there."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def memory() -> tuple[int, int]:
    """Free and total memory in bytes."""
    found = psutil.virtual_memory()
    return found.available, found.total
