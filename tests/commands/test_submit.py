"""submit and watch on Argo, against an HTTP server that answers as the Kubernetes API does.

The workflow objects in `workflows/` were recorded on a cluster and reduced to what a status is read from.
"""

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finemill.cli import main
from finemill.commands import run_table
from finemill.commands.engine_argo import read_workflow
from finemill.commands.run_table import RunTable, summary
from finemill.transport import unpack
from tests.commands.api_server import Api, point_kubeconfig_at

WORKFLOWS = Path(__file__).parent / "workflows"
ARGO = ["--engine", "argo", "--namespace", "ml"]
OBJECTS = "/apis/argoproj.io/v1alpha1/namespaces/ml"


def recorded(name: str) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((WORKFLOWS / f"{name}.json").read_text())
    return loaded


def installed(name: str) -> dict[str, Any]:
    return {"metadata": {"name": name, "uid": "1234"}}


@pytest.fixture
def api(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Api]:
    """A cluster with the WorkflowTemplate finetune, behind KUBECONFIG."""
    found = Api()
    point_kubeconfig_at(found.url, tmp_path, monkeypatch)
    found.answers["GET", f"{OBJECTS}/workflowtemplates/finetune"] = (200, installed("finetune"))
    found.answers["POST", f"{OBJECTS}/workflows"] = (201, {"metadata": {"name": "finetune-x"}})
    found.answers["GET", "/api/v1/namespaces/ml/pods"] = (200, {"kind": "PodList", "items": []})
    yield found
    found.server.shutdown()
    found.server.server_close()


def status_answer(code: int, reason: str, message: str, **details: str) -> tuple[int, dict[str, Any]]:
    return code, {"kind": "Status", "code": code, "reason": reason, "message": message, "details": details}


def test_submit_sends_only_what_was_given(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    options = ["--store", "s3://b/p", "--gpus", "0", "--train-qlora.lora-r", "32", "--base-model", "hf://o/m@r"]
    assert main(["submit", "finetune", *ARGO, *options]) == 0
    captured = capsys.readouterr()
    assert captured.out == "finetune-x\n"
    assert "finemill watch finetune-x --engine argo --namespace ml" in captured.err
    (workflow,) = api.posted
    parameters = {item["name"]: item["value"] for item in workflow["spec"]["arguments"]["parameters"]}
    assert workflow["spec"]["workflowTemplateRef"] == {"name": "finetune"}
    assert parameters == {"store": "s3://b/p", "gpus": "0", "base_model": "hf://o/m@r", "train_qlora": '{"lora_r": 32}'}


def test_a_configuration_travels_to_the_letter(api: Api, tmp_path: Path) -> None:
    """Argo evaluates braces in a workflow's own arguments; everything else is the templates' affair."""
    prompt = "Put it in $$\\boxed{}$$, {{=1+1}}, $(HOME)"
    sources = [{"uri": f"s3://b/a-folder-with-a-long-name/part-{number:05d}.jsonl"} for number in range(1500)]
    config = {"data_prep": {"sources": sources}, "chat_format": {"system_prompt": prompt, "max_length": None}}
    (tmp_path / "c.yaml").write_text(json.dumps(config))
    assert main(["submit", "finetune", *ARGO, "--config", str(tmp_path / "c.yaml")]) == 0
    parameters = {item["name"]: item["value"] for item in api.posted[-1]["spec"]["arguments"]["parameters"]}
    assert "{{" not in "".join(parameters.values())
    assert max(map(len, parameters.values())) < 90_000
    assert json.loads(parameters["chat_format"]) == config["chat_format"]
    found = unpack(json.loads(parameters["data_prep"]))["sources"]
    assert [item["uri"] for item in found] == [item["uri"] for item in sources]


def test_a_parameter_that_no_argument_holds_is_refused(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    noise = "".join(f"{number * 2654435761 % 2**32:08x}" for number in range(40_000))
    assert main(["submit", "finetune", *ARGO, "--chat-format.system-prompt", noise]) == 2
    assert "'chat_format' has" in capsys.readouterr().err
    assert not api.posted


@pytest.mark.parametrize(
    ("name", "exit_code", "last_line"),
    [
        ("done", 0, "done, promoted"),
        ("failed", 2, "failed in preflight: main: Error (exit code 2)"),
        ("unchanged", 0, "unchanged: the data is that of the newest registered version"),
    ],
)
def test_wait_ends_with_the_run_s_exit_code(
    name: str, exit_code: int, last_line: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers["GET", f"{OBJECTS}/workflows/finetune-x"] = (200, recorded(name))
    assert main(["submit", "finetune", *ARGO, "--wait"]) == exit_code
    assert capsys.readouterr().out.splitlines()[-1].endswith(last_line)


@pytest.mark.parametrize(
    ("answer", "code", "message"),
    [
        ((404, "404 page not found"), 2, "does not know the kind; install Argo Workflows"),
        (
            status_answer(404, "NotFound", "not found", name="finetune"),
            2,
            "WorkflowTemplate finetune not found in namespace ml: install the chart there",
        ),
        (
            status_answer(403, "Forbidden", 'workflowtemplates is forbidden: User "me" cannot get resource "x"'),
            2,
            'User "me" cannot get resource "x": bind the Role `<release>-submit`',
        ),
        (status_answer(403, "Forbidden", "exceeded quota: runs"), 75, "exceeded quota: runs: run again"),
        (status_answer(401, "Unauthorized", "Unauthorized"), 2, "does not accept the credentials in KUBECONFIG"),
        (status_answer(503, "ServiceUnavailable", "try later"), 75, "answers 503: try later"),
    ],
)
def test_what_the_cluster_refuses_is_one_line(
    answer: tuple[int, Any], code: int, message: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    api.answers["GET", f"{OBJECTS}/workflowtemplates/finetune"] = answer
    assert main(["submit", "finetune", *ARGO]) == code
    (line,) = capsys.readouterr().err.splitlines()
    assert message in line
    assert not api.posted


@pytest.mark.parametrize(
    "content",
    [
        b"[1, 2]",
        b"text",
        b"a: b: c",
        b"\xe4\x00",
        b"{current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: 5, users: []}",
        b"{current-context: c, contexts: [{name: c, context: {cluster: c}}], clusters: [{name: c, cluster: {server: 5}}]}",  # noqa: E501
    ],
)
def test_a_kubeconfig_that_is_none_is_one_line(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "kubeconfig").write_bytes(content)
    monkeypatch.setenv("KUBECONFIG", str(tmp_path / "kubeconfig"))
    assert main(["submit", "finetune", *ARGO]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "KUBECONFIG" in line


def test_a_certificate_that_is_not_trusted_is_the_user_s_to_mend(
    api: Api, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from kubernetes.client import ApiException, CustomObjectsApi

    def refuse(*arguments: Any) -> None:
        raise ApiException(status=0, reason="SSLError\n[SSL: CERTIFICATE_VERIFY_FAILED] certificate verify failed")

    monkeypatch.setattr(CustomObjectsApi, "get_namespaced_custom_object", refuse)
    assert main(["submit", "finetune", *ARGO]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "correct certificate-authority in KUBECONFIG" in line


def test_an_unreachable_cluster_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    point_kubeconfig_at("http://127.0.0.1:1", tmp_path, monkeypatch)
    assert main(["submit", "finetune", *ARGO]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert "the Kubernetes API is out of reach" in line


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "argo"], "--engine argo needs --namespace"),
        (["--engine", "kfp"], "--engine kfp needs --host"),
        ([*ARGO, "--timezone", "UTC"], "give both"),
        ([*ARGO, "--start-timeout", "1.5"], "'1.5': give whole seconds, or 0 for no limit"),
        ([*ARGO, "--train-qlora.lora-rank", "8"], "unrecognized arguments: --train-qlora.lora-rank"),
    ],
)
def test_bad_flags_are_refused_before_anything_is_asked(
    options: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    try:
        code = main(["submit", "finetune", *options])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 2
    assert message in capsys.readouterr().err


def with_training_pending(message: str) -> dict[str, Any]:
    workflow = recorded("done")
    workflow["status"] |= {"phase": "Running"}
    for node in workflow["status"]["nodes"].values():
        if node["displayName"].startswith("train-qlora"):
            node |= {"phase": "Pending", "message": message}
            del node["finishedAt"]
    return workflow


def test_a_step_that_waits_in_vain_ends_the_wait(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_table, "BLOCKED_S", 0.0)
    monkeypatch.setattr(run_table, "POLL_S", 0.01)
    workflow = with_training_pending('ErrImageNeverPull: Container image "x" is not present')
    api.answers["GET", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    assert main(["watch", "finetune-x", *ARGO]) == 2
    line = capsys.readouterr().err.splitlines()[-1]
    assert "train-qlora cannot start: the image is not on the node" in line


def test_a_run_whose_step_finds_no_place_for_too_long_is_ended(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_table, "POLL_S", 0.01)
    workflow = with_training_pending("Unschedulable: 0/4 nodes are available: 4 Insufficient GPU")
    api.answers["GET", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    api.answers["PATCH", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    assert main(["watch", "finetune-x", *ARGO, "--start-timeout", "600"]) == 75
    line = capsys.readouterr().err.splitlines()[-1]
    assert re.search(r"train-qlora has waited \d+ s for a place \(Unschedulable: 0/4 nodes .*--start-timeout$", line)
    assert api.posted == [{"spec": {"shutdown": "Terminate"}}]


def test_a_run_that_no_controller_takes_up_is_ended(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_table, "UNCLAIMED_S", 0.02)
    monkeypatch.setattr(run_table, "POLL_S", 0.01)
    workflow = {"metadata": {"name": "finetune-x"}, "spec": {}}
    api.answers["GET", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    api.answers["PATCH", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    assert main(["watch", "finetune-x", *ARGO]) == 75
    assert "finetune-x: no controller has taken it up in" in capsys.readouterr().err
    assert api.posted == [{"spec": {"shutdown": "Terminate"}}]


def test_ctrl_c_leaves_the_run_alone_and_says_how_to_come_back(
    api: Api, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(seconds: float) -> None:
        raise KeyboardInterrupt

    workflow = recorded("done")
    workflow["status"]["phase"] = "Running"
    api.answers["GET", f"{OBJECTS}/workflows/finetune-x"] = (200, workflow)
    monkeypatch.setattr("finemill.commands.run_table.time.sleep", interrupt)
    assert main(["watch", "finetune-x", *ARGO]) == 130
    assert "come back with:  finemill watch finetune-x --engine argo --namespace ml" in capsys.readouterr().err
    assert not api.posted


def test_steps_keep_the_pipeline_s_order_and_their_times() -> None:
    status = read_workflow(recorded("done"))
    names = [step.name for step in status.steps]
    assert names[:3] == ["preflight", "data-prep", "chat-format"]
    assert names[-1] == "promote"
    assert all(step.phase == "done" and step.seconds > 0 for step in status.steps)
    assert status.steps[-1].verdict == ("promotion_passed", "true")


def test_a_failed_step_s_own_line_is_the_run_s() -> None:
    status = read_workflow(recorded("failed"))
    assert summary(status, {"preflight": "store s3://b cannot be written"}).endswith(
        "failed in preflight: store s3://b cannot be written"
    )
    assert [step.phase for step in status.steps] == ["failed"] + ["skipped"] * (len(status.steps) - 1)


def test_without_a_terminal_only_changes_are_printed() -> None:
    stream = io.StringIO()
    table = RunTable(stream)
    for _ in range(2):
        table.show(read_workflow(recorded("unchanged")), ["data-prep  data-prep: 12 rows"])
    lines = stream.getvalue().splitlines()
    assert lines.count("data-prep  data-prep: 12 rows") == 2
    assert sum(line.startswith("detect-change") for line in lines) == 1


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--schedule", ""], "has 0 fields"),
        (["--schedule", "banana"], "has 1 fields"),
        (["--schedule", "0 3 * * *", "--timezone", "Mars/Base"], "time zone database"),
        (["--timezone", ""], "give both"),
        (["--gpus", "-1"], "--gpus -1"),
        (["--store", ""], "pods share nothing but S3"),
        (["--store", "./folder"], "pods share nothing but S3"),
        (["--store", "http://bucket/prefix"], "pods share nothing but S3"),
        (["--store", "s3://bucket/{{workflow.name}}"], "pods share nothing but S3"),
    ],
)
def test_what_no_pod_could_work_with_is_refused_before_anything_is_asked(
    options: list[str], said: str, api: Api, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", "finetune", *ARGO, *options]) == 2
    assert said in capsys.readouterr().err
    assert not api.posted


def test_another_release_in_the_namespace_is_named_by_its_prefix(api: Api) -> None:
    api.answers["GET", f"{OBJECTS}/workflowtemplates/team-a-finetune"] = (200, installed("team-a-finetune"))
    assert main(["submit", "finetune", *ARGO, "--prefix", "team-a-"]) == 0
    workflow = api.posted[-1]
    assert workflow["spec"]["workflowTemplateRef"] == {"name": "team-a-finetune"}
    assert workflow["metadata"]["generateName"] == "team-a-finetune-"


def test_a_schedule_goes_with_its_pipeline_when_that_is_uninstalled(api: Api) -> None:
    api.answers["POST", f"{OBJECTS}/cronworkflows"] = (201, {})
    assert main(["submit", "finetune", *ARGO, "--schedule", "0 3 * * *"]) == 0
    (owner,) = api.posted[-1]["metadata"]["ownerReferences"]
    assert (owner["kind"], owner["name"], owner["uid"]) == ("WorkflowTemplate", "finetune", "1234")
    # Whoever may not delete the template may set this all the same.
    assert "blockOwnerDeletion" not in owner
