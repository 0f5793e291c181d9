"""A step computed by the nodes of a TrainJob of Kubeflow Trainer: created, followed, deleted when this one has to stop.

The job's name is the step and the key of its output: a retry finds the job that it started, and so does another run
that wants the same. Every node runs `finemill <step>`, which starts a process per GPU; the main one publishes.
"""

import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from finemill.errors import StepError, TemporaryError, UserError, kind_of
from finemill.runtime.kubernetes_api import KubernetesAPI
from finemill.runtime.pods import pod_waits_for

RUNTIME_VARIABLE = "FINEMILL_TRAINING_RUNTIME"
"""Names the TrainingRuntime that nodes are made from; the chart sets it."""
QUEUE_VARIABLE = "FINEMILL_TRAINING_QUEUE"
"""Names Kueue's LocalQueue that TrainJobs wait in, if they do."""
PRIORITY_VARIABLE = "FINEMILL_TRAINING_PRIORITY"
"""Names their WorkloadPriorityClass there; without one Kueue goes by the priority of the runtime's pods."""
POLL_S = 5.0
"""Seconds between two looks at the job."""
PATIENCE_S = 120.0
"""Seconds that the API may be out of reach while a job runs, and that a deleted job may take to its end."""
_GROUP = "trainer.kubeflow.org"
_NO_FAULT = {137, 143, TemporaryError.exit_code}
"""Exit codes of a container that was killed, told to stop, or lost another."""
_TAIL_LINES = "20"
"""Lines that are shown of a node that failed beside the main one."""


def run_train_job(name: str, arguments: Sequence[str], num_nodes: int) -> None:
    """Have the nodes of a TrainJob run `finemill <arguments>`, and wait until they have, or somebody deletes it.

    Args:
        name: of the job; one that runs already is followed, one that has ended is replaced.
        arguments: the step and its options, the same on every node.
        num_nodes: how many nodes a new job has.
    Raises: UserError: there is no runtime, or the nodes ended so. TemporaryError: this process was told to stop, and
        the job is deleted; a node was lost: the next one continues from the last checkpoint.
    """
    runtime = _runtime(num_nodes)
    with KubernetesAPI() as api, _stoppable():
        job = TrainJob(api, name)
        try:
            job.start(manifest(name, arguments, num_nodes, runtime))
            job.follow()
        except _StoppedError:
            job.delete()
            raise TemporaryError(f"told to stop, TrainJob {name} with it: run again to continue") from None


def check_train_jobs(num_nodes: int) -> None:
    """See that a step can make a TrainJob here. Raises: UserError: there is no runtime, or no right to it."""
    _runtime(num_nodes)
    with KubernetesAPI() as api:
        TrainJob(api, "preflight").exists()


def _runtime(num_nodes: int) -> str:
    runtime = os.environ.get(RUNTIME_VARIABLE)
    if not runtime:
        raise UserError(
            f"num_nodes {num_nodes}: nodes come from Kubeflow Trainer, in a cluster where finemill's chart was "
            "installed with trainingRuntime.enabled; elsewhere start torchrun on every node"
        )
    return runtime


def manifest(name: str, arguments: Sequence[str], num_nodes: int, runtime: str) -> dict[str, Any]:
    """The TrainJob as Trainer 2 takes it."""
    kueue = {"queue-name": os.environ.get(QUEUE_VARIABLE), "priority-class": os.environ.get(PRIORITY_VARIABLE)}
    return {
        "apiVersion": f"{_GROUP}/v1alpha1",
        "kind": "TrainJob",
        "metadata": {
            "name": name,
            "labels": {"app.kubernetes.io/name": "finemill", "app.kubernetes.io/component": arguments[0]}
            | {f"kueue.x-k8s.io/{name}": value for name, value in kueue.items() if value},
        },
        "spec": {
            "runtimeRef": {"apiGroup": _GROUP, "kind": "TrainingRuntime", "name": runtime},
            "trainer": {
                "numNodes": num_nodes,
                "command": ["finemill"],
                # The kubelet expands $(NAME).
                "args": [argument.replace("$", "$$") for argument in arguments],
            },
        },
    }


class TrainJob:
    """One TrainJob of this pod's namespace.

    Args:
        api: of the cluster.
        name: the job's.
    """

    def __init__(self, api: KubernetesAPI, name: str) -> None:
        self._api, self.name = api, name
        self._jobs = f"/apis/{_GROUP}/v1alpha1/namespaces/{api.namespace}/trainjobs"
        self._path = f"{self._jobs}/{name}"
        self._pods = f"/api/v1/namespaces/{api.namespace}/pods"
        self._said: str | None = None
        self._stamp = ""

    def exists(self) -> bool:
        """Whether there is a job of this name."""
        return self._api.get(self._path) is not None

    def start(self, wanted: dict[str, Any]) -> None:
        """Create the job, unless it runs already; one that has ended makes place first."""
        found = self._api.get(self._path)
        if found is not None and _end(found) is None and not found["metadata"].get("deletionTimestamp"):
            self._say(f"TrainJob {self.name} runs already: follows it")
            return
        if found is not None:
            self.delete()
        if self._api.create(self._jobs, wanted):
            self._say(f"TrainJob {self.name} created, {wanted['spec']['trainer']['numNodes']} nodes")

    def follow(self) -> None:
        """Show the main node's log and the job's state until it has ended, and delete it.

        Raises: StepError: it does not complete.
        """
        heard = time.monotonic()
        while True:
            try:
                found = self._api.get(self._path)
                pods = self._nodes()
                self._show_log(pods)
                heard = time.monotonic()
            except TemporaryError:
                if time.monotonic() - heard > PATIENCE_S:
                    raise
                time.sleep(POLL_S)
                continue
            if found is None:
                self._say(f"TrainJob {self.name} was deleted")
                return
            end = _end(found)
            if end == "Complete":
                # Its pods would stay for good.
                self._api.delete(self._path)
                return
            if end == "Failed":
                self._show_other_ends(pods)
                failure = self._failure(pods, _message(found, "Failed"))
                self.delete()
                raise failure
            self._say_what_it_waits_for(found, pods)
            time.sleep(POLL_S)

    def delete(self) -> None:
        """Delete the job, and wait until its pods have written what they write at their end.

        The job goes first: its controller makes anew what a job still there has lost.
        """
        began = time.monotonic()
        self._api.delete(self._path)
        while self._nodes():
            if time.monotonic() - began > PATIENCE_S:
                raise TemporaryError(f"TrainJob {self.name} is still being deleted: run again")
            time.sleep(POLL_S)

    def _failure(self, pods: Sequence[dict[str, Any]], message: str) -> StepError:
        """What the job failed with, from its containers' ends; pods that are gone were lost with their node."""
        ends = [end for pod in pods for end in _container_ends(pod) if end.get("exitCode")]
        if any(end.get("reason") == "OOMKilled" for end in ends):
            return UserError(
                f"TrainJob {self.name}: a node's memory was not enough: give the chart's resources.gpu more"
            )
        codes = {int(end["exitCode"]) for end in ends} - _NO_FAULT
        if codes:
            # A user's mistake is what every node ends with; other codes may be its consequence.
            code = UserError.exit_code if UserError.exit_code in codes else min(codes)
            return kind_of(code)(f"TrainJob {self.name}: a node ended with exit code {code}; its lines are above")
        return TemporaryError(f"TrainJob {self.name}: a node was lost ({message}): run again to continue")

    def _nodes(self) -> list[dict[str, Any]]:
        found = self._api.get(self._pods, labelSelector=f"jobset.sigs.k8s.io/jobset-name={self.name}")
        return list((found or {}).get("items", []))

    def _say_what_it_waits_for(self, job: dict[str, Any], pods: Sequence[dict[str, Any]]) -> None:
        if _is(job, "Suspended"):
            self._say(f"TrainJob {self.name} waits in its queue: {_message(job, 'Suspended')}")
        for reason in filter(None, map(pod_waits_for, pods)):
            self._say(f"TrainJob {self.name}: a node waits: {reason}")
            break

    def _show_log(self, pods: Sequence[dict[str, Any]]) -> None:
        """Print what the main node has said since the last look."""
        for pod in pods:
            metadata = pod["metadata"]
            if _rank(pod) != "0":
                continue
            since = {"sinceTime": self._stamp} if self._stamp else {}
            text = self._api.text(f"{self._pods}/{metadata['name']}/log", container="node", timestamps="true", **since)
            # Not splitlines(): a progress bar returns the carriage, and what follows it has no timestamp.
            for line in text.split("\n"):
                stamp, _, content = line.partition(" ")
                if stamp > self._stamp:
                    self._stamp = stamp
                    print(content.rstrip("\r").rpartition("\r")[2], file=sys.stderr, flush=True)

    def _show_other_ends(self, pods: Sequence[dict[str, Any]]) -> None:
        """Print what the other nodes said at their end, if that was a failure of their own."""
        for pod in pods:
            codes = {end["exitCode"] for end in _container_ends(pod)} - _NO_FAULT - {0}
            if codes and _rank(pod) != "0":
                log = f"{self._pods}/{pod['metadata']['name']}/log"
                for line in self._api.text(log, container="node", tailLines=_TAIL_LINES).splitlines():
                    print(f"node {_rank(pod)}: {line}", file=sys.stderr, flush=True)

    def _say(self, line: str) -> None:
        if line != self._said:
            self._said = line
            print(line, file=sys.stderr, flush=True)


def _is(job: dict[str, Any], condition: str) -> bool:
    return any(item["type"] == condition and item["status"] == "True" for item in _conditions(job))


def _end(job: dict[str, Any]) -> str | None:
    return next((end for end in ("Complete", "Failed") if _is(job, end)), None)


def _rank(pod: dict[str, Any]) -> str:
    rank: str = pod["metadata"].get("labels", {}).get("batch.kubernetes.io/job-completion-index", "0")
    return rank


def _message(job: dict[str, Any], condition: str) -> str:
    return next((item.get("message", "") for item in _conditions(job) if item["type"] == condition), "")


def _conditions(job: dict[str, Any]) -> list[dict[str, Any]]:
    return list(job.get("status", {}).get("conditions") or [])


def _container_ends(pod: dict[str, Any]) -> list[dict[str, Any]]:
    states = [item.get("state", {}) for item in pod.get("status", {}).get("containerStatuses") or []]
    return [state["terminated"] for state in states if "terminated" in state]


class _StoppedError(Exception):
    """SIGTERM arrived."""


@contextmanager
def _stoppable() -> Iterator[None]:
    """Turn SIGTERM into an exception of the main thread, once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(signum: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        raise _StoppedError

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)
