"""Run a pipeline on this machine and follow it: the steps' events as they come, the results at the end."""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from finemill.errors import StepError
from finemill.pipelines.graph import SMALL, Pipeline
from finemill.tracking.progress import EVENTS_VARIABLE

STOP_TIMEOUT_S = 60.0
"""How long a step that was told to stop may take to save its state."""


def for_this_machine(pipeline: Pipeline) -> Pipeline:
    """The pipeline without what only a cluster needs: retries (there is no node to lose, a failed step would only fail
    again) and the steps that are `cluster_only`.

    Each task waits for the one before: one machine gains nothing from two at once, and kfp's local runner would take
    independent tasks in an order that changes from run to run.
    """
    kept = [task for task in pipeline.tasks if not task.step.cluster_only]
    tasks = [
        replace(task, retries=0, after=tuple(kept[position - 1 : position]), resources=SMALL)
        for position, task in enumerate(kept)
    ]
    return replace(pipeline, tasks=tuple(tasks))


class StepFailedError(StepError):
    """A step of a local run failed; carries its exit code."""

    def __init__(self, message: str, exit_code: int) -> None:
        super().__init__(message)
        self.exit_code = exit_code


@dataclass
class LocalRun:
    """What the steps of a run said: the newest event of each, by step name."""

    log_file: Path
    events: dict[str, dict[str, Any]] = field(default_factory=dict)

    @property
    def references(self) -> dict[str, str]:
        """The output's reference of each finished step."""
        return {step: event["reference"] for step, event in self.events.items() if "reference" in event}


def run_locally(
    pipeline: Pipeline,
    parameters: Mapping[str, Any],
    log_file: Path,
    on_event: Callable[[dict[str, Any]], None],
    environment: Mapping[str, str],
) -> LocalRun:
    """Run `pipeline` in a child process under kfp's local runner.

    Args:
        pipeline: what to run.
        parameters: a value for each of its parameters.
        log_file: gets everything kfp and the steps print.
        on_event: called with each event (`finemill.tracking.progress`) soon after it happened.
        environment: variables for the steps besides this process's own.
    Raises: StepFailedError: with the failed step's line and exit code. KeyboardInterrupt: after the steps were told.
    """
    version("kfp")  # without it the child would fail where only its log tells
    run = LocalRun(log_file)
    log_file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="finemill-run-") as scratch:
        events, request = Path(scratch, "events.jsonl"), Path(scratch, "request.json")
        events.touch()
        request.write_text(
            json.dumps(
                {
                    "pipeline": pipeline.name,
                    "parameters": dict(parameters),
                    "root": f"{scratch}/kfp",
                    "caller": os.getpid(),
                }
            )
        )
        child_environment = {**os.environ, **environment, **_own_variables(scratch), EVENTS_VARIABLE: str(events)}
        command = [sys.executable, "-m", "finemill.pipelines.local_process", str(request)]
        with log_file.open("wb") as log:
            child = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=child_environment, start_new_session=True
            )
        try:
            for event in _follow(events, child):
                if event["event"] not in ("progress", "warning") or event["step"] not in run.events:
                    run.events[event["step"]] = event
                on_event(event)
        finally:
            _stop(child)
    _raise_if_failed(run, child.returncode)
    return run


def _own_variables(scratch: str) -> dict[str, str]:
    """Variables that keep a run's processes apart from the user's working folder, and their leftovers in `scratch`."""
    temporary = Path(scratch, "tmp")
    temporary.mkdir()
    return {
        # The working folder is the user's: a `tokenizers.py` there is not the library.
        "PYTHONSAFEPATH": "1",
        # kfp leaves a folder of every step.
        "TMPDIR": str(temporary),
    }


def _follow(events: Path, child: "subprocess.Popen[bytes]") -> Iterator[dict[str, Any]]:
    """Yield the lines appended to a file until the child has ended."""
    with events.open() as file:
        unfinished, ended = "", False
        while True:
            unfinished += file.readline()
            if unfinished.endswith("\n"):
                yield json.loads(unfinished)
                unfinished = ""
            elif ended:
                return
            else:
                ended = child.poll() is not None
                time.sleep(0 if ended else 0.1)


def _stop(child: "subprocess.Popen[bytes]") -> None:
    """End the child and its steps; a step in training uses the time to save a checkpoint."""
    _signal_group(child.pid, signal.SIGTERM)
    deadline = time.monotonic() + STOP_TIMEOUT_S
    while _signal_group(child.pid, 0):
        child.poll()
        time.sleep(0.05)
        if time.monotonic() > deadline:
            _signal_group(child.pid, signal.SIGKILL)
    child.wait()


def _signal_group(group: int, number: int) -> bool:
    """Send a signal (0: none) to a process group. Returns: whether anybody is left in it."""
    try:
        os.killpg(group, number)
    except ProcessLookupError:
        return False
    return True


def _raise_if_failed(run: LocalRun, returncode: int) -> None:
    for event in run.events.values():
        if event["event"] == "failed":
            raise StepFailedError(f"{event['step']}: {event['text']} (log: {run.log_file})", event.get("exit_code", 1))
    if returncode:
        raise StepError(f"the local run ended with exit code {returncode}; its log is {run.log_file}")
