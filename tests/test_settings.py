"""Parameters are checked before anything runs, and every finding is said at once."""

import pytest
import yaml

from utils import settings


def refused(values, notebook=None):
    with pytest.raises(settings.SettingsError) as caught:
        settings.validate(values, notebook)
    return str(caught.value)


def test_the_default_is_valid_and_complete():
    values = settings.validate({})
    assert set(settings.OWNER) <= set(values) and values["RUN_DIR"] == "runs/tiny"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"STUDENT_LERNING_RATE": 0.1}, ["STUDENT_LERNING_RATE", "STUDENT_LEARNING_RATE"]),
        ({"PHASE_1_EPOCHS": 0}, ["PHASE_1_EPOCHS", "02"]),
        ({"PHASE_1_EPOCHS": 2.5}, ["PHASE_1_EPOCHS"]),
        ({"FLIP": 1}, ["FLIP"]),
        ({"PHASE_3_LEARNING_RATE": "1e-4"}, ["PHASE_3_LEARNING_RATE", "1.0e-04"]),
        ({"PHASE_3_LEARNING_RATE": float("nan")}, ["PHASE_3_LEARNING_RATE"]),
        ({"TEACHER_IMAGE_SIZE": 100}, ["multiple of 32"]),
        ({"TEACHER_IMAGE_SIZE": 384}, ["STORED_SIZE = 384"]),
        ({"TEACHER_BACKBONE": "ResNet50"}, ["TEACHER_BACKBONE", "EfficientNetV2B0"]),
        ({"STUDENT_BACKBONE": "EfficientNetV2B0"}, ["shapes", "EfficientNetV2B0"]),
        ({"TEACHER_PRECISION": "float16"}, ["mixed_float16"]),
        ({"TEACHER_WEIGHTS": "no/such.h5"}, ["TEACHER_WEIGHTS", "such.h5"]),
        ({"DATA_DIR": "/no/such/folder"}, ["DATA_DIR", "/no/such/folder"]),
        ({"MORE_TEACHERS": ["/no/such/run"]}, ["MORE_TEACHERS", "/no/such/run"]),
        ({"VIEWS": 40, "STUDENT_EPOCHS": 10}, ["VIEWS", "never"]),
        ({"BATCH_SIZE": 33, "DEVICES": 2}, ["BATCH_SIZE", "DEVICES"]),
        ({"MAX_HOURS": 0.0}, ["MAX_HOURS"]),
        ({"JIT_COMPILE": "yes"}, ["JIT_COMPILE"]),
    ],
)
def test_a_bad_value_is_refused_by_name(values, words):
    message = refused(values)
    assert all(word in message for word in words), message


def test_all_findings_come_at_once():
    assert len(refused({"PHASE_1_EPOCHS": 0, "DROPOUT": 1.0, "SEEED": 1}).splitlines()) == 3


def test_a_notebook_leaves_alone_what_another_decides():
    own = settings.validate({"PHASE_2_EPOCHS": 5, "STUDENT_EPOCHS": 7}, "03_teacher_phase_2")
    assert own["PHASE_2_EPOCHS"] == 5 and "STUDENT_EPOCHS" not in own


def test_a_parameter_belongs_to_one_notebook():
    names = [n for model in settings.SERIES.values() for n in model.model_fields]
    own = [n for n in names if n not in settings.Shared.model_fields]
    assert len(own) == len(set(own))


@pytest.mark.parametrize("path", sorted(settings.PROFILES.glob("*.yaml")), ids=lambda p: p.stem)
def test_every_profile_is_valid(path):
    values = settings.validate(settings.load_profile(path.stem))
    assert values["RUN_DIR"] == f"runs/{path.stem}"


def test_a_profile_may_be_a_path_and_must_be_a_mapping(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text(yaml.safe_dump({"SEED": 3}))
    assert settings.load_profile(str(path)) == {"SEED": 3}
    for text, words in (("- a", "NAME: value"), ("a: [", "valid YAML")):
        path.write_text(text)
        with pytest.raises(settings.SettingsError, match=words):
            settings.load_profile(str(path))
    with pytest.raises(settings.SettingsError, match="tiny"):
        settings.load_profile("tini")


def test_paths_mean_the_callers(tmp_path, monkeypatch):
    (tmp_path / "images").mkdir()
    monkeypatch.chdir(tmp_path)
    assert settings.validate({"DATA_DIR": "images"})["DATA_DIR"] == str(tmp_path / "images")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert settings.validate({"DATA_DIR": "~/images"})["DATA_DIR"] == str(tmp_path / "images")
