"""A limit on how long Python code of somebody else may run: a template's loops have no end of their own."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class OutOfTimeError(BaseException):
    """The time is over. No `Exception`, which the code in the block might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block after `seconds`; in another thread than the main one there is no limit, as signals reach none.

    Raises: OutOfTimeError: it took longer.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _over(number: int, frame: object) -> NoReturn:
    raise OutOfTimeError
