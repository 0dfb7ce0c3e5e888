"""How large the house is, who imports whom, and how its notebooks are built."""

import ast
import importlib
import re
import statistics
import subprocess
import sys

import nbformat
import pytest

from utils import settings

ROOT = settings.ROOT
TABLE = re.findall(
    r"\w+",  # a module may import those that stand before it
    "settings files runs phantoms images folders kaggle audit data views layers models "
    "losses training distillation metrics explain export plots exercises page",
)
MODULES = {path.stem: path for path in sorted((ROOT / "utils").glob("[!_]*.py"))}
CLI = {f"cli.{path.stem}": path for path in sorted((ROOT / "utils" / "cli").glob("[!_]*.py"))}
TREES = {name: ast.parse(path.read_text()) for name, path in (MODULES | CLI).items()}
NOTEBOOKS = {path.stem: nbformat.read(path, 4) for path in ROOT.glob("notebooks/*.ipynb")}
KNOW_TENSORFLOW = {"views", "training", "explain", "export"}  # all else is pure Keras
PROFILES = {"tiny", "test", "cpu", "quick", "kaggle", "original"}
UNCLEAR = {"told", "plain", "some", "look", "drawing", "travelling", "leg", "recipe", "opening"}
# 3,600 and 3,100 lines for the rebuild, and 300 for the features that came after it.
LONGEST = {"utils": 3900, "imported by the notebooks": 3400, "imported by 02": 2300, "tests": 4500}


def lines(path):
    return len(path.read_text().splitlines())


def imports(tree):
    """The modules of `utils` that a tree imports anywhere, also inside functions."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module in ("utils", "utils.cli"):
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("utils."):
            found.add(node.module)
        elif isinstance(node, ast.Import):
            found |= {a.name for a in node.names if a.name.startswith("utils.")}
    return {name.removeprefix("utils.") for name in found} & TREES.keys()


def code_cells(book, tag=None):
    code = [cell for cell in book.cells if cell.cell_type == "code"]
    return [cell for cell in code if tag is None or tag in cell.metadata.get("tags", [])]


def tree_of(book):
    text = "\n".join(cell.source for cell in code_cells(book))
    return ast.parse(re.sub(r"(?m)^(\s*)[%!].*$", r"\1pass", text))


def reached(names):
    """These modules and all that they import, directly or not."""
    found = set(names)
    while more := set().union(*(imports(TREES[name]) for name in found)) - found:
        found |= more
    return found


def test_the_house_is_small(capsys):
    of = {name: imports(tree_of(book)) for name, book in NOTEBOOKS.items()}
    used = set().union(*of.values())
    counts = {
        "utils": sum(map(lines, (ROOT / "utils").rglob("*.py"))),
        "imported by the notebooks": sum(lines(MODULES[n]) for n in reached(used)),
        "imported by 02": sum(lines(MODULES[n]) for n in reached(of["02_teacher_phase_1"])),
        "tests": sum(map(lines, (ROOT / "tests").glob("*.py"))),
    }
    with capsys.disabled():
        print(f"\nlines: {', '.join(f'{name} {count:,}' for name, count in counts.items())}")
    assert [path.name for path in ROOT.glob("utils/**/*.py") if lines(path) > 300] == []
    assert {name: count for name, count in counts.items() if count > LONGEST[name]} == {}


def test_imports_go_upwards_only():
    assert set(MODULES) <= set(TABLE)
    for name in MODULES:
        assert imports(TREES[name]) <= set(TABLE[: TABLE.index(name)]), name
    for name, tree in (TREES | {n: tree_of(b) for n, b in NOTEBOOKS.items()}).items():
        assert not any(module.startswith("cli.") for module in imports(tree)), name


def test_no_private_name_of_a_library_is_read_or_overridden():
    ours = set()
    for tree in TREES.values():
        for node in ast.walk(tree):
            if isinstance(node, ast.FunctionDef | ast.ClassDef):
                ours.add(node.name)
            elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
                ours.add(node.id)
    for where, tree in (TREES | {n: tree_of(b) for n, b in NOTEBOOKS.items()}).items():
        for node in ast.walk(tree):
            name, of = "", None
            if isinstance(node, ast.Attribute):
                name, of = node.attr, getattr(node.value, "id", None)
            elif isinstance(node, ast.Call) and getattr(node.func, "id", "").endswith("attr"):
                name = str(getattr(node.args[1], "value", ""))
            elif isinstance(node, ast.ImportFrom | ast.Import):
                name = (re.findall(r"\b_\w+|keras\.src", ast.unparse(node)) or [""])[0]
            if re.match(r"_(?!_)|keras", name) and of not in ("self", "cls"):
                assert name in ours, f"{where}, line {node.lineno}: {name}"
    for name, tree in TREES.items():
        for node in (n for n in ast.walk(tree) if isinstance(n, ast.ClassDef) and name in MODULES):
            bases = getattr(importlib.import_module(f"utils.{name}"), node.name).__mro__[1:]
            private = [n.name for n in node.body if re.match(r"_(?!_)", getattr(n, "name", ""))]
            assert not [m for m in private for b in bases if m in vars(b)], node.name


def test_models_are_pure_keras_and_names_are_clear():
    for name, path in (MODULES | CLI).items():
        foreign = re.search(r"(?m)^\s*(import|from) tensorflow|\bLambda\b", path.read_text())
        assert not foreign or name in KNOW_TENSORFLOW or name.startswith("cli."), name
        for node in ast.walk(TREES[name]):
            if isinstance(node, ast.FunctionDef | ast.arg):
                assert getattr(node, "name", getattr(node, "arg", "")) not in UNCLEAR, name


@pytest.mark.parametrize("name", sorted(NOTEBOOKS))
def test_a_notebook_has_one_title_short_cells_and_a_kernel(name):
    book = NOTEBOOKS[name]
    nbformat.validate(book)
    assert book.metadata.kernelspec.name == "python3"
    text = "\n".join(cell.source for cell in book.cells if cell.cell_type == "markdown")
    assert len(re.findall(r"(?m)^# ", re.sub(r"(?ms)^```.*?^```", "", text))) == 1
    assert len(book.cells) <= 45 and len(code_cells(book, "parameters")) == 1
    lengths = sorted(len(re.findall(r"(?m)^.*\S", cell.source)) for cell in code_cells(book))
    if name.startswith("00"):  # one page: the set-up cell, and at most 100 lines in all others
        assert lengths.pop() <= 60 and sum(lengths) <= 100 and lengths[-1] <= 25
    else:
        assert lengths[-1] <= 25 and statistics.median(lengths) <= 6
    assert all("answer = None" in cell.source for cell in code_cells(book, "exercise"))
    assert not code_cells(book, "solution"), "a solution is Markdown"


@pytest.mark.parametrize(("name", "model"), (settings.SERIES | settings.APPENDIX).items())
def test_a_notebook_decides_its_parameters_with_the_defaults_of_settings(name, model):
    [cell] = code_cells(NOTEBOOKS[name], "parameters")
    found = {}
    for node in ast.parse(cell.source).body:
        target = node.target if isinstance(node, ast.AnnAssign) else node.targets[0]
        assert node.lineno == node.end_lineno, "one line each: `kaggle` rewrites them"
        found[target.id] = ast.literal_eval(node.value)
    own = [field for field in model.model_fields if field not in settings.Shared.model_fields]
    assert [field for field in found if field in own] == own
    assert set(found) - set(own) <= set(settings.Shared.model_fields) and "RUN_DIR" in found
    defaults = model().model_dump()
    for field, value in found.items():
        assert (value, type(value)) == (defaults[field], type(defaults[field])), field


def test_the_notebooks_begin_alike():
    starts = {}
    for name, book in NOTEBOOKS.items():
        if imports(tree_of(book)) and not name.startswith(("00", "A1")):  # which need no code
            [cell] = [c for c in code_cells(book) if "KAGGLE_INPUT_ROOT" in c.source]
            starts.setdefault(cell.source, []).append(name)
    assert len(starts) == 1, list(starts.values())
    for name in ("01_data", "02_teacher_phase_1", "05_distillation"):
        code = "\n".join(cell.source for cell in code_cells(NOTEBOOKS[name]))
        assert 0 < code.find("kaggle.preflight(globals()") < code.find("open_stage("), name


def test_profiles_are_complete():
    assert {path.stem for path in settings.PROFILES.glob("*.yaml")} == PROFILES
    for name in PROFILES:
        values, text = settings.load_profile(name), (settings.PROFILES / f"{name}.yaml").read_text()
        assert settings.validate(values)["RUN_DIR"] == f"runs/{name}"
        assert len(re.findall(r"^\w+:", text, re.M)) == len(values), f"{name}: a name twice"
        assert "GPU hours" in text, f"{name}: what a run costs"


@pytest.mark.slow
def test_outputs_that_are_tagged_for_it_come_out_again():
    command = [sys.executable, "-m", "pytest", "-q", "--nbval-lax", "--nbval-cell-timeout=3600"]
    command += ["-p", "no:cacheprovider", "--override-ini=addopts="]
    paths = [f"notebooks/{name}.ipynb" for name in [*settings.SERIES, "A1_mixed_precision"]]
    done = subprocess.run([*command, *paths], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-3000:]
