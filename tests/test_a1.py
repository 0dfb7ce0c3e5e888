"""A1 as a user runs it: alone, in an empty folder, and through Keras's own compiler settings."""

import re
from pathlib import Path

import papermill
import pytest

NOTEBOOK = Path(__file__).parents[1] / "notebooks" / "A1_mixed_precision.ipynb"


def shown(book):
    for cell in book.cells:
        for output in cell.get("outputs", []):
            yield output.get("text") or output.get("data", {}).get("text/plain", "")


def test_the_page_runs_alone_and_its_table_names_every_remedy(tmp_path, monkeypatch):
    """The asserts about the remedies are in the notebook, where its reader sees them."""
    tf = pytest.importorskip("tensorflow")
    monkeypatch.setenv("XLA_FLAGS", "--xla_backend_optimization_level=0")  # half the time
    monkeypatch.setenv("KERAS_BACKEND", "jax")  # the page asks for TensorFlow itself
    monkeypatch.delenv("PYTHONPATH", raising=False)
    book = papermill.execute_notebook(
        NOTEBOOK, tmp_path / "A1.ipynb", {"NET_CHANNELS": 4}, cwd=tmp_path, progress_bar=False
    )
    texts = list(shown(book))
    table = next(text for text in texts if "AveragePooling2D" in text and "outcome" in text)
    outcome = dict(re.findall(r"^(\S.*?)\s{2,}(pass|fail)\b", table, flags=re.MULTILINE))
    assert len(outcome) == 11 and outcome["AveragePooling2D"] == "pass"
    if f"TensorFlow {tf.__version__} has the bug" in "".join(texts):
        assert outcome["Resizing, bilinear"] == "fail"
        assert any("mixed precision is disallowed" in " ".join(t.split()) for t in texts)
    else:
        assert f"TensorFlow {tf.__version__} has no such bug" in "".join(texts)
    assert [path.name for path in tmp_path.iterdir()] == ["A1.ipynb"]  # it writes nothing


def test_the_page_needs_nothing_of_the_project():
    assert not re.search(r"from utils|import utils", NOTEBOOK.read_text(encoding="utf-8"))
