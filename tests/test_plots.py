"""Figures hold what they should say, in any script, and do not stall."""

import time
import warnings

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.text import Text

from utils import plots

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (10, 32, 32, 1), dtype=np.uint8)
NAMES = [f"KL {k}" for k in range(5)]


def history(epochs=4, judge="qwk"):
    columns = [f"{p}{n}" for n in ("loss", "accuracy", judge) for p in ("", "val_")]
    table = pd.DataFrame({name: np.linspace(0.9, 0.5, epochs) for name in columns})
    return table.assign(epoch=range(1, epochs + 1), **{f"val_{judge}": [0.1, 0.6, 0.2, 0.5]})


def texts(figure):
    figure.draw_without_rendering()
    return [text.get_text() for text in figure.findobj(Text) if text.get_visible()]


def test_learning_curves_mark_one_epoch_in_all_panels():
    figure = plots.learning_curves({"a": history(), "b": history()}, note="synthetic")
    kept = [line.get_markevery() for ax in figure.axes for line in ax.lines]
    assert [mark for mark in kept if mark is not None] == [[1]] * 6
    assert {line.get_linestyle() for line in figure.axes[0].lines} == {"--", "-"}
    assert {"loss", "accuracy", "QWK", "a val", "b train", "synthetic"} <= set(texts(figure))
    assert "macro F1" in texts(plots.learning_curves(history(judge="f1")))


@pytest.mark.parametrize("empty", [pd.DataFrame(), history()[:0], {}, {"a": pd.DataFrame()}])
def test_a_run_without_an_epoch_has_curves_too(empty):
    assert "epoch" in texts(plots.learning_curves(empty))


def test_image_grid_shows_maps_and_titles_and_says_what_it_leaves_out():
    heat = [None, np.eye(4), np.ones((4, 4))]
    figure = plots.image_grid(IMAGES[:3], ["a", "b", "c"], heat, columns=3, note="synthetic")
    assert [len(ax.images) for ax in figure.axes] == [1, 2, 1]  # a constant map colours nothing
    assert {"a", "b", "c", "synthetic"} <= set(texts(figure))
    many = plots.image_grid(np.concatenate([IMAGES] * 20), note="synthetic")
    assert "synthetic; the first 60 of 200 images" in texts(many)


def test_confusion_shows_shares_of_the_row_and_counts():
    matrix = np.diag([50, 20, 30, 20, 8]) + 2
    shared, ax = plt.subplots()
    assert plots.confusion(matrix, NAMES, "teacher", ax, note="synthetic") is shared
    assert {f"{52 / 60:.0%}\n52", "teacher", "KL 4", "truth"} <= set(texts(shared))
    assert plt.fignum_exists(shared.number)  # others may still draw beside it
    plt.close(shared)


def test_intervals_fit_their_axis_and_name_groups_once():
    table = pd.DataFrame({"label": ["x", "y"] * 2, "group": ["a", "a", "b", "b"]})
    table = table.assign(value=[0.8, 0.82, 0.81, -0.7], low=[0.79, 0.8, np.nan, -0.8], high=0.83)
    figure = plots.intervals(table[:3], "t", line=0.85)
    assert figure.axes[0].get_xlim()[0] > 0.7
    found = texts(figure)
    assert {"0.800 (0.790 to 0.830)", "0.810", "t"} <= set(found)
    assert found.count("a") == found.count("b") == 1
    minus = "\N{MINUS SIGN}"
    assert f"{minus}0.70 ({minus}0.80 to 0.83)" in texts(plots.intervals(table, digits=2))


def test_figures_show_once_and_are_saved_whole(tmp_path):
    figure = plots.image_grid(IMAGES[:2])
    assert not plt.get_fignums()  # pyplot would show it a second time
    path = plots.save(figure, tmp_path / "new" / "figure.png")
    assert path.read_bytes()[:4] == b"\x89PNG" and len(list(path.parent.iterdir())) == 1


def test_two_hundred_classes_do_not_stall():
    started = time.process_time()
    names = [f"class {k}" for k in range(200)]
    _, ax = plt.subplots(figsize=(7.8, 7))
    plots.confusion(RNG.integers(9, size=(200, 200)), names, "", ax)
    assert len(ax.get_xticklabels()) < 70
    plt.close()
    plots.image_grid(np.concatenate([IMAGES] * 40), ["x"] * 400)
    assert time.process_time() - started < 20


def test_a_script_that_no_font_has_is_named_once(monkeypatch):
    monkeypatch.setattr(plots.font_manager.fontManager, "ttflist", [])
    plots.font_for.cache_clear()
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default", UserWarning)
        plots.image_grid(IMAGES[:2], ["轻度", "重度"])
    assert ["CJK" in str(warning.message) for warning in found] == [True]
    plots.font_for.cache_clear()


def test_letters_come_from_an_installed_font_that_has_them(monkeypatch):
    monkeypatch.setattr(plots, "font_for", {"b": "DejaVu Sans Mono"}.get)
    families = [ax.title.get_fontfamily() for ax in plots.image_grid(IMAGES[:2], ["a", "b"]).axes]
    assert families == [["DejaVu Sans"], ["DejaVu Sans", "DejaVu Sans Mono"]]
