"""What a run in a cluster is doing, in the same words for both engines."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from finemill.pipelines.graph import Pipeline

START_TIMEOUT_S = 24 * 3600
"""How long a step may wait for a place in the cluster, a GPU as a rule, unless the caller says otherwise."""

Phase = Literal["waiting", "running", "done", "failed", "skipped"]


@dataclass(frozen=True)
class StepStatus:
    """One step of a run.

    `blocked`: it cannot start until somebody mends what `message` says. `unplaced_s`: for how many seconds its pod has
    had no place in the cluster, as no node has a free GPU.
    """

    name: str
    phase: Phase
    seconds: float = 0.0
    attempts: int = 1
    message: str = ""
    blocked: bool = False
    unplaced_s: float = 0.0
    exit_code: int | None = None
    verdict: tuple[str, str] | None = None


@dataclass(frozen=True)
class RunStatus:
    """A run and its steps, in the pipeline's order. `claimed`: whether the engine's controller has taken it up."""

    name: str
    phase: Phase
    message: str = ""
    steps: Sequence[StepStatus] = field(default_factory=tuple)
    claimed: bool = True

    @property
    def ended(self) -> bool:
        """Whether nothing more will happen."""
        return self.phase in ("done", "failed")

    @property
    def exit_code(self) -> int:
        """0, or the exit code of the failed step: 1 where the engine hides it."""
        if self.phase != "failed":
            return 0
        return next((step.exit_code for step in self.steps if step.phase == "failed" and step.exit_code), 1)


class Engine(Protocol):
    """A system that runs pipelines."""

    def submit(self, pipeline: Pipeline, parameters: Mapping[str, Any]) -> str:
        """Start a run. Returns: its name or id. Raises: StepError: it cannot be started, and why."""

    def schedule(self, pipeline: Pipeline, parameters: Mapping[str, Any], cron: str, timezone: str | None) -> str:
        """Run the pipeline on a schedule, in place of an earlier one. Returns: its name or id."""

    def status(self, run: str) -> RunStatus:
        """Raises: UserError: there is no such run."""

    def new_log_lines(self, run: str) -> list[str]:
        """Lines `<step>  <text>` that the steps have written since the last call."""

    def stop(self, run: str) -> None:
        """End the run and what it has in the cluster."""

    def come_back(self, run: str) -> str:
        """The command that follows the run again."""
