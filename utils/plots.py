"""Figures that more than one cell needs, in one style, with colours that colour-blind readers see.

A cell that ends with one shows it once: pyplot no longer holds it. `note` is a small grey line.
"""

import contextlib
import functools
import itertools
import unicodedata
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.text import Text
from matplotlib.ticker import MaxNLocator

from utils import files

WIDTH = 9.0  # inches, about a notebook's column
MOST_IMAGES = 60  # in one figure
FEW_CLASSES = 8  # up to here a confusion matrix has its counts written in
CURVES = {"loss": "loss", "accuracy": "accuracy", "qwk": "QWK", "f1": "macro F1"}
COLORS = sns.color_palette("colorblind")

plt.rcParams.update({
    "figure.constrained_layout.use": True, "figure.dpi": 80, "axes.titlesize": 10,
    "axes.spines.top": False, "axes.spines.right": False, "grid.color": "#e4e4e4",
    "axes.prop_cycle": plt.cycler(color=COLORS), "image.cmap": "cividis", "legend.frameon": False,
})  # fmt: skip
warnings.filterwarnings("ignore", message="Glyph .* missing from")  # `check_fonts` says it once


def learning_curves(histories: pd.DataFrame | Mapping[str, pd.DataFrame], note: str = "") -> Figure:
    """Loss, accuracy and QWK (or macro F1) over epochs: train dashed, val solid.

    A ring marks the epoch that is kept, the best by val QWK (or macro F1). histories: one, as
    training writes it (a row an epoch, or none yet), or several by the name of their run.
    """
    histories = {"": histories} if isinstance(histories, pd.DataFrame) else histories
    shown = [name for name in CURVES if any(name in table for table in histories.values())]
    figure, axes = plt.subplots(1, max(len(shown), 1), figsize=(WIDTH, 3), squeeze=False)
    for (run, table), color in zip(histories.items(), itertools.cycle(COLORS), strict=False):
        epochs = np.arange(1, len(table) + 1)
        judge = table.get("val_qwk", table.get("val_f1", pd.Series(dtype=float)))
        best = [int(judge.argmax())] if judge.notna().any() else []
        ring = {"marker": "o", "markersize": 9, "fillstyle": "none", "markevery": best}
        train, val = f"{run} train".strip(), f"{run} val".strip()
        for ax, name in zip(axes[0], shown, strict=False):
            if name in table:
                ax.plot(epochs, table[name], ".--", markersize=3, color=color, label=train)
                ax.plot(epochs, table[f"val_{name}"], color=color, label=val, **ring)
                ax.set_title(CURVES[name])
    for ax in axes[0]:
        ax.set_xlabel("epoch")
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
    return _finished(figure, note, legend=axes[0, 0])


def image_grid(images, titles=None, overlays=None, columns: int = 5, note: str = "") -> Figure:
    """Images row by row, each under its title; the note says so if there are more than 60.

    images: (H, W) or (H, W, 1) gray from 0 to 255, or (H, W, 3). titles: None, or a string for
    each. overlays: None, or for each image None or a heat map (h, w) of any size and range.
    """
    count = min(len(images), MOST_IMAGES)
    if count < len(images):
        note = f"{note}; the first {count} of {len(images)} images".removeprefix("; ")
    columns = min(columns, count)
    rows, tile = -(-count // columns), WIDTH / max(columns, 4)
    size = (tile * columns, rows * (tile + (0.35 if titles else 0)))
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False)
    for ax in axes.flat:
        ax.set_axis_off()
    for k, ax in zip(range(count), axes.flat, strict=False):
        height, width, *_ = np.shape(images[k])
        ax.imshow(np.asarray(images[k], "uint8"), cmap="gray", vmin=0, vmax=255)
        if overlays is not None and overlays[k] is not None and np.ptp(overlays[k]) > 0:
            heat = (overlays[k] - np.min(overlays[k])) / np.ptp(overlays[k])
            place = {"extent": (-0.5, width - 0.5, height - 0.5, -0.5)}
            ax.imshow(heat, cmap="inferno", alpha=0.65 * heat, interpolation="bilinear", **place)
        if titles:
            ax.set_title(titles[k], fontsize=9)
    return _finished(figure, note)


def confusion(matrix, names: Sequence[str], title: str, ax: plt.Axes, note: str = "") -> Figure:
    """Who is graded as what: colours are shares of a row; up to 8 classes have counts in them.

    matrix: int (K, K), truth down, graded across. names: K class names.
    """
    matrix, few = np.asarray(matrix), len(names) <= FEW_CLASSES
    share = matrix / np.maximum(matrix.sum(axis=1, keepdims=True), 1)
    cells = np.vectorize("{:.0%}\n{:,}".format)(share, matrix)
    sns.heatmap(  # which leaves out names where they would overlap
        pd.DataFrame(share, names, names), vmin=0, vmax=1, cmap="cividis", square=True, cbar=False,
        annot=np.where(matrix > 0, cells, "") if few else None, fmt="", annot_kws={"fontsize": 8},
        linewidths=0.5 if few else 0, ax=ax,
    )  # fmt: skip
    ax.set(title=title, xlabel="graded as", ylabel="truth")
    ax.tick_params(axis="y", rotation=0)
    return _finished(ax.figure, note, own=False)


def intervals(table: pd.DataFrame, title="", line=None, note="", digits=3) -> Figure:
    """Values with their 95 % intervals, a row each, on an axis that fits them.

    table: columns `label`, `value`, `low`, `high` (NaN where there is no interval) and perhaps
        `group`, which decides colour and marker.
    line: None, or a value to compare with (zero, a target), drawn dashed.
    """
    table = pd.DataFrame({"group": "", **table.reset_index(drop=True)})
    figure, ax = plt.subplots(figsize=(WIDTH, 0.9 + 0.3 * len(table)))
    if line is not None:
        ax.axvline(line, color="gray", ls="--", lw=1)
    for number, (group, rows) in enumerate(table.groupby("group", sort=False)):
        color = COLORS[number % 6]
        ax.hlines(rows.index, rows["low"], rows["high"], color=color, lw=2)
        ax.plot(rows["value"], rows.index, "osD^vP"[number % 6], color=color, label=group)
    texts = table["value"].map(f"{{:.{digits}f}}".format)
    ends = [f" ({x:.{digits}f} to {y:.{digits}f})" for x, y in table[["low", "high"]].to_numpy()]
    texts = (texts + ends).where(table["low"].notna(), texts)
    right = ax.secondary_yaxis("right")
    right.set_yticks(table.index, texts.str.replace("-", "\N{MINUS SIGN}"))
    right.tick_params(length=0)
    ax.set_yticks(table.index, table["label"])
    ax.set(title=title, ylim=(len(table) - 0.5, -0.5))
    ax.tick_params(axis="y", length=0)
    ax.grid(axis="x")
    return _finished(figure, note, legend=ax if table["group"].nunique() > 1 else None)


def save(figure: Figure, path: str | Path) -> Path:
    """Write a figure as PNG, whole or not at all; it stays open. Returns the path."""
    check_fonts(figure)
    options = {"dpi": 110, "format": "png", "metadata": {"Software": None}}
    return files.write_atomic(Path(path), lambda part: figure.savefig(part, **options))


def check_fonts(figure: Figure) -> None:
    """Take each letter from an installed font that has it; warn of a script that none has."""
    for text in figure.findobj(Text):
        fonts = map(font_for, text.get_text().replace("\n", ""))
        text.set_fontfamily(list(dict.fromkeys(["DejaVu Sans", *filter(None, fonts)])))


@functools.cache
def font_for(letter: str) -> str | None:
    """The first installed font with this letter, DejaVu Sans before all; None if none has it."""
    fonts = font_manager.fontManager.ttflist
    for font in sorted(fonts, key=lambda font: font.name != "DejaVu Sans"):
        with contextlib.suppress(OSError, RuntimeError):  # removed since Matplotlib listed it
            has_it = font_manager.get_font(font.fname).get_char_index(ord(letter))
            if has_it and "last resort" not in font.name.lower():
                return font.name
    script = unicodedata.name(letter, "UNKNOWN").split()[0]
    warnings.warn(f"Figures show boxes: install a Noto font with {script} letters.", stacklevel=2)
    return None


def _finished(figure: Figure, note: str, own: bool = True, legend=None) -> Figure:
    """Add note and legend, find fonts, and take the figure from pyplot, so that it shows once."""
    if legend:
        lines, labels = legend.get_legend_handles_labels()
        figure.legend(lines, labels, loc="outside lower center", ncols=4, fontsize=9)
    if note:
        figure.supxlabel(note, x=0.995, ha="right", fontsize=8, color="gray")
    check_fonts(figure)
    if own:
        plt.close(figure)
    return figure
