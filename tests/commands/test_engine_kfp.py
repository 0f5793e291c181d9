"""submit, watch and schedules on KFP.

Tasks are as KFP 2.17's API server writes them (`toModelTasks` of its `api_converter.go`): one per node of the Argo
workflow, with neither message nor outputs, an omitted one without a state. `kfp/failed.log` is from its launcher.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from urllib3 import HTTPConnectionPool
from urllib3.exceptions import LocationParseError, MaxRetryError, ReadTimeoutError, SSLError

import finemill
from finemill.cli import main
from finemill.commands import engine_kfp, run_table
from finemill.errors import TemporaryError, UserError
from finemill.pipelines.cluster import ClusterConfig
from tests.commands.api_server import Api, point_kubeconfig_at

pytestmark = pytest.mark.usefixtures("quick_kfp")

ROOT = "/apis/v2beta1"
PODS = "/api/v1/namespaces/kubeflow/pods"
LOG = (Path(__file__).parent / "kfp" / "failed.log").read_text()
FINETUNE = [
    *("preflight", "data-prep", "chat-format", "train-qlora", "eval"),
    *("merge", "gguf-quantize", "register", "promote"),
]


def task(name: str, state: str = "SUCCEEDED", seconds: int = 9) -> dict[str, Any]:
    """An entry of `task_details`; a node that has not ended has the year 1."""
    started, ended = "2026-11-24T03:00:00Z", f"2026-11-24T03:00:{seconds:02d}Z"
    end = "0001-01-01T00:00:00Z" if state in ("RUNNING", "PENDING") else ended
    return {
        "run_id": "r1",
        "task_id": f"uuid-{name}",
        "display_name": name,
        "create_time": started,
        "start_time": started,
        "end_time": end,
        "state": state,
        "child_tasks": [{"pod_name": "finetune-x-123"}],
    }


def tasks(**states: str) -> list[dict[str, Any]]:
    """The nodes of a finetune run in which every step was done but those named; `_` is for `-`."""
    found = [task("finetune-x7k2p"), task("root-driver"), task("root")]
    for name in FINETUNE:
        state = states.get(name.replace("-", "_"), "SUCCEEDED")
        driver = "SUCCEEDED" if state in ("SUCCEEDED", "FAILED", "RUNNING") else state
        found += [task(f"{name}-driver", driver, 3), task(name, state)]
        if state != "RUNTIME_STATE_UNSPECIFIED":
            found += [task("executor", state), task("executor(0)", state)]
    return found


FAILED = tasks(data_prep="FAILED", **dict.fromkeys((name.replace("-", "_") for name in FINETUNE[2:]), ""))
for entry in FAILED:
    entry["state"] = entry["state"] or "RUNTIME_STATE_UNSPECIFIED"


def run(state: str, details: list[dict[str, Any]], *history: str) -> tuple[int, dict[str, Any]]:
    entries = [{"state": item, "update_time": "2026-11-24T03:00:00Z"} for item in (*history, state)]
    body = {"run_id": "r1", "state": state, "state_history": entries, "run_details": {"task_details": details}}
    return 200, body


def pod(step: str, attempt: int = 0, level: str = "", **status: Any) -> dict[str, Any]:
    name = f"finetune-x7k2p{level}.root{level}.{step}{level}.executor({attempt})"
    return {
        "metadata": {
            "name": f"{step}-{attempt}",
            "creationTimestamp": f"2026-11-24T03:00:{attempt:02d}Z",
            "annotations": {"workflows.argoproj.io/node-name": name},
        },
        "spec": {"containers": []},
        "status": status,
    }


@pytest.fixture
def kfp(monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A KFP API server on which the newest run has failed in its second step; its cluster is not at hand."""
    api = Api()
    monkeypatch.delenv("KUBECONFIG", raising=False)
    monkeypatch.setenv("HOME", "/nonexistent")
    monkeypatch.setattr(engine_kfp, "SETTLE_S", 0.0)
    monkeypatch.setattr(run_table, "POLL_S", 0.01)
    experiment = {"experiment_id": "e1", "display_name": "finemill"}
    recurring = [{"recurring_run_id": "old", "display_name": "finemill-retrain"}]
    api.answers |= {
        ("GET", f"{ROOT}/healthz"): (200, {"multi_user": False}),
        ("GET", f"{ROOT}/experiments"): (200, {"experiments": [experiment]}),
        ("POST", f"{ROOT}/experiments"): (200, experiment),
        ("POST", f"{ROOT}/runs"): (200, {"run_id": "r1", "display_name": "finetune"}),
        ("GET", f"{ROOT}/runs/r1"): run("FAILED", FAILED, "PENDING", "RUNNING"),
        ("GET", f"{ROOT}/recurringruns"): (200, {"recurringRuns": recurring}),
        ("POST", f"{ROOT}/recurringruns"): (200, {"recurring_run_id": "new", "display_name": "finemill-retrain"}),
        ("DELETE", f"{ROOT}/recurringruns/old"): (200, {}),
    }
    yield api
    api.server.shutdown()
    api.server.server_close()


@pytest.fixture
def pods(kfp: Api, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """The cluster is at hand, with these pods."""
    point_kubeconfig_at(kfp.url, tmp_path, monkeypatch)
    found: list[dict[str, Any]] = []
    kfp.answers["GET", PODS] = (200, {"kind": "PodList", "items": found})
    return found


def stamped(text: str) -> str:
    """A log as the Kubernetes API gives it."""
    return "".join(f"2026-11-24T03:00:00.{number:09d}Z {line}\n" for number, line in enumerate(text.splitlines()))


def default_config(pipeline: str) -> dict[str, Any]:
    file = Path(finemill.__file__).parent / "pipelines" / "configs" / f"{pipeline}.yaml"
    loaded: dict[str, Any] = yaml.safe_load(file.read_text())
    return loaded


def watch(kfp: Api) -> int:
    return main(["watch", "r1", "--engine", "kfp", "--host", kfp.url])


def test_a_run_is_compiled_uploaded_and_followed(kfp: Api, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--host", kfp.url, "--store", "s3://b/p", "--gpus", "0", "--train-qlora.lora-r", "32", "--wait"]
    assert main(["submit", "finetune", "--engine", "kfp", *options]) == 1
    posted = kfp.posted[-1]
    parameters = posted["runtime_config"]["parameters"]
    assert (parameters["store"], parameters["gpus"]) == ("s3://b/p", "0")
    # What is not given is what `finemill run` starts from.
    assert parameters["train_qlora"] == default_config("finetune")["train_qlora"] | {"lora_r": 32}
    assert parameters["data_prep"] == default_config("finetune")["data_prep"]
    # Two documents, the pipeline and what Kubernetes is to do for it.
    assert set(posted["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    captured = capsys.readouterr()
    first, last = captured.out.splitlines()
    assert first == "r1"
    assert last == "r1 failed in data-prep: why is in its log: see KFP's pages, or set KUBECONFIG"
    rows = {line.split()[0]: line.split()[1] for line in captured.err.splitlines() if line.split()[0] in FINETUNE}
    assert rows == {"preflight": "done", "data-prep": "failed"} | dict.fromkeys(FINETUNE[2:], "skipped")
    assert "driver" not in captured.err
    assert "executor" not in captured.err


def test_a_configuration_of_one_s_own_stands_alone(kfp: Api, tmp_path: Path) -> None:
    (tmp_path / "own.yaml").write_text("data_prep: {sources: [{uri: s3://b/rows}]}")
    options = ["--host", kfp.url, "--config", str(tmp_path / "own.yaml")]
    assert main(["submit", "finetune", "--engine", "kfp", *options]) == 0
    assert kfp.posted[-1]["runtime_config"]["parameters"] == {"data_prep": {"sources": [{"uri": "s3://b/rows"}]}}


@pytest.mark.parametrize("level", ["", "(0)"], ids=["Argo as it comes", "Argo as KFP's manifests set it"])
def test_the_failed_step_s_own_words_and_exit_code_come_from_its_pods(
    kfp: Api, pods: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], level: str
) -> None:
    pods += [pod("data-prep", 0, level), pod("data-prep", 1, level), pod("root-driver")]
    pods[-1]["metadata"]["annotations"] = {"workflows.argoproj.io/node-name": "finetune-x7k2p.root-driver"}
    for attempt in (0, 1):
        progress_bar = "2026-11-24T02:59:59.000000000Z \rWriting shards: 0%\rWriting shards: 100%\n"
        kfp.answers["GET", f"{PODS}/data-prep-{attempt}/log"] = (200, progress_bar + stamped(LOG))
    assert watch(kfp) == 2
    captured = capsys.readouterr()
    expected = "r1 failed in data-prep: source '/no/such/rows.jsonl' not found"
    assert captured.out.startswith(expected)
    assert "attempt 2" in captured.err
    lines = [line for line in captured.err.splitlines() if line.startswith("data-prep  ") and "attempt" not in line]
    assert [line for line in lines if "shards" in line] == ["data-prep  Writing shards: 100%"] * 2
    lines = [line for line in lines if "shards" not in line]
    # What the launcher and kfp's executor say of themselves is left out.
    assert lines == [line for line in lines if line.split("  ")[1].startswith(("data-prep: ", "finemill data-prep: "))]
    assert len(lines) == 6


def test_a_step_whose_pod_has_no_place_yet_waits(kfp: Api, pods: list[dict[str, Any]]) -> None:
    pods += [pod("train-qlora", phase="Pending"), pod("data-prep", phase="Running")]
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("RUNNING", tasks(data_prep="RUNNING", train_qlora="RUNNING"))
    kfp.answers["GET", f"{PODS}/data-prep-0/log"] = (200, "")
    kfp.answers["GET", f"{PODS}/train-qlora-0/log"] = (400, {})
    status = engine_kfp.KFPEngine(kfp.url, None, ClusterConfig()).status("r1")
    phases = {step.name: step.phase for step in status.steps}
    assert (phases["data-prep"], phases["train-qlora"]) == ("running", "waiting")


def test_a_run_whose_step_finds_no_place_for_too_long_is_ended(
    kfp: Api, pods: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    scheduled = {"type": "PodScheduled", "status": "False", "reason": "Unschedulable", "message": "4 Insufficient GPU"}
    pods.append(pod("train-qlora", phase="Pending", conditions=[scheduled]))
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("RUNNING", tasks(train_qlora="RUNNING"))
    kfp.answers["POST", f"{ROOT}/runs/r1:terminate"] = (200, {})
    assert watch(kfp) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert "train-qlora has waited" in line
    assert "(Unschedulable: 4 Insufficient GPU), and the run was ended" in line


def test_a_run_s_end_waits_for_its_tasks(
    kfp: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP writes the run's state first, its tasks after that."""
    monkeypatch.setattr(engine_kfp, "SETTLE_S", 30.0)
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("FAILED", tasks(promote="RUNNING"))

    def report(seconds: float) -> None:
        kfp.answers["GET", f"{ROOT}/runs/r1"] = run("FAILED", FAILED)

    monkeypatch.setattr("finemill.commands.engine_kfp.time.sleep", report)
    assert watch(kfp) == 1
    assert capsys.readouterr().out.startswith("r1 failed in data-prep")


def test_a_terminated_run_says_so(kfp: Api, capsys: pytest.CaptureFixture[str]) -> None:
    later = dict.fromkeys(("eval", "merge", "gguf_quantize", "register", "promote"), "RUNTIME_STATE_UNSPECIFIED")
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("FAILED", tasks(train_qlora="FAILED", **later), "RUNNING", "CANCELING")
    assert watch(kfp) == 1
    assert capsys.readouterr().out == "r1 failed in train-qlora: terminated\n"


def test_a_driver_s_failure_is_the_step_s(kfp: Api, capsys: pytest.CaptureFixture[str]) -> None:
    details = tasks(train_qlora="RUNTIME_STATE_UNSPECIFIED")
    next(item for item in details if item["display_name"] == "train-qlora-driver")["state"] = "FAILED"
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("FAILED", details)
    assert watch(kfp) == 1
    assert "failed in train-qlora: KFP's driver failed before it began" in capsys.readouterr().out


@pytest.mark.parametrize("state", ["SUCCEEDED", "FAILED"])
def test_a_failure_outside_of_steps_names_its_place(state: str, kfp: Api, capsys: pytest.CaptureFixture[str]) -> None:
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("FAILED", [task("root-driver", state)])
    assert watch(kfp) == 1
    expected = "root-driver of KFP failed, see its log" if state == "FAILED" else ""
    assert capsys.readouterr().out.strip() == f"r1 failed: {expected}".strip()


def test_a_retraining_without_new_data_is_unchanged(kfp: Api, capsys: pytest.CaptureFixture[str]) -> None:
    names = ("preflight", "data-prep", "chat-format", "detect-change")
    details = [*map(task, names), task("condition-1-driver"), task("condition-1", "SKIPPED")]
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("SUCCEEDED", details)
    assert watch(kfp) == 0
    assert capsys.readouterr().out == "r1 unchanged: the data is that of the newest registered version\n"


@pytest.mark.parametrize(("verdict", "end"), [("true", "done, promoted"), ("false", "done, not promoted")])
def test_a_verdict_comes_from_the_step_s_log(
    verdict: str, end: str, kfp: Api, pods: list[dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    pods.append(pod("promote"))
    kfp.answers["GET", f"{PODS}/promote-0/log"] = (200, stamped(f"promote: promotion_passed: {verdict}"))
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("SUCCEEDED", tasks())
    assert watch(kfp) == 0
    assert capsys.readouterr().out == f"r1 {end}\n"


def test_an_image_that_cannot_be_pulled_ends_the_wait(
    kfp: Api, pods: list[dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_table, "BLOCKED_S", 0.0)
    waiting = {"reason": "ImagePullBackOff", "message": "no such image: mine:1"}
    statuses = [{"name": "main", "image": "", "imageID": "", "ready": False, "restartCount": 0}]
    statuses[0]["state"] = {"waiting": waiting}
    pods.append(pod("preflight", containerStatuses=statuses))
    kfp.answers["GET", f"{ROOT}/runs/r1"] = run("RUNNING", [task("preflight", "RUNNING")])
    assert watch(kfp) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "preflight cannot start: the image cannot be pulled (no such image: mine:1)" in line


def test_a_schedule_replaces_the_ones_before_and_leaves_their_runs_alone(
    kfp: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    place = ["--engine", "kfp", "--host", kfp.url]
    assert main(["submit", "retrain", *place, "--schedule", "0 3 * * *"]) == 0
    job = kfp.posted[-1]
    assert job["trigger"]["cron_schedule"]["cron"] == "0 0 3 * * *"
    assert (job["max_concurrency"], job["no_catchup"]) == (1, True)
    assert set(job["pipeline_spec"]) == {"pipeline_spec", "platform_spec"}
    # Kubernetes would delete a run that is under way together with the recurring run that owns it.
    assert kfp.deleted == [f"{ROOT}/recurringruns/old?propagation_policy=ORPHAN"]
    assert capsys.readouterr().out == "retrain scheduled at '0 3 * * *': new\n"
    assert main(["submit", "retrain", *place, "--schedule", "0 3 * * *", "--timezone", "UTC"]) == 2
    assert "leave --timezone out" in capsys.readouterr().err


def test_an_unreachable_kfp_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", "finetune", "--engine", "kfp", "--host", "http://127.0.0.1:1"]) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert "KFP at http://127.0.0.1:1 is out of reach" in line


@pytest.mark.parametrize(
    ("status", "answer", "message"), [(200, "login", "is not KFP but a page"), (401, {"error": "no"}, "refuses (401)")]
)
def test_a_login_page_takes_no_run(
    status: int, answer: Any, message: str, kfp: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    kfp.answers["GET", f"{ROOT}/healthz"] = (status, answer)
    assert main(["submit", "finetune", "--engine", "kfp", "--host", kfp.url]) == 2
    assert message in capsys.readouterr().err
    assert not kfp.posted


POOL = HTTPConnectionPool("kfp")


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (LocationParseError("http://[::1"), UserError),
        (MaxRetryError(POOL, "/", SSLError("CERTIFICATE_VERIFY_FAILED")), UserError),
        (MaxRetryError(POOL, "/", ReadTimeoutError(POOL, "/", "late")), TemporaryError),
    ],
)
def test_an_address_and_a_certificate_are_mended_by_nobody_else(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind), engine_kfp.readable_errors("kfp"):
        raise error
