"""What a step says of itself while it runs: a line for people, and an event for whoever displays a whole pipeline."""

import json
import logging
import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Literal

from finemill.errors import UserError

EVENTS_VARIABLE = "FINEMILL_EVENTS"
"""A file to which every step of a local pipeline run appends its events, one JSON object a line."""

FORMAT_VARIABLE = "FINEMILL_PROGRESS"
"""`json` for an object a line on standard error in place of lines for people."""
_HINTS = ("bitsandbytes.backends.cpu.ops",)
"""Loggers of libraries that only say what would make a CPU faster."""

Event = Literal["started", "progress", "warning", "done", "reused", "failed"]
"""What a person is told."""
RecordedEvent = Literal["computing", "metrics"]
"""What only a recorder of the run needs: a step began to compute (not: found its output), values of a training step."""


def silence_progress_bars() -> None:
    """Keep other libraries' bars and hints out of the lines of steps; to be called before they are imported.

    A download from a model hub, which may take long, still shows itself on a terminal.
    """
    for name in _HINTS:
        logging.getLogger(name).setLevel(logging.ERROR)
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")


class Progress:
    """Lines `<step>: <text>` on stderr, and events in `$FINEMILL_EVENTS` if that is set.

    With `FINEMILL_PROGRESS=json` the events are what stderr gets, the values of training steps among them.

    Raises: UserError: the variable says something else.
    """

    def __init__(self, step: str) -> None:
        self.step = step
        self._events = os.environ.get(EVENTS_VARIABLE)
        kind = os.environ.get(FORMAT_VARIABLE) or "lines"
        if kind not in ("lines", "json"):
            raise UserError(f"{FORMAT_VARIABLE} is '{kind}': set it to lines or json, or leave it out")
        self._as_json = kind == "json"

    def emit(self, event: Event, text: str = "", **details: object) -> None:
        """Say `text`; `details` go into the event only."""
        if not self._as_json:
            line = text if event == "progress" else ": ".join(part for part in (event, text) if part)
            _say(f"{self.step}: {line}")
        self.record(event, text=text, **details)

    def record(self, event: Event | RecordedEvent, **details: object) -> None:
        """Write an event for who reads events."""
        line = json.dumps({"time": time.time(), "step": self.step, "event": event, **details})
        if self._as_json:
            _say(line)
        if self._events:
            with Path(self._events).open("a") as file:
                file.write(line + "\n")


def _say(line: str) -> None:
    # A log that is full, or that nobody reads any more, is no reason to end hours of work.
    with suppress(OSError):
        print(line, file=sys.stderr, flush=True)
