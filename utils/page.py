"""What a run has to show: RUN_DIR/index.html and the model card, from jinja2 templates.

The page is one file with its style and figures inside, without scripts. Names are escaped in both.
"""

import base64
from pathlib import Path

import jinja2
from PIL import Image

from utils import metrics, runs, settings


def render(template: str, **values) -> str:
    """Fill a template of `utils/templates`; a value that is missing is empty, and so false."""
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent / "templates"),
        undefined=jinja2.ChainableUndefined,
        autoescape=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["figure"] = figure
    known = {"KNEES": settings.KNEES, "titles": metrics.TITLES}
    return environment.get_template(template).render(**known, **values)


def figure(value: float | None, interval=None) -> str:
    """A value and its 95 % interval, as "0.712 (0.690 to 0.734)"; a dash for None."""
    if value is None:
        return "\N{EN DASH}"
    between = "" if not interval or None in interval else " ({:.3f} to {:.3f})".format(*interval)
    return f"{value:.3f}{between}"


def write(run: Path) -> Path:
    """Write RUN_DIR/index.html from what is in the run; what is missing is left out."""
    lessons = []
    for notebook, folder in runs.STAGES.items():
        pages = (run / f"notebooks/{notebook}.{suffix}" for suffix in ("html", "ipynb"))
        lesson = {"notebook": notebook, "stage": runs.read_json(run / folder / "stage.json", {})}
        lesson["page"] = next((page.name for page in pages if page.exists()), None)
        lesson["figures"] = [_picture(path) for path in sorted((run / folder).glob("*.png"))]
        lessons.append(lesson)
    kinds = ("evaluation/report", "trust/trust", "deploy/deploy")
    found = {kind.split("/")[1]: runs.read_json(run / f"report/{kind}.json", {}) for kind in kinds}
    card = run / "report/deploy/model_card.md"
    found["card"] = card.read_text(encoding="utf-8") if card.exists() else ""
    text = render("page.html.j2", run=run, lessons=lessons, **found)
    return runs.write_atomic(run / "index.html", lambda path: path.write_text(text, "utf-8"))


def _picture(path: Path) -> dict:
    """A figure to stand in the page at 100 px an inch, where text of 8 points is 11 px high."""
    with Image.open(path) as image:
        width = round(image.width * 100 / image.info.get("dpi", (100, 100))[0])
    source = f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"
    return {"src": source, "width": width, "text": path.stem.replace("_", " ")}
