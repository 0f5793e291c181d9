"""Which code wrote an artifact: a digest of the sources a step runs, and what the image or checkout says of itself."""

import hashlib
import os
import subprocess
from functools import cache
from pathlib import Path

from finemill import __version__
from finemill.components.artifacts import Producer
from finemill.components.steps import Step

_COMPONENTS = Path(__file__).parent


def producer(step: Step) -> Producer:
    """The step's producer record; `$FINEMILL_IMAGE` and `$FINEMILL_GIT_SHA` are set in the images."""
    return Producer(
        step=step.name,
        version=__version__,
        code=source_digest(step.module_name),
        git_sha=os.environ.get("FINEMILL_GIT_SHA") or _checkout_sha(),
        image=os.environ.get("FINEMILL_IMAGE") or None,
    )


@cache
def source_digest(module_name: str) -> str:
    """The sha256 over the step's own Python files and those that steps share (16 hex digits)."""
    patterns = ("*.py", "storage/*.py", "training/*.py", f"{module_name}/*.py")
    files = sorted({path for pattern in patterns for path in _COMPONENTS.glob(pattern)})
    total = hashlib.sha256(__version__.encode())
    for path in files:
        total.update(path.relative_to(_COMPONENTS).as_posix().encode() + b"\0" + path.read_bytes())
    return total.hexdigest()[:16]


@cache
def _checkout_sha() -> str | None:
    """The commit of the checkout that tracks this file; None for an installed wheel, wherever it lies."""
    if _git("ls-files", "--error-unmatch", Path(__file__).name) is None:
        return None
    return _git("rev-parse", "HEAD")


def _git(*arguments: str) -> str | None:
    try:
        result = subprocess.run(
            ["git", "-C", str(_COMPONENTS), *arguments], capture_output=True, text=True, timeout=5, check=False
        )
    except OSError:
        return None
    return result.stdout.strip() if result.returncode == 0 else None
