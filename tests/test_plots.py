"""Figures hold what they should say, keep alternative text, and leave nothing open behind."""

import base64
import io
import re

import matplotlib
import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from matplotlib.figure import Figure
from PIL import Image

from utils import plots, runs
from utils.plots import images, page

NAMES = [f"KL {k}" for k in range(5)]
RNG = np.random.default_rng(0)
KNEES = RNG.integers(0, 256, (10, 32, 32, 1), dtype=np.uint8)
COUNTS = np.diag([50, 20, 30, 20, 8]) + 2
MAPS = RNG.random((5, 4, 4), dtype=np.float32)
MODELS = pd.DataFrame(
    [["teacher", 0.71, 0.69, 0.73], ["student", 0.66, 0.63, 0.69]],
    columns=["model", "value", "low", "high"],
)


def history(epochs=4):
    """A plausible history.csv, best at the third epoch."""
    columns = ("loss", "val_loss", "accuracy", "val_accuracy", "qwk", "val_qwk", "learning_rate")
    table = pd.DataFrame({name: np.linspace(0.9, 0.5, epochs) for name in columns})
    table["val_qwk"] = [0.1, 0.2, 0.6, 0.5]
    return table.assign(epoch=range(1, epochs + 1), phase=["head", "head", "all", "all"])


def frozen(trained):
    """A table of what trains, as models.trainable_table makes it."""
    return pd.DataFrame(
        {"part": ["backbone", "head"], "parameters": [1000, 100], "trainable": trained}
    )


def manifest():
    return pd.DataFrame(
        {"split": ["train"] * 6 + ["test"] * 2, "grade": [0, 0, 0, 1, 2, 4, 0, 1],
         "patient": ["1", "1", "2", "2", "3", "4", "5", "5"]}
    )  # fmt: skip


BINS = pd.DataFrame({"confidence": [0.3, 0.7], "accuracy": [0.2, 0.65], "count": [10, 30]})
SOFT = np.array([[0.7, 0.1, 0.1, 0.05, 0.05], [0.4, 0.2, 0.2, 0.1, 0.1]])

# Every figure on plausible data: how it is made, how many axes it has, texts that must be in it.
FIGURES = {
    "class_counts": (lambda: plots.class_counts(manifest(), NAMES, note="synthetic"), 1,
                     ["(synthetic)", "train: 6", "test: 2", "3\n50%", "KL 4"]),
    "images_per_patient": (lambda: plots.images_per_patient(manifest()), 1, ["3", "2"]),
    "gallery": (lambda: plots.gallery(KNEES, NAMES * 2, title="Ten"), 10, ["Ten", "KL 0"]),
    "contact_sheet": (lambda: plots.contact_sheet(KNEES, np.arange(10) % 5, NAMES, per_class=3), 15,
                      NAMES),
    "error_gallery": (lambda: plots.error_gallery(KNEES[:2], [0, 1], [3, 4], [0.92, 0.5], NAMES), 2,
                      ["read KL 0\nmodel KL 3 (92%)"]),
    "augmented_views": (lambda: plots.augmented_views(np.stack([KNEES[:3]] * 2), ["a", "b"],
                                                      ["stored", "1", "2"], note="synthetic"), 6,
                        ["stored", "a", "(synthetic)"]),
    "learning_curves": (lambda: plots.learning_curves(history()), 4,
                        ["loss", "QWK", "learning rate", "head", "all", "best epoch, 3", "0.600"]),
    "schedule": (lambda: plots.schedule([0.1, 0.2, 0.1], steps_per_epoch=3, warmup_epochs=1), 1,
                 ["warm-up", "epoch"]),
    "frozen_map": (lambda: plots.frozen_map({"phase 1": frozen([0, 100]),
                                             "phase 3": frozen([1000, 100])}), 1,
                   ["phase 1", "frozen", "1,000 train", "100 train"]),
    "scales_on_image": (lambda: plots.scales_on_image(KNEES[0], [4, 8, 16], [10, 20, 99]), 3,
                        ["stride 4: 8 by 8 cells", "sees 10 by 10", "the whole knee"]),
    "attention_map": (lambda: plots.attention_map(KNEES[0], {"CBAM": MAPS[0], "CAM": MAPS[1]}), 3,
                      ["radiograph", "CBAM", f"{MAPS[0].max():.2f}"]),
    "explanation_page": (lambda: plots.explanation_page(
        KNEES[:5], {"teacher": MAPS, "student": MAPS}, NAMES), 15, ["teacher", "KL 4"]),
    "soft_targets": (lambda: plots.soft_targets(SOFT, [1, 4], NAMES, image=KNEES[0], truth=0), 3,
                     ["T = 1", "T = 4", "0.70", "read KL 0"]),
    "softmax_of_softmax": (lambda: plots.softmax_of_softmax(
        SOFT, np.full((2, 5), 0.2), NAMES), 2, ["entropy 2.32 of 2.32 bits"]),
    "confusion_matrices": (lambda: plots.confusion_matrices(
        {"teacher": COUNTS, "student": COUNTS}, NAMES, note="synthetic"), 3,
        ["teacher", "student", f"{52 / 60:.0%}\n52", "(synthetic)"]),
    "metric_intervals": (lambda: plots.metric_intervals(MODELS.assign(metric="accuracy")), 1,
                         ["accuracy", "0.710 (0.690 to 0.730)", "student"]),
    "recall_intervals": (lambda: plots.recall_intervals(
        MODELS.assign(**{"class": "KL 0", "count": 9})), 1, ["KL 0\n9 images", "teacher"]),
    "precision": (lambda: plots.recall_intervals(
        MODELS.assign(**{"class": "KL 0", "count": [9, 1200]}), metric="precision"), 1,
        ["KL 0\n9 / 1,200 images", "precision"]),
    "differences": (lambda: plots.differences(pd.DataFrame(
        {"name": ["student"], "value": [-0.012], "low": [-0.023], "high": [-0.001]})), 1,
        ["\N{MINUS SIGN}1.2 (\N{MINUS SIGN}2.3 to \N{MINUS SIGN}0.1)"]),
    "deletion": (lambda: plots.deletion(MODELS.assign(hidden=["hottest tenth", "random tenth"])), 1,
                 ["teacher: hottest tenth hidden", "student: random tenth hidden"]),
    "reliability": (lambda: plots.reliability(
        {"a": BINS, "b": BINS}, errors={"a": 0.08, "b": 0.01}), 4,
        ["expected calibration error 0.080", "images"]),
    "coverage": (lambda: plots.coverage({"student": (np.array([0.5, 1]), np.array([0.9, 0.7]))}), 1,
                 ["student", "accuracy of the graded"]),
    "leak_gaps": (lambda: plots.leak_gaps(pd.DataFrame(
        {"protocol": ["honest", "leak"], "value": [0.6, 0.8], "low": [0.5, 0.7], "high": [0.7, 0.9],
         "gap": [np.nan, 0.2], "gap_low": [np.nan, 0.1], "gap_high": [np.nan, 0.3]})), 2,
        ["honest", "+20.0 (+10.0 to +30.0)"]),
    "exports": (lambda: plots.exports(pd.DataFrame(
        {"name": ["float32", "8-bit"], "bytes": [5.2e6, 1.49e6], "accuracy": [0.66, None],
         "ms": [2.0, None]})), 3, ["1.49", "not measured", "MB (dashed: 1.5)"]),
    "target_bar": (lambda: plots.target_bar(MODELS.rename(columns={"model": "name"}), 0.7), 1,
                   ["met: 0.71, 0.69 to 0.73", "not met: 0.66, 0.63 to 0.69", "70%"]),
    "ratios": (lambda: plots.ratios(pd.DataFrame(
        {"name": ["views"], "ratio": [11.0], "target": [8.0]})), 1,
        ["11 times"]),
    "series_overview": (lambda: plots.series_overview(
        KNEES[:5], NAMES, MAPS, {"teacher": COUNTS, "student": COUNTS}, note="synthetic"), 12,
        ["where the teacher looks", "teacher", "(synthetic)"]),
}  # fmt: skip


def texts(fig: Figure) -> list[str]:
    fig.draw_without_rendering()  # tick labels exist only once drawn
    found = fig.findobj(matplotlib.text.Text)
    return [text.get_text() for text in found if text.get_visible()]


def test_every_public_figure_is_tested():
    assert set(FIGURES) - {"precision"} == set(plots.__all__) - {"save", "show", "tabulate"}


@pytest.mark.parametrize("name", FIGURES)
def test_figure(name):
    before = dict(matplotlib.rcParams)
    make, count, wanted = FIGURES[name]
    fig = make()
    assert isinstance(fig, Figure)
    assert len(fig.get_axes()) == count
    joined = "\n".join(texts(fig))
    assert [text for text in wanted if text not in joined] == []
    assert plt.get_fignums() == [], "a figure was left open"
    assert dict(matplotlib.rcParams) == before, "matplotlib's settings were changed"


def test_target_is_not_judged_without_one():
    fig = plots.target_bar(MODELS.rename(columns={"model": "name"}), None)
    assert "not judged" in "\n".join(texts(fig))
    assert not any("met:" in text for text in texts(fig))


def test_curves_with_one_epoch_and_nothing_but_loss():
    fig = plots.learning_curves(pd.DataFrame({"epoch": [0], "loss": [1.0]}))
    assert len(fig.axes) == 1
    assert not any("best" in text for text in texts(fig))


def test_curves_count_epochs_through_where_they_start_anew():
    table = pd.concat([history(), history()])
    (line, *_) = plots.learning_curves(table).axes[0].lines
    np.testing.assert_array_equal(line.get_xdata(), np.arange(1, 9))


def test_confusion_shares_are_of_the_row_on_one_scale():
    counts = np.array([[3, 1], [0, 0]])
    fig = plots.confusion_matrices({"a": counts, "b": counts}, ["x", "y"])
    meshes = [ax.collections[0] for ax in fig.axes[:2]]
    for mesh in meshes:
        assert mesh.get_clim() == (0, 1)
        assert mesh.get_cmap().name == "cividis"
        np.testing.assert_allclose(np.ravel(mesh.get_array()), [0.75, 0.25, 0, 0])


def test_overlay_leaves_a_constant_map_uncoloured_and_colours_the_hottest():
    gray = np.full((8, 8), 100, np.uint8)
    np.testing.assert_array_equal(images.overlay(gray, np.ones((2, 2))), 100)
    mixed = images.overlay(gray, np.eye(2)).astype(int)
    assert mixed.shape == (8, 8, 3)
    yellow = mixed[..., 0] - mixed[..., 2]  # red minus blue
    assert yellow[0, 0] == yellow.max() > 60
    assert abs(yellow[0, -1]) < 15


def test_empty_gallery_is_refused():
    with pytest.raises(ValueError, match="no image"):
        plots.gallery(KNEES[:0])


def test_save_keeps_alternative_text_of_every_figure(tmp_path):
    fig = plots.schedule([1, 2])
    path = plots.save(fig, tmp_path / "report" / "a.png", "Learning rate\n   rises.")
    plots.save(fig, tmp_path / "report" / "b.png", "Two")
    again = plots.save(fig, tmp_path / "report" / "a.png", "Learning rate rises.")
    assert again == path
    assert runs.read_json(path.with_name("figures.json")) == {
        "a.png": "Learning rate rises.", "b.png": "Two"
    }  # fmt: skip
    with Image.open(path) as picture:
        picture.load()
        assert picture.width == 9 * page.DOTS
    assert sorted(p.name for p in path.parent.iterdir()) == ["a.png", "b.png", "figures.json"]


@pytest.mark.parametrize(("name", "alt"), [("a.png", "  "), ("a.jpg", "text")])
def test_save_refuses_a_figure_without_text_or_png(tmp_path, name, alt):
    with pytest.raises(ValueError, match=r"alternative text|\.png"):
        plots.save(plots.schedule([1, 2]), tmp_path / name, alt)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("name", "kind"), [("schedule", "png"), ("gallery", "webp")])
def test_show_displays_an_image_with_alternative_text(tmp_path, monkeypatch, name, kind):
    shown = []
    monkeypatch.setattr("IPython.display.display", shown.append)
    noisy = RNG.integers(0, 256, (10, 200, 200), dtype=np.uint8)
    fig = plots.gallery(noisy) if name == "gallery" else FIGURES[name][0]()
    plots.show(fig, tmp_path / "a.png", 'A "quoted" <text>')
    (html,) = [item.data for item in shown]
    assert 'alt="A &quot;quoted&quot; &lt;text&gt;"' in html
    found = re.search(r'src="data:image/(\w+);base64,([^"]+)"', html)
    assert found[1] == kind
    with Image.open(io.BytesIO(base64.b64decode(found[2]))) as picture:
        picture.load()
        assert picture.width >= 9 * page.SHOWN
    assert (tmp_path / "a.png").exists()


def test_frozen_map_of_one_table_marks_what_trains():
    fig = plots.frozen_map(frozen([False, True]))
    assert {"frozen", "100 train"} <= set(texts(fig))


def test_tabulate_takes_figures_as_the_report_keeps_them():
    teacher = {"accuracy": 0.7, "accuracy_ci95": [0.6, 0.8], "recall": [0.9, None],
               "recall_ci95": [[0.8, 1.0], None], "support": [8, 0],
               "binary": {"sensitivity": 0.5, "sensitivity_ci95": [None, None]}}  # fmt: skip
    summaries = {"teacher": teacher, "student": {"accuracy": 0.6, "accuracy_ci95": [0.5, 0.7]}}
    table = plots.tabulate(summaries, {"accuracy": "right", "sensitivity": "found"})
    assert list(table["metric"]) == ["right", "found", "right"]
    assert table.iloc[0].tolist() == ["teacher", "right", 0.7, 0.6, 0.8]
    plots.metric_intervals(table)
    recall = plots.tabulate({"teacher": teacher}, {"recall": "recall"}, ["KL 0", "KL 1"])
    assert recall["count"].tolist() == [8, 0]
    assert recall["value"].isna().tolist() == [False, True]
    plots.recall_intervals(recall)
    with pytest.raises(ValueError):
        plots.tabulate({"teacher": teacher}, {"recall": "recall"}, ["KL 0"])


def test_a_cell_that_sees_the_whole_knee_is_framed_by_the_whole_knee():
    side = len(KNEES[0])
    [ax] = plots.scales_on_image(KNEES[0], [side // 2], [side]).axes  # a cell off the middle
    _, frame = ax.patches
    assert frame.get_bbox().extents.tolist() == [-0.5, -0.5, side - 0.5, side - 0.5]
