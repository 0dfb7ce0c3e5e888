"""The folders for Kaggle and their push: the real client, against a stand-in for its network."""

import io
import json
import re
import shutil
import sys
from pathlib import Path

import keras
import pytest
import requests

from utils import cli, kaggle, models, runs, settings
from utils.cli import kaggle as command_line

PREFIX, DATA = "jane/knee-distillation-", "shashwatwork/knee-osteoarthritis-dataset-with-severity"
CODE, WEIGHTS = f"{PREFIX}code", f"{PREFIX}00-weights"
KERNELS = ["00_weights", *settings.SERIES]
STATUS, SAVE, OUTPUT = "GetKernelSessionStatus", "SaveKernel", "ListKernelSessionOutput"
RUNNING, COMPLETE, UNPACKED = ({"status": word} for word in ("RUNNING", "COMPLETE", "READY"))
PROFILE = {"TEACHER_WEIGHTS": "imagenet", "STUDENT_WEIGHTS": "imagenet", "PHASE_1_EPOCHS": 2}


def command(*arguments):
    return cli.main(["kaggle", "--user", "jane", "--data", DATA, *map(str, arguments)])


def saved(**found):
    return [{"versionNumber": 7, "url": "u", "ref": "r"} | found]


def results(name, after=None):
    return {"files": [{"url": "https://files.test/x", "fileName": name}], "nextPageToken": after}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Everything generated for user jane from a profile with ImageNet weights."""
    top = tmp_path_factory.mktemp("kaggle")
    (top / "mine.yaml").write_text("\n".join(f"{name}: {PROFILE[name]}" for name in PROFILE))
    assert command("--profile", top / "mine.yaml", "--out", top / "up") == 0
    return top / "up"


class Server:
    """Kaggle's end: answers by the first rule that fits, a list's replies one after another."""

    def __init__(self):
        self.sent, self.rules, self.counts = [], [], {}
        self.usual = [
            ("GetDatasetStatus", [404, 404, UNPACKED]),
            ("GetDataset ", [{"currentVersionNumber": 1}]),
            ("CreateDataset", [{"status": "ok", "url": "u", "ref": "r"}]),
            (SAVE, saved()),
            (STATUS, [{"status": "QUEUED"}, RUNNING, COMPLETE]),
            (OUTPUT, [results("runs/mine/index.html"), results("FINISHED")]),
        ]

    def send(self, request, **named):
        response, call = requests.Response(), request.url.rsplit("/", 1)[1]
        response.status_code, response.request, response.url = 200, request, request.url
        response.headers["Content-Type"] = "application/json"
        if request.url.startswith("https://files.test/"):
            response.raw = io.BytesIO(b"<p>results</p>")
            return response
        if request.url.startswith("https://upload.test/"):
            reply = {}
        else:
            body = json.loads(request.body)
            self.sent.append((call, body))
            reply = self.reply(call, body)
        if isinstance(reply, Exception):
            raise reply
        if isinstance(reply, int):
            response.status_code, reply = reply, {}
        response._content = json.dumps(reply).encode()
        return response

    def reply(self, call, body):
        if call == "StartBlobUpload":
            return {"token": body["name"], "createUrl": f"https://upload.test/{body['name']}"}
        text = f"{call} {json.dumps(body)[-400:]} {body.get('slug')}"
        for pattern, replies in [*self.rules, *self.usual]:
            if re.search(pattern, text):
                kernel = re.search(r'"(?:kernelSlug|slug)": "([^"]*)"', text)
                key = (pattern, kernel and kernel[1])
                self.counts[key] = number = self.counts.get(key, -1) + 1
                return replies[min(number, len(replies) - 1)]
        raise AssertionError(f"no reply to {text}")


@pytest.fixture
def server(monkeypatch, tmp_path):
    """The published client, logged in as jane; its network is the returned server."""
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("KAGGLE_USERNAME", "jane")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    client = pytest.importorskip("kaggle", reason="the kaggle client is not installed")
    monkeypatch.setattr(client, "api", type(client.api)())
    client.api.authenticate()
    server = Server()
    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", server.send)
    monkeypatch.setattr(command_line, "POLL", 0)
    return server


@pytest.fixture
def pushes(folder, server, tmp_path):
    """Push a copy of the folders with rules over the usual replies: (status, what was pushed)."""
    shutil.copytree(folder, tmp_path / "up")

    def run(*rules, what="notebooks"):
        server.rules, server.counts, server.sent = list(rules), {}, []
        arguments = ["--profile", folder.parent / "mine.yaml", "--push", what]
        status = command(*arguments, "--out", tmp_path / "up")
        slugs = [body["slug"][len(PREFIX) :] for call, body in server.sent if call == SAVE]
        return status, [slug.replace("-", "_") for slug in slugs]

    return run


def test_all_is_pushed_in_order_each_waited_for_and_nothing_twice(pushes, server, tmp_path, capsys):
    pages = [results("runs/mine/index.html", "2"), results("runs/mine/report/a.json", "3")]
    assert pushes((OUTPUT, [*pages, results("runs/mine/data/images.npy")])) == (0, KERNELS)
    calls = [call for call, _ in server.sent]
    assert calls.index("CreateDataset") < calls.index(SAVE) and "CreateDatasetVersion" not in calls
    order = [call for call in calls if call in (SAVE, STATUS)]
    assert order == [SAVE, STATUS, STATUS, STATUS] * len(KERNELS)
    assert {body["versionLabel"] for call, body in server.sent if call == STATUS} == {"v7"}
    assert [b.get("pageToken") for call, b in server.sent if call == OUTPUT] == ["", "2", "3"]
    there = tmp_path / "up/results/runs/mine"
    assert {path.name for path in there.rglob("*.*")} == {"index.html", "a.json"}
    code = next(body for call, body in server.sent if call == "CreateDataset")
    assert code["isPrivate"] is True and code["licenseName"] == "apache-2.0"
    assert {"utils.zip", "notebooks.zip"} <= {file["token"] for file in code["files"]}
    assert pushes() == (0, []) and {call for call, _ in server.sent} == {OUTPUT}
    sys.modules["kaggle"].api.config_values = {"username": "joe"}
    assert pushes() == (1, []) and "you are joe" in capsys.readouterr().err


@pytest.mark.parametrize("kernel", [*KERNELS, "series"])
def test_what_the_client_asks_for(folder, server, kernel):
    import kaggle as client

    client.api.kernels_push(str(folder / kernel))
    [(_, body)] = server.sent
    number, slug = kernel[:2], kernel.replace("_", "-")
    gpu, weights = number in "02 03 04 05 06 07 series", number in ("02", "05", "se")
    before = list(settings.SERIES)[int(number) - 2].replace("_", "-") if "01" < number < "a" else ""
    attached = [PREFIX + before] * bool(before) + [WEIGHTS] * weights
    datasets = [CODE] * (number != "00") + [DATA] * (number in ("01", "se"))
    assert body["enableInternet"] is (number == "00") and body["isPrivate"] is True
    machine = (True, "NvidiaTeslaT4") if gpu else (False, None)
    assert (body["enableGpu"], body.get("machineShape")) == machine
    assert body.get("datasetDataSources", []) == datasets
    assert body.get("kernelDataSources", []) == attached and body["slug"] == PREFIX + slug
    assert body["newTitle"] == f"Knee distillation {slug.replace('-', ' ')}"
    text, kind = body["text"], "notebook" if kernel in settings.SERIES else "script"
    assert ("_1_EPOCHS = 2" in text) == (number == "02") and "output_type" not in text
    assert body["kernelType"] == kind


def test_a_known_code_dataset_gets_a_new_version_which_is_waited_for(pushes, server):
    numbers = [{"currentVersionNumber": number} for number in (1, 1, 2)]
    still = {"status": "NOT_YET_PERSISTED"}
    rules = ("GetDatasetStatus", [UNPACKED, UNPACKED, still, UNPACKED]), ("GetDataset ", numbers)
    lost = requests.ConnectionError("no route to host")
    assert pushes(*rules, (STATUS, [502, RUNNING, lost, 429, COMPLETE])) == (0, KERNELS)
    calls = [call for call, _ in server.sent]
    assert "CreateDatasetVersion" in calls and calls.count("GetDatasetStatus") == 4


@pytest.mark.parametrize(
    ("rule", "said", "reached", "again"),
    [
        (("GetDatasetStatus", [404, 404, {"status": "FAILED"}]), "unpack", 0, 0),
        (("CreateDataset", [{"status": "error", "error": "title taken"}]), "title taken", 0, 0),
        (("CreateDataset", [{"status": "ok", "invalidTags": ["knee"]}]), "invalid tags", 0, 0),
        ((f"{SAVE}.*01-data$", saved(error="Maximum batch GPU session")), "Maximum", 2, 1),
        ((f"{SAVE}.*02-t", saved(invalidKernelSources=["a/b"])), "kernel sources: a/b", 3, 2),
        ((f"{STATUS}.*03-t", [{"status": "ERROR", "failureMessage": "memory"}]), "memory", 4, 3),
        ((f"{STATUS}.*03-t", [RUNNING, {"status": "CANCEL_ACKNOWLEDGED"}]), "CANCEL", 4, 3),
        ((f"{STATUS}.*03-t", [503]), "503", 4, 4),  # it did not fail: not pushed again
        ((OUTPUT, [404]), "404", 9, 9),
    ],
)
def test_what_fails_stops_and_the_next_start_goes_on(pushes, capsys, rule, said, reached, again):
    assert pushes(rule) == (1, KERNELS[:reached])
    error = capsys.readouterr().err
    assert said in error and len(error.splitlines()) == 1
    assert pushes() == (0, KERNELS[again:]), capsys.readouterr().err


def test_the_series_in_one_kernel_goes_on_with_its_last_output(pushes, server):
    rules = [(f'{OUTPUT}.*series(-2)?"', [results("UNFINISHED")]), (OUTPUT, [results("FINISHED")])]
    assert pushes(*rules, what="series") == (0, ["00_weights", "series", "series_2", "series_3"])
    attached = [body.get("kernelDataSources") for call, body in server.sent if call == SAVE]
    assert attached[2:] == [[WEIGHTS, f"{PREFIX}series"], [WEIGHTS, f"{PREFIX}series-2"]]


def test_changed_parameters_do_not_go_on_with_the_old_folders(folder, tmp_path, capsys):
    shutil.copytree(folder, tmp_path / "up")
    (tmp_path / "mine.yaml").write_text("PHASE_1_EPOCHS: 9\n")
    given = ["--profile", tmp_path / "mine.yaml", "--out", tmp_path / "up", "--push"]
    assert command(*given) == 2 and "move it away" in capsys.readouterr().err


def test_refusals_leave_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "local.yaml").write_text(f"TEACHER_WEIGHTS: {__file__}\n")
    for given in ("--user", "A B"), ("--data", "x"), ("--out", "."), ("--profile", "local.yaml"):
        assert command("--out", "up", *given) == 2
    said = capsys.readouterr().err
    assert said.count("OWNER/SLUG") == 2 and "exists" in said and "this machine's files" in said
    assert [path.name for path in tmp_path.iterdir()] == ["local.yaml"]


def test_the_weights_kernel_saves_what_the_notebooks_find_and_load(folder, tmp_path, monkeypatch):
    name, real = "MobileNetV3Small", keras.applications.MobileNetV3Small
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with monkeypatch.context() as patch:  # nothing is downloaded: the weights are random
        patch.setattr(keras.applications, name, lambda **given: real(**given | {"weights": None}))
        exec((folder / "00_weights/00_weights.py").read_text(), {})
    assert kaggle.attached_weights(name).parent == tmp_path
    models.build_student(name, 32, 5, "imagenet", 0.2, "float32", 0)


def test_a_session_is_told_all_that_it_lacks_and_no_more(tmp_path, monkeypatch):
    values = settings.validate({"STORED_SIZE": 224, "TEACHER_IMAGE_SIZE": 224, **PROFILE})
    monkeypatch.setattr(kaggle, "online", lambda: False)
    for name in ("KERNEL_RUN_TYPE", "INPUT_ROOT", "WORKING_ROOT"):
        monkeypatch.setenv(f"KAGGLE_{name}", str(tmp_path))
    gpu = "" if list(Path("/dev").glob("nvidia[0-9]*")) else "GPU T4 x2.*"
    with pytest.raises(runs.StageError, match=rf"(?s){gpu}Add Input.*Turn on internet"):
        kaggle.preflight(values)
    monkeypatch.setattr(kaggle, "online", lambda: True)
    kaggle.preflight(values | {"STORED_SIZE": 64, "TEACHER_IMAGE_SIZE": 64})
