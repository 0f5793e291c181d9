"""A limit on how long Python code of somebody else may run: a template's loops have no end of their own."""

import ctypes
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import NoReturn


class OutOfTimeError(BaseException):
    """The time is over. No `Exception`, which the code in the block might catch."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    """End the block after `seconds`, between two steps of Python code: a single call of C code is waited for.

    Raises: OutOfTimeError: it took longer.
    """
    limited = _by_signal if threading.current_thread() is threading.main_thread() else _by_another_thread
    with limited(seconds):
        yield


@contextmanager
def _by_signal(seconds: float) -> Iterator[None]:
    before = signal.signal(signal.SIGALRM, _over)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def _over(number: int, frame: object) -> NoReturn:
    raise OutOfTimeError


@contextmanager
def _by_another_thread(seconds: float) -> Iterator[None]:
    """Signals reach the main thread only: the interpreter is asked to raise in this one."""
    thread, lock = ctypes.c_ulong(threading.get_ident()), threading.Lock()
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    over = threading.Event()

    def end() -> None:
        with lock:
            if not over.is_set():
                raise_in(thread, ctypes.py_object(OutOfTimeError))

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        with lock:
            over.set()
            # What was asked for and not raised yet would hit whatever comes after the block.
            raise_in(thread, None)
        timer.cancel()
