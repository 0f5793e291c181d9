"""Runs on Kubeflow Pipelines: compiled here, submitted to the API server, read back through it."""

import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from finemill.commands.kubernetes_client import PodLogs, load_client
from finemill.commands.run_status import Phase, RunStatus, StepStatus
from finemill.components.errors import StepError, TemporaryError, UserError
from finemill.components.steps import STEPS
from finemill.pipelines.cluster import ClusterConfig
from finemill.pipelines.graph import Pipeline

EXPERIMENT = "finemill"
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
        from kfp import Client

        self.host = host
        self.namespace = namespace or "kubeflow"
        self._multi_user = namespace
        self._cluster = cluster
        self._logs: dict[str, PodLogs | None] = {}
        with readable_errors(host), warnings.catch_warnings():
            # "This client only works with KFP 2", on every start.
            warnings.simplefilter("ignore", FutureWarning)
            self._client = Client(host=host, namespace=self.namespace)
            self._client._healthz_api.healthz_service_get_healthz()

    def submit(self, pipeline: Pipeline, parameters: Mapping[str, Any]) -> str:
        """Compile, upload and start a run in the experiment `finemill`."""
        with self._package(pipeline) as package, readable_errors(self.host):
            run = self._client.create_run_from_pipeline_package(
                package,
                arguments=dict(parameters),
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
        with self._package(pipeline) as package, readable_errors(self.host):
            experiment = self._client.create_experiment(EXPERIMENT, namespace=self._multi_user)
            earlier = self._client.list_recurring_runs(experiment_id=experiment.experiment_id, page_size=100)
            created = self._client.create_recurring_run(
                experiment.experiment_id,
                name,
                cron_expression=f"0 {cron}",
                max_concurrency=1,
                no_catchup=True,
                params=dict(parameters),
                pipeline_package_path=package,
                enable_caching=False,
            )
            for item in earlier.recurring_runs or []:
                if item.display_name == name:
                    self._client.delete_recurring_run(item.recurring_run_id)
        recurring_run_id: str = created.recurring_run_id
        return recurring_run_id

    def status(self, run: str) -> RunStatus:
        """The run's tasks by their display names: drivers and groups are KFP's own."""
        with readable_errors(self.host):
            answer = self._client.get_run(run)
        return read_run(answer)

    def new_log_lines(self, run: str) -> list[str]:
        """See `PodLogs`; none without access to the cluster itself."""
        if run not in self._logs:
            self._logs[run] = self._open_logs(run)
        logs = self._logs[run]
        return logs.new_lines() if logs else []

    def come_back(self, run: str) -> str:
        """The command that follows the run again."""
        return f"finemill watch {run} --engine kfp --host {self.host}"

    def _open_logs(self, run: str) -> PodLogs | None:
        try:
            return PodLogs(
                load_client(), self.namespace, f"pipeline/runid={run},component=workflow-pod", "app.kubernetes.io/name"
            )
        except StepError:
            return None

    @contextmanager
    def _package(self, pipeline: Pipeline) -> Iterator[str]:
        from finemill.pipelines.render_kfp import compile_kfp

        with tempfile.TemporaryDirectory(prefix="finemill-") as folder:
            file = Path(folder) / f"{pipeline.name}.yaml"
            compile_kfp(pipeline, {}, self._cluster, file)
            yield str(file)


@contextmanager
def readable_errors(host: str) -> Iterator[None]:
    """Turn an API error into one line that says what to do."""
    from kfp_server_api import ApiException
    from urllib3.exceptions import HTTPError

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
        raise TemporaryError(f"KFP at {host} is out of reach ({line}): check --host and the port-forward") from None


def read_run(run: Any) -> RunStatus:
    """The status of a run from the API server's answer."""
    details = (run.run_details.task_details if run.run_details else None) or []
    steps = [_step(task) for task in details if task.display_name in STEPS]
    order = list(STEPS)
    message = (run.error.message or "") if run.error else ""
    return RunStatus(
        run.run_id,
        _PHASES.get(run.state or "PENDING", "waiting"),
        message,
        tuple(sorted(steps, key=lambda step: order.index(step.name))),
    )


def _step(task: Any) -> StepStatus:
    end = task.end_time if task.end_time and task.end_time.year > 1970 else datetime.now(UTC)
    seconds = (end - task.start_time).total_seconds() if task.start_time else 0.0
    message = task.error.message if task.error else ""
    return StepStatus(
        task.display_name, _PHASES.get(task.state or "PENDING", "waiting"), seconds, message=message or ""
    )
