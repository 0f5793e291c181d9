"""Equality of formulas by Math-Verify and SymPy, in a process of their own.

SymPy may take forever on a formula that a model made up, and Math-Verify's own limit is a signal, which only the main
thread of a process can use. A process can be ended from any thread.
"""

import atexit
import importlib.util
import json
import os
import selectors
import subprocess
import sys
import threading
from functools import lru_cache
from pathlib import Path

from finemill.errors import UserError

TIMEOUT_S = 5.0
"""Seconds that a comparison may take; what is not proven by then is not equal."""
_START_TIMEOUT_S = 120.0

_lock = threading.Lock()
_process: "subprocess.Popen[bytes] | None" = None


_ORDERS = {b"less": -1, b"equal": 0, b"more": 1}


def proven_equal(gold: str, said: str) -> bool:
    """Whether two formulas in LaTeX are equal for all values of their variables.

    Raises: UserError: Math-Verify is not installed.
    """
    return _ask("equality", gold, said) == b"equal"


def proven_order(one: str, other: str) -> int | None:
    """-1, 0 or 1 as a number is less than another, equal to it or more; None for what is no number.

    Raises: UserError: Math-Verify is not installed.
    """
    return _ORDERS.get(_ask("order", one, other) or b"")


@lru_cache(maxsize=4096)
def _ask(what: str, one: str, other: str) -> bytes | None:
    """What the process says of two formulas, None if it fails or takes too long."""
    question = json.dumps([what, one, other]).encode() + b"\n"
    with _lock:
        process = _running()
        try:
            if process.stdin is None or process.stdout is None:
                return None
            process.stdin.write(question)
            process.stdin.flush()
            answer = _read_line(process, TIMEOUT_S)
        except OSError:
            answer = None
        if answer is None:
            _stop()
        return answer


def _running() -> "subprocess.Popen[bytes]":
    global _process
    if _process is not None and _process.poll() is None:
        return _process
    if importlib.util.find_spec("math_verify") is None:
        raise UserError("formulas are compared by Math-Verify, which is not installed: pip install 'finemill[eval]'")
    worker = Path(__file__).with_name("symbolic_worker.py")
    _process = subprocess.Popen(
        # Without the worker's folder on the path, whose modules would hide others.
        [sys.executable, "-P", str(worker)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )
    if _read_line(_process, _START_TIMEOUT_S) != b"ready":
        _stop()
        raise UserError("Math-Verify does not start: run `python -c 'import math_verify'` to see why")
    return _process


def _read_line(process: "subprocess.Popen[bytes]", timeout_s: float) -> bytes | None:
    """One line of the process; None if it ends or takes longer. The worker writes nothing without being asked."""
    if process.stdout is None:
        return None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(timeout_s):
            return None
    return process.stdout.readline().strip() or None


@atexit.register
def _stop() -> None:
    global _process
    if _process is not None:
        _process.kill()
        _process.wait()
        for stream in (_process.stdin, _process.stdout):
            if stream is not None:
                try:
                    stream.close()
                except OSError:
                    continue
        _process = None
