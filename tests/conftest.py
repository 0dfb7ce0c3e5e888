"""What every test shares: quiet TensorFlow, a small phantom dataset, no leaking dtype policy."""

import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
os.environ.setdefault("MPLBACKEND", "Agg")

import sys

import pytest


@pytest.fixture(scope="session")
def phantom_folder(tmp_path_factory):
    """A `split/class/image` folder of 60 made-up patients at 64 px."""
    from utils import phantoms

    return phantoms.write(tmp_path_factory.mktemp("phantoms") / "knees", 60, size=64, seed=1)


@pytest.fixture(autouse=True)
def restore_policy():
    """Put the dtype policy back after every test: `clear_session` and precision tests move it."""
    yield
    if "keras" in sys.modules:
        import keras

        keras.config.set_dtype_policy("float32")
