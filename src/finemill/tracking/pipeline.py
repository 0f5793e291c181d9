"""The MLflow run of a whole pipeline on this machine: one process records what the steps say of themselves."""

import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from finemill.artifacts.manifest import Reference
from finemill.config import StepConfig
from finemill.storage.store import read_artifact
from finemill.tracking.abandoned import end_abandoned_runs, process_tags
from finemill.tracking.describe import REUSED_TAG, RUN_ID_TAG, STEP_TAG, StepDescription, flatten
from finemill.tracking.server import check_reachable, find_experiment, open_client, readable_errors
from finemill.tracking.settings import Tracking
from finemill.tracking.step import RECORDER_VARIABLE

if TYPE_CHECKING:
    from mlflow import MlflowClient

    from finemill.tracking.record import Point, StepRecord

# Importing MLflow on a busy machine, and what a server that stays away may cost at the end.
_CLOSE_TIMEOUT_S = 90.0
# Metrics that arrive within this time go to MLflow in one request.
_GATHER_S = 1.0
_RECORDED = ("computing", "metrics", "warning", "done", "reused", "failed")


class PipelineRun:
    """Takes the steps' events and records them from a thread, so that the display never waits for MLflow."""

    environment: Mapping[str, str] = {RECORDER_VARIABLE: "events"}
    """Variables for the steps."""

    def __init__(self, name: str, params: Mapping[str, str], tracking: Tracking) -> None:
        self._name = name
        self._params = params
        self._tracking = tracking
        self._events: queue.Queue[Mapping[str, Any]] = queue.Queue()
        self._closing = threading.Event()
        self._status = "FINISHED"
        self._start_time = int(time.time() * 1000)
        self._start_error: Exception | None = None
        self._lost: Exception | None = None
        self._thread = threading.Thread(target=self._run, name="mlflow-recorder", daemon=True)
        self._thread.start()

    def record(self, event: Mapping[str, Any]) -> None:
        """Take an event of `finemill.tracking.progress`. Raises: StepError: the run cannot be recorded at all."""
        if self._start_error is not None:
            raise self._start_error
        if event["event"] in _RECORDED:
            self._events.put(event)

    def close(self, status: str) -> str | None:
        """Record what is left and end the run. Returns: why something is missing, None if nothing is."""
        self._status = status
        self._closing.set()
        self._thread.join(_CLOSE_TIMEOUT_S)
        if self._thread.is_alive():
            return f"no answer for {_CLOSE_TIMEOUT_S:.0f} s"
        error = self._start_error or self._lost
        return " ".join(str(error).split())[:300] if error else None

    def _run(self) -> None:
        try:
            client = open_client(self._tracking.runs)
            with readable_errors(self._tracking.runs):
                writer = _Writer(client, self._tracking, self._name, self._params, self._start_time)
        except Exception as error:
            self._start_error = error
            return
        while not (self._closing.wait(_GATHER_S) and self._events.empty()):
            events = [self._events.get() for _ in range(self._events.qsize())]
            self._tolerate(lambda events=events: writer.write(events))  # type: ignore[misc]
        self._tolerate(lambda: writer.end(self._status))

    def _tolerate(self, write: Callable[[], None]) -> None:
        """A server that goes away while the steps run costs the record, not the run."""
        try:
            write()
        except Exception as error:
            self._lost = self._lost or error


class _Writer:
    """The runs of one pipeline run in MLflow: the parent, and by name those of the steps that have begun."""

    def __init__(
        self, client: "MlflowClient", tracking: Tracking, name: str, params: Mapping[str, str], start_time: int
    ) -> None:
        from finemill.tracking.record import log_params

        self._client = client
        self._experiment = find_experiment(client, tracking)
        end_abandoned_runs(client, self._experiment)
        run = client.create_run(
            self._experiment,
            start_time=start_time,
            run_name=name,
            tags={"pipeline.name": name, "mlflow.source.name": f"finemill run {name}", **process_tags()},
        )
        self._parent: str = run.info.run_id
        self._open: dict[str, StepRecord] = {}
        self._warnings: dict[str, list[str]] = {}
        self._ends: list[str] = []
        log_params(client, self._parent, params)

    def write(self, events: list[Mapping[str, Any]]) -> None:
        """Record events in order; a step's metrics between two others in one request."""
        from finemill.tracking.record import event_points

        waiting: dict[str, list[Point]] = {}
        for event in events:
            if event["event"] == "metrics":
                waiting.setdefault(event["step"], []).extend(event_points(event))
            else:
                self._send(waiting)
                self._write_one(event)
        self._send(waiting)

    def end(self, status: str) -> None:
        """End the parent run, and the runs of steps that said nothing more."""
        for record in self._open.values():
            record.fail("the step reported nothing more", "KILLED")
        if self._ends and set(self._ends) == {"reused"}:
            self._client.set_tag(self._parent, REUSED_TAG, "true")
        self._client.set_terminated(self._parent, status)

    def _send(self, waiting: "dict[str, list[Point]]") -> None:
        for step, batch in waiting.items():
            if step in self._open:
                self._open[step].log_points(batch)
        waiting.clear()

    def _write_one(self, event: Mapping[str, Any]) -> None:
        name, kind, end_time = event["step"], event["event"], int(event["time"] * 1000)
        if kind == "computing":
            self._open[name] = self._start(
                StepDescription(name, event["params"], event["tags"], event["run_id"]), end_time
            )
        elif kind == "warning" and name in self._open:
            self._warnings.setdefault(name, []).append(event["text"])
            self._open[name].warn(self._warnings[name])
        elif kind == "failed" and name in self._open:
            self._open.pop(name).fail(event["text"], end_time=end_time)
        elif kind in ("done", "reused"):
            reference = Reference.parse(event["reference"])
            if kind == "reused":
                self._open[name] = self._start(
                    StepDescription(name, {}, {STEP_TAG: name, REUSED_TAG: "true"}), end_time
                )
            self._ends.append(kind)
            self._open.pop(name).finish(reference, read_artifact(reference), end_time=end_time)

    def _start(self, step: StepDescription, start_time: int) -> "StepRecord":
        from finemill.tracking.record import StepRecord

        if step.run_id:
            self._client.set_tag(self._parent, RUN_ID_TAG, step.run_id)
        return StepRecord.start(self._client, self._experiment, self._parent, step, start_time=start_time)


@contextmanager
def parent_run(name: str, config: StepConfig, tracking: Tracking) -> Iterator[PipelineRun]:
    """Record a run of the pipeline `name`; it ends as the block ends.

    Raises: UserError, TemporaryError: `tracking` names no place, or nothing answers there; in seconds.
    """
    check_reachable(tracking.runs)
    run = PipelineRun(name, flatten(config.model_dump(mode="json", by_alias=True)), tracking)
    status = "KILLED"
    try:
        yield run
        status = "FINISHED"
    except Exception:
        status = "FAILED"
        raise
    finally:
        missing = run.close(status)
        if missing:
            print(f"finemill run: warning: not everything is recorded in MLflow ({missing})", file=sys.stderr)
