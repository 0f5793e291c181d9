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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemill.errors import TemporaryError, UserError, kind_of
from finemill.transport import pack_long


def num_processes() -> int:
    """How many processes there are on all nodes."""
    return _number("WORLD_SIZE", 1)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable) or str(default)
    if not text.isdecimal():
        raise UserError(
            f"{variable} is '{text}', no number of a process: torchrun sets it; leave it out without torchrun"
        )
    return int(text)


def is_among_processes() -> bool:
    """Whether somebody has started this process beside others, torchrun for instance."""
    return "WORLD_SIZE" in os.environ


def is_main_process() -> bool:
    """Whether this is the one that speaks for all."""
    return num_processes() == 1 or os.environ.get("RANK") == "0"


def process_rank() -> int:
    """The number of this process among all."""
    return _number("RANK", 0)


@dataclass(frozen=True)
class Node:
    """A node of a TrainJob, which has yet to start its processes: its number among `count`, and where they meet."""

    rank: int
    count: int
    endpoint: str


def node_of_train_job() -> Node | None:
    """The node that Kubeflow Trainer says this is; None outside of a job of several, and under torchrun."""
    count = int(os.environ.get("PET_NNODES") or 1)
    if count == 1 or is_among_processes():
        return None
    endpoint = f"{os.environ['PET_MASTER_ADDR']}:{os.environ['PET_MASTER_PORT']}"
    return Node(int(os.environ["PET_NODE_RANK"]), count, endpoint)


def num_node_processes() -> int:
    """Processes of a node: one per GPU, one on a CPU."""
    import torch

    return max(1, torch.cuda.device_count())


def num_idle_gpus() -> int:
    """Visible GPUs, where more than one waits for a process of its own; 0 otherwise."""
    if is_among_processes():
        return 0
    import torch

    count = torch.cuda.device_count()
    return count if count > 1 else 0


def step_arguments(
    name: str, *, store: str, inputs: Mapping[str, str], config: Mapping[str, Any], output_file: Path | None = None
) -> list[str]:
    """What `finemill` is called with to run a step that writes its output's reference to `output_file`, if any."""
    options = {f"--{port.replace('_', '-')}": value for port, value in inputs.items()}
    options |= {"--store": store, "--config-json": json.dumps(pack_long(config))}
    options |= {"--output-file": str(output_file)} if output_file else {}
    return [name, *(part for option in options.items() for part in option)]


def run_in_processes(arguments: list[str], count: int, node: Node | None = None) -> None:
    """Run `finemill <arguments>` in `count` processes of this machine that find each other, as torchrun would.

    On a `node` of several they find those of the others, too.

    What they print goes to standard error: standard output is the caller's.
    Raises: StepError: of the kind that a failed process ended with, whose own line is printed already; TemporaryError
        where one was killed, by the kernel for its memory or by hand.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    # The orchestrator's grace period is what limits a last checkpoint, not torch's own half minute.
    os.environ.setdefault("TORCH_ELASTIC_SHUTDOWN_TIMEOUT", "600")
    num_nodes = node.count if node else 1
    config = LaunchConfig(
        min_nodes=num_nodes,
        max_nodes=num_nodes,
        nproc_per_node=count,
        run_id="finemill" if node else uuid.uuid4().hex,
        rdzv_backend="static" if node else "c10d",
        rdzv_endpoint=node.endpoint if node else "localhost:0",
        rdzv_configs={"rank": node.rank} if node else {},
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
