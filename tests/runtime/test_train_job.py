"""A step on several nodes makes a TrainJob, follows it, and ends as it does; a server answers as the API's would."""

import json
import os
import signal
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread, Timer
from typing import Any
from urllib.parse import parse_qs, urlsplit

import pytest

from finemill.components.preflight.step import check_nodes
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.errors import StepError, TemporaryError, UserError
from finemill.registry.config import RegisterConfig
from finemill.runtime.processes import Node, node_of_train_job
from finemill.runtime.run import run_step
from finemill.runtime.train_job import (
    PRIORITY_VARIABLE,
    QUEUE_VARIABLE,
    RUNTIME_VARIABLE,
    check_train_jobs,
    run_train_job,
)

NAME = "train-qlora-0123"
ARGUMENTS = ["train-qlora", "--store", "s3://bucket/$(HOME)"]
JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/ml/trainjobs"
PODS = "/api/v1/namespaces/ml/pods"


class FakeCluster:
    """Jobs by name, what becomes of a new one look by look, and the pods of all."""

    def __init__(self) -> None:
        self.jobs: dict[str, dict[str, Any]] = {}
        self.lives: list[list[dict[str, str]]] = []
        """Conditions of the jobs at each look, the last of them for good."""
        self.pods: list[dict[str, Any]] = []
        self.deleted_pods: list[list[dict[str, Any]]] = []
        """The pods after each look, the last first, once their job is deleted."""
        self.log = ""
        self.calls: list[str] = []
        self.created: list[dict[str, Any]] = []
        self.status, self.message = 200, ""

    def answer(self, method: str, path: str, query: dict[str, list[str]], body: Any) -> tuple[int, Any]:
        """Status and body, text or JSON."""
        self.calls.append(f"{method} {path}")
        name = path.rpartition("/")[2]
        if self.status != 200:
            return self.status, {"message": self.message}
        if path == PODS:
            assert query["labelSelector"] == [f"jobset.sigs.k8s.io/jobset-name={NAME}"]
            found = self.pods
            if self.deleted_pods:
                self.pods = self.deleted_pods.pop()
            return 200, {"items": found}
        if path.startswith(PODS):
            return 200, self.log
        if method == "POST":
            self.created.append(body)
            self.jobs[body["metadata"]["name"]] = body
            return 201, body
        if name not in self.jobs:
            return 404, {"message": "not found"}
        if method == "DELETE":
            # Trainer makes the nodes of a job anew that waits for its nodes to be deleted first.
            assert query["propagationPolicy"] == ["Background"]
            self.deleted_pods = [[], self.pods]
            return 200, self.jobs.pop(name)
        if self.lives:
            self.jobs[name]["status"] = {"conditions": self.lives.pop(0)}
        return 200, self.jobs[name]


def condition(kind: str, message: str = "") -> list[dict[str, str]]:
    return [{"type": kind, "status": "True", "message": message}]


def pod(index: int, exit_code: int | None = None, reason: str = "") -> dict[str, Any]:
    labels = {"batch.kubernetes.io/job-completion-index": str(index)}
    ended = {"terminated": {"exitCode": exit_code, "reason": reason}}
    statuses = [{"name": "node", "state": {"running": {}} if exit_code is None else ended}]
    return {"metadata": {"name": f"node-{index}", "labels": labels}, "status": {"containerStatuses": statuses}}


@pytest.fixture
def cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeCluster]:
    fake = FakeCluster()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            assert self.headers["Authorization"] == "Bearer secret"
            url = urlsplit(self.path)
            length = int(self.headers.get("Content-Length") or 0)
            body = json.loads(self.rfile.read(length)) if length else None
            status, found = fake.answer(self.command, url.path, parse_qs(url.query), body)
            data = (found if isinstance(found, str) else json.dumps(found)).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        do_GET = do_POST = do_DELETE = _answer  # noqa: N815

        def log_message(self, *_: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()
    for name, text in (("token", "secret\n"), ("namespace", "ml")):
        (tmp_path / name).write_text(text)
    monkeypatch.setattr("finemill.runtime.kubernetes_api.ACCOUNT", tmp_path)
    monkeypatch.setattr("finemill.runtime.kubernetes_api._server", lambda: f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr("finemill.runtime.train_job.POLL_S", 0.01)
    monkeypatch.setattr("finemill.runtime.train_job.PATIENCE_S", 0.3)
    monkeypatch.setenv(RUNTIME_VARIABLE, "finemill-torch")
    yield fake
    server.shutdown()
    server.server_close()


def test_a_job_is_created_followed_and_deleted_when_it_completes(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(QUEUE_VARIABLE, "gpus")
    monkeypatch.setenv(PRIORITY_VARIABLE, "high")
    cluster.lives = [condition("Suspended", "no quota"), [], [], condition("Complete")]
    cluster.pods = [pod(1), pod(0)]
    # A progress bar returns the carriage.
    cluster.log = "2026-11-30T12:00:00.1Z 50%\rstep 1/2\n2026-11-30T12:00:00.2Z step 2/2\n"
    run_train_job(NAME, ARGUMENTS, 2)
    (job,) = cluster.created
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "gpus"
    assert job["metadata"]["labels"]["kueue.x-k8s.io/priority-class"] == "high"
    assert job["spec"]["runtimeRef"]["name"] == "finemill-torch"
    trainer = job["spec"]["trainer"]
    assert (trainer["numNodes"], trainer["command"], trainer["args"][-1]) == (2, ["finemill"], "s3://bucket/$$(HOME)")
    assert capsys.readouterr().err.splitlines() == [
        f"TrainJob {NAME} created, 2 nodes",
        "step 1/2",
        "step 2/2",
        f"TrainJob {NAME} waits in its queue: no quota",
    ]
    assert f"GET {PODS}/node-1/log" not in cluster.calls
    assert cluster.jobs == {}


@pytest.mark.parametrize(
    ("status", "line"),
    [
        (
            {"conditions": [{"type": "PodScheduled", "reason": "Unschedulable", "message": "0/1 nodes are available"}]},
            "a node waits: Unschedulable: 0/1 nodes are available",
        ),
        (
            {
                "containerStatuses": [
                    {"state": {"waiting": {"reason": "CreateContainerConfigError", "message": "keys"}}}
                ]
            },
            "a node waits: a secret or config map is missing (keys)",
        ),
        ({"containerStatuses": [{"state": {"waiting": {"reason": "ContainerCreating"}}}]}, None),
    ],
)
def test_what_a_node_waits_for_is_said_once(
    status: dict[str, Any], line: str | None, cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.lives = [[], [], condition("Complete")]
    cluster.pods = [{"metadata": {"name": "node-0"}, "status": status}]
    run_train_job(NAME, ARGUMENTS, 2)
    said = [f"TrainJob {NAME} created, 2 nodes", *([f"TrainJob {NAME}: {line}"] if line else [])]
    assert capsys.readouterr().err.splitlines() == said


def test_another_node_s_own_failure_is_shown(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    cluster.lives, cluster.pods, cluster.log = [condition("Failed")], [pod(0, 75), pod(1, 2)], "rows differ\n"
    with pytest.raises(UserError):
        run_train_job(NAME, ARGUMENTS, 2)
    assert "node 1: rows differ" in capsys.readouterr().err


def test_a_retry_follows_the_job_that_runs_and_replaces_one_that_has_ended(
    cluster: FakeCluster, capsys: pytest.CaptureFixture[str]
) -> None:
    cluster.jobs[NAME] = {"metadata": {"name": NAME}}
    cluster.lives = [[], condition("Complete")]
    run_train_job(NAME, ARGUMENTS, 2)
    assert cluster.created == []
    assert "runs already" in capsys.readouterr().err
    cluster.jobs[NAME] = {"metadata": {"name": NAME}}
    cluster.lives = [condition("Failed"), [], condition("Complete")]
    run_train_job(NAME, ARGUMENTS, 3)
    assert [job["spec"]["trainer"]["numNodes"] for job in cluster.created] == [3]


@pytest.mark.parametrize(
    ("pods", "kind", "line"),
    [
        ([pod(0, 75), pod(1, 2)], UserError, "a node ended with exit code 2; its lines are above"),
        ([pod(0, 75), pod(1, 1)], StepError, "a node ended with exit code 1"),
        ([pod(0, 75), pod(1, 137)], TemporaryError, r"a node was lost \(jobset failed\): run again"),
        ([pod(0, 75), pod(1, 137, "OOMKilled")], UserError, "memory was not enough"),
        ([], TemporaryError, "a node was lost"),
    ],
)
def test_a_job_that_failed_is_deleted_and_ends_the_step_as_its_nodes_ended(
    pods: list[dict[str, Any]], kind: type[StepError], line: str, cluster: FakeCluster
) -> None:
    cluster.lives, cluster.pods = [condition("Failed", "jobset failed")], pods
    with pytest.raises(StepError, match=line) as error:
        run_train_job(NAME, ARGUMENTS, 2)
    assert type(error.value) is kind
    assert (cluster.jobs, cluster.pods) == ({}, [])


def test_sigterm_deletes_the_job(cluster: FakeCluster) -> None:
    cluster.pods = [pod(0)]
    before = signal.getsignal(signal.SIGTERM)
    Timer(0.2, os.kill, (os.getpid(), signal.SIGTERM)).start()
    with pytest.raises(TemporaryError, match="told to stop"):
        run_train_job(NAME, ARGUMENTS, 2)
    assert (cluster.jobs, cluster.pods) == ({}, [])
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_job_that_another_run_deleted_has_ended(cluster: FakeCluster, capsys: pytest.CaptureFixture[str]) -> None:
    Timer(0.2, cluster.jobs.clear).start()
    run_train_job(NAME, ARGUMENTS, 2)
    assert capsys.readouterr().err.splitlines()[-1] == f"TrainJob {NAME} was deleted"


@pytest.mark.parametrize(
    ("status", "message", "kind", "line"),
    [
        (403, 'User "a" cannot get resource "trainjobs"', UserError, '"trainjobs": bind the Role of the chart'),
        (403, "admission webhook denied the request: no such runtime", UserError, "no such runtime$"),
        (403, "exceeded quota: jobs, limited: 1", TemporaryError, "exceeded quota: .* when there is room"),
        (503, "no", TemporaryError, "the Kubernetes API answers 503"),
        (422, "the server says no", UserError, "the server says no"),
    ],
)
def test_what_the_api_refuses_is_one_line(
    status: int, message: str, kind: type[StepError], line: str, cluster: FakeCluster
) -> None:
    cluster.status, cluster.message = status, message
    with pytest.raises(kind, match=line):
        run_train_job(NAME, ARGUMENTS, 2)


def test_preflight_asks_whether_a_step_may_make_a_train_job(
    cluster: FakeCluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    check_nodes({"train_qlora": TrainQLoRAConfig(num_nodes=2)})
    assert cluster.calls == [f"GET {JOBS}/preflight"]
    cluster.status, cluster.message = 403, 'User "a" cannot get resource "trainjobs"'
    with pytest.raises(UserError, match="bind the Role of the chart"):
        check_train_jobs(2)
    monkeypatch.delenv(RUNTIME_VARIABLE)
    with pytest.raises(UserError, match="num_nodes 2: nodes come from Kubeflow Trainer"):
        check_nodes({"train_qlora": TrainQLoRAConfig(num_nodes=2)})
    check_nodes({"train_qlora": TrainQLoRAConfig(), "register": RegisterConfig()})


def test_nodes_without_a_runtime_or_a_pod_are_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"num_nodes 2: nodes come from Kubeflow Trainer"):
        run_train_job(NAME, ARGUMENTS, 2)
    monkeypatch.setenv(RUNTIME_VARIABLE, "finemill-torch")
    monkeypatch.setattr("finemill.runtime.kubernetes_api.ACCOUNT", tmp_path)
    with pytest.raises(UserError, match="no service account is mounted here"):
        run_train_job(NAME, ARGUMENTS, 2)


def test_a_node_starts_processes_where_trainer_says_unless_torchrun_has(monkeypatch: pytest.MonkeyPatch) -> None:
    values = {
        "PET_NNODES": "2",
        "PET_NODE_RANK": "1",
        "PET_MASTER_ADDR": "job-node-0-0.job",
        "PET_MASTER_PORT": "29400",
    }
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    assert node_of_train_job() == Node(1, 2, "job-node-0-0.job:29400")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert node_of_train_job() is None


def test_a_step_of_several_nodes_takes_what_its_job_published(
    folder_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    started: list[tuple[str, list[str], int]] = []
    monkeypatch.setattr(
        "finemill.runtime.run.run_train_job", lambda name, arguments, nodes: started.append((name, arguments, nodes))
    )
    data = run_step(
        "data-prep", store=folder_store, inputs={}, config={"sources": [{"uri": "example:reasoning", "max_rows": 20}]}
    )
    inputs = {"rows": str(data.reference), "base_model": "builtin:tiny-qwen3"}
    dataset = str(run_step("chat-format", store=folder_store, inputs=inputs, config={}).reference)
    inputs = {"dataset": dataset, "base_model": "builtin:tiny-qwen3"}
    with pytest.raises(TemporaryError, match="has ended without its output"):
        run_step("train-qlora", store=folder_store, inputs=inputs, config={"num_nodes": 2}, run_id="run")
    ((name, arguments, nodes),) = started
    assert name.startswith("train-qlora-")
    assert nodes == 2
    assert (arguments[0], arguments[-2:]) == ("train-qlora", ["--run-id", "run"])
    assert dataset in arguments
