"""Parameters: what the notebooks declare, and what is refused before anything runs."""

import ast
import re

import nbformat
import pytest
import yaml

from utils import parameters
from utils.parameters import ParameterError

KNOWN = parameters.defaults()
FREE = {"DATA_DIR"}  # any text: whether the folder is there is asked by who looks into it


def test_every_name_stands_in_one_notebook_but_the_shared_ones():
    owners = {}
    for notebook, own in parameters.declared().items():
        for name in own:
            owners.setdefault(name, []).append(notebook)
    assert {n for n, where in owners.items() if len(where) > 1} == set(parameters.SHARED)


def test_shared_names_mean_the_same_everywhere():
    for name in parameters.SHARED:
        declared = [own[name] for own in parameters.declared().values() if name in own]
        assert declared and len(set(map(str, declared))) == 1


@pytest.mark.parametrize("name", sorted(KNOWN))
def test_every_parameter_has_a_rule_and_keeps_it(name):
    rules = [rule for pattern, rule in parameters.RULES.items() if re.fullmatch(pattern, name)]
    assert rules or parameters.TYPES[name] == ("bool",) or name in FREE, "no rule for its values"
    assert parameters.fault_of(name, KNOWN[name]) is None
    assert not parameters.accepts(name, object())


def test_the_notebooks_declare_every_name_and_annotate_it_rightly():
    assert set(KNOWN) == set(parameters.TYPES)
    for notebook in parameters.NOTEBOOKS:
        cell = parameters.parameter_cell(parameters.ROOT / "notebooks" / f"{notebook}.ipynb")
        for node in ast.parse(cell).body:
            if isinstance(node, ast.AnnAssign):
                kinds = tuple(ast.unparse(node.annotation).split(" | "))
                assert kinds == parameters.TYPES[node.target.id]


def test_what_a_saved_notebook_makes_up_is_refused_all_the_same(tmp_path):
    (tmp_path / "notebooks").mkdir()
    path = tmp_path / "notebooks" / "05_distillation.ipynb"

    def declared(line):
        cell = nbformat.v4.new_code_cell(line, metadata={"tags": ["parameters"]})
        path.write_text(nbformat.writes(nbformat.v4.new_notebook(cells=[cell])))
        return parameters.declared(tmp_path)["05_distillation"]

    assert declared("T = 8.0\nVIEWS = 4\nx = [1][0]\nfor i in x: pass") == {"VIEWS": 4}
    for line, said in {
        "TEMPERATUR = 8.0": r"TEMPERATUR is no .* Did you mean TEMPERATURE\?",
        "VIEWS = 4\nVIEWS += 1": "VIEWS \\+= 1 is an expression",
        "HARD_WEIGHT = 1 / 3": "HARD_WEIGHT = 1 / 3 is an expression: write the value itself",
        "VIEWS = VIEWS": "VIEWS = VIEWS is an expression",
        "VIEWS = ": "cell of parameters: invalid syntax",
    }.items():
        with pytest.raises(ParameterError, match=rf"05_distillation\.ipynb, .*{said}"):
            declared(line)


def test_every_rule_has_a_parameter():
    for pattern in parameters.RULES:
        assert any(re.fullmatch(pattern, name) for name in KNOWN), pattern


# One value just outside for every rule; what is inside is shown by the defaults and the profiles.
@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("TEACHER_IMAGE_SIZE", [0, -32, 48, 2048]),
        ("STUDENT_IMAGE_SIZE", [16]),
        ("STORED_SIZE", [31]),
        ("PHANTOM_PATIENTS", [0]),
        ("PHASE_1_EPOCHS", [0, -1]),
        ("STUDENT_EPOCHS", [0]),
        ("STUDENT_HEAD_EPOCHS", [-1]),
        ("WARMUP_EPOCHS", [-1]),
        ("PHASE_2_LEARNING_RATE", [0.0, -1e-3, 1.5]),
        ("BATCH_SIZE", [0]),
        ("STUDENT_BATCH_SIZE", [0]),
        ("ACCUMULATION", [0]),
        ("DEVICES", [-1]),
        ("MAX_HOURS", [0, -1.0]),
        ("JIT_COMPILE", ["on"]),
        ("TEACHER_PRECISION", ["float16"]),
        ("STUDENT_BACKBONE", ["ResNet50"]),
        ("BALANCE", ["both"]),
        ("VAL_FRACTION", [0.0, 0.6]),
        ("DROPOUT", [1.0, -0.1]),
        ("CUTOUT", [1.0]),
        ("ROTATION", [181.0]),
        ("LABEL_SOFTENING", [-0.1]),
        ("STUDENT_LABEL_SOFTENING", [6.0]),
        ("FOCAL_GAMMA", [-1.0]),
        ("RESTARTS", [-1]),
        ("UNFREEZE", [0.0, 1.1]),
        ("TEMPERATURE", [0.0]),
        ("HARD_WEIGHT", [-0.1, 1.1]),
        ("VIEWS", [0]),
        ("BOOTSTRAP", [99]),
        ("POSITIVE_FROM", [0]),
        ("COVERAGE", [0.0]),
        ("LEAK_IMAGES", [0]),
        ("TEST_VIEWS", [0]),
        ("DECISION", ["median"]),
        ("TARGET_ACCURACY", [85.0]),
        ("SEED", [-1]),
        ("RUN_DIR", ["", "  "]),
        ("TEACHER_WEIGHTS", ["", "nowhere.h5"]),
    ],
)
def test_values_out_of_range_are_refused_by_name(name, bad):
    for value in bad:
        with pytest.raises(ParameterError, match=rf"{name} = .* must be ."):
            parameters.check({name: value})


@pytest.mark.parametrize(
    ("name", "bad"),
    [
        ("SEED", [1.0, "1", True, None]),
        ("FLIP", [1, "yes"]),
        ("DROPOUT", ["0.5", False]),
        ("RUN_DIR", [1]),
        ("MAX_HOURS", ["2"]),
        ("JIT_COMPILE", [1]),
    ],
)
def test_values_of_another_type_are_refused(name, bad):
    for value in bad:
        with pytest.raises(ParameterError, match=rf"{name} = .* is \w+, wanted "):
            parameters.check({name: value})


def test_what_is_allowed_beside_the_default():
    values = {"MAX_HOURS": None, "JIT_COMPILE": True, "DROPOUT": 0, "ROTATION": 10, "MAX_HOURS": 2}  # noqa: F601
    assert parameters.check(values) == values
    assert parameters.check({"JIT_COMPILE": False, "MAX_HOURS": None})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_numbers_that_are_not_finite_are_refused(value):
    for name, types in parameters.TYPES.items():
        if "float" in types:
            with pytest.raises(ParameterError, match=rf"{name} = .* is not a finite number"):
                parameters.check({name: value})


def test_a_weights_file_may_be_named(tmp_path, monkeypatch):
    (tmp_path / "x.weights.h5").write_bytes(b"")
    parameters.check({"TEACHER_WEIGHTS": str(tmp_path / "x.weights.h5")})
    monkeypatch.chdir(tmp_path)
    parameters.check({"STUDENT_WEIGHTS": "x.weights.h5"})


def test_unknown_names_are_refused_with_the_nearest_one():
    with pytest.raises(ParameterError, match="Did you mean PHASE_1_EPOCHS"):
        parameters.check({"PHASE_1_EPOCH": 3})


def test_many_faults_fit_one_screen():
    with pytest.raises(ParameterError) as caught:
        parameters.check({f"NOTHING_{i}": i for i in range(50)})
    lines = str(caught.value).splitlines()
    assert len(lines) == 11 and lines[-1] == "… and 40 more"


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "1.5e4", "8e4", "-1e-4"])
def test_numbers_that_yaml_takes_for_text_come_with_the_cure(text):
    value = yaml.safe_load(text)
    assert isinstance(value, str), "YAML has changed: the hint is no longer needed"
    with pytest.raises(ParameterError) as caught:
        parameters.check({"PHASE_1_LEARNING_RATE": value})
    cure = str(caught.value).split(": ")[-1].rstrip(".")
    assert yaml.safe_load(cure) == float(text)


def test_other_text_gets_no_such_hint():
    assert parameters.as_yaml_number("fast") is None
    assert parameters.as_yaml_number(1e-4) is None


@pytest.mark.parametrize(
    ("notebook", "settings", "said"),
    [
        (
            "02_teacher_phase_1",
            {"TEACHER_IMAGE_SIZE": 384, "STORED_SIZE": 224},
            "notebook 01 stored 224 px.*STORED_SIZE = 384",
        ),
        (
            "05_distillation",
            {"STUDENT_IMAGE_SIZE": 96, "STORED_SIZE": 64},
            "STUDENT_IMAGE_SIZE = 96",
        ),
        (
            "05_distillation",
            {"VIEWS": 8, "STUDENT_HEAD_EPOCHS": 1, "STUDENT_EPOCHS": 6},
            "VIEWS to 7 or less",
        ),
    ],
)
def test_values_that_do_not_go_together_are_refused(notebook, settings, said):
    good = {"VIEWS": 1, "STUDENT_HEAD_EPOCHS": 0, "STUDENT_EPOCHS": 1}
    parameters.check_together(notebook, good | {"STORED_SIZE": 384, "TEACHER_IMAGE_SIZE": 384})
    with pytest.raises(ParameterError, match=said):
        parameters.check_together(notebook, good | settings)


@pytest.mark.parametrize("positive_from", [3, 7])
def test_a_question_that_all_images_answer_alike_is_refused(positive_from):
    asked = {"POSITIVE_FROM": positive_from}
    with pytest.raises(ParameterError, match=rf"{positive_from} .* 0 to 2: .* 1 to 2"):
        parameters.check_question(asked, 3)
    parameters.check_question(asked, positive_from + 1)
    parameters.check_question(asked, None)
    parameters.check_question({}, 3)


def test_a_series_is_checked_with_what_its_notebooks_say(tmp_path):
    notebooks = tmp_path / "notebooks"
    notebooks.mkdir()
    for name in parameters.NOTEBOOKS:
        source = parameters.ROOT / "notebooks" / f"{name}.ipynb"
        (notebooks / source.name).write_bytes(source.read_bytes())
    assert parameters.settings({"SEED": 3}, tmp_path)["SEED"] == 3
    six = notebooks / "06_evaluation.ipynb"
    text = six.read_text(encoding="utf-8")
    for old, new, said in [
        ("BOOTSTRAP = 2000", "BOOTSTRAP = 20", "BOOTSTRAP = 20 must be at least 100"),
        ("COVERAGE = 0.8", "x = 0.8", "No notebook sets COVERAGE"),
        ("COVERAGE = 0.8", "COVERAG = 0.8", "Did you mean COVERAGE"),
    ]:
        assert text.count(old) == 1
        six.write_text(text.replace(old, new), encoding="utf-8")
        with pytest.raises(ParameterError, match=said):
            parameters.settings({}, tmp_path)


# --- reading


def test_cells_are_read_without_being_run():
    read = parameters.read_cell(
        'MAX_HOURS: float | None = None\nSEED = -1\nRUN_DIR = "x"  # a comment\nimport os\n'
        'VIEWS: int\nprint("never")\nother = 1 + 1',
        parameters.TYPES,
    )
    assert parameters.read_cell("OTHER = 1") == {"OTHER": 1}
    assert read == {"MAX_HOURS": None, "SEED": -1, "RUN_DIR": "x"}
    with pytest.raises(ValueError, match="is an expression"):
        parameters.read_cell("SEED = 1 + len('x')")


@pytest.mark.parametrize("cells", [0, 2])
def test_a_notebook_has_exactly_one_parameter_cell(tmp_path, cells):
    sources = [nbformat.v4.new_code_cell("A = 1") for _ in range(cells)]
    notebook = nbformat.v4.new_notebook(cells=sources)
    for cell in notebook.cells:
        cell["metadata"]["tags"] = ["parameters"]
    path = tmp_path / "x.ipynb"
    path.write_text(nbformat.writes(notebook))
    with pytest.raises(ParameterError, match=f"{cells} cells tagged 'parameters', not one"):
        parameters.parameter_cell(path)


def test_what_is_no_notebook_is_named(tmp_path):
    (tmp_path / "x.ipynb").write_text("{")
    with pytest.raises(ParameterError, match=r"x\.ipynb cannot be read as a notebook"):
        parameters.parameter_cell(tmp_path / "x.ipynb")


def test_notebooks_that_are_not_there_declare_nothing(tmp_path):
    assert parameters.declared(tmp_path) == {}


@pytest.mark.parametrize(
    ("content", "said"), [("- 1\n- 2\n", "not a list"), ("A: [1", "valid YAML"), ("x\xff", "valid")]
)
def test_a_profile_that_is_none_is_refused(tmp_path, content, said):
    (tmp_path / "x.yaml").write_text(content, encoding="latin-1")
    with pytest.raises(ParameterError, match=said):
        parameters.load_profile(str(tmp_path / "x.yaml"))


def test_profiles_are_found_by_name_or_path(tmp_path):
    assert parameters.load_profile("tiny")["RUN_DIR"] == "runs/tiny"
    (tmp_path / "empty.yaml").write_text("# nothing\n")
    assert parameters.load_profile(str(tmp_path / "empty.yaml")) == {}
    with pytest.raises(ParameterError, match=r"No profile 'x'.*kaggle.*tiny"):
        parameters.load_profile("x")


def test_parameters_need_no_tensorflow():
    imported = {
        name.name.split(".")[0]
        for module in ("parameters", "runs", "files")
        for node in ast.walk(ast.parse((parameters.ROOT / f"utils/{module}.py").read_text()))
        if isinstance(node, ast.Import)
        for name in node.names
    }
    assert not imported & {"tensorflow", "keras", "jax"}
