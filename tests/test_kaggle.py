"""What `python -m utils kaggle` writes, as the published client sends it; push.sh; what is missing.

The client is real, its network is the test's; push.sh runs against a stub client.
"""

import json
import os
import re
import subprocess
import zipfile

import nbformat
import pytest
import test_pages

from utils import __main__ as command_line
from utils import pages, parameters, preflight, runs
from utils.commands import kaggle
from utils.folders import find_dataset

DATA = "shashwatwork/knee-osteoarthritis-dataset-with-severity"
PROFILE = """RUN_DIR: runs/kaggle
STORED_SIZE: 384
TEACHER_BACKBONE: EfficientNetV2M
TEACHER_WEIGHTS: imagenet
TEACHER_IMAGE_SIZE: 384
PHASE_3_EPOCHS: 30
STUDENT_BACKBONE: MobileNetV3Small
STUDENT_WEIGHTS: imagenet
TEST_VIEWS: 7
"""
KERNELS = ["00_weights", *parameters.NOTEBOOKS]


def write_project(folder):
    """Six notebooks of one parameter cell each, and a profile."""
    (folder / "notebooks" / "profiles").mkdir(parents=True)
    (folder / "utils").mkdir()
    (folder / "utils" / "runs.py").touch()
    (folder / "LICENSE").write_text("Apache")
    for name in parameters.NOTEBOOKS:
        real = parameters.ROOT / "notebooks" / f"{name}.ipynb"
        cells = [nbformat.v4.new_code_cell(parameters.parameter_cell(real))]
        cells[0]["metadata"]["tags"] = ["parameters"]
        cells.append(nbformat.v4.new_code_cell("1", outputs=[nbformat.v4.new_output("stream")]))
        kernel = {"kernelspec": {"name": "python3", "display_name": "x", "language": "python"}}
        node = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
        nbformat.write(node, folder / "notebooks" / f"{name}.ipynb")
    (folder / "notebooks" / "profiles" / "kaggle.yaml").write_text(PROFILE)
    (folder / "notebooks" / "profiles" / "local.yaml").write_text(
        "RUN_DIR: /tmp/run\nDATA_DIR: /data\nTEACHER_WEIGHTS: weights.h5\n"
    )
    (folder / "notebooks" / "profiles" / "random.yaml").write_text("RUN_DIR: runs/random\n")
    small = PROFILE.replace("EfficientNetV2M", "EfficientNetV2B0")
    (folder / "notebooks" / "profiles" / "small.yaml").write_text(small)
    return folder


@pytest.fixture(scope="module")
def project(tmp_path_factory):
    """The mini project."""
    return write_project(tmp_path_factory.mktemp("kaggle") / "project")


@pytest.fixture(scope="module")
def folders(project, tmp_path_factory):
    """Everything generated for user jane."""
    return kaggle.generate("jane", DATA, tmp_path_factory.mktemp("out") / "up", root=project)


@pytest.fixture
def client(monkeypatch, tmp_path):
    """The published client with dummy credentials; `client.sent` holds (method, url, body)."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("KAGGLE_CONFIG_DIR", str(tmp_path))
    monkeypatch.setenv("KAGGLE_USERNAME", "jane")
    monkeypatch.setenv("KAGGLE_KEY", "0" * 32)
    monkeypatch.delenv("KAGGLE_API_TOKEN", raising=False)
    pytest.importorskip("kaggle", reason="the kaggle client is not installed")
    import requests
    from kaggle.api.kaggle_api_extended import KaggleApi

    api = KaggleApi()
    api.authenticate()
    api.sent = []
    api.known_dataset = False
    api.uploads = {}
    api.answers = {"GetDatasetStatus": {"status": "READY"}}

    def send(_, request, **__):
        url = request.url
        response = requests.Response()
        response.status_code, response.request, response.url = 200, request, url
        response.headers["Content-Type"] = "application/json"
        answer = api.answers.get(url.rsplit("/", 1)[1], {})
        if url.startswith("https://upload.test/"):
            api.uploads[url.rsplit("/", 1)[1]] = request.body.read()
        else:
            body = json.loads(request.body)
            api.sent.append((url.rsplit("/", 1)[1], body))
            if url.endswith("/SaveKernel"):
                answer = {"versionNumber": 3, "url": "u", "ref": "r"}
            elif url.endswith("/GetDatasetStatus"):
                response.status_code = 200 if api.known_dataset else 404
            elif url.endswith("/StartBlobUpload"):
                answer = {"token": body["name"], "createUrl": f"https://upload.test/{body['name']}"}
            elif url.endswith(("/CreateDataset", "/CreateDatasetVersion")):
                answer = {"status": "ok", "url": "u", "ref": "r"}
        response._content = json.dumps(answer).encode()
        return response

    monkeypatch.setattr(requests.adapters.HTTPAdapter, "send", send)
    return api


def expected(kernel):
    """The request of each kernel, written out by hand."""
    code, weights = "jane/knee-distillation-code", "jane/knee-distillation-00-weights"
    gpu = {"enableGpu": True, "machineShape": "NvidiaTeslaT4"}
    cpu = {"enableGpu": False}
    before = {
        "02_teacher_phase_1": "01-data",
        "03_teacher_phase_2": "02-teacher-phase-1",
        "04_teacher_phase_3": "03-teacher-phase-2",
        "05_distillation": "04-teacher-phase-3",
        "06_evaluation": "05-distillation",
    }
    sources = [f"jane/knee-distillation-{before[kernel]}"] if kernel in before else []
    if kernel == "00_weights":
        return cpu | {"enableInternet": True, "datasetDataSources": [], "kernelDataSources": []}
    if kernel.startswith("series"):
        earlier = {"series": [], "series_b": ["series"], "series_a": ["series-b"]}
        names = earlier.get(kernel, ["series"])
        own = [weights, *(f"jane/knee-distillation-{name}" for name in names)]
        return gpu | {
            "enableInternet": False,
            "datasetDataSources": [code, DATA],
            "kernelDataSources": own,
        }
    return (cpu if kernel == "01_data" else gpu) | {
        "enableInternet": False,
        "datasetDataSources": [code, DATA] if kernel == "01_data" else [code],
        "kernelDataSources": sources + [weights] * (kernel[:2] in ("02", "05")),
    }


@pytest.mark.parametrize("kernel", [*KERNELS, "series", "series_again", "series_b", "series_a"])
def test_the_request_that_the_client_would_send(folders, client, capsys, kernel):
    client.kernels_push_cli(str(folders / kernel), None, None)
    [(call, body)] = client.sent
    said = capsys.readouterr().out
    assert call == "SaveKernel" and "Kernel version 3 successfully pushed" in said
    assert "does not resolve" not in said, "the title's slug must equal the id"
    wanted = expected(kernel)
    assert {name: body.get(name) or type(wanted[name])() for name in wanted} == wanted
    if kernel in ("00_weights", "01_data"):
        assert not body.get("machineShape")
    slug = {"series_again": "series", "series_a": "series"}.get(kernel, kernel).replace("_", "-")
    assert body["slug"] == f"jane/knee-distillation-{slug}"
    assert body["newTitle"].lower() == f"knee distillation {slug.replace('-', ' ')}"
    assert len(body["newTitle"]) <= 50
    assert body["isPrivate"] is True and not body.get("enableTpu")
    assert body["language"] == "python"
    assert not body.get("competitionDataSources") and not body.get("modelDataSources")
    if kernel in parameters.NOTEBOOKS:
        assert body["kernelType"] == "notebook"
        cells = json.loads(body["text"])["cells"]
        assert [cell["outputs"] for cell in cells] == [[], [], []]
        assert cells[0]["metadata"]["tags"] == ["parameters"]
        assert cells[1]["metadata"]["tags"] == ["injected-parameters"]
        values = {}
        exec(cells[0]["source"] + "\n" + cells[1]["source"], {"str": str, "int": int}, values)
        values.pop("__annotations__", None)
        profile = parameters.load_profile("kaggle", folders / "code")
        own = parameters.declared()[kernel]
        assert {n: values[n] for n in own if n in profile} == {
            n: profile[n] for n in own if n in profile
        }
        assert values["RUN_DIR"] == "runs/kaggle"
    else:
        assert body["kernelType"] == "script"
        compile(body["text"], kernel, "exec")


def test_the_code_is_uploaded_as_a_private_dataset_with_its_folders(folders, client, capsys):
    client.dataset_create_new_cli(str(folders / "code"), dir_mode="zip", quiet=True)
    assert "is being created" in capsys.readouterr().out
    call, body = client.sent[-1]
    assert call == "CreateDataset"
    assert body["ownerSlug"] == "jane" and body["slug"] == "knee-distillation-code"
    assert body["title"] == "Knee distillation code" and body["licenseName"] == "apache-2.0"
    assert body["isPrivate"] is True
    assert {file["token"] for file in body["files"]} == {"utils.zip", "notebooks.zip", "LICENSE"}
    archive = folders.parent / "notebooks.zip"
    archive.write_bytes(client.uploads["notebooks.zip"])
    names = zipfile.ZipFile(archive).namelist()
    assert "01_data.ipynb" in names and "profiles/kaggle.yaml" in names

    client.known_dataset, client.sent = True, []
    client.dataset_create_version_cli(str(folders / "code"), "m", dir_mode="zip", quiet=True)
    assert "is being created" in capsys.readouterr().out
    call, body = client.sent[-1]
    assert call == "CreateDatasetVersion" and body["datasetSlug"] == "knee-distillation-code"
    assert len(body["body"]["files"]) == 3


def test_push_reads_words_that_the_client_says(client, capsys):
    client.answers = {
        "GetKernelSessionStatus": {
            "status": "ERROR",
            "failureMessage": "Your notebook ran out of memory",
        },
        "GetDatasetStatus": {"status": "READY"},
        "GetDataset": {"currentVersionNumber": 1},
    }
    client.kernels_status_cli("jane/kernel/7")
    assert capsys.readouterr().out.replace("jane/kernel/7", "jane/x").strip() == FAILED[1]
    client.known_dataset = True
    assert json.loads(client.dataset_status("jane/dataset", format="json")) == json.loads(READY[1])
    client.known_dataset = False
    with pytest.raises(Exception, match="404"):
        client.dataset_status("jane/dataset", format="json")


def test_the_weights_kernel_saves_what_02_and_05_then_load(project, tmp_path, monkeypatch):
    """With Keras's own models; only the download is not made: their weights are random."""
    import keras

    from utils import models

    backbones = {"teacher": "EfficientNetV2B0", "student": "MobileNetV3Small"}
    real, saving = {name: getattr(keras.applications, name) for name in backbones.values()}, {}
    out = kaggle.generate("jane", DATA, tmp_path / "up", "small", root=project)
    saved = tmp_path / "input" / "notebooks" / "jane" / "knee-distillation-00-weights"
    saved.mkdir(parents=True)
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(tmp_path / "input"))
    monkeypatch.setenv("KAGGLE_WORKING_ROOT", str(tmp_path))
    monkeypatch.setattr(preflight, "online", lambda: False)
    monkeypatch.chdir(saved)
    values = parameters.load_profile("small", project)
    notebooks = ["02_teacher_phase_1", "05_distillation"]

    def wanting():
        found = preflight.findings(notebooks, values, tmp_path / "run")
        return [finding for finding in found if "ImageNet" in finding]

    assert "EfficientNetV2B0 and MobileNetV3Small are not attached" in wanting()[0]
    with monkeypatch.context() as patch:
        for name, make in real.items():

            def undownloaded(*, weights, make=make, **arguments):
                assert weights == "imagenet"
                saving[make.__name__] = make(weights=None, **arguments)
                return saving[make.__name__]

            patch.setattr(keras.applications, name, undownloaded)
        exec((out / "00_weights" / "weights.py").read_text(), {})
    assert wanting() == []
    for who, name in backbones.items():
        model = getattr(models, f"build_{who}")(name, 32, weights="imagenet")
        layers = {layer.name: layer for layer in model.get_layer("backbone").layers}
        convolutions = [layer for layer in saving[name].layers if "conv" in layer.name]
        assert len(convolutions) > 50
        for layer in convolutions:
            pairs = zip(layers[layer.name].get_weights(), layer.get_weights(), strict=True)
            assert all((found == wanted).all() for found, wanted in pairs), layer.name


def test_without_imagenet_there_is_no_weights_kernel(project, tmp_path):
    out = kaggle.generate("jane", DATA, tmp_path / "up", "random", root=project)
    assert not (out / "00_weights").exists()
    metadata = json.loads((out / "02_teacher_phase_1" / "kernel-metadata.json").read_text())
    assert metadata["kernel_sources"] == ["jane/knee-distillation-01-data"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--user", "Jane Doe", "--data", DATA], "Jane Doe"),
        (["--user", "jane/x", "--data", DATA], "jane/x"),
        (["--user", "", "--data", DATA], "--user"),
        (["--user", "jane", "--data", "only-a-slug"], "OWNER/SLUG"),
        (["--user", "jane", "--data", "https://www.kaggle.com/a/b"], "OWNER/SLUG"),
        (["--user", "jane", "--data", "owner/"], "OWNER/SLUG"),
        (["--user", "jane", "--data", DATA, "--out", "."], "exists"),
        (["--user", "jane", "--data", DATA, "--profile", "nowhere"], "nowhere"),
        (["--user", "jane", "--data", DATA, "--profile", "local"], "weights.h5"),
        (["--user", "jane"], "--data"),
        (["--data", DATA], "--user"),
    ],
)
def test_refusals(project, monkeypatch, tmp_path, capsys, arguments, said):
    monkeypatch.setattr(parameters, "ROOT", project)
    monkeypatch.chdir(tmp_path)
    try:
        status = command_line.main(["kaggle", *arguments])
    except SystemExit as left:  # argparse's own refusals
        status = left.code
    error = capsys.readouterr().err
    assert status == 2 and said in error and len(error.splitlines()) <= 12
    assert list(tmp_path.iterdir()) == [], "nothing half-written"


def test_the_real_series_is_generated(tmp_path, capsys):
    assert list(parameters.declared()) == list(runs.NOTEBOOKS)
    out = tmp_path / "up"
    arguments = ["--user", "jane", "--data", DATA, "--out", str(out)]
    assert command_line.main(["kaggle", *arguments]) == 0
    assert str(out / "push.sh") in capsys.readouterr().out
    assert sorted(p.name for p in out.iterdir() if p.name[0] == "0") == KERNELS
    assert (out / "code" / "utils" / "commands" / "series.py").exists()
    assert os.access(out / "push.sh", os.X_OK)


# push.sh, against a client that answers as it is told.

STUB = r"""#!/usr/bin/env bash
# Lines of rules.txt: a pattern and its answers, each "status words", between tabs; the last stays.
here={here}
echo "$*" >>$here/calls.txt
while IFS=$'\t' read -r -a rule; do
  [[ "$*" =~ ${{rule[0]}} ]] || continue
  count=$here/count-$(tr -c 'a-z0-9A-Z\n' _ <<<"${{rule[0]}}$*")
  number=$(cat "$count" 2>/dev/null || echo 1)
  echo $((number + 1)) >"$count"
  [ $number -lt ${{#rule[@]}} ] || number=$((${{#rule[@]}} - 1))
  words=${{rule[$number]#* }}
  [[ "$words" =~ ^\<(.*)\>$ ]] && touch "results/${{BASH_REMATCH[1]}}"
  printf '%b\n' "$words"
  exit "${{rule[$number]%% *}}"
done <$here/rules.txt
echo "the stub knows no answer to $*"
exit 1
"""
READY = [0, '{"status": "ready", "current_version_number": 1}']
NOT_THERE = [1, "404 Client Error: Not Found for url: https://api.kaggle.com/"]
PUSHED = [0, "Kernel version 7 successfully pushed.  Please check progress at https://kaggle.com/x"]


def says(word):
    """A kernel's status in the client's words."""
    return [0, f'jane/x has status "KernelWorkerStatus.{word}"']


FAILED = [0, says("ERROR")[1] + '\nFailure message: "Your notebook ran out of memory"']
USUAL = [
    ("datasets status", [NOT_THERE, READY]),
    ("datasets create", [[0, "Your private Dataset is being created. Please check progress at u"]]),
    ("datasets version", [[0, "Dataset version is being created. Please check progress at u"]]),
    ("kernels push", [PUSHED]),
    ("kernels status", [says("QUEUED"), says("RUNNING"), says("COMPLETE")]),
    ("kernels output", [[0, ""]]),
]


@pytest.fixture
def push(folders, tmp_path):
    """Run push.sh with rules over the usual answers: exit status, words, the client's calls."""
    subprocess.run(["cp", "-r", str(folders), str(tmp_path / "up")], check=True)
    (tmp_path / "bin").mkdir()
    stub = tmp_path / "bin" / "kaggle"
    stub.write_text(STUB.format(here=tmp_path))
    stub.chmod(0o755)
    path = f"{tmp_path / 'bin'}:{os.environ['PATH']}"

    def run(*rules, arguments=()):
        lines = [
            "\t".join(
                [pattern, *(f"{status} {words}".replace("\n", "\\n") for status, words in answers)]
            )
            for pattern, answers in [*rules, *USUAL]
        ]
        (tmp_path / "rules.txt").write_text("\n".join(lines) + "\n")
        (tmp_path / "calls.txt").write_text("")
        for count in tmp_path.glob("count-*"):
            count.unlink()
        done = subprocess.run(
            [str(tmp_path / "up" / "push.sh"), *arguments],
            env=os.environ | {"PATH": path, "POLL_SECONDS": "0"},
            capture_output=True,
            text=True,
            timeout=120,
        )
        calls = (tmp_path / "calls.txt").read_text().splitlines()
        return done.returncode, done.stdout + done.stderr, calls

    return run


def pushed(calls):
    """The folders pushed, in order."""
    return [call.split(" -p ")[1] for call in calls if call.startswith("kernels push")]


def test_push_goes_through_in_order_and_does_nothing_twice(push):
    pages = (
        ("kernels output.*page-token def", [[0, ""]]),
        ("kernels output.*page-token abc", [[0, "Next page token: def"]]),
        ("kernels output", [[0, "Next page token: abc"]]),
    )
    status, words, calls = push(*pages)
    assert status == 0, words
    assert calls[1] == "datasets create -p code -r zip"
    assert pushed(calls) == KERNELS
    for number, kernel in enumerate(KERNELS[:-1]):
        own = f"jane/knee-distillation-{kernel.replace('_', '-')}/7"
        polls = [n for n, call in enumerate(calls) if call == f"kernels status {own}"]
        assert len(polls) == 3, "queued, running, complete"
        assert polls[-1] < calls.index(f"kernels push -p {KERNELS[number + 1]}")
    fetched = [call for call in calls if call.startswith("kernels output")]
    assert len(fetched) == 3 and "jane/knee-distillation-06-evaluation" in fetched[0]
    assert all("--page-size 200" in call for call in fetched)

    status, words, calls = push()
    assert status == 0 and pushed(calls) == [] and not any("datasets" in call for call in calls)


def test_an_existing_code_dataset_gets_a_new_version_that_is_waited_for(push):
    new = [0, '{"status": "ready", "current_version_number": 2}']
    pending = [0, '{"status": "pending", "current_version_number": 2}']
    status, words, calls = push(("datasets status", [READY, READY, pending, new]))
    assert status == 0, words
    assert calls[1].startswith("datasets version -p code -r zip -m ")
    assert calls.index("kernels push -p 00_weights") == 5, "the old version's 'ready' is no answer"


@pytest.mark.parametrize(
    ("rule", "said", "reached"),
    [
        (("datasets create", [[0, "Dataset creation error: title taken"]]), "title taken", []),
        (("datasets create", [[1, "401 Unauthorized"]]), "401", []),
        (("datasets status", [[1, "ConnectionError: no route"]]), "no route", []),
        (("datasets status", [NOT_THERE, [0, '{"status": "failed"}']]), "failed", []),
        (("push -p 01", [[0, "Kernel push error: Maximum batch GPU session count"]]), "Maximum", 2),
        (("push -p 01", [[0, "Kernel push error: see previous output"]]), "push error", 2),
        (("push -p 01", [[1, "403 Client Error: Forbidden"]]), "403", 2),
        (
            ("push -p 02", [[0, f"not valid dataset sources: ['a/b']\n{PUSHED[1]}"]]),
            "not valid dataset sources",
            3,
        ),
        (
            ("push -p 02", [[0, f"not valid kernel sources: ['a/b']\n{PUSHED[1]}"]]),
            "not valid kernel sources",
            3,
        ),
        (("status .*03", [says("RUNNING"), says("ERROR")]), "ERROR", 4),
        (("status .*03", [[0, 'x has status "error"'], says("ERROR")]), "ERROR", 4),
        (("status .*03", [says("QUEUED"), says("CANCEL_ACKNOWLEDGED")]), "CANCEL_ACKNOW", 4),
        (("status .*03", [says("QUEUED"), FAILED]), "out of memory", 4),
        (("status .*03", [[0, 'x has status "lost"']]), "lost", 4),
        (("status .*03", [[1, "503 Server Error"]]), "503", 4),
        # The version before's COMPLETE, read right after the push, is not this one's.
        (("status .*03", [says("COMPLETE"), says("RUNNING"), says("ERROR")]), "ERROR", 4),
        (("kernels output", [[1, "404 Client Error"]]), "404", 7),
    ],
)
def test_whatever_fails_stops_and_the_next_start_goes_on(push, rule, said, reached):
    status, words, calls = push(rule)
    assert status == 1 and said in words and "start this again" in words
    assert pushed(calls) == KERNELS[: reached or 0]
    assert len(words) < 2000

    status, words, calls = push()
    assert status == 0, words
    left = KERNELS[max((reached or 0) - 1, 0) :]
    # A kernel that had been pushed and was not seen to fail is waited for, not pushed again.
    waited = said in ("503", "lost", "404")
    assert pushed(calls) == (left[1:] if waited else left)


def test_answers_that_fail_now_and_then_are_asked_again(push):
    broken = [1, "502 Bad Gateway"]
    status, words, _ = push(
        ("kernels status", [broken, says("RUNNING"), broken, broken, says("COMPLETE")])
    )
    assert status == 0, words


def test_the_whole_series_goes_on_with_its_own_output(push):
    more, done = [0, "<UNFINISHED>"], [0, "<FINISHED>"]
    status, words, calls = push(
        ("kernels output.*FINISHED", [more, more, done]), arguments=["series"]
    )
    assert status == 0, words
    assert pushed(calls) == ["00_weights", "series", "series_again", "series_again"]


@pytest.mark.parametrize(
    "refusal",
    [
        ("push -p series_again", [[0, f"not valid kernel sources: ['a/b']\n{PUSHED[1]}"]]),
        ("push -p series_again", [[0, "Kernel push error: a kernel cannot use itself"]]),
        ("status jane/knee-distillation-series/", []),
    ],
)
def test_twins_take_turns_where_a_kernel_cannot_be_attached_to_itself(push, refusal):
    again = ("status jane/knee-distillation-series/", [says("RUNNING"), says("COMPLETE")])
    more, done = [0, "<UNFINISHED>"], [0, "<FINISHED>"]
    finished = [
        ("kernels output jane/knee-distillation-series-b .*FINISHED", [more, done]),
        ("kernels output jane/knee-distillation-series .*FINISHED", [more]),
    ]
    if "status" in refusal[0]:  # one kernel: first as `series`, then as `series_again`, `series_a`
        words = ("RUNNING", "COMPLETE", "RUNNING", "ERROR")
        again = (refusal[0], [says(word) for word in words] + again[1])
        refusal = ("never", [[0, ""]])
    status, words, calls = push(refusal, again, *finished, arguments=["series"])
    assert status == 0, words
    assert pushed(calls)[1:] == ["series", "series_again", "series_b", "series_a", "series_b"]


def test_a_series_that_never_ends_is_stopped(push):
    status, words, calls = push(
        ("kernels output.*FINISHED", [[0, "<UNFINISHED>"]]), arguments=["series"]
    )
    assert status == 1 and "six sessions" in words and len(pushed(calls)) == 7


def test_what_is_fetched_is_all_that_the_page_of_a_run_links_to(tmp_path):
    script = (runs.root() / "utils" / "commands" / "kaggle_push.sh").read_text()
    [pattern] = re.findall(r"^results='(.*)'$", script, re.M)
    run = test_pages.make_run(tmp_path / "output" / "runs" / "kaggle")
    (run / "data" / "phantoms").mkdir()
    for name in ("data/phantoms/1L.png", "teacher/phase_1/teacher.keras", "data/images.npy"):
        (run / name).touch()
    page = pages.build(run)
    links = test_pages.Links(page.read_text()).links
    for path in [path for path in run.rglob("*") if path.is_file()]:
        if not re.search(pattern, path.relative_to(tmp_path / "output").as_posix()):
            path.unlink()
    assert test_pages.dead(run, links) == [] and page.exists()
    assert not list(run.glob("data/phantoms/*")) and not (run / "data/images.npy").exists()
    assert [path.parent.name for path in run.rglob("teacher.keras")] == ["phase_3"]


# What is missing on Kaggle.


@pytest.fixture
def session(tmp_path, monkeypatch):
    """A Kaggle session that has all that is needed: full-size parameters, input, a run folder."""
    attached = tmp_path / "input"
    image = attached / "datasets" / "jane" / "knees" / "train" / "0" / "1L.png"
    image.parent.mkdir(parents=True)
    image.touch()
    (attached / "notebooks").mkdir()
    for name in ("efficientnetv2-m_notop.h5", "mobilenetv3small_notop.weights.h5"):
        (attached / "notebooks" / name).touch()
    run = tmp_path / "working" / "run"
    (run / "data").mkdir(parents=True)
    (run / "data" / "stage.json").write_text('{"parameters": {"STORED_SIZE": 384}}')
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Batch")
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(attached))
    monkeypatch.setenv("KAGGLE_WORKING_ROOT", str(tmp_path / "working"))
    monkeypatch.setattr(preflight, "accelerators", lambda: 2)
    monkeypatch.setattr(preflight, "free_disk", lambda: 50e9)
    monkeypatch.setattr(preflight, "memory", lambda: (28e9, 31e9))
    monkeypatch.setattr(preflight, "online", lambda: False)
    return run


VALUES = {
    "DATA_DIR": "",
    "STORED_SIZE": 384,
    "TEACHER_BACKBONE": "EfficientNetV2M",
    "TEACHER_WEIGHTS": "imagenet",
    "STUDENT_BACKBONE": "MobileNetV3Small",
    "STUDENT_WEIGHTS": "imagenet",
}


def test_a_session_that_has_everything_begins(session, capsys):
    for notebook in runs.NOTEBOOKS:
        preflight.check([notebook], VALUES, session)
    preflight.check(runs.NOTEBOOKS, VALUES, session)
    assert "2 GPU, 50 GB of disk free, the run holds 0.0 of 20 GB" in capsys.readouterr().out


@pytest.mark.parametrize("run_type", ["Interactive", "Batch"])
@pytest.mark.parametrize(
    ("dataset", "notebook"),
    [
        ("knees", "knee-distillation-01-data"),
        ("datasets/owner/knees", "notebooks/jane/knee-distillation-01-data"),
    ],
)
def test_both_mount_layouts_and_run_types(tmp_path, monkeypatch, dataset, notebook, run_type):
    attached, working = tmp_path / "input", tmp_path / "working"
    for grade in "01":
        image = attached / dataset / "train" / grade / "9000001L.png"
        image.parent.mkdir(parents=True)
        image.touch()
    stage = attached / notebook / "runs" / "kaggle" / "data" / "stage.json"
    saved = {"id": "a", "finished": True, "opened": 1.0, "seconds": 2.0}
    runs.write_json(stage, saved)
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", run_type)
    monkeypatch.setenv("KAGGLE_INPUT_ROOT", str(attached))
    monkeypatch.setenv("KAGGLE_WORKING_ROOT", str(working))
    assert find_dataset() == attached / dataset
    run = runs.run_folder("runs/kaggle")
    assert run == working / "runs" / "kaggle"
    runs.take_up(run)
    assert runs.read_stage(run, "01_data") == saved
    assert stage.exists() and runs.batch_mode() is (run_type == "Batch")


def remove(pattern):
    """Something that takes files away from the session."""

    def take_away(run, monkeypatch):
        found = list(run.parent.parent.rglob(pattern))
        assert found
        for path in found:
            path.unlink()

    return take_away


def without(name, value):
    """Something that lets the session offer less."""
    return lambda _, monkeypatch: monkeypatch.setattr(preflight, name, lambda *_: value)


@pytest.mark.parametrize(
    ("notebook", "breaks", "said"),
    [
        ("02_teacher_phase_1", without("accelerators", 0), "Accelerator > GPU T4 x2"),
        ("02_teacher_phase_1", without("free_disk", 1e9), "1.0 GB of disk"),
        ("03_teacher_phase_2", without("size_of", 19e9), "19.0 GB, Kaggle keeps 20"),
        ("05_distillation", without("memory", (1e9, 31e9)), "1.0 GB of memory"),
        ("01_data", remove("1L.png"), "Add Input > Datasets"),
        ("02_teacher_phase_1", remove("data/stage.json"), "output of 01_data"),
        ("06_evaluation", remove("data/stage.json"), "output of 05_distillation"),
        ("02_teacher_phase_1", remove("efficientnetv2*"), "EfficientNetV2M are not attached"),
        ("05_distillation", remove("mobilenetv3*"), "Turn on internet"),
    ],
)
def test_each_thing_missing_is_found_with_its_remedy(
    session, monkeypatch, capsys, notebook, breaks, said
):
    breaks(session, monkeypatch)
    with pytest.raises(runs.StageError) as raised:
        preflight.check([notebook], VALUES, session)
    lines = str(raised.value).splitlines()
    assert len(lines) == 2 and said in lines[1] and notebook in lines[0]


def test_all_findings_come_at_once(session, monkeypatch):
    for breaks in (without("accelerators", 0), without("free_disk", 0), remove("*.h5")):
        breaks(session, monkeypatch)
    remove("1L.png")(session, monkeypatch)
    found = preflight.findings(runs.NOTEBOOKS, VALUES, session)
    assert len(found) == 4
    assert "EfficientNetV2M and MobileNetV3Small" in " ".join(found)


def test_small_runs_need_no_gpu_and_internet_replaces_attached_weights(session, monkeypatch):
    without("accelerators", 0)(session, monkeypatch)
    small = VALUES | {"STORED_SIZE": 64, "TEACHER_WEIGHTS": "none", "STUDENT_WEIGHTS": "none"}
    assert preflight.findings(runs.NOTEBOOKS, small, session) == []
    without("accelerators", 2)(session, monkeypatch)
    remove("*.h5")(session, monkeypatch)
    without("online", True)(session, monkeypatch)
    assert preflight.findings(runs.NOTEBOOKS, VALUES, session) == []
