"""What a Kaggle session must offer, checked before the first minute of GPU is spent."""

import contextlib
import re
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from utils import runs


def preflight(values: Mapping[str, object], images: Path | None = None) -> None:
    """On Kaggle, StageError with all that these parameters (01's: and `images`) need and lack."""
    if not runs.on_kaggle():
        return
    large = max(values.get(f"{n}_IMAGE_SIZE", 0) for n in ("TEACHER", "STUDENT")) >= 128
    wanted = [n for n in ("TEACHER", "STUDENT") if values.get(f"{n}_WEIGHTS") == "imagenet"]
    absent = sorted({b for n in wanted if not attached_weights(b := values[f"{n}_BACKBONE"])})
    free = shutil.disk_usage(runs.run_folder("")).free / 1e9  # in GB
    found = []
    if large and not list(Path("/dev").glob("nvidia[0-9]*")):
        found.append("a GPU: Settings > Accelerator > GPU T4 x2 (verify your phone number first)")
    if values.get("STORED_SIZE", 0) >= 128 and images is None:
        found.append("images: Add Input > Datasets > your images, or those that README names")
    if absent and not online():
        found.append(f"weights of {absent}: Settings > Turn on internet, or attach 00-weights")
    if large and free < 5:
        found.append(f"disk, {free:.1f} GB free of 5: Run > Factory reset")
    if found:
        raise runs.StageError("\n- ".join(["This Kaggle session lacks:", *found]))


def online() -> bool:
    """Whether Keras could download weights."""
    with contextlib.suppress(OSError):
        return bool(socket.create_connection(("storage.googleapis.com", 443), timeout=3))
    return False


def attached_weights(backbone: str) -> Path | None:
    """A backbone's attached ImageNet weights, by our name of the file or Keras's; or None."""
    name = re.compile(rf"{backbone.lower()}(2241\.0float)?notop")
    files = sorted(runs.kaggle_input().rglob("*.h5"))
    return next((f for f in files if name.search(re.sub("[_-]", "", f.name.lower()))), None)
