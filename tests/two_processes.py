"""Two processes of a test, over gloo."""

import socket
from collections.abc import Callable
from multiprocessing import set_forkserver_preload
from typing import Any

from torch.multiprocessing.spawn import start_processes


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run_in_two(function: Callable[..., None], *arguments: Any) -> None:
    """Run `function(rank, *arguments)` in two processes, forked from one that has loaded what they need."""
    set_forkserver_preload([function.__module__])
    start_processes(function, args=arguments, nprocs=2, start_method="forkserver")
