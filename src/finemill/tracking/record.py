"""Writing one step's MLflow run: parameters, tags, live metrics, results, end."""

import json
import threading
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from finemill.artifacts.manifest import Manifest, Reference
from finemill.artifacts.metrics import is_total
from finemill.credentials import without_credentials
from finemill.tracking.abandoned import process_tags
from finemill.tracking.describe import INPUT_TAG, OUTPUT_TAG, WARNINGS_TAG, StepDescription
from finemill.tracking.shown import NOTE_TAG, show_files

if TYPE_CHECKING:
    from mlflow import MlflowClient

PARENT_TAG = "mlflow.parentRunId"
_MAX_PARAMS_PER_BATCH = 100
_MAX_METRICS_PER_BATCH = 1000
_MAX_TAG_LENGTH = 5000
_DATASET_DIGEST_LENGTH = 36
# What a parent run takes over of its steps' tags.
_LINEAGE = (
    "dataset.digest",
    "base_model.id",
    "base_model.revision",
    "image",
    "image.digest",
    "git.sha",
    "finemill.version",
)
FLUSH_INTERVAL_S = 2.0

Point = tuple[str, float, int, int]
"""A metric's name, value, time in milliseconds, and training step."""


def points(metrics: Mapping[str, float], step: int) -> list[Point]:
    """Values of one training step, measured now."""
    now = int(time.time() * 1000)
    return [(name, float(value), now, step) for name, value in metrics.items()]


class StepRecord:
    """One run in MLflow. Every method may raise MLflow's exceptions."""

    def __init__(self, client: "MlflowClient", run_id: str, parent_id: str | None, *, owned: bool = True) -> None:
        """`owned`: whether this project started the run, and so ends it; KFP ends the runs that its plugin starts."""
        self.client = client
        self.run_id = run_id
        self.parent_id = parent_id
        self._owned = owned
        self._live: set[str] = set()

    @classmethod
    def start(
        cls,
        client: "MlflowClient",
        experiment_id: str,
        parent_id: str | None,
        step: StepDescription,
        *,
        start_time: int | None = None,
    ) -> "StepRecord":
        """Start a run for `step`, nested under `parent_id` if there is one; times in milliseconds, now by default."""
        parent = {PARENT_TAG: parent_id} if parent_id else {}
        tags = {**step.tags, **parent, **process_tags()}
        run = client.create_run(experiment_id, run_name=step.name, tags=tags, start_time=start_time)
        record = cls(client, run.info.run_id, parent_id)
        record.log_params(step.params)
        log_dataset(client, record.run_id, step)
        if parent_id:
            set_lineage(client, parent_id, step)
        return record

    def log_params(self, params: Mapping[str, str]) -> None:
        """Record parameters, as many a request as MLflow takes."""
        log_params(self.client, self.run_id, params)

    def log_points(self, batch: list[Point]) -> None:
        """Record points of live curves."""
        self._live |= {name for name, *_ in batch}
        from mlflow.entities import Metric

        for start in range(0, len(batch), _MAX_METRICS_PER_BATCH):
            part = batch[start : start + _MAX_METRICS_PER_BATCH]
            self.client.log_batch(self.run_id, metrics=[Metric(*point) for point in part], synchronous=True)

    def warn(self, lines: Sequence[str]) -> None:
        """Tag the run with all of its warnings."""
        if lines:
            warnings = without_credentials("\n".join(lines))
            self.client.set_tag(self.run_id, WARNINGS_TAG, warnings[:_MAX_TAG_LENGTH])

    def finish(self, reference: Reference, manifest: Manifest, *, end_time: int | None = None) -> None:
        """Record the step's metrics, the totals also on the parent, and the link to its output; end the run."""
        place = without_credentials(str(reference))
        self.client.set_tag(self.run_id, OUTPUT_TAG, place)
        self.client.set_tag(self.run_id, NOTE_TAG, f"Output: `{place}`")
        self.warn(manifest.warnings)
        # A final value under a curve's name would be a point of the curve.
        self.log_points(points({name: x for name, x in manifest.metrics.items() if name not in self._live}, 0))
        if self.parent_id and self._owned:
            totals = {name: value for name, value in manifest.metrics.items() if is_total(name)}
            StepRecord(self.client, self.parent_id, None).log_points(points(totals, 0))
        if self._owned:
            self.client.set_terminated(self.run_id, "FINISHED", end_time)
        show_files(self.client, self.run_id, self.parent_id if self._owned else None, reference, manifest)

    def fail(self, line: str, status: str = "FAILED", *, end_time: int | None = None) -> None:
        """End the run as failed or killed, with the line that says why."""
        self.client.set_tag(self.run_id, NOTE_TAG, without_credentials(line))
        if self._owned:
            self.client.set_terminated(self.run_id, status, end_time)


def log_params(client: "MlflowClient", run_id: str, params: Mapping[str, str]) -> None:
    """Record parameters. Those that are there already stay: MLflow refuses to change one."""
    from mlflow.entities import Param

    standing = client.get_run(run_id).data.params
    new = [Param(key, value) for key, value in params.items() if key not in standing]
    for start in range(0, len(new), _MAX_PARAMS_PER_BATCH):
        client.log_batch(run_id, params=new[start : start + _MAX_PARAMS_PER_BATCH], synchronous=True)


def log_dataset(client: "MlflowClient", run_id: str, step: StepDescription) -> None:
    """Record the dataset as MLflow's own input, which its pages show in a column."""
    from mlflow.entities import Dataset, DatasetInput

    digest, uri = step.tags.get("dataset.digest"), step.tags.get(f"{INPUT_TAG}dataset")
    if digest and uri:
        source = json.dumps({"uri": uri})
        dataset = Dataset("dataset", digest[:_DATASET_DIGEST_LENGTH], source_type=urlsplit(uri).scheme, source=source)
        client.log_inputs(run_id, [DatasetInput(dataset)])


def set_lineage(client: "MlflowClient", run_id: str, step: StepDescription) -> None:
    """Copy to the parent run what its steps know of data, base model and code: one looks for runs by that."""
    from mlflow.entities import RunTag

    log_dataset(client, run_id, step)
    tags = [RunTag(key, step.tags[key]) for key in _LINEAGE if key in step.tags]
    client.log_batch(run_id, tags=tags, synchronous=True)


class MetricSender:
    """Sends live metrics from a thread, so that a slow or absent server does not hold up a training."""

    def __init__(self, record: StepRecord) -> None:
        self._record = record
        self._pending: list[Point] = []
        self._lock = threading.Lock()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def add(self, metrics: Mapping[str, float], step: int) -> None:
        """Queue values of one training step."""
        with self._lock:
            self._pending += points(metrics, step)
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="mlflow-metrics", daemon=True)
            self._thread.start()

    def close(self) -> None:
        """Send what is left. Raises: MLflow's exception if that fails."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()
        self._send()

    def _run(self) -> None:
        while not self._stop.wait(FLUSH_INTERVAL_S):
            try:
                self._send()
            except Exception:  # whatever it is, the points are kept and `close` tries again
                self._stop.wait(10 * FLUSH_INTERVAL_S)

    def _send(self) -> None:
        with self._lock:
            batch, self._pending = self._pending, []
        try:
            self._record.log_points(batch)
        except Exception:
            with self._lock:
                self._pending = batch + self._pending
            raise


def event_points(event: Mapping[str, Any]) -> list[Point]:
    """The points of a `metrics` event."""
    return [
        (name, value, int(event["time"] * 1000), event["training_step"]) for name, value in event["metrics"].items()
    ]
