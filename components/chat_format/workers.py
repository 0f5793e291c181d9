"""Batches formatted in several processes; their order, and so every byte, is that of one."""

import socket
import subprocess
import sys
import traceback
from collections.abc import Generator, Iterator
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection
from pathlib import Path

from finemill.artifacts.rows import iterate_rows
from finemill.artifacts.splits import Split
from finemill.components.chat_format.batch import FormattedBatch, format_batch
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.formatter import Formatter, load_formatter
from finemill.errors import StepError, TemporaryError

_PROGRAM = """
import sys
from multiprocessing.connection import Connection
connection = Connection(int(sys.argv[1]))
sys.path[:] = connection.recv()
from finemill.components.chat_format.workers import serve
serve(connection)
"""
_DIED = "a process that formats rows was killed, most likely for want of memory: run it again, or with a lower num_proc"


@dataclass(frozen=True)
class Work:
    """Rows to format: of a split's batches of `batch_rows` rows those from number `first` on, each `step`-th."""

    rows: Path
    split: Split
    batch_rows: int
    base_model: Path
    config: ChatFormatConfig
    first: int = 0
    step: int = 1

    def run(self, formatter: Formatter) -> Iterator[FormattedBatch]:
        """Read and format them in order."""
        batches = iterate_rows(self.rows, self.split, batch_rows=self.batch_rows, first=self.first, step=self.step)
        return (format_batch(formatter, batch, unroll=self.split == "train") for batch in batches)


def format_rows(work: Work, formatter: Formatter, *, num_proc: int) -> Generator[FormattedBatch, None, None]:
    """Format the batches of a split, all of them, in order.

    Args:
        work: which rows; turns that are rewritten get examples of their own in the training split.
        formatter: what formats them in this process.
        num_proc: how many processes there are, this one among them: each reads and formats every `num_proc`-th batch.
    Raises: StepError: as in one process. TemporaryError: a process was killed.
    """
    with ExitStack() as stack:
        others = [_start(stack, replace(work, first=place, step=num_proc)) for place in range(1, num_proc)]
        own = replace(work, step=num_proc).run(formatter)
        for batch in own:
            yield batch
            for other in others:
                formatted = _receive(other)
                if formatted is None:
                    return
                yield formatted


def _start(stack: ExitStack, work: Work) -> Connection:
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


def _receive(worker: Connection) -> FormattedBatch | None:
    """What a process has formatted next, None where it has no more."""
    try:
        result = worker.recv()
    except (EOFError, ConnectionResetError):
        raise TemporaryError(_DIED) from None
    if isinstance(result, BaseException):
        raise result
    formatted: FormattedBatch | None = result
    return formatted


def serve(connection: Connection) -> None:
    """Format what this process, one of several, is to, and send it, then None."""
    with suppress(EOFError, BrokenPipeError, ConnectionResetError, KeyboardInterrupt):
        work = connection.recv()
        try:
            for formatted in work.run(load_formatter(work.base_model, work.config)):
                connection.send(formatted)
            connection.send(None)
        except StepError as error:
            connection.send(error)
        except Exception:
            connection.send(RuntimeError(traceback.format_exc()))
