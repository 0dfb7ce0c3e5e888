"""00_one_page: short, finds images and weights wherever they are, runs on both backends."""

import json
import os
import shutil
import sys
from pathlib import Path

import keras
import nbformat
import papermill
import pytest
from PIL import Image

from utils import phantoms

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "00_one_page.ipynb"
SHORT = {"EPOCHS": [1, 1, 1], "IMAGE_SIZE": 64, "PATIENTS": 30, "BATCH_SIZE": 16}


def code_cells():
    cells = nbformat.read(NOTEBOOK, as_version=4).cells
    return [cell for cell in cells if cell.cell_type == "code"]


def lines(cell):
    return [x for x in cell.source.splitlines() if x.strip() and not x.strip().startswith("#")]


def tagged(tag):
    return next(cell for cell in code_cells() if tag in cell.metadata.get("tags", []))


def look_around(folder, monkeypatch, **values):
    """Run the parameters and the set-up cell in `folder` as Kaggle would, without internet."""
    monkeypatch.chdir(folder)
    found = {}
    exec(tagged("parameters").source, found)
    found.update(values)
    source = tagged("setup").source.replace("storage.googleapis.com", "none.invalid")
    exec(compile(source, "set-up", "exec"), found)
    return found


@pytest.fixture(scope="module")
def drawn(tmp_path_factory):
    return phantoms.draw(tmp_path_factory.mktemp("drawn") / "knees", 30, seed=0, size=64)


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """A file in the older format of Keras's own, which `.weights.h5` is not."""
    made = {"include_top": False, "weights": None, "input_shape": (64, 64, 3)}
    file = tmp_path_factory.mktemp("weights") / "older.h5"
    keras.applications.MobileNetV3Small(**made).save(file)
    return file


@pytest.fixture(params=["{slug}", "datasets/someone/{slug}"])
def mount(request, tmp_path, monkeypatch, drawn, weights):
    """Kaggle's input mount in both layouts: images, and weights under Keras's own names."""
    slug = request.param.format(slug="knee-osteoarthritis-dataset-with-severity")
    for file in drawn.glob("*/*/*.png"):
        copy = tmp_path / "input" / slug / file.relative_to(drawn)
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes(file.read_bytes())
    again = tmp_path / "input" / slug / "auto_test" / "0" / "9000000R.png"
    again.parent.mkdir(parents=True)
    Image.new("L", (64, 64)).save(again)
    name = "weights_mobilenet_v3_small_224_1.0_float_no_top_v2.h5"
    (place := tmp_path / "input" / slug.replace("knee", "weights")).mkdir(parents=True)
    shutil.copyfile(weights, place / name)
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    return tmp_path


def test_it_is_one_page():
    setup = len(lines(tagged("setup")))
    assert setup <= 60
    assert sum(len(lines(cell)) for cell in code_cells()) - setup <= 100
    used = [line for cell in code_cells() for line in lines(cell) if "from utils" in line]
    assert len(used) == 1 and "import phantoms" in used[0]


def test_attached_images_and_weights_are_found(mount, monkeypatch):
    found = look_around(mount, monkeypatch, TEACHER="MobileNetV3Small")
    assert found["KIND"] == "CPU" and found["IMAGE_SIZE"] == 160
    assert len(found["FILES"]) == 60  # auto_test is left out
    weights = found["WEIGHTS"]["MobileNetV3Small"]
    assert "no_top" in weights.name and mount in weights.parents


@pytest.mark.parametrize("names", ["training validation testing", "Train Valid Test"])
def test_usual_names_of_splits_and_files_are_read(names, drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    shutil.copytree(drawn, tmp_path / "knees")
    for before, after in zip(("train", "val", "test"), names.split(), strict=True):
        (tmp_path / "knees" / before).rename(tmp_path / "knees" / after)
    for file in (tmp_path / "knees").rglob("*L.png"):
        file.rename(file.with_suffix(".PNG"))
    found = look_around(tmp_path, monkeypatch, DATA_DIR=str(tmp_path / "knees"))
    assert len(found["FILES"]) == 60


def test_without_images_it_says_what_to_do(tmp_path, monkeypatch):
    (tmp_path / "input").mkdir()
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    monkeypatch.setitem(sys.modules, "utils", None)  # Kaggle has no utils
    with pytest.raises(FileNotFoundError, match="Add Input"):
        look_around(tmp_path, monkeypatch)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        look_around(tmp_path, monkeypatch, DATA_DIR="nowhere")


def test_without_weights_it_starts_from_random_ones(drawn, tmp_path, monkeypatch):
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    found = look_around(tmp_path, monkeypatch, DATA_DIR=str(drawn))
    assert found["WEIGHTS"] == {"EfficientNetV2B0": None, "MobileNetV3Small": None}


def run(folder, monkeypatch, **parameters):
    monkeypatch.chdir(folder)
    project = str(NOTEBOOK.parents[1])
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([project, os.environ.get("PYTHONPATH", "")]))
    done = folder / "done.ipynb"
    options = {"cwd": folder, "progress_bar": False, "kernel_name": "python3"}
    papermill.execute_notebook(NOTEBOOK, done, SHORT | parameters, **options)
    text = json.dumps(nbformat.read(done, as_version=4).cells)
    out = Path("/kaggle/working") if Path("/kaggle/working").is_dir() else folder / "runs/one_page"
    return text, out


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_it_runs_on_synthetic_images(backend, tmp_path, monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", backend)
    text, out = run(tmp_path, monkeypatch, DATA_DIR="synthetic")
    assert "student \\u2212 teacher" in text and "true class" in text
    assert (out / "student.keras").stat().st_size < 5e6
    assert (out / "student.tflite").exists() == (backend == "tensorflow")


@pytest.mark.slow
def test_it_runs_on_attached_images(mount, monkeypatch):
    text, out = run(mount, monkeypatch, TEACHER="MobileNetV3Small")
    assert "CPU: 60 images" in text and (out / "student.keras").exists()
