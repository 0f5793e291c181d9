"""A local cache of artifacts by digest, shared by processes: one writer at a time under a lock."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_COMPLETE = ".complete"


def cache_root() -> Path:
    """`$FINEMILL_CACHE`, or `finemill` in the user's cache folder."""
    configured = os.environ.get("FINEMILL_CACHE")
    if configured:
        return Path(configured)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "finemill"


def staging_root() -> Path:
    """Where outputs are prepared before they are uploaded; on the cache's file system."""
    folder = cache_root() / "staging"
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@contextmanager
def cached_folder(digest: str) -> Iterator[tuple[Path, bool]]:
    """Lock the cache entry of `digest` and yield its folder and whether an earlier writer completed it.

    Leaving the block without an exception marks the entry complete. An interrupted one keeps its partial files, which
    the next download resumes.
    """
    entry = cache_root() / "artifacts" / digest
    entry.mkdir(parents=True, exist_ok=True)
    marker = entry / _COMPLETE
    with FileLock(entry / ".lock"):
        yield entry / "files", marker.exists()
        marker.touch()
