"""Pictures of knees and ideas: galleries, attention, receptive fields, soft targets.

Images are uint8, (height, width) or (height, width, 1), 0 to 255.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from PIL import Image

from utils.plots.style import COLORS, FAINT, HEAT, WIDTH, figure, styled


def pixels(image: np.ndarray) -> np.ndarray:
    """Drop a channel axis of one: (height, width)."""
    image = np.asarray(image)
    return image[..., 0] if image.ndim == 3 and image.shape[-1] == 1 else image


def show_image(ax: Axes, image: np.ndarray | None, title: str | None = None) -> None:
    """Show an image (gray 0 to 255, or RGB) without axes; None leaves a gap."""
    if image is not None:
        ax.imshow(pixels(image), cmap="gray", vmin=0, vmax=255)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    if title:
        ax.set_title(title)


def grid(
    pictures: Sequence[Sequence[np.ndarray | None]],
    row_titles: Sequence[str],
    column_titles: Sequence[str],
    title: str | None,
    note: str,
) -> Figure:
    """Rows of pictures, all of one length, each row behind its title, each column under its own."""
    rows, columns = len(pictures), len(pictures[0])
    tile = WIDTH / (columns + 0.8 * bool(row_titles))
    made = figure(title, note, rows * tile + 0.4 + 0.3 * bool(column_titles))
    axes = made.subplots(rows, columns, squeeze=False)
    for ax, picture in zip(axes.flat, (p for row in pictures for p in row), strict=True):
        show_image(ax, picture)
    for ax, text in zip(axes[0], column_titles, strict=False):
        ax.set_title(text)
    for ax, text in zip(axes[:, 0], row_titles, strict=False):
        ax.set_ylabel(text, rotation=0, ha="right", va="center", labelpad=8, fontsize=9)
    return made


def overlay(image: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Lay a heat map over a radiograph.

    Args:
        image: uint8 (height, width[, 1]).
        heat: float (h, w) of any range and coarser grid; it is stretched from its least to its
            greatest value (a constant map colours nothing) and scaled up bilinearly.

    Returns:
        uint8 (height, width, 3); the hotter, the more colour and the less radiograph.
    """
    gray = pixels(image).astype("float32") / 255
    heat = np.asarray(heat, "float32")
    span = float(heat.max() - heat.min())
    heat = (heat - heat.min()) / span if span > 0 else np.zeros_like(heat)
    heat = np.asarray(Image.fromarray(heat).resize(gray.shape[::-1], Image.Resampling.BILINEAR))
    alpha = 0.65 * heat[..., None]
    mixed = (1 - alpha) * gray[..., None] + alpha * HEAT(heat)[..., :3]
    return np.round(255 * mixed.clip(0, 1)).astype("uint8")


@styled
def gallery(
    images: np.ndarray,
    titles: Sequence[str] = (),
    *,
    ncols: int = 5,
    title: str | None = None,
    note: str = "",
) -> Figure:
    """Images row by row, each under its title.

    Args:
        images: uint8 (n, height, width[, 1]), n >= 1.
        titles: n short texts, or none.
    """
    if len(images) == 0:
        raise ValueError("gallery got no image to show: give at least one.")
    ncols = min(ncols, len(images))
    rows = -(-len(images) // ncols)
    tile = WIDTH / max(ncols, 4)
    lines = max((text.count("\n") + 1 for text in titles), default=0)
    made = figure(title, note, rows * (tile + 0.18 * lines) + 0.3 * bool(title), tile * ncols)
    axes = made.subplots(rows, ncols, squeeze=False).ravel()
    for ax in axes[len(images) :]:
        ax.set_axis_off()
    for ax, image, text in zip(axes, images, titles or [None] * len(images), strict=False):
        show_image(ax, image)
        if text:
            ax.set_title(text, fontsize=9)
    return made


@styled
def contact_sheet(
    images: np.ndarray,
    labels: np.ndarray,
    names: Sequence[str],
    *,
    per_class: int = 6,
    title: str | None = "Some knees of each grade",
    note: str = "",
) -> Figure:
    """The first `per_class` images of every class, a row each.

    Args:
        images: uint8 (n, height, width[, 1]).
        labels: int (n,), indices into `names`.
    """
    rows = []
    for k in range(len(names)):
        chosen = list(images[np.flatnonzero(np.asarray(labels) == k)[:per_class]])
        rows.append(chosen + [None] * (per_class - len(chosen)))
    return grid(rows, names, (), title, note)


@styled
def augmented_views(
    views: np.ndarray,
    row_titles: Sequence[str] = (),
    column_titles: Sequence[str] = (),
    *,
    title: str | None = "The same knees, as training sees them",
    note: str = "",
) -> Figure:
    """Views of some images: uint8 or float (rows, views, height, width[, 1]), 0 to 255."""
    return grid(views, row_titles, column_titles, title, note)


@styled
def scales_on_image(
    image: np.ndarray,
    strides: Sequence[int],
    receptive_fields: Sequence[int] | None = None,
    *,
    title: str | None = "What one cell of each feature map stands for and sees",
    note: str = "",
) -> Figure:
    """The grid of each tap over a radiograph, one cell filled, what that cell sees outlined.

    Args:
        image: uint8 (size, size[, 1]), at the model's input size.
        strides: pixels from one cell to the next, for each tap.
        receptive_fields: side in pixels of what one cell sees, for each tap; none is drawn without.
    """
    image = pixels(image)
    size = image.shape[0]
    made = figure(title, note, WIDTH / len(strides) + (0.55 if receptive_fields is None else 0.7))
    for number, (ax, stride) in enumerate(
        zip(made.subplots(1, len(strides), squeeze=False)[0], strides, strict=True)
    ):
        show_image(ax, image)
        edges = np.arange(0, size + 1, stride) - 0.5
        strength = float(np.clip(stride / 20, 0.25, 0.7))
        ax.hlines(edges, -0.5, size - 0.5, color="white", lw=0.5, alpha=strength)
        ax.vlines(edges, -0.5, size - 0.5, color="white", lw=0.5, alpha=strength)
        corner = size // stride // 2 * stride - 0.5
        cell = Rectangle((corner, corner), stride, stride, color=COLORS[1], alpha=0.6, lw=0)
        ax.add_patch(cell)
        text = f"stride {stride}: {size // stride} by {size // stride} cells"
        if receptive_fields is not None:
            sees = receptive_fields[number]
            whole = sees >= size  # also where the cell lies off the middle
            low = -0.5 if whole else max(corner + (stride - sees) / 2, -0.5)
            high = size - 0.5 if whole else min(corner + (stride + sees) / 2, size - 0.5)
            ax.add_patch(
                Rectangle((low, low), high - low, high - low, fill=False, ec=COLORS[1], lw=2)
            )
            text += "\none cell sees " + ("the whole knee" if whole else f"{sees} by {sees} pixels")
        ax.set(xlim=(-0.5, size - 0.5), ylim=(size - 0.5, -0.5))
        ax.set_title(text)
    return made


@styled
def attention_map(
    image: np.ndarray,
    maps: Mapping[str, np.ndarray],
    *,
    title: str | None = "Where the model looks",
    note: str = "",
) -> Figure:
    """A radiograph and, beside it, maps laid over it; each map's range stands under it.

    Args:
        image: uint8 (height, width[, 1]).
        maps: title to a float map (h, w), stretched over its own range.
    """
    count = len(maps) + 1
    made = figure(title, note, WIDTH / max(count, 3) + 0.65, WIDTH * count / max(count, 3))
    axes = made.subplots(1, count, squeeze=False)[0]
    show_image(axes[0], image, "radiograph")
    for ax, (name, heat) in zip(axes[1:], maps.items(), strict=True):
        show_image(ax, overlay(image, heat), name)
        ax.set_xlabel(f"{np.min(heat):.2f} (gray) to {np.max(heat):.2f} (yellow)", fontsize=9)
    return made


@styled
def explanation_page(
    images: np.ndarray,
    maps: Mapping[str, np.ndarray],
    row_titles: Sequence[str] = (),
    *,
    title: str | None = "Where teacher and student look",
    note: str = "",
) -> Figure:
    """A row for each knee: the radiograph, then one column for each kind of map laid over it.

    Args:
        images: uint8 (n, height, width[, 1]).
        maps: column title (such as "teacher\\nGrad-CAM") to float maps (n, h, w).
        row_titles: n short texts, such as "KL 2\\nteacher KL 2\\nstudent KL 3".
    """
    rows = [
        [image, *(overlay(image, heat[k]) for heat in maps.values())]
        for k, image in enumerate(images)
    ]
    return grid(rows, row_titles, ["radiograph", *maps], title, note)


@styled
def soft_targets(
    probabilities: np.ndarray,
    temperatures: Sequence[float],
    names: Sequence[str],
    *,
    image: np.ndarray | None = None,
    truth: int | None = None,
    title: str | None = "What the teacher says about one knee, softened",
    note: str = "",
) -> Figure:
    """The teacher's probabilities for one knee at several temperatures (Hinton et al. 2015).

    Args:
        probabilities: float (temperatures, classes), rows sum to one.
        image: that knee, uint8 (height, width[, 1]).
        truth: the reader's grade, drawn in another colour.
    """
    count = len(temperatures) + (image is not None)
    made = figure(title, note, 2.9)
    axes = list(made.subplots(1, count, squeeze=False)[0])
    if image is not None:
        axes[0].set_anchor("S")
        show_image(axes.pop(0), image, None if truth is None else f"read {names[truth]}")
    colors = [COLORS[1] if k == truth else COLORS[0] for k in range(len(names))]
    for ax, temperature, row in zip(axes, temperatures, probabilities, strict=True):
        bars = ax.bar(range(len(names)), row, color=colors)
        ax.bar_label(bars, [f"{p:.2f}" for p in row], fontsize=8, padding=1)
        ax.set(title=f"T = {temperature:g}", ylim=(0, 1.15 * np.max(probabilities)), yticks=[])
        ax.set_xticks(range(len(names)), names, fontsize=8, rotation=90 * (count > 4))
        ax.spines["left"].set_visible(False)
    return made


@styled
def softmax_of_softmax(
    right: np.ndarray,
    wrong: np.ndarray,
    names: Sequence[str],
    *,
    title: str | None = "A softmax of a softmax says the same about every knee",
    note: str = "",
) -> Figure:
    """Soft targets from logits, and from probabilities taken for logits; a line a knee, of 20.

    Args:
        right: softmax(logits / T), float (n, classes) or (classes,), rows sum to one.
        wrong: softmax(softmax(logits) / T), the same shape.
    """
    made = figure(title, note, 3.3)
    panels = {"softmax(logits / T)": right, "softmax(softmax(logits) / T)": wrong}
    axes = made.subplots(1, 2, sharey=True)
    for ax, (name, rows) in zip(axes, panels.items(), strict=True):
        rows = np.atleast_2d(np.asarray(rows, float))
        shown = rows[:: max(1, len(rows) // 20)][:20]  # they may come sorted by class
        ax.axhline(1 / len(names), color=FAINT, ls="--", lw=1)
        ax.plot(shown.T, "-o", color=COLORS[0], lw=1, ms=3, alpha=0.4)
        entropy = -np.sum(rows * np.log2(np.maximum(rows, 1e-12)), axis=1).mean()
        ax.set_title(f"{name}\nentropy {entropy:.2f} of {np.log2(len(names)):.2f} bits")
        ax.set_xticks(range(len(names)), names)
        ax.set_ylim(0, 1.05 * max(np.max(right), np.max(wrong)))
    made.supxlabel("dashed: all classes alike, nothing known", fontsize=9, color=FAINT)
    axes[0].set_ylabel("probability")
    return made


@styled
def error_gallery(
    images: np.ndarray,
    truths: Sequence[int],
    grades: Sequence[int],
    probabilities: Sequence[float],
    names: Sequence[str],
    *,
    ncols: int = 5,
    title: str | None = "The worst errors",
    note: str = "",
) -> Figure:
    """Misgraded knees: what the reader said, what the model said and how sure it was (0 to 1)."""
    rows = zip(truths, grades, probabilities, strict=True)
    texts = [f"read {names[t]}\nmodel {names[g]} ({p:.0%})" for t, g, p in rows]
    return gallery(images, texts, ncols=ncols, title=title, note=note)
