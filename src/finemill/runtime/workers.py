"""Work in several processes, batch by batch; the results' order, and so every byte made of them, is that of one."""

import logging
import socket
import subprocess
import sys
import traceback
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from typing import Any, Protocol, TypeVar

from finemill.errors import StepError, TemporaryError

ResultT_co = TypeVar("ResultT_co", covariant=True)
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from finemill.runtime.workers import serve
serve(connection)
"""
_DIED = (
    "a process that works on rows was killed, most likely for want of memory: run it again, or with a lower num_proc"
)


class Work(Protocol[ResultT_co]):
    """Every n-th batch of some rows; it travels to the process that does it."""

    def run(self) -> Iterator[ResultT_co]:
        """Do it, in order."""
        ...


def in_turns(own: Iterator[ResultT_co], others: Sequence[Work[ResultT_co]]) -> Generator[ResultT_co, None, None]:
    """Results of all batches in order: one of this process, then one of each other, as long as there are any.

    Args:
        own: what this process makes of batches 0, n, 2 n and so on, where n is the number of processes.
        others: what each of the others does, from batch 1 on.
    Raises: StepError: as in one process. TemporaryError: a process was killed.
    """
    with ExitStack() as stack:
        connections = [_start(stack, work) for work in others]
        for result in own:
            yield result
            for connection in connections:
                received = _receive(connection)
                if received is None:
                    return
                yield received


def _start(stack: ExitStack, work: Work[Any]) -> Connection:
    """A process, as a connection to it; it ends when that is closed, or when this process is gone.

    A new interpreter: a forked one would have this one's locks, but not its threads; multiprocessing's would import the
    user's script once more.
    """
    ours, its = socket.socketpair()
    process = subprocess.Popen([sys.executable, "-c", _PROGRAM, str(its.fileno())], pass_fds=[its.fileno()])
    its.close()
    connection = Connection(ours.detach())
    stack.callback(process.wait)
    stack.callback(connection.close)
    for message in (sys.path, work):
        try:
            connection.send(message)
        except (BrokenPipeError, ConnectionResetError):
            raise TemporaryError(_DIED) from None
    return connection


def _receive(worker: Connection) -> Any:
    """What a process has made next, None where it has no more."""
    try:
        result = worker.recv()
    except (EOFError, ConnectionResetError):
        raise TemporaryError(_DIED) from None
    if isinstance(result, BaseException):
        raise result
    return result


def serve(connection: Connection) -> None:
    """Do what this process, one of several, is to, and send the results, then None."""
    # The process that started it reads the same rows and says what is to be said.
    logging.disable(logging.CRITICAL)
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        try:
            for result in connection.recv().run():
                connection.send(result)
            connection.send(None)
        except StepError as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))
