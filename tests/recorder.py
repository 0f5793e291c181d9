"""What a step records, kept in lists."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from finemill.runtime.context import StepContext


@dataclass
class ListRecorder:
    """Keeps the points of metrics and the lines of progress."""

    points: list[tuple[int, dict[str, float]]] = field(default_factory=list)
    lines: list[str] = field(default_factory=list)
    on_progress: Callable[[str], None] = lambda text: None

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        self.points.append((step, dict(metrics)))

    def log_progress(self, text: str) -> None:
        self.lines.append(text)
        self.on_progress(text)


def recorded(context: StepContext) -> ListRecorder:
    """What a step recorded that got this context."""
    assert isinstance(context.recorder, ListRecorder)
    return context.recorder
