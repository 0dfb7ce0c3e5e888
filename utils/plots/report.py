"""Figures of the evaluation and the benchmarks: what is known about the models, and how surely.

Values, intervals and `note` are as `utils.plots` says.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter

from utils.plots.style import COLORS, FAINT, INK, MARKERS, WIDTH, figure, styled


def draw_confusion(made, confusion: Mapping[str, np.ndarray], names, *, colorbar=True) -> None:
    """Row-normalised matrices side by side in a (sub)figure, on one scale, with counts."""
    axes = made.subplots(1, len(confusion), squeeze=False)[0]
    for number, (ax, (name, counts)) in enumerate(zip(axes, confusion.items(), strict=True)):
        counts = np.asarray(counts)
        shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
        sns.heatmap(
            shares, cmap="cividis", vmin=0, vmax=1, square=True, cbar=False, ax=ax, linewidths=0.5,
            xticklabels=list(names), yticklabels=list(names) if number == 0 else False,
        )  # fmt: skip
        for (row, column), share in np.ndenumerate(shares):
            text = f"{share:.0%}\n{counts[row, column]:,}" if counts[row, column] else "0"
            color = "black" if share > 0.55 else "white" if text != "0" else "#8a93ad"
            ax.text(
                column + 0.5, row + 0.5, text, ha="center", va="center", fontsize=8, color=color
            )
        ax.set(title=name.replace("_", " "), xlabel="graded as")
        ax.tick_params(length=0, rotation=0)
    axes[0].set_ylabel("true grade")
    if colorbar:
        bar = made.colorbar(axes[-1].collections[0], ax=list(axes), shrink=0.8, pad=0.02)
        bar.set_label("share of the row")
        bar.outline.set_visible(False)


@styled
def confusion_matrices(
    confusion: Mapping[str, np.ndarray],
    names: Sequence[str],
    *,
    title: str | None = "Who is graded as what",
    note: str = "",
) -> Figure:
    """Confusion matrices side by side on one scale: share of the row, and counts.

    Args:
        confusion: model to int (classes, classes), truth down, graded across.
    """
    side = min(3.7, (WIDTH - 1.7) / len(confusion))
    made = figure(title, note, side + 1.1, len(confusion) * side + 1.7)
    draw_confusion(made, confusion, names)
    return made


def interval_row(ax: Axes, y: float, row, *, color, marker="o", text: str | None = None) -> None:
    """One value with its interval at height `y`, and its text at the right margin."""
    value, low, high = (float(row.get(key, np.nan)) for key in ("value", "low", "high"))
    ax.plot([low, high], [y, y], color=color, lw=2, solid_capstyle="butt")
    ax.plot([value], [y], marker=marker, color=color, ms=6)
    if text is None:
        text = f"{value:.3f}" + ("" if np.isnan(low) else f" ({low:.3f} to {high:.3f})")
    text = text.replace("-", "\N{MINUS SIGN}")
    ax.text(1.02, y, text, transform=ax.get_yaxis_transform(), va="center", fontsize=9, color=INK)


def rows_figure(title, note, names: Sequence[str], rows: pd.DataFrame, styles) -> tuple:
    """(figure, its axes): a row of `rows` for each name; styles: keywords of `interval_row`."""
    made = figure(title, note, 1.0 + 0.34 * len(rows))
    ax = made.subplots()
    for y, ((_, row), style) in enumerate(zip(rows.iterrows(), styles, strict=True)):
        interval_row(ax, y, row, **style)
    rows_axes(ax, list(names))
    ax.set_ylim(len(rows) - 0.5, -0.5)
    return made, ax


def in_points(row: Mapping) -> str:
    """A difference and its interval."""
    return "{value:+.1f} ({low:+.1f} to {high:+.1f})".format_map(row)


def rows_axes(ax: Axes, labels: Sequence[str], positions: Sequence[float] | None = None) -> None:
    """Make an axes of rows: labels at the left, first row on top, light vertical lines."""
    ax.set_yticks(range(len(labels)) if positions is None else positions, labels)
    ax.tick_params(axis="y", length=0)
    ax.spines["left"].set_visible(False)
    ax.grid(axis="x")
    ax.invert_yaxis()


@styled
def metric_intervals(
    table: pd.DataFrame,
    *,
    title: str | None = "Figures with 95 % intervals",
    note: str = "",
) -> Figure:
    """Metrics of several models, a group of rows each.

    Args:
        table: columns `model`, `metric`, `value`, `low`, `high`; shown in the order they come in.
    """
    models, metrics = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["metric"]))
    made = figure(title, note, 0.9 + 0.2 * len(metrics) * (len(models) + 1))
    ax = made.subplots()
    middles = []
    for number, metric in enumerate(metrics):
        start = number * (len(models) + 0.7)
        middles.append(start + (len(models) - 1) / 2)
        for which, model in enumerate(models):
            found = table[(table["metric"] == metric) & (table["model"] == model)]
            for _, row in found.iterrows():
                interval_row(ax, start + which, row, color=COLORS[which], marker=MARKERS[which])
    rows_axes(ax, metrics, middles)
    ax.set_xlim(min(0, np.nanmin(table[["value", "low"]])), max(1, np.nanmax(table["high"])))
    for which, model in enumerate(models):
        ax.plot([], [], color=COLORS[which], marker=MARKERS[which], label=model)
    made.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    return made


@styled
def recall_intervals(
    table: pd.DataFrame,
    *,
    metric: str = "recall",
    title: str | None = "Recall of each grade, with 95 % intervals",
    note: str = "",
) -> Figure:
    """Recall (or precision) of every class and model.

    Args:
        table: columns `model`, `class`, `value`, `low`, `high`, and `count` (images of the class,
            or that a model graded so).
    """
    models, classes = list(dict.fromkeys(table["model"])), list(dict.fromkeys(table["class"]))
    made = figure(title, note, 3.2)
    ax = made.subplots()
    for number, model in enumerate(models):
        rows = table[table["model"] == model].set_index("class").reindex(classes)
        where = np.arange(len(classes)) + (number - (len(models) - 1) / 2) * 0.18
        ax.vlines(where, rows["low"], rows["high"], color=COLORS[number], lw=2)
        ax.plot(where, rows["value"], MARKERS[number], color=COLORS[number], ms=6, label=model)
    labels = classes
    if "count" in table:
        counts = {name: list(rows) for name, rows in table.groupby("class")["count"]}
        labels = [f"{name}\n{one_or_each(counts[name])} images" for name in classes]
    ax.set_xticks(range(len(classes)), labels)
    ax.set(ylim=(0, 1), ylabel=metric, xlim=(-0.5, len(classes) - 0.5))
    ax.grid(axis="y")
    made.legend(*ax.get_legend_handles_labels(), loc="outside lower center", ncols=len(models))
    return made


def one_or_each(counts: Sequence[int]) -> str:
    """The count that all models share, or each model's."""
    same = len(set(counts)) == 1
    return " / ".join(f"{count:,.0f}" for count in (counts[:1] if same else counts))


@styled
def differences(
    table: pd.DataFrame,
    *,
    xlabel: str = "difference, in points (hundredths)",
    title: str | None = "Paired differences, with 95 % intervals",
    note: str = "",
) -> Figure:
    """Differences against zero; an interval that leaves zero out is drawn in colour.

    Args:
        table: columns `name` (such as "student minus teacher, accuracy"), `value`, `low`, `high`.
    """
    points = 100 * table[["value", "low", "high"]]
    clear = (points["low"] > 0) | (points["high"] < 0)
    styles = [
        {"color": COLORS[0] if drawn else FAINT, "text": in_points(row)}
        for drawn, row in zip(clear, points.to_dict("records"), strict=True)
    ]
    made, ax = rows_figure(title, note, table["name"], points, styles)
    ax.axvline(0, color=INK, lw=1)
    ax.set_xlabel(xlabel)
    return made


@styled
def deletion(
    table: pd.DataFrame,
    *,
    title: str | None = "Does hiding what the map marks hurt more than hiding anything?",
    note: str = "",
) -> Figure:
    """Fall of the graded class's probability when a tenth of the image is hidden.

    Args:
        table: columns `model`, `hidden` ("hottest tenth", "random tenth"), `value`, `low`, `high`.
    """
    kinds = pd.factorize(table["hidden"])[0]
    styles = [{"color": COLORS[kind], "marker": MARKERS[kind]} for kind in kinds]
    names = table["model"] + ": " + table["hidden"] + " hidden"
    made, ax = rows_figure(title, note, names, table, styles)
    ax.axvline(0, color=INK, lw=1)
    ax.set_xlabel("fall in probability")
    return made


@styled
def reliability(
    bins: Mapping[str, pd.DataFrame],
    *,
    errors: Mapping[str, float] | None = None,
    title: str | None = "Does a stated 80 % mean 80 %?",
    note: str = "",
) -> Figure:
    """Reliability diagrams (Guo et al. 2017) with the number of images in each bin under them.

    Args:
        bins: title (such as "student, calibrated") to a table with columns `confidence` (mean of
            the bin), `accuracy` and `count`; empty bins left out or NaN.
        errors: title to expected calibration error.
    """
    made = figure(title, note, min(3.9, 1.7 + 0.75 * WIDTH / len(bins)))
    axes = made.subplots(
        2, len(bins), squeeze=False, sharex=True, sharey="row", height_ratios=[4, 1]
    )
    for column, (name, table) in enumerate(bins.items()):
        table = pd.DataFrame(table).dropna(subset=["confidence", "accuracy"])
        top, under = axes[:, column]
        top.plot([0, 1], [0, 1], color=FAINT, ls="--", lw=1)
        top.plot(table["confidence"], table["accuracy"], "-o", color=COLORS[0], ms=5)
        under.bar(table["confidence"], table["count"], 0.05, color=COLORS[0])
        error = f"\nexpected calibration error {errors[name]:.3f}" if errors else ""
        top.set(title=name + error, xlim=(0, 1), ylim=(0, 1), xticks=[0, 0.25, 0.5, 0.75, 1])
        top.grid()
        under.set_xlabel("stated probability")
        under.xaxis.set_major_formatter(lambda x, _: f"{x:g}" if x in (0, 0.5, 1) else "")
        under.yaxis.set_major_locator(MaxNLocator(2, integer=True))
    axes[0, 0].set_ylabel("share that is right")
    axes[1, 0].set_ylabel("images")
    return made


@styled
def coverage(
    curves: Mapping[str, tuple[np.ndarray, np.ndarray]],
    *,
    title: str | None = "Accuracy when the least sure knees go to a reader",
    note: str = "",
) -> Figure:
    """Selective grading. Args: curves: model to (coverage, accuracy), both (n,) from 0 to 1."""
    made = figure(title, note, 3.2, 0.7 * WIDTH)
    ax = made.subplots()
    for number, (name, (share, accuracy)) in enumerate(curves.items()):
        line = ("-", "--", "-.", ":")[number % 4]
        label = name.replace("_", " ")
        ax.plot(share, accuracy, color=COLORS[number], lw=1.8, ls=line, label=label)
    ax.set(
        xlabel="graded by the model (the rest goes to a reader)", ylabel="accuracy of the graded"
    )
    ax.set(xlim=(0, 1), ylim=(None, 1.005))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.grid()
    ax.legend()
    return made


@styled
def leak_gaps(
    table: pd.DataFrame,
    *,
    title: str | None = "How much a leak flatters the same model",
    note: str = "",
) -> Figure:
    """Accuracy under honest (blue) and leaking protocols, and the gap to the honest counterpart.

    Args:
        table: columns `protocol`, `value`, `low`, `high` (accuracy) and `gap`, `gap_low`,
            `gap_high` (NaN for honest ones, the first of which is the dashed line).
    """
    made = figure(title, note, 1.1 + 0.36 * len(table))
    left, right = made.subplots(1, 2, sharey=True)
    left.axvline(table["value"].iloc[0], color=FAINT, ls="--", lw=1)
    right.axvline(0, color=FAINT, ls="--", lw=1)
    for y, (_, row) in enumerate(table.iterrows()):
        color = COLORS[1] if np.isfinite(row["gap"]) else COLORS[0]
        interval_row(left, y, row, color=color, text=f"{row['value']:.3f}")
        if np.isfinite(row["gap"]):
            gap = {key: 100 * row[f"gap{end}"] for key, end in
                   (("value", ""), ("low", "_low"), ("high", "_high"))}  # fmt: skip
            interval_row(right, y, gap, color=color, text=in_points(gap))
    rows_axes(left, list(table["protocol"]))
    right.grid(axis="x")
    right.spines["left"].set_visible(False)
    right.tick_params(axis="y", length=0)
    left.set_ylim(len(table) - 0.5, -0.5)
    left.set_xlabel("accuracy")
    right.set_xlabel("points above the honest counterpart")
    return made


@styled
def exports(
    table: pd.DataFrame,
    *,
    limit: float | None = 1.5,
    title: str | None = "The student to take along: size, accuracy, speed",
    note: str = "",
) -> Figure:
    """Exported files, a row each: megabytes, accuracy, milliseconds an image.

    Args:
        table: columns `name`, `bytes`, `accuracy`, `ms`; any may be None or NaN.
        limit: size aimed at, in MB (10^6 bytes).
    """
    made = figure(title, note, 1.1 + 0.36 * len(table))
    axes = made.subplots(1, 3, sharey=True)
    places = np.arange(len(table))
    table = table.assign(**table[["bytes", "accuracy", "ms"]].apply(pd.to_numeric))
    megabytes = table["bytes"] / 1e6
    parts = (
        (megabytes, "MB", "{:.2f}"),
        (table["accuracy"], "accuracy", "{:.3f}"),
        (table["ms"], "ms an image, one thread", "{:.1f}"),
    )
    for number, (ax, (values, label, form)) in enumerate(zip(axes, parts, strict=True)):
        bars = ax.barh(places, values.fillna(0), 0.6, color=COLORS[number])
        texts = [form.format(v) if np.isfinite(v) else "not measured" for v in values]
        ax.bar_label(bars, texts, fontsize=9, padding=3)
        ax.set_xlabel(label)
        ax.set_xlim(0, 1.3 * max(float(values.max(skipna=True)), 1e-9))
        ax.tick_params(axis="y", length=0)
    if limit is not None:
        axes[0].axvline(limit, color=INK, ls="--", lw=1)
        axes[0].set_xlabel(f"MB (dashed: {limit:g})")
    axes[0].set_yticks(places, list(table["name"]))
    axes[0].invert_yaxis()
    return made


@styled
def target_bar(
    table: pd.DataFrame,
    target: float | None,
    *,
    metric: str = "accuracy",
    title: str | None = None,
    note: str = "",
) -> Figure:
    """Models against the target; the point estimate decides, its interval stands beside it.

    Args:
        table: columns `name`, `value`, `low`, `high`.
        target: from 0 to 1, or None where it is not judged (synthetic data).
    """
    judged = "not judged on these data" if target is None else f"{target:.0%}"
    styles = []
    for y, row in enumerate(table.to_dict("records")):
        text = f"{row['value']:.2f}, {row['low']:.2f} to {row['high']:.2f}"
        if target is not None:
            text = ("met: " if row["value"] >= target else "not met: ") + text
        styles.append({"color": COLORS[y], "marker": MARKERS[y % len(MARKERS)], "text": text})
    title = title or f"Target for {metric}: {judged}"
    made, ax = rows_figure(title, note, table["name"], table, styles)
    if target is not None:
        ax.axvline(target, color=INK, ls="--", lw=1)
    ax.set(xlim=(0, 1), xlabel=metric)
    return made
