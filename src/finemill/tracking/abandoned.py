"""Runs in MLflow whose process was killed before it could end them: ended by the next one that starts a run."""

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mlflow import MlflowClient

PROCESS_TAG = "finemill.process"
"""Tag with the process that ends a run: host, name space of process ids, id, start in clock ticks since boot."""
_START_FIELD = 19
"""Position of the start among the fields behind the command's name in `/proc/PID/stat`."""


def process_tags() -> dict[str, str]:
    """The tag of this process; none where the system does not say when a process began."""
    start = _start(os.getpid())
    return {PROCESS_TAG: f"{_here()} {os.getpid()} {start}"} if start else {}


def end_abandoned_runs(client: "MlflowClient", experiment_id: str) -> None:
    """End the running runs of processes of this machine that do not live, as killed.

    Of another machine's nobody knows here whether they live. Raises: MlflowException: MLflow does not answer.
    """
    if not process_tags():
        return
    for run in client.search_runs([experiment_id], "attributes.status = 'RUNNING'"):
        here, _, rest = run.data.tags.get(PROCESS_TAG, "").rpartition(" ")
        here, _, process = here.rpartition(" ")
        if here == _here() and process.isdecimal() and _start(int(process)) != rest:
            client.set_tag(run.info.run_id, "mlflow.note.content", "its process was killed")
            client.set_terminated(run.info.run_id, "KILLED")


def _here() -> str:
    try:
        return f"{platform.node()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return platform.node()


def _start(process: int) -> str | None:
    """When a process began, None if it does not live: an id alone may be another's by now."""
    try:
        fields = Path(f"/proc/{process}/stat").read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()
    except OSError:
        return None
    return None if fields[0] == "Z" else fields[_START_FIELD]
