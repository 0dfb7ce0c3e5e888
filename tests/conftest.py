"""What every test shares: quiet TensorFlow on few threads, a small dataset, nothing that leaks."""

import os
import sys

import pytest

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")
for threads in ("OMP_NUM_THREADS", "TF_NUM_INTRAOP_THREADS", "TF_NUM_INTEROP_THREADS"):
    os.environ.setdefault(threads, "2")


@pytest.fixture(scope="session")
def synthetic(tmp_path_factory):
    """A `split/class/image` folder: synthetic X-rays of 40 patients, 64 px."""
    from utils import phantoms

    return phantoms.draw(tmp_path_factory.mktemp("synthetic") / "knees", 40, 1, size=64)


@pytest.fixture(autouse=True)
def nothing_leaks():
    """Put environment and dtype policy back after every test."""
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)
    if "keras" in sys.modules:
        sys.modules["keras"].config.set_dtype_policy("float32")
