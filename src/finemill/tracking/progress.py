"""What a step says of itself while it runs: a line for people, and an event for whoever displays a whole pipeline."""

import json
import os
import sys
import time
from pathlib import Path
from typing import Literal

EVENTS_VARIABLE = "FINEMILL_EVENTS"
"""A file to which every step of a local pipeline run appends its events, one JSON object a line."""

Event = Literal["started", "progress", "warning", "done", "reused", "failed"]
"""What a person is told."""
RecordedEvent = Literal["computing", "metrics"]
"""What only a recorder of the run needs: a step began to compute (not: found its output), values of a training step."""


def silence_progress_bars() -> None:
    """Keep other libraries' bars out of the lines of steps; to be called before they are imported.

    A download from a model hub, which may take long, still shows itself on a terminal.
    """
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


class Progress:
    """Lines `<step>: <text>` on stderr, and events in `$FINEMILL_EVENTS` if that is set."""

    def __init__(self, step: str) -> None:
        self.step = step
        self._events = os.environ.get(EVENTS_VARIABLE)

    def emit(self, event: Event, text: str = "", **details: object) -> None:
        """Say `text`; `details` go into the event only."""
        line = text if event == "progress" else ": ".join(part for part in (event, text) if part)
        print(f"{self.step}: {line}", file=sys.stderr, flush=True)
        self.record(event, text=text, **details)

    def record(self, event: Event | RecordedEvent, **details: object) -> None:
        """Write an event without saying anything."""
        if self._events:
            record = {"time": time.time(), "step": self.step, "event": event, **details}
            with Path(self._events).open("a") as file:
                file.write(json.dumps(record) + "\n")
