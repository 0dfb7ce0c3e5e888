"""The look that all figures share."""

from __future__ import annotations

import functools
import textwrap
from collections.abc import Callable

import matplotlib
import seaborn as sns
from matplotlib.figure import Figure

WIDTH = 9.0  # inches, about a notebook's column
COLORS = sns.color_palette("colorblind")
MARKERS = "osD^vP"
INK, FAINT = "#333333", "#8c8c8c"
HEAT = matplotlib.colormaps["cividis"]
STYLE = {
    "font.size": 10,
    "axes.titlesize": 10,
    "axes.labelsize": 10,
    "figure.titlesize": 12,
    "legend.frameon": False,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": FAINT,
    "axes.axisbelow": True,
    "grid.color": "#e4e4e4",
    "text.color": INK,
    "axes.labelcolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
}


def styled(draw: Callable[..., Figure]) -> Callable[..., Figure]:
    """Draw under the series' style and leave matplotlib's own settings alone."""

    @functools.wraps(draw)
    def wrapper(*args, **kwargs):
        with matplotlib.rc_context(STYLE):
            return draw(*args, **kwargs)

    return wrapper


def figure(title: str | None, note: str, height: float, width: float = WIDTH) -> Figure:
    """An empty figure, in inches, titled "title (note)", on as many lines as its width needs."""
    made = Figure(figsize=(width, height), layout="constrained")
    text = " ".join(part for part in (title, f"({note})" if note else "") if part)
    if text:
        lines = [textwrap.fill(line, int(9 * width)) for line in text.splitlines()]
        made.suptitle("\n".join(lines), fontweight="bold")
    return made
