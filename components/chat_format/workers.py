"""Batches formatted in several processes; their order, and so every byte, is that of one."""

import socket
import subprocess
import sys
import traceback
from collections import deque
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, suppress
from multiprocessing.connection import Connection
from pathlib import Path

from finemill.artifacts.rows import PreparedRow
from finemill.components.chat_format.batch import FormattedBatch, format_batch
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.formatter import Formatter, load_formatter
from finemill.errors import StepError, TemporaryError

Batches = Iterable[Sequence[PreparedRow]]
_PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from finemill.components.chat_format.workers import serve
serve(connection)
"""
_DIED = "a process that formats rows was killed, most likely for want of memory: run it again, or with a lower num_proc"


def format_batches(
    batches: Batches, formatter: Formatter, base_model: Path, config: ChatFormatConfig, *, unroll: bool, num_proc: int
) -> Generator[FormattedBatch, None, None]:
    """Format batches in order.

    Args:
        batches: rows.
        formatter: what formats them in this process.
        base_model: folder from which other processes make theirs.
        config: the step's.
        unroll: whether rewritten turns get examples of their own.
        num_proc: how many processes there are; with one there is no other than this.
    Raises: StepError: as in one process. TemporaryError: a process was killed.
    """
    if num_proc == 1:
        for batch in batches:
            yield format_batch(formatter, batch, unroll=unroll)
        return
    with ExitStack() as stack:
        idle = deque(_start(stack, base_model, config, unroll=unroll) for _ in range(num_proc))
        busy: deque[Connection] = deque()
        for batch in batches:
            # Whoever has worked longest comes first, so that results come in the order of the batches.
            done = None if idle else _receive(busy[0])
            worker = idle.popleft() if idle else busy.popleft()
            _send(worker, batch)
            busy.append(worker)
            if done is not None:
                yield done
        for worker in busy:
            yield _receive(worker)


def _start(stack: ExitStack, base_model: Path, config: ChatFormatConfig, *, unroll: bool) -> Connection:
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
    connection.send(sys.path)
    _send(connection, (base_model, config, unroll))
    return connection


def _send(worker: Connection, message: object) -> None:
    try:
        worker.send(message)
    except (BrokenPipeError, ConnectionResetError):
        raise TemporaryError(_DIED) from None


def _receive(worker: Connection) -> FormattedBatch:
    try:
        result = worker.recv()
    except (EOFError, ConnectionResetError):
        raise TemporaryError(_DIED) from None
    if isinstance(result, BaseException):
        raise result
    formatted: FormattedBatch = result
    return formatted


def serve(connection: Connection) -> None:
    """Format what comes, in a process of its own, until nothing more does."""
    formatter: Formatter | None = None
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        base_model, config, unroll = connection.recv()
        while True:
            batch = connection.recv()
            try:
                formatter = formatter or load_formatter(base_model, config)
                result: FormattedBatch | BaseException = format_batch(formatter, batch, unroll=unroll)
            except StepError as error:
                result = error
            except Exception:
                result = RuntimeError(traceback.format_exc())
            connection.send(result)
