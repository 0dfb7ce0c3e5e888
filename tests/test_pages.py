"""The page of a run: everything joined, nothing dead, in a file that needs no network."""

import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote

import pytest

from utils import pages, plots, runs

REPORT = {
    "dataset": {"name": "phantoms <drawn>", "synthetic": True},
    "models": {
        "teacher": {"parameters": 7_000_000, "bytes": 28e6, "accuracy": 0.712, "qwk": 0.83,
                    "accuracy_ci95": [0.69, 0.73], "qwk_ci95": [None, None], "mae": None},
        "student": {"parameters": 1_300_000, "bytes": 5.2e6, "accuracy": 0.66, "qwk": 0.81,
                    "accuracy_ci95": [0.63, 0.69]},
    },
    "target": {"accuracy": 0.85, "teacher_met": False, "student_met": False},
    "test_openings": 1,
    "exports": [{"name": "int8 weights", "file": "student_int8.tflite", "bytes": 1_490_000,
                 "accuracy": 0.655, "ms": 2.1}],
    "environment": {"python": "3.11.2", "processors": 2, "versions": {"keras": "3.15"}},
}  # fmt: skip
CARD = "# Model card\n\n[predictions](predictions.csv) and [source](https://example.org/a)\n"


def make_run(run: Path) -> Path:
    """A made-up finished run with a space in its name."""
    for number, (notebook, folder) in enumerate(runs.FOLDERS.items()):
        stage = {"finished": True, "stopped": None, "seconds": 60.0 * (number + 1)}
        runs.write_json(run / folder / "stage.json", stage)
        page = run / "notebooks" / f"{notebook}.html"
        page.parent.mkdir(parents=True, exist_ok=True)
        page.write_text("<!doctype html><title>x</title>")
        plots.save(plots.schedule([1, 3, 2]), run / folder / "curve.png", f'A "curve" of {folder}')
    (run / "notebooks" / "01_data.20250101-000000.html").write_text("set aside")
    (run / "notebooks" / "A2_benchmarks.html").write_text("<!doctype html><title>x</title>")
    shutil.copy(run / "report" / "curve.png", run / "report" / "no text.png")
    runs.write_json(run / "report" / "report.json", REPORT)
    (run / "report" / "MODEL_CARD.md").write_text(CARD)
    (run / "report" / "exports").mkdir()
    kept = ("report/predictions.csv", "report/exports/student_int8.tflite", "data/manifest.csv")
    for name in (*kept, "student/student.keras", "teacher/phase_3/teacher.keras"):
        (run / name).write_text("x")
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run with its page, in a folder whose name needs quoting."""
    folder = make_run(tmp_path_factory.mktemp("my runs") / "tiny #1")
    pages.build(folder)
    return folder


class Links(HTMLParser):
    """Collects what a page links to, its images, its tags and its text."""

    def __init__(self, text):
        super().__init__()
        self.links, self.images, self.tags, self.words = [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("href", "src") if attributes.get(name)]
        if tag == "img":
            self.images.append(attributes)

    def handle_data(self, data):
        self.words.append(data)


def dead(folder: Path, links) -> list[str]:
    local = [link for link in links if not re.match(r"[a-z]+:|#", link)]
    return [link for link in local if not (folder / unquote(link)).is_file()]


def test_page_joins_everything_without_a_dead_link(run):
    page = Links((run / "index.html").read_text())
    text = " ".join(page.words)
    assert dead(run, page.links) == []
    linked = {unquote(link) for link in page.links}
    assert {f"notebooks/{name}.html" for name in runs.NOTEBOOKS} <= linked
    assert {f"{folder}/curve.png" for folder in runs.FOLDERS.values()} <= linked
    assert {"notebooks/A2_benchmarks.html", "report/predictions.csv", "student/student.keras",
            "report/exports/student_int8.tflite", "https://example.org/a"} <= linked  # fmt: skip
    assert "notebooks/01_data.20250101-000000.html" not in linked
    for part in ("phantoms <drawn>", "synthetic", "0.712", "(0.690 to 0.730)", "not met",
                 "7,000,000", "opened 1 time in", "Model card", "keras 3.15", "6.0"):  # fmt: skip
        assert part in text, part
    assert "Not here" not in text


def test_a_dead_link_would_be_seen(run):
    assert dead(run, ["report/nothing.png", "#top", "https://example.org"]) == [
        "report/nothing.png"
    ]


def test_page_needs_no_network_and_no_script(run):
    page = Links((run / "index.html").read_text())
    assert not {"script", "iframe", "object"} & set(page.tags)
    assert all(not image["src"].startswith(("http", "//")) for image in page.images)
    assert "@import" not in (run / "index.html").read_text()


def test_every_image_has_alternative_text(run):
    images = Links((run / "index.html").read_text()).images
    assert len(images) == len(runs.FOLDERS) + 1
    assert all(image.get("alt") for image in images)
    texts = {unquote(image["src"]): image["alt"] for image in images}
    assert texts["report/curve.png"] == 'A "curve" of report'
    assert "no description was kept" in texts["report/no text.png"]


def test_missing_parts_are_left_out_and_said(tmp_path):
    runs.write_json(tmp_path / "data" / "stage.json",
                    {"finished": False, "stopped": "out of <time>", "seconds": 6.0})  # fmt: skip
    (tmp_path / "report").mkdir()
    (tmp_path / "report" / "report.json").write_text("{ half")
    page = Links(pages.build(tmp_path).read_text())
    text = " ".join(page.words)
    assert dead(tmp_path, page.links) == []
    assert "Results" not in text
    assert "Figures" not in page.words
    for part in ("out of <time>", "report.json is damaged", "06_evaluation", "MODEL_CARD.md"):
        assert part in text, part


def test_no_such_run(tmp_path):
    with pytest.raises(FileNotFoundError, match="run the series first"):
        pages.build(tmp_path / "nowhere")


# --- in a browser ------------------------------------------------------------------------------

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
# Says at the end of loading which images are broken and how far the page is wider than its window.
PROBE = """<script>
addEventListener("load", () => {
  const images = [...document.images];
  const broken = images.filter(i => !i.naturalWidth).map(i => i.getAttribute("src"));
  const root = document.documentElement, wide = root.scrollWidth - root.clientWidth;
  document.title = `probed ${images.length} broken [${broken}] wide ${wide}`;
});
</script></body>"""


def browse(page: Path, width: int, profile: Path) -> tuple[str, list[str]]:
    """Load a page in headless Chromium: its title at the end, and what its console said."""
    # A window of less than 500 px is not to be had, so a frame gives the phone's width.
    frame = page.with_name(f"frame{width}.html")
    inner = f'<iframe src="{page.name}" style="border:0;width:{width}px"></iframe>'
    script = "<script>onload = () => document.title = frames[0].document.title</script>"
    frame.write_text(inner + script)
    done = subprocess.run(
        [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files",
         f"--user-data-dir={profile}", "--enable-logging=stderr", "--virtual-time-budget=20000",
         "--dump-dom", frame.as_uri()],
        capture_output=True, text=True, timeout=120, check=True,
    )  # fmt: skip
    title = re.search("<title>(.*?)</title>", done.stdout)
    return title[1] if title else "", [x for x in done.stderr.splitlines() if "CONSOLE" in x]


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
@pytest.mark.skipif(sys.platform != "linux", reason="the browser is driven on Linux only")
def test_browser_shows_the_page_without_errors(run, tmp_path):
    text = (run / "index.html").read_text().replace(' loading="lazy"', "")
    page, damaged = run / "probe.html", run / "damaged.html"
    page.write_text(text.replace("</body>", PROBE))
    damaged.write_text(
        text.replace("report/curve.png", "report/gone.png").replace(
            "</body>", "<div style='width:900px'>x</div><script>gone()</script>" + PROBE
        )
    )
    count = len(runs.FOLDERS) + 1
    assert browse(page, 390, tmp_path) == (f"probed {count} broken [] wide 0", [])
    title, console = browse(damaged, 390, tmp_path)
    assert "[report/gone.png]" in title
    assert "wide 0" not in title
    assert any("gone is not defined" in line for line in console)
