"""One step computed by several processes, one a GPU: which of them this is, and starting them.

torchrun and Kubeflow Trainer start every process with the same command line and tell each by `RANK` and `WORLD_SIZE`
which it is. The main process does what is done once: it publishes, records and reports.
"""

import json
import os
import signal
import sys
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from finemill.errors import TemporaryError, kind_of
from finemill.transport import pack_long


def num_processes() -> int:
    """How many processes there are on all nodes."""
    return int(os.environ.get("WORLD_SIZE") or 1)


def is_main_process() -> bool:
    """Whether this is the one that speaks for all."""
    return num_processes() == 1 or os.environ.get("RANK") == "0"


def process_rank() -> int:
    """The number of this process among all."""
    return int(os.environ.get("RANK") or 0)


def num_idle_gpus() -> int:
    """Visible GPUs, where more than one waits for a process of its own; 0 otherwise."""
    if "WORLD_SIZE" in os.environ:
        return 0
    import torch

    count = torch.cuda.device_count()
    return count if count > 1 else 0


def step_arguments(
    name: str, *, store: str, inputs: Mapping[str, str], config: Mapping[str, Any], output_file: Path
) -> list[str]:
    """What `finemill` is called with to run a step that writes its output's reference to `output_file`."""
    options = {f"--{port.replace('_', '-')}": value for port, value in inputs.items()}
    options |= {"--store": store, "--config-json": json.dumps(pack_long(config)), "--output-file": str(output_file)}
    return [name, *(part for option in options.items() for part in option)]


def run_in_processes(arguments: list[str], count: int) -> None:
    """Run `finemill <arguments>` in `count` processes of this machine that find each other, as torchrun would.

    What they print goes to standard error: standard output is the caller's.
    Raises: StepError: of the kind that a failed process ended with, whose own line is printed already; TemporaryError
        where one was killed, by the kernel for its memory or by hand.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The orchestrator's grace period is what limits a last checkpoint, not torch's own half minute.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=count,
        run_id=uuid.uuid4().hex,
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=0,
    )
    to_stderr = ["-c", 'exec "$0" "$@" >&2', sys.executable, "-P", "-m", "finemill", *arguments]
    what = f"{arguments[0]} in {count} processes"
    try:
        elastic_launch(config, "/bin/sh")(*to_stderr)
    except SignalException:
        raise TemporaryError(f"{what} was told to stop: run again to continue") from None
    except ChildFailedError as error:
        ends = {rank: failure.exitcode for rank, failure in sorted(error.failures.items())}
        rank = min(ends, key=lambda rank: _order(ends[rank]))
        if ends[rank] < 0:
            raise TemporaryError(
                f"{what}: process {rank} was killed ({signal.Signals(-ends[rank]).name}): run again to continue from "
                "the last checkpoint"
            ) from None
        raise kind_of(ends[rank])(f"{what} ended with exit code {ends[rank]}; its own lines are above") from None


def _order(exit_code: int) -> int:
    """Whose end says most about the cause: others end as temporary, or are told to, because of the first."""
    if exit_code == TemporaryError.exit_code:
        return 2
    if exit_code == -signal.SIGTERM:
        return 3
    return 1 if exit_code < 0 else 0
