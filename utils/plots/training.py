"""Figures of a run up to its report: classes, learning curves, schedules, freezing, the series."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from utils.plots.images import overlay, show_image
from utils.plots.report import draw_confusion, rows_axes
from utils.plots.style import COLORS, FAINT, INK, MARKERS, WIDTH, figure, styled


@styled
def class_counts(
    table: pd.DataFrame,
    names: Sequence[str],
    *,
    title: str | None = "Images of each grade",
    note: str = "",
) -> Figure:
    """Images of each class in every split, with counts and shares of the split.

    Args:
        table: the manifest; columns `split` and `grade` (int, an index into `names`).
    """
    counts = pd.crosstab(table["split"], table["grade"]).reindex(
        index=list(dict.fromkeys(table["split"])), columns=range(len(names)), fill_value=0
    )
    made = figure(title, note, 3.2)
    ax = made.subplots()
    width = 0.86 / len(counts)
    for number, (split, row) in enumerate(counts.iterrows()):
        where = np.arange(len(names)) + (number - (len(counts) - 1) / 2) * width
        bars = ax.bar(where, row, 0.94 * width, color=COLORS[number % len(COLORS)],
                      label=f"{split}: {row.sum():,}")  # fmt: skip
        shares = row / max(row.sum(), 1)
        texts = [f"{n:,}\n{s:.0%}" for n, s in zip(row, shares, strict=True)]
        ax.bar_label(bars, texts, fontsize=8, padding=1)
    ax.set_xticks(range(len(names)), names)
    ax.set(ylabel="images", ylim=(0, 1.2 * counts.to_numpy().max()))
    ax.legend(ncols=len(counts), loc="upper right", bbox_to_anchor=(1, 1.12))
    return made


@styled
def images_per_patient(
    table: pd.DataFrame,
    *,
    title: str | None = "Images of each patient",
    note: str = "",
) -> Figure:
    """How many patients have one, two, … images. Args: table: manifest with column `patient`."""
    counts = table["patient"].value_counts().value_counts().sort_index()
    made = figure(title, note, 2.4, WIDTH / 2)
    ax = made.subplots()
    bars = ax.bar(counts.index.astype(str), counts, 0.4, color=COLORS[0])
    ax.bar_label(bars, [f"{n:,}" for n in counts], fontsize=9)
    ax.set(xlabel="images of one patient", ylabel="patients")
    return made


def stretches(values: Sequence) -> list[tuple[object, int, int]]:
    """Runs of equal neighbours: (value, first position, last position)."""
    values = list(values)
    starts = [i for i in range(len(values)) if i == 0 or values[i] != values[i - 1]]
    return [(values[a], a, b - 1) for a, b in zip(starts, [*starts[1:], len(values)], strict=True)]


@styled
def learning_curves(
    history: pd.DataFrame,
    *,
    monitor: str = "val_qwk",
    title: str | None = "Learning curves",
    note: str = "",
) -> Figure:
    """Loss, accuracy, QWK and learning rate over epochs, of train and val.

    Args:
        history: one row an epoch, in order; `epoch`, any of `loss`, `accuracy`, `qwk` (each with
            `val_`) and `learning_rate`; a column `phase`, `step` or `leg` shades its stretches.
            Where `epoch` starts anew with every phase, epochs are counted through.
        monitor: the column whose best (greatest) epoch is marked.
    """
    panels = [n for n in ("loss", "accuracy", "qwk") if n in history or f"val_{n}" in history]
    panels += [n for n in ("learning_rate",) if n in history]
    x = history["epoch"].to_numpy()
    x = x if len(set(x)) == len(x) else np.arange(1, len(x) + 1)
    phase = next((c for c in ("phase", "step", "leg") if c in history), None)
    legs = stretches(history[phase]) if phase and history[phase].nunique() > 1 else []
    best = None
    if monitor in history and history[monitor].notna().any():
        best = int(np.nanargmax(history[monitor].to_numpy(float)))
    made = figure(title, note, 2.9)
    for ax, name in zip(made.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
        for column, text, number in ((name, "train", 0), (f"val_{name}", "val", 1)):
            if column in history:
                marker = MARKERS[number] if len(x) <= 30 else ""
                ax.plot(x, history[column], marker=marker, ms=4, color=COLORS[number], label=text)
        for number, (value, first, last) in enumerate(legs):
            if number % 2:
                ax.axvspan(x[first] - 0.5, x[last] + 0.5, color="#f0f0f0", lw=0, zorder=0)
            middle = (x[first] + x[last]) / 2
            short = str(value).removeprefix("phase ")  # a short phase has room for its number only
            ax.text(middle, 1, short, transform=ax.get_xaxis_transform(), ha="center",
                    va="bottom", fontsize=8, color=FAINT)  # fmt: skip
        if best is not None:
            ax.axvline(x[best], color=INK, lw=0.8, ls=":")
        text = {"qwk": "QWK", "learning_rate": "learning rate, epoch's end"}.get(name, name)
        ax.set_title(text, pad=14 if legs else 6)
        ax.set_xlabel("epoch")
        ax.set_xlim(x[0] - 0.5, x[-1] + 0.5)
        ax.xaxis.set_major_locator(MaxNLocator(5, integer=True, min_n_ticks=1))
        if name == "learning_rate":
            ax.set_yscale("log")
        elif ax.lines:
            ax.grid(axis="y")
    if panels:
        made.axes[0].legend(fontsize=9)
    if best is not None:
        value = history[monitor].iloc[best]
        at = f"dotted: best epoch, {x[best]} ({monitor} {value:.3f})"
        at += "; above: phases" * any(str(leg[0]).startswith("phase ") for leg in legs)
        made.supxlabel(at, fontsize=9, color=FAINT)
    return made


@styled
def schedule(
    values: Sequence[float],
    *,
    steps_per_epoch: int = 1,
    warmup_epochs: float = 0,
    title: str | None = "Learning rate",
    note: str = "",
) -> Figure:
    """The learning rate at every step, over epochs (steps if an epoch's are not given)."""
    made = figure(title, note, 2.4)
    ax = made.subplots()
    ax.plot(np.arange(len(values)) / steps_per_epoch, values, color=COLORS[0])
    if warmup_epochs:
        ax.axvspan(0, warmup_epochs, color="#f0f0f0")
        ax.text(warmup_epochs / 2, 0, "warm-up", ha="center", va="bottom", color=FAINT, fontsize=9)
    unit = "epoch" if steps_per_epoch > 1 else "step"
    ax.set(xlabel=unit, ylabel="learning rate", ylim=(0, None), xlim=(0, None))
    ax.grid(axis="y")
    return made


@styled
def frozen_map(
    tables: Mapping[str, pd.DataFrame] | pd.DataFrame,
    *,
    title: str | None = "What trains in which phase",
    note: str = "",
) -> Figure:
    """Parts of a model down, phases across; filled where a part trains.

    Args:
        tables: phase to a table with columns `part`, `parameters` (count) and `trainable` (count of
            those that train, or a truth value), the same parts in the same order in every phase;
            or one such table.
    """
    tables = {"": tables} if isinstance(tables, pd.DataFrame) else tables
    parts = list(next(iter(tables.values()))["part"])
    share = np.zeros((len(parts), len(tables)))
    counts = np.zeros_like(share)
    for column, table in enumerate(tables.values()):
        counts[:, column] = table["parameters"]
        trains = table["trainable"]
        trains = counts[:, column] * trains if trains.dtype == bool else trains
        share[:, column] = np.asarray(trains, float) / np.maximum(counts[:, column], 1)
    made = figure(title, note, 0.32 * len(parts) + 1.1, min(WIDTH, 3 + 1.9 * len(tables)))
    ax = made.subplots()
    ax.pcolormesh(share, cmap=sns.light_palette(COLORS[0], as_cmap=True), vmin=0, vmax=1.2,
                  edgecolor="white", linewidth=2)  # fmt: skip
    for (row, column), part in np.ndenumerate(share):
        text = "frozen" if part == 0 else f"{part * counts[row, column]:,.0f} train"
        ax.text(column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=9,
                color="white" if part > 0.6 else INK)  # fmt: skip
    ax.set_xticks(np.arange(len(tables)) + 0.5, list(tables))
    ax.set_yticks(np.arange(len(parts)) + 0.5, parts)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    ax.invert_yaxis()
    return made


@styled
def series_overview(
    images: np.ndarray,
    names: Sequence[str],
    maps: np.ndarray,
    confusion: Mapping[str, np.ndarray],
    *,
    title: str | None = "From X-ray to grade: a large teacher, a small student",
    note: str = "",
) -> Figure:
    """The whole in one picture: a knee of each grade, where the teacher looks, who errs where.

    Args:
        images: uint8 (classes, height, width[, 1]), one knee of each class.
        maps: float (classes, h, w), the teacher's map of each.
        confusion: model to counts (classes, classes), truth down.
    """
    made = figure(title, note, 3.15, 1.25 * WIDTH)
    left, right = made.subfigures(1, 2, width_ratios=[1.1, 0.5 * len(confusion)])
    axes = left.subplots(2, len(names), squeeze=False)
    for column, (image, name) in enumerate(zip(images, names, strict=True)):
        show_image(axes[0, column], image, name)
        show_image(axes[1, column], overlay(image, maps[column]))
        axes[0, column].set_anchor("S")
        axes[1, column].set_anchor("N")
    axes[1, 0].set_xlabel("where the teacher looks", loc="left")
    draw_confusion(right, confusion, names, colorbar=False)
    return made


@styled
def ratios(
    table: pd.DataFrame,
    *,
    xlabel: str = "times as fast as the peer (1 = the same)",
    title: str | None = "Speed against peers",
    note: str = "",
) -> Figure:
    """Ratios on a logarithmic scale from 1.

    Args:
        table: columns `name`, `ratio` (> 0), and perhaps `target`.
    """
    made = figure(title, note, 1.1 + 0.36 * len(table))
    ax = made.subplots()
    ax.axvline(1, color=INK, lw=1)
    for y, (_, row) in enumerate(table.iterrows()):
        color = COLORS[0] if row["ratio"] >= 1 else COLORS[1]
        ax.barh(y, row["ratio"] - 1, 0.6, left=1, color=color)
        text = f"{row['ratio']:.2g} times"
        ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9)
        if np.isfinite(row.get("target", np.nan)):
            ax.plot([row["target"]] * 2, [y - 0.38, y + 0.38], color=INK, lw=1.5, ls="--")
    rows_axes(ax, list(table["name"]))
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter("{x:g}")
    ax.set(ylim=(len(table) - 0.5, -0.5), xlabel=xlabel)
    return made
