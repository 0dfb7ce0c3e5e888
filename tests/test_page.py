"""The run's page and the model card: what they say, and that names from folders do nothing."""

import re
import shutil
import subprocess
from types import SimpleNamespace
from urllib.parse import unquote

import numpy as np
import pandas as pd
import pytest

from utils import metrics, page, plots, runs, settings

EVIL = "<img src=x onerror=alert(1)>"


def report(names, synthetic=False, gain=0.3, subject=settings.KNEES):
    """What 06 writes, from made-up answers: the distilled student is better by `gain`."""
    rng, classes = np.random.default_rng(0), len(names)
    labels, patients = rng.integers(classes, size=200), np.repeat(np.arange(100), 2)
    bootstrap = metrics.Bootstrap(patients, draws=100)

    def evaluate(right):
        hit = rng.random(200) < right
        given = np.where(hit, labels, rng.integers(classes, size=200))
        shares = np.full((200, classes), 0.2 / (classes - 1))
        shares[np.arange(200), given] = 0.8
        return metrics.Evaluation(labels, shares, bootstrap)

    found = {"teacher": 0.8, "student": 0.6, "labels_only": 0.6 - gain}
    found = {name: evaluate(right) for name, right in found.items()}
    gaps = []
    for second in ("teacher", "labels_only"):
        gap = metrics.difference(found["student"], found[second])
        gap |= {"first": "student", "second": second.replace("_", " "), "title": "accuracy"}
        gaps.append(gap | {"sentence": f"student minus {second}: {gap['difference']:+.3f}"})
    content = {"headline": "Accuracy on 200 test images of 100 patients.", "subject": subject}
    content |= {"synthetic": synthetic, "class_names": names, "split": "test", "images": 200}
    content |= {"patients": 100, "differences": gaps}
    content["models"] = {name: evaluation.summary() for name, evaluation in found.items()}
    return content | {"target": {"accuracy": 0.85, "met": {"teacher": False, "student": False}}}


ROW = {"file": "student_float16.tflite", "bytes": 2_570_000, "agreement": 0.993, "accuracy": 0.81}
ROW |= {"speed": 1.0, "runtime": "ai-edge-litert"}
DEPLOY = {"backbone": "MobileNetV3Small", "parameters": 1_234_567, "files": [ROW]}
DEPLOY["sentence"] = "student_float16.tflite is the smallest."


def make_run(run, content):
    """A finished run without training."""
    for notebook, folder in runs.STAGES.items():
        stage = {"finished": True, "stopped": None, "seconds": 90.0}
        runs.write_json(run / folder / "stage.json", stage)
        (run / "notebooks").mkdir(exist_ok=True)
        (run / "notebooks" / f"{notebook}.html").write_text("<!doctype html>")
    plots.save(plots.learning_curves({}), run / "report" / "evaluation" / "learning_curves.png")
    runs.write_json(run / "report" / "evaluation" / "report.json", content)
    runs.write_json(run / "report" / "deploy" / "deploy.json", DEPLOY)
    kept = {"kept": 0.789, "accuracy": 0.913, "ci95": [0.871, 0.954], "accuracy_of_all": 0.8}
    trust = {"coverage": 0.8, "temperature": {"student": 1.3}, "referral": {"student": kept}}
    runs.write_json(run / "report" / "trust" / "trust.json", trust)
    (run / "report" / "deploy" / "model_card.md").write_text("# Model card\n")
    (run / "report" / "deploy" / ROW["file"]).touch()
    return run


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    names = [f"KL {k}" for k in range(5)]
    folder = make_run(tmp_path_factory.mktemp("my runs") / "tiny #1", report(names))
    page.write(folder)
    return folder


def test_the_verdict_comes_first_and_the_rest_is_folded(run):
    text = (run / "index.html").read_text()
    order = ["Did distillation help", "Paired differences", "Who is graded as what", "<details"]
    places = [text.index(part) for part in order]
    assert places == sorted(places)
    words = " ".join(re.sub(r"<[^>]*>", " ", text).split())
    student = report([f"KL {k}" for k in range(5)])["models"]["student"]
    assert f"{student['accuracy']:.3f} ({student['ci95']['accuracy'][0]:.3f} to" in words
    assert "Did distillation help? Yes" in words
    assert "Is the target met? No" in words
    assert "Labels only KL 0 KL 1" in words and "A difference of 0.000" not in words
    assert "An interval without width" in words
    assert "0.913 (0.871 to 0.954)" in words
    assert "04 Teacher phase 3" in words and "teacher/phase_3/stage" not in words


def test_an_open_or_lost_comparison_is_said_and_synthetic_runs_are_not_judged(tmp_path):
    for gain, answer in {
        0.0: "Undecided: the interval includes 0",
        -0.3: "No: labels alone are",
    }.items():
        make_run(tmp_path, report(["a", "b", "c"], synthetic=True, gain=gain))
        text = page.write(tmp_path).read_text()
        assert answer in text and "Not judged on synthetic images" in text


def test_the_page_carries_its_figures_and_no_link_is_dead(run):
    text = (run / "index.html").read_text()
    assert not re.search("<(script|iframe|object)", text)
    ids, links = (re.findall(rf' (?:{name})="([^"]*)"', text) for name in ("id", "href|src"))
    for link in links:
        if link.startswith("#"):
            assert link[1:] in ids
        elif not link.startswith("data:"):
            assert (run / unquote(link)).is_file(), link
    images = re.findall(r'<img src="data:image/png[^>]* width="(\d+)" alt="([^"]*)"', text)
    assert [alt for _, alt in images] == ["learning curves"] and int(images[0][0]) >= 850
    assert sum(link.startswith("notebooks/") for link in links) == len(runs.STAGES)


def test_a_run_that_has_not_come_far_has_a_page_too(tmp_path):
    stage = {"finished": False, "stopped": EVIL, "seconds": 6.0}
    runs.write_json(tmp_path / "data" / "stage.json", stage)
    text = page.write(tmp_path).read_text()
    assert "01 Data" in text and "&lt;img" in text and "Did distillation help" not in text


def card(names, subject, synthetic=False, content=None):
    manifest = pd.DataFrame({"split": ["train", "test"], "grade": [0, 1]})
    dataset = SimpleNamespace(
        names_shown=names, subject=subject, synthetic=synthetic, ordered=True, name="photos",
        manifest=manifest, origin={"colour": True},
    )  # fmt: skip
    counts = {"train": [3] * len(names), "test": [1] * len(names)}
    about = {"image_size": 64, "temperature": 1.25, "refer_below": 0.5}
    content = content or report(names, synthetic, subject=subject)
    values = {"dataset": dataset, "counts": counts, "about": about, "report": content}
    return page.render("model_card.md.j2", shared={}, deploy=DEPLOY, **values)


def test_names_from_folders_are_escaped(tmp_path):
    names = [EVIL, "a|b", "c"]
    make_run(tmp_path, report(names, subject=EVIL))
    text = page.write(tmp_path).read_text()
    assert "<img src=x" not in text and "&lt;img src=x onerror=alert(1)&gt;" in text
    text = card(names, EVIL)
    assert "<img" not in text and "&lt;img" in text
    assert {line.count("|") for line in text.splitlines() if line.startswith("| t")} == {5}


def test_the_card_of_another_subject_knows_no_knees():
    text = card(["mild", "severe"], "leaf rust in five degrees").lower()
    assert "leaf rust in five degrees" in text
    assert not re.search("knee|radiograph|kellgren|osteoarthritis|medical|clinic|kl 0", text)


def test_the_card_holds_every_figure_with_its_interval():
    names = ["KL 0", "KL 1"]
    content = report(names)
    text = card(names, settings.KNEES, content=content)
    for model in content["models"].values():
        for name in metrics.TITLES.keys() & model["ci95"].keys():
            low, high = model["ci95"][name]
            assert f"{model[name]:.3f} ({low:.3f} to {high:.3f})" in text, name
        for value, (low, high) in zip(model["recall"], model["ci95"]["recall"], strict=True):
            assert f"{value:.3f} ({low:.3f} to {high:.3f})" in text
    assert "1,234,567" in text and "logits / 1.2500" in text and "Kellgren" in text
    assert "Synthetic data" in card(names, settings.KNEES, synthetic=True)


CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
PROBE = """<script>
addEventListener("load", () => {
  document.querySelectorAll("details").forEach(d => d.open = true);
  const root = document.documentElement, wide = root.scrollWidth - root.clientWidth;
  const texts = [...document.querySelectorAll("body *")].filter(e => e.textContent.trim());
  const least = Math.min(...texts.map(e => parseFloat(getComputedStyle(e).fontSize)));
  document.title = `wide ${wide} least ${least}`;
});
</script></body>"""


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here (Debian: apt-get install chromium)")
def test_a_phone_shows_the_page_without_sideways_scrolling(run, tmp_path):
    """A window of less than 500 px is not to be had, so a frame gives the phone's width."""
    text = (run / "index.html").read_text()
    (tmp_path / "probe.html").write_text(text.replace("</body>", PROBE))
    inner = '<iframe src="probe.html" style="border:0;width:390px"></iframe>'
    script = "<script>onload = () => document.title = frames[0].document.title</script>"
    (tmp_path / "frame.html").write_text(inner + script)
    options = "--headless --no-sandbox --disable-gpu --allow-file-access-from-files --dump-dom"
    options += f" --virtual-time-budget=10000 --user-data-dir={tmp_path}"
    command = [CHROMIUM, *options.split(), (tmp_path / "frame.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    title = re.search(r"<title>wide (-?\d+) least ([\d.]+)</title>", done.stdout)
    assert title, done.stdout[-500:]
    assert int(title[1]) <= 0 and float(title[2]) >= 11
