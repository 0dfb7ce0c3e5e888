"""How figures are kept and shown, as PNG with alternative text, and the table behind them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure
from PIL import Image

from utils import runs

DOTS = 120  # dots an inch of the files
SHOWN = 80  # dots an inch on the page
HEAVY = 14_000  # bytes above which a notebook carries a WebP: 20 pictures fit in its 400 kB


def save(fig: Figure, path: str | Path, alt: str) -> Path:
    """Write a figure as PNG and keep its alternative text in `figures.json` beside it.

    Args:
        path: ends in .png.
        alt: what the figure shows, for those who cannot see it.

    Raises:
        ValueError: no alternative text, or another ending.
    """
    path, alt = Path(path), " ".join(alt.split())
    if path.suffix != ".png":
        raise ValueError(f"A figure is saved as .png, not {path.name}: change the ending.")
    if not alt:
        raise ValueError(f"{path.name} has no alternative text: say in a sentence what it shows.")
    runs.write_atomic(path, lambda file: fig.savefig(file, dpi=DOTS, metadata={"Software": None}))
    register = path.with_name("figures.json")
    known = runs.read_json(register) if register.exists() else {}
    runs.write_json(register, known | {path.name: alt})
    return path


def embedded(path: str | Path, alt: str) -> str:
    """An HTML `<img>` that carries the picture itself, small enough for a notebook in git."""
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    size = [round(side * SHOWN / DOTS) for side in picture.size]
    kind, file = "png", io.BytesIO()
    # Few colours serve charts; their text stays sharp at the file's full size.
    picture.quantize(64).save(file, "png", optimize=True)
    if file.tell() > HEAVY:
        kind, file = "webp", io.BytesIO()
        smaller = picture.resize(size, Image.Resampling.LANCZOS)
        smaller.save(file, "webp", quality=55, method=6)
    data = base64.b64encode(file.getvalue()).decode()
    return (
        f'<img src="data:image/{kind};base64,{data}" alt="{html.escape(alt)}" '
        f'width="{size[0]}" style="max-width:100%;height:auto">'
    )


def show(fig: Figure, path: str | Path, alt: str) -> None:
    """Save a figure as `save` does and display it with its alternative text in a notebook."""
    from IPython.display import HTML, display

    alt = " ".join(alt.split())
    display(HTML(embedded(save(fig, path, alt), alt)))


def tabulate(
    summaries: Mapping[str, Mapping], shown: Mapping[str, str], names: Sequence[str] = ()
) -> pd.DataFrame:
    """Models' figures, as report.json keeps them, as a table for `metric_intervals` and its kin.

    Args:
        summaries: model to its figures, each with its `_ci95` as [low, high]; `binary` is looked
            into as well.
        shown: figure's key to the name it is shown under; keys that a model lacks are left out.
        names: class names, for figures that are lists, one entry a class.

    Returns:
        Columns model, metric, value, low, high; with `names` also class and count: of images of the
        class, for precision of images graded so.
    """
    rows = []
    for model, summary in summaries.items():
        summary = {**summary, **summary.get("binary", {})}
        for key, metric in shown.items():
            values, ends = summary.get(key), summary.get(f"{key}_ci95")
            if values is None:
                continue
            counts = summary.get("predicted" if key == "precision" else "support")
            classes = zip(names, values, ends, counts, strict=True) if names else ()
            for name, value, end, count in classes or [(None, values, ends, None)]:
                shown_as = model.replace("_", " ")
                rows.append([shown_as, metric, value, *(end or (None, None)), name, count])
    columns = ["model", "metric", "value", "low", "high", "class", "count"]
    table = pd.DataFrame(rows, columns=columns if rows else None)
    table = table.reindex(columns=columns if names else columns[:5])
    return table.astype(dict.fromkeys(["value", "low", "high"], float))
