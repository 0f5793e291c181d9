"""Follow a run to its end: a live table on a terminal, a line per change elsewhere, and between them the
steps' warnings or whole logs.
"""

import sys
import time
from collections.abc import Mapping
from typing import TextIO

from finemill.commands.run_status import START_TIMEOUT_S, Engine, RunStatus, StepStatus
from finemill.errors import TemporaryError, UserError

POLL_S = 2.0
BLOCKED_S = 30.0
"""How long a step may wait for an image or a secret before that counts as the user's error."""
UNCLAIMED_S = 300.0
"""How long a run may wait for the engine's controller to take it up."""
OUT_OF_REACH_S = 300.0
"""How long the cluster may be out of reach while a run is followed."""


class RunTable:
    """Shows a run's status; on a terminal the table stays below the log lines."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._live = stream.isatty()
        self._height = 0
        self._shown: dict[str, tuple[str, int, str]] = {}

    def show(self, status: RunStatus, log_lines: list[str]) -> None:
        """Print the new log lines, then the table or its changes."""
        if self._live and self._height:
            self._stream.write(f"\033[{self._height}A\033[J")
        for line in log_lines:
            self._stream.write(f"{line}\n")
        rows = table_rows(status)
        if self._live:
            self._stream.write("".join(f"{row}\n" for row in rows))
            self._height = len(rows)
        else:
            for step, row in zip(status.steps, rows[1:], strict=True):
                state = (step.phase, step.attempts, step.message)
                if state != self._shown.get(step.name, ("waiting", 1, "")):
                    self._stream.write(f"{row}\n")
                    self._shown[step.name] = state
        self._stream.flush()


def table_rows(status: RunStatus) -> list[str]:
    """The run's own line, then one per step."""
    width = max([len(step.name) for step in status.steps] + [len(status.name)])
    return [f"{status.name:<{width}}  {status.phase}", *(_row(step, width) for step in status.steps)]


def _row(step: StepStatus, width: int) -> str:
    seconds = f"{step.seconds:7.0f} s" if step.phase in ("running", "done", "failed") else " " * 9
    attempts = f"  attempt {step.attempts}" if step.attempts > 1 else ""
    verdict = f"  {step.verdict[0]}: {step.verdict[1]}" if step.verdict else ""
    message = f"  {step.message}" if step.message else ""
    return f"{step.name:<{width}}  {step.phase:<8}{seconds}{attempts}{verdict}{message}"[:240].rstrip()


def follow(engine: Engine, run: str, *, logs: bool, start_timeout_s: float = START_TIMEOUT_S) -> int:
    """Show the run until it has ended; Ctrl-C leaves it alone. Returns: the run's exit code, 130 after Ctrl-C.

    Args:
        logs: whether the steps' whole logs are shown, or their warnings only.
        start_timeout_s: how long a step may wait for a place in the cluster before the run is ended; 0: for ever.
    Raises: UserError: a step waits for something that will not come by itself. TemporaryError: one has waited for a
        place for too long.
    """
    table = RunTable(sys.stderr)
    last_words: dict[str, str] = {}
    try:
        status = _follow(engine, run, table, logs, start_timeout_s, last_words)
    except KeyboardInterrupt:
        print(f"\n{run} goes on without you; come back with:  {engine.come_back(run)}", file=sys.stderr)
        return 130
    print(summary(status, last_words))
    return status.exit_code


def _follow(
    engine: Engine, run: str, table: RunTable, logs: bool, start_timeout_s: float, last_words: dict[str, str]
) -> RunStatus:
    """Poll until the run has ended; `last_words` gets each step's own error line."""
    blocked_since: float | None = None
    unclaimed_since: float | None = None
    reached = time.monotonic()
    while True:
        try:
            status = engine.status(run)
            lines = engine.new_log_lines(run)
            last_words.update(_error_lines(lines))
            table.show(status, lines if logs else _warning_lines(lines))
            reached = time.monotonic()
        except TemporaryError:
            if time.monotonic() - reached > OUT_OF_REACH_S:
                raise
        else:
            if status.ended:
                return status
            blocked = next((step for step in status.steps if step.blocked), None)
            blocked_since = (blocked_since or time.monotonic()) if blocked else None
            if blocked and blocked_since and time.monotonic() - blocked_since > BLOCKED_S:
                raise UserError(f"{run}: {blocked.name} cannot start: {blocked.message}")
            unclaimed_since = None if status.claimed else unclaimed_since or time.monotonic()
            if unclaimed_since and time.monotonic() - unclaimed_since > UNCLAIMED_S:
                engine.stop(run)
                raise TemporaryError(
                    f"{run}: no controller has taken it up in {UNCLAIMED_S:.0f} s, and the run was ended: see that "
                    "Argo's workflow-controller runs and watches this namespace, then run it again"
                )
            unplaced = next((step for step in status.steps if step.unplaced_s > start_timeout_s > 0), None)
            if unplaced:
                engine.stop(run)
                raise TemporaryError(
                    f"{run}: {unplaced.name} has waited {unplaced.unplaced_s:.0f} s for a place ({unplaced.message}), "
                    "and the run was ended: run it again when there is room, or with a longer --start-timeout"
                )
        time.sleep(POLL_S)


def _error_lines(lines: list[str]) -> dict[str, str]:
    """What the command line of a step printed as its error, by step."""
    found = {}
    for line in lines:
        step, _, text = line.partition("  ")
        if text.startswith(f"finemill {step}: "):
            found[step] = text.removeprefix(f"finemill {step}: ")
    return found


def _warning_lines(lines: list[str]) -> list[str]:
    """The log lines in which a step warns of something."""
    split = ((line, *line.partition("  ")) for line in lines)
    return [line for line, step, _, text in split if text.startswith(f"{step}: warning: ")]


def summary(status: RunStatus, last_words: Mapping[str, str]) -> str:
    """The run's result in one line; a failed step's own error line if it left one."""
    failed = next((step for step in status.steps if step.phase == "failed"), None)
    if failed:
        return f"{status.name} failed in {failed.name}: {last_words.get(failed.name) or failed.message}"
    if status.phase == "failed":
        return f"{status.name} failed: {status.message}"
    verdicts = dict(step.verdict for step in status.steps if step.verdict)
    if verdicts.get("changed") == "false":
        return f"{status.name} unchanged: the data is that of the newest registered version"
    promotion = {"true": ", promoted", "false": ", not promoted"}.get(verdicts.get("promotion_passed", ""), "")
    return f"{status.name} {status.phase}{promotion}"
