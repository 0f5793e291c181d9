"""Runs on Kubeflow Pipelines: compiled here, submitted to the API server, read back through it."""

import json
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, redirect_stdout
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finemill.commands.kfp_pods import KFPPods, StepFacts
from finemill.commands.kubernetes_client import load_client
from finemill.commands.run_status import Phase, RunStatus, StepStatus
from finemill.errors import StepError, TemporaryError, UserError
from finemill.pipelines.catalog import PIPELINES
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.parameters import SUBMITTED_CHARACTERS, for_kfp
from finemill.runtime.catalog import STEPS

EXPERIMENT = "finemill"
SETTLE_S = 15.0
"""How long after its end a run's tasks may still be those of before: KFP writes the run first, then the tasks."""
_UNFINISHED = ("PENDING", "RUNNING")
_PHASES: Mapping[str, Phase] = {
    "PENDING": "waiting",
    "RUNNING": "running",
    "PAUSED": "running",
    "CANCELING": "running",
    "SUCCEEDED": "done",
    "SKIPPED": "skipped",
    "FAILED": "failed",
    "CANCELED": "failed",
}


class KFPEngine:
    """The KFP API server at `host`; logs come from the cluster in KUBECONFIG if there is one."""

    def __init__(self, host: str, namespace: str | None, cluster: ClusterConfig) -> None:
        self.host = host
        self.namespace = namespace or "kubeflow"
        self._multi_user = namespace
        self._cluster = cluster
        self._pods: dict[str, KFPPods | None] = {}
        self._lines: list[str] = []
        self._client = _open_client(host, self.namespace)

    def submit(self, pipeline: Pipeline, parameters: Mapping[str, Any]) -> str:
        """Compile, upload and start a run in the experiment `finemill`."""
        # The client prints links, and standard output is for the run's id.
        with self._package(pipeline) as package, readable_errors(self.host), redirect_stdout(sys.stderr):
            run = self._client.create_run_from_pipeline_package(
                package,
                arguments=for_kfp(parameters, SUBMITTED_CHARACTERS),
                run_name=f"{pipeline.name} {datetime.now(UTC):%Y-%m-%d %H:%M:%S}",
                experiment_name=EXPERIMENT,
                namespace=self._multi_user,
                enable_caching=False,
            )
        run_id: str = run.run_id
        return run_id

    def schedule(self, pipeline: Pipeline, parameters: Mapping[str, Any], cron: str, timezone: str | None) -> str:
        """Make a recurring run: one at a time, no catch-up. KFP's own cron has the seconds first and no time zone."""
        if timezone:
            raise UserError("KFP knows no time zone for a schedule, it counts in UTC: leave --timezone out")
        name = f"finemill-{pipeline.name}"
        with self._package(pipeline) as package, readable_errors(self.host), redirect_stdout(sys.stderr):
            experiment = self._client.create_experiment(EXPERIMENT, namespace=self._multi_user)
            earlier = self._recurring_runs(experiment.experiment_id, name)
            created = self._client.create_recurring_run(
                experiment.experiment_id,
                name,
                cron_expression=f"0 {cron}",
                max_concurrency=1,
                no_catchup=True,
                params=for_kfp(parameters, SUBMITTED_CHARACTERS),
                pipeline_package_path=package,
                enable_caching=False,
            )
            for recurring_run in earlier:
                # A run of the old schedule that is under way goes on: it would be deleted with its owner.
                self._client._recurring_run_api.recurring_run_service_delete_recurring_run(
                    recurring_run_id=recurring_run, propagation_policy="ORPHAN"
                )
        recurring_run_id: str = created.recurring_run_id
        return recurring_run_id

    def _recurring_runs(self, experiment: str, name: str) -> list[str]:
        """The ids of all recurring runs of that name, over all pages."""
        found, token = [], ""
        while True:
            page = self._client.list_recurring_runs(page_token=token, page_size=100, experiment_id=experiment)
            found += [item.recurring_run_id for item in page.recurring_runs or [] if item.display_name == name]
            token = page.next_page_token or ""
            if not token:
                return found

    def status(self, run: str) -> RunStatus:
        """The run's tasks by their display names, and what their pods tell; drivers and groups are KFP's own."""
        with readable_errors(self.host):
            answer = self._settled(run)
        if run not in self._pods:
            self._pods[run] = self._open_pods(run)
        pods = self._pods[run]
        if pods:
            try:
                self._lines += pods.read()
            except TemporaryError:
                pass  # the next call reads on
            except UserError:
                self._pods[run] = None
        return read_run(answer, pods.facts if pods else {})

    def _settled(self, run: str) -> Any:
        """The run; once it has ended, with its tasks as they ended too."""
        deadline = time.monotonic() + SETTLE_S
        while True:
            answer = self._client.get_run(run)
            ended = _PHASES.get(answer.state or "PENDING") in ("done", "failed")
            if (
                not ended
                or time.monotonic() > deadline
                or all(task.state not in _UNFINISHED for task in _tasks(answer))
            ):
                return answer
            time.sleep(1)

    def new_log_lines(self, run: str) -> list[str]:
        """The lines that came with the last status; none without access to the cluster itself."""
        lines, self._lines = self._lines, []
        return lines

    def stop(self, run: str) -> None:
        """Terminate the run."""
        with readable_errors(self.host):
            self._client.terminate_run(run)

    def come_back(self, run: str) -> str:
        """The command that follows the run again."""
        place = f" --namespace {self._multi_user}" if self._multi_user else ""
        return f"finemill watch {run} --engine kfp --host {self.host}{place}"

    def _open_pods(self, run: str) -> KFPPods | None:
        try:
            return KFPPods(load_client(), self.namespace, run)
        except StepError:
            return None

    @contextmanager
    def _package(self, pipeline: Pipeline) -> Iterator[str]:
        from finemill.pipelines.render_kfp import compile_kfp

        with tempfile.TemporaryDirectory(prefix="finemill-") as folder:
            file = Path(folder) / f"{pipeline.name}.yaml"
            compile_kfp(pipeline, {}, self._cluster, file)
            yield str(file)


def _open_client(host: str, namespace: str) -> Any:
    """kfp's client of a server that is one. Raises: UserError: something else answers there, a login page as a rule."""
    from kfp import Client

    class AskingOnce(Client):  # type: ignore[misc]
        """kfp's own asks five times, whatever the answer is, and drops it."""

        def get_kfp_healthz(self, sleep_duration: int = 0) -> Any:
            return self._healthz_api.healthz_service_get_healthz()

    with readable_errors(host), warnings.catch_warnings():
        # "This client only works with KFP 2", on every start.
        warnings.simplefilter("ignore", FutureWarning)
        client = AskingOnce(host=host, namespace=namespace)
        # kfp takes any text for an answer without fields.
        answer = client._healthz_api.healthz_service_get_healthz(_preload_content=False).data
    try:
        is_kfp = isinstance(json.loads(answer), dict)
    except ValueError:
        is_kfp = False
    if not is_kfp:
        raise UserError(
            f"what answers at {host} is not KFP but a page, of a login as a rule: give its API's own address, through "
            "a port-forward for instance"
        )
    return client


@contextmanager
def readable_errors(host: str) -> Iterator[None]:
    """Turn an API error into one line that says what to do."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError, LocationValueError, SSLError

    try:
        yield
    except ApiException as error:
        text = " ".join(str(error.body or error.reason).split())[:300]
        if error.status in (401, 403):
            raise UserError(f"KFP at {host} refuses ({error.status}): {text}") from None
        if error.status == 404:
            raise UserError(f"KFP at {host} knows no such run or pipeline: {text}") from None
        kind: Callable[[str], StepError] = TemporaryError if error.status in (429, 500, 502, 503, 504) else UserError
        raise kind(f"KFP at {host} answers {error.status}: {text}") from None
    except (HTTPError, OSError, TimeoutError) as error:
        line = " ".join(str(error).split())[:200]
        if isinstance(error, LocationValueError):
            raise UserError(f"--host {host}: {line}: write http(s)://host:port") from None
        if isinstance(getattr(error, "reason", error), SSLError):
            raise UserError(
                f"KFP at {host}: no trusted connection ({line}): give a host whose certificate a public authority has "
                "signed, or http:// through a port-forward"
            ) from None
        raise TemporaryError(f"KFP at {host} is out of reach ({line}): check --host and the port-forward") from None


def read_run(run: Any, facts: Mapping[str, StepFacts]) -> RunStatus:
    """The status of a run from the API server's answer, and what is known of its steps besides."""
    phase = _PHASES.get(run.state or "PENDING", "waiting")
    tasks = {task.display_name: task for task in _tasks(run)}
    terminated = any(entry.state == "CANCELING" for entry in run.state_history or [])
    steps = [
        _step(tasks[name], tasks.get(f"{name}-driver"), phase, terminated, facts.get(name, StepFacts()))
        for name in STEPS
        if name in tasks
    ]
    if any(name.startswith("condition-") and task.state == "SKIPPED" for name, task in tasks.items()):
        steps = [replace(step, verdict=_refusal(step)) for step in steps]
    message = (run.error.message or "") if run.error else ""
    if phase == "failed" and not message:
        own = [name for name, task in tasks.items() if name.endswith("-driver") and _failed(task)]
        message = "terminated" if terminated else " and ".join(f"{name} of KFP failed, see its log" for name in own)
    return RunStatus(run.run_id, phase, message, tuple(steps))


def _tasks(run: Any) -> list[Any]:
    return (run.run_details.task_details if run.run_details else None) or []


def _failed(task: Any) -> bool:
    return _PHASES.get(task.state or "") == "failed"


def _step(task: Any, driver: Any, run_phase: Phase, terminated: bool, facts: StepFacts) -> StepStatus:
    phase = _PHASES.get(task.state or "", "waiting")
    message = facts.blocked
    if driver is not None and _failed(driver):
        phase, message = "failed", f"KFP's driver failed before it began, see the log of {driver.display_name}"
    elif phase == "failed":
        message = "terminated" if terminated else "why is in its log: see KFP's pages, or set KUBECONFIG"
    elif phase == "waiting" and run_phase in ("done", "failed"):
        phase = "skipped"
    elif phase == "running" and facts.pending and not facts.blocked:
        # KFP calls a task running as soon as its pod is asked for; it may wait long for a GPU.
        phase, message = "waiting", facts.unplaced
    end = task.end_time if task.end_time and task.end_time.year > 1970 else datetime.now(UTC)
    return StepStatus(
        task.display_name,
        phase,
        (end - task.start_time).total_seconds() if task.start_time else 0.0,
        attempts=facts.attempts,
        message=message,
        blocked=bool(facts.blocked) and phase == "running",
        unplaced_s=facts.unplaced_s if phase == "waiting" else 0.0,
        exit_code=facts.exit_code,
        verdict=facts.verdict,
    )


def _refusal(step: StepStatus) -> tuple[str, str] | None:
    """The no that left the rest of a pipeline out: KFP tells of a condition only that it was skipped."""
    gates = {task.when.name for pipeline in PIPELINES.values() for task in pipeline.tasks if task.when}
    verdict = STEPS[step.name].verdict
    return (verdict, "false") if verdict and step.name in gates else step.verdict
