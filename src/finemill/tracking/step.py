"""What a step records while it runs: progress always, and an MLflow run if there is a place for it.

Under `finemill run` the step only says what happens, in the events that the display follows too, and the one process
that started the run records it (`pipeline.py`): importing MLflow once a run instead of once a step saves half a minute.
"""

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from finemill.artifacts.manifest import Manifest, Producer, Reference
from finemill.config import StepConfig
from finemill.errors import StepError
from finemill.tracking.describe import StepDescription
from finemill.tracking.progress import Progress
from finemill.tracking.server import open_client, readable_errors
from finemill.tracking.settings import Tracking

logger = logging.getLogger(__name__)

RECORDER_VARIABLE = "FINEMILL_RECORDER"
"""`events`: another process reads the events and records them."""


class StepRun:
    """Shows progress, and leaves the recording to whoever follows the events."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Say the values of one training step."""
        self.progress.record("metrics", metrics=dict(metrics), training_step=step)

    def log_progress(self, text: str) -> None:
        """Show one short line about where the step is."""
        self.progress.emit("progress", text)

    def finish(self, reference: Reference, manifest: Manifest) -> None:
        """Record the step's metrics and the link to its output, which is published already."""


class MlflowRun(StepRun):
    """Records in this process. Once the step has begun, trouble with MLflow costs a line, never the result."""

    def __init__(
        self, progress: Progress, tracking: Tracking, store: str, made_by: Producer, step: StepDescription
    ) -> None:
        super().__init__(progress)
        self._tracking = tracking
        self._client = open_client(tracking.runs)
        from finemill.tracking.parent import start_step
        from finemill.tracking.record import MetricSender

        with readable_errors(tracking.runs):
            self._record = start_step(self._client, tracking, store, made_by, step)
        self._sender = MetricSender(self._record)

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Say and queue values of one training step."""
        super().log_metrics(metrics, step)
        self._sender.add(metrics, step)

    def finish(self, reference: Reference, manifest: Manifest) -> None:
        """Record the step's metrics and the link to its output."""
        with self._tolerated():
            self._sender.close()
            self._record.finish(reference, manifest)
            self._follow()

    def fail(self, line: str, status: str, warnings: Sequence[str]) -> None:
        """End the run, saying why and what was warned of before."""
        with self._tolerated():
            self._sender.close()
            self._record.warn(warnings)
            self._record.fail(line, status)
            self._follow()

    def _follow(self) -> None:
        from finemill.tracking.parent import follow_steps

        follow_steps(self._client, self._tracking, self._record)

    @contextmanager
    def _tolerated(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            logger.warning("not everything is recorded in MLflow (%s)", " ".join(str(error).split())[:200])


@contextmanager
def step_run(
    name: str,
    *,
    config: StepConfig,
    inputs: Mapping[str, str],
    made_by: Producer,
    store: str,
    run_id: str | None,
    tracking: Tracking,
    progress: Progress,
    warnings: Sequence[str] = (),
) -> Iterator[StepRun]:
    """The MLflow run of a step; ended as failed, with the `warnings` there are by then, when the block raises.

    Raises: UserError, TemporaryError: `tracking` names no tracking server, or nothing answers there. In seconds, and
        before the block has begun.
    """
    if tracking.uri is None:
        yield StepRun(progress)
        return
    step = StepDescription.of_call(name, config.model_dump(mode="json"), inputs, made_by, run_id)
    if os.environ.get(RECORDER_VARIABLE) == "events":
        progress.record("computing", params=step.params, tags=step.tags, run_id=run_id)
        yield StepRun(progress)
        return
    run = MlflowRun(progress, tracking, store, made_by, step)
    try:
        yield run
    except BaseException as error:
        expected = isinstance(error, StepError)
        line = str(error) if expected else f"{type(error).__name__}: {error}"
        run.fail(line, "FAILED" if isinstance(error, Exception) else "KILLED", warnings)
        raise
