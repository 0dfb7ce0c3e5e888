"""One page that joins what a run made: notebooks, report, figures and times, as RUN_DIR/index.html.

It is one file of plain HTML with its style inside: no script, no font and no picture from
elsewhere, so that it opens without a network. What is missing from the run is left out and said.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from urllib.parse import quote

from PIL import Image

from utils import runs

# Figures of report.json that the page shows: key, name, and whether lower is better.
SHOWN = (
    ("accuracy", "accuracy"),
    ("balanced_accuracy", "balanced accuracy"),
    ("qwk", "quadratic weighted kappa"),
    ("mae", "mean absolute error, in grades (lower is better)"),
)
NONE = "\N{EN DASH}"
FOLDERS = (*runs.FOLDERS.values(), "benchmarks")

STYLE = """
:root{color-scheme:light dark;--ink:#1d2733;--soft:#5a6675;--line:#d9dee5;--back:#fff;
--tint:#f3f6f9;--link:#0b5cad}
@media(prefers-color-scheme:dark){:root{--ink:#e6eaf0;--soft:#a3aebb;--line:#39424e;--back:#14181d;
--tint:#1d232b;--link:#7db7f5}}
*{box-sizing:border-box}
body{margin:0 auto;padding:1rem;max-width:66rem;font:1rem/1.5 system-ui,sans-serif;color:var(--ink);
background:var(--back);overflow-wrap:break-word}
h1{font-size:1.6rem;line-height:1.2;margin:.5rem 0}h2{font-size:1.2rem;margin:2rem 0 .5rem}
h3{font-size:1rem;margin:1.2rem 0 .4rem}
a{color:var(--link)}p{max-width:44rem}.soft{color:var(--soft)}
.note{background:var(--tint);border-left:4px solid #de8f05;padding:.5rem .8rem;margin:.8rem 0}
.wide{overflow-x:auto}
table{border-collapse:collapse;font-variant-numeric:tabular-nums;min-width:60%}
th,td{text-align:left;padding:.35rem .7rem .35rem 0;border-bottom:1px solid var(--line);
vertical-align:top}
thead th{color:var(--soft);font-weight:600}tbody th{font-weight:400}
.figures{display:flex;flex-wrap:wrap;gap:1.2rem}
figure{margin:0;min-width:0}figure img{width:100%}
figcaption{color:var(--soft);font-size:.9rem;margin-top:.3rem}
img{max-width:100%;height:auto;background:#fff;border-radius:4px;display:block}
@media(max-width:30rem){table{font-size:.85rem}th,td{padding-right:.4rem}}
details{border:1px solid var(--line);border-radius:4px;padding:.5rem .8rem;margin:.8rem 0}
summary{cursor:pointer}pre{overflow-x:auto;white-space:pre-wrap}.anchor-link{display:none}
"""


def build(run_dir: str | Path) -> Path:
    """Write RUN_DIR/index.html from what is in the run.

    Args:
        run_dir: the run's folder; notebooks, report and figures in it may be missing.

    Returns:
        The page.

    Raises:
        FileNotFoundError: there is no such folder.
    """
    run = Path(run_dir)
    if not run.is_dir():
        raise FileNotFoundError(f"{run} is no folder: run the series first (python -m utils run).")
    missing: list[str] = []
    report = read(run / "report" / "report.json", missing, "the report (notebook 06 writes it)")
    sections = [
        ("Results", results(report)),
        ("Notebooks and times", notebooks(run, missing)),
        ("Figures", figures(run, missing)),
        ("Files to take along", files(run, report, missing)),
        ("Made with", environment(report)),
    ]
    if missing:
        items = "".join(f"<li>{escape(text)}</li>" for text in missing)
        sections.append(("Not here", f"<ul>{items}</ul>"))
    body = "".join(f"<section><h2>{name}</h2>{part}</section>" for name, part in sections if part)
    name = escape(run.resolve().name)
    page = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width,initial-scale=1">'
        f'<link rel="icon" href="data:,"><title>Run {name}</title><style>{STYLE}</style></head>'
        f"<body><h1>Knee distillation: run “{name}”</h1>{about(report)}{body}</body></html>\n"
    )
    return runs.write_atomic(run / "index.html", lambda path: path.write_text(page, "utf-8"))


def read(path: Path, missing: list[str], what: str) -> dict:
    """A JSON object, or an empty one, with the reason noted."""
    try:
        found = runs.read_json(path)
        if isinstance(found, dict):
            return found
        missing.append(f"{what}: {path.name} holds no object")
    except runs.StageError:
        missing.append(what if not path.exists() else f"{what}: {path.name} is damaged")
    return {}


def link(run: Path, path: Path, text: str) -> str:
    """A link to a file of the run, relative to the page."""
    return f'<a href="{quote(path.relative_to(run).as_posix())}">{escape(text)}</a>'


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """An HTML table; cells are HTML already, the first of a row names it."""
    body = "".join(
        f'<tr><th scope="row">{first}</th>{"".join(f"<td>{cell}</td>" for cell in cells)}</tr>'
        for first, *cells in rows
    )
    head = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f'<div class="wide"><table>{inside}</table></div>'


def number(value: float | None, ends: Sequence[float] | None = None) -> str:
    """A figure and its 95 % interval as text."""
    if value is None:
        return NONE
    text = f"{value:.3f}"
    if ends and None not in ends:
        text += f' <span class="soft">({ends[0]:.3f} to {ends[1]:.3f})</span>'
    return text


def about(report: Mapping) -> str:
    """What the run was about, and a warning where its images are drawn."""
    dataset = report.get("dataset") or {}
    parts = []
    if dataset.get("name"):
        parts.append(f"<p>Data: {escape(str(dataset['name']))}.</p>")
    if dataset.get("synthetic"):
        parts.append(
            '<p class="note">These knees are <strong>synthetic</strong>: phantoms that the series '
            "draws to test itself. The figures say nothing about radiographs of people.</p>"
        )
    return "".join(parts)


def results(report: Mapping) -> str:
    """Every model's headline figures with intervals, and the target."""
    models = {name: model for name, model in (report.get("models") or {}).items() if model}
    if not models:
        return ""
    rows = [
        [name, *(number(m.get(key), m.get(f"{key}_ci95")) for m in models.values())]
        for key, name in SHOWN
        if any(m.get(key) is not None for m in models.values())
    ]
    for key, name, unit in (("parameters", "parameters", 1), ("bytes", "megabytes", 1e6)):
        values = [m.get(key) for m in models.values()]
        shown = [
            f"{v / unit:,.{0 if unit == 1 else 1}f}" if v is not None else NONE for v in values
        ]
        rows += [[name, *shown]] if any(v is not None for v in values) else []
    names = [name.replace("_", " ") for name in models]
    split = (report.get("evaluated") or {}).get("split", "test")
    return (
        table([f"on the {split} split", *names], rows)
        + '<p class="soft">In brackets: 95 % intervals.</p>'
        + target(report.get("target") or {}, models)
        + openings(report.get("test_openings"))
    )


def target(goal: Mapping, models: Mapping) -> str:
    """Whether the target was met, each model's figure beside it; nothing where it is not judged."""
    words = {True: "met", False: "not met"}
    said = [
        f"{who} {words[goal[f'{who}_met']]}: "
        + number(model.get("accuracy"), model.get("accuracy_ci95"))
        for who, model in models.items()
        if goal.get(f"{who}_met") in (True, False)
    ]
    return (
        f"<p>Target, an accuracy of {goal['accuracy']:.0%}: {'; '.join(said)}.</p>" if said else ""
    )


def openings(count: object) -> str:
    """How often the test split was opened."""
    count = len(count) if isinstance(count, list) else count
    if not isinstance(count, int):
        return ""
    return f"<p>The test split was opened {count} time{'s' * (count != 1)} in this run.</p>"


def notebooks(run: Path, missing: list[str]) -> str:
    """Each notebook of the series: how it ended, its minutes, its page; then any other page."""
    rows = []
    for name in runs.NOTEBOOKS:
        stage = runs.FOLDERS[name]
        saved = {}
        if (run / stage / "stage.json").exists():
            saved = read(run / stage / "stage.json", missing, f"what {name} noted")
        shown = executed(run, name)
        if not saved and not shown:
            missing.append(f"notebook {name}: it has not been run here")
            continue
        state = (
            "finished" if saved.get("finished") else escape(saved.get("stopped") or "unfinished")
        )
        minutes = f"{saved['seconds'] / 60:.1f}" if saved.get("seconds") is not None else NONE
        title = link(run, shown, name) if shown else escape(name)
        rows.append([title, state if saved else NONE, minutes])
        if not shown:
            missing.append(f"the executed notebook {name}: its stage was made outside this run")
    known = set(runs.NOTEBOOKS)
    others = sorted({p.stem for p in (run / "notebooks").glob("*.html")} - known)
    rows += [
        [link(run, executed(run, name), name), NONE, NONE] for name in others if "." not in name
    ]
    return table(["notebook", "state", "minutes"], rows) if rows else ""


def executed(run: Path, name: str) -> Path | None:
    """An executed notebook as HTML, or as it is where that failed."""
    for suffix in (".html", ".ipynb"):
        if (path := run / "notebooks" / f"{name}{suffix}").exists():
            return path
    return None


def figures(run: Path, missing: list[str]) -> str:
    """Every figure of every stage with its alternative text, in the order they were made."""
    parts = []
    for folder in FOLDERS:
        there = sorted((run / folder).glob("*.png"))
        if not there:
            continue
        known = {}
        if (run / folder / "figures.json").exists():
            known = read(run / folder / "figures.json", missing, f"the texts of {folder}'s figures")
        order = list(known)
        there.sort(key=lambda p: order.index(p.name) if p.name in known else len(order))
        pictures = "".join(picture(run, path, known.get(path.name)) for path in there)
        parts.append(f'<h3>{escape(folder)}</h3><div class="figures">{pictures}</div>')
    if not parts:
        missing.append("figures: no notebook has saved one yet")
        return ""
    return '<p class="soft">Each opens in full size.</p>' + "".join(parts)


def picture(run: Path, path: Path, text: str | None) -> str:
    """A figure with its text as alternative and caption."""
    alt = escape(text or f"Figure {path.stem.replace('_', ' ')}; no description was kept")
    with Image.open(path) as opened:
        width, height = opened.size
        dots = opened.info.get("dpi", (96, 96))[0]
    source = quote(path.relative_to(run).as_posix())
    inches = width / dots  # all in one scale, so that their letters are of one size
    image = f'<img src="{source}" alt="{alt}" width="{width}" height="{height}" loading="lazy">'
    return (
        f'<figure style="flex:0 1 {inches:.1f}in"><a href="{source}">{image}</a>'
        f"<figcaption>{alt}</figcaption></figure>"
    )


def files(run: Path, report: Mapping, missing: list[str]) -> str:
    """The models, their exports, predictions, and the model card to read."""
    wanted = (
        ("student/student.keras", "the student"),
        ("teacher/phase_3/teacher.keras", "the teacher"),
        ("report/predictions.csv", "every prediction, to recompute the figures from"),
        ("report/report.json", "the report's figures"),
        ("data/manifest.csv", "the split: every image and where it belongs"),
    )
    rows = []
    for name, what in wanted:
        if (run / name).exists():
            size = (run / name).stat().st_size
            rows.append([link(run, run / name, name), what, megabytes(size), "", ""])
        elif name != "report/report.json":  # said already
            missing.append(f"{what} ({name})")
    exports = {
        Path(row["file"]).name: row for row in report.get("exports") or [] if row.get("file")
    }
    for path in sorted((run / "report" / "exports").glob("*.tflite")):
        row = exports.get(path.name, {})
        speed = NONE if row.get("ms") is None else f"{row['ms']:.1f}"
        name = path.relative_to(run).as_posix()
        what = f"student as LiteRT, {row.get('name', path.stem)}"
        cells = [escape(what), megabytes(path.stat().st_size), number(row.get("accuracy")), speed]
        rows.append([link(run, path, name), *cells])
    listing = table(["file", "what it is", "MB", "accuracy", "ms an image"], rows) if rows else ""
    return listing + card(run, missing)


def megabytes(size: int) -> str:
    """Bytes as megabytes (10^6)."""
    return f"{size / 1e6:.2f}"


def card(run: Path, missing: list[str]) -> str:
    """The model card, folded, as HTML; its links lead from the page's folder."""
    path = run / "report" / "MODEL_CARD.md"
    if not path.exists():
        missing.append("the model card (report/MODEL_CARD.md)")
        return ""
    text = path.read_text(encoding="utf-8")
    try:
        from nbconvert.filters.markdown_mistune import markdown2html_mistune
    except Exception:  # nbconvert and mistune of different ages break in several ways
        inside = f"<pre>{escape(text)}</pre>"
    else:
        inside = re.sub(r"<(/?)h[1-6]", r"<\1h3", markdown2html_mistune(text))
        inside = re.sub(r'(href|src)="(?![a-z]+:|#|/)', r'\1="report/', inside)
    return f"<details><summary>Model card</summary>{inside}</details>"


def environment(report: Mapping) -> str:
    """Versions and machine."""
    found = report.get("environment") or {}
    versions = [f"{name} {version}" for name, version in (found.get("versions") or {}).items()]
    named = [("Python ", found.get("python"), ""), ("", found.get("processors"), " processors")]
    machine = [f"{before}{value}{after}" for before, value, after in named if value]
    text = ", ".join([*machine, *map(str, found.get("accelerators") or []), *versions])
    return f"<p>{escape(text)}.</p>" if text else ""
