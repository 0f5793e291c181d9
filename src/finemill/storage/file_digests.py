"""The sha256 of large local files, remembered: a base model of 15 GB is read once on a machine, not once per step.

What is remembered lies beside the cache, a small file per hashed one, and holds for a file of the same path, size,
modification time and inode. That is a guess about its bytes, a good one: whoever computes with them for hours should
read them once more.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock

from finemill.artifacts.manifest import sha256_file
from finemill.storage.cache import cache_root

REMEMBERED_BYTES = 2**24
"""Size in bytes from which on a file is remembered; smaller ones are read in no time."""
_SETTLED_NS = 2 * 10**9
"""Age in nanoseconds from which on a file is remembered: the clocks of file systems tick as slowly as every 2 s, and
within a tick a file can change without another modification time."""
_MAX_THREADS = 8
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True)
class FileDigest:
    """A file's sha256 (hex), and whether it is remembered: nobody has read the file now."""

    sha256: str
    remembered: bool


def digest_of_files(paths: Iterable[Path]) -> list[FileDigest]:
    """The digests of files, in their order, several computed at once; each file by one process at a time."""
    with ThreadPoolExecutor(min(_MAX_THREADS, os.cpu_count() or 1)) as pool:
        return list(pool.map(_digest_of_file, paths))


def forget_digest(path: Path) -> None:
    """Have the file read the next time that its digest is wanted."""
    with suppress(OSError):
        _memory(path.resolve()).unlink()


def _digest_of_file(path: Path) -> FileDigest:
    path = path.resolve()
    if path.stat().st_size < REMEMBERED_BYTES:
        return FileDigest(sha256_file(path), remembered=False)
    memory = _memory(path)
    with _locked(memory) as writable:
        identity, started = _identity(path), time.time_ns()
        known = _recall(memory, identity)
        if known:
            return FileDigest(known, remembered=True)
        sha256 = sha256_file(path)
        is_settled = path.stat().st_mtime_ns < started - _SETTLED_NS
        if writable and is_settled and identity == _identity(path):
            _remember(memory, identity, sha256)
        return FileDigest(sha256, remembered=False)


def _identity(path: Path) -> dict[str, str | int]:
    status = path.stat()
    return {"path": str(path), "size": status.st_size, "mtime_ns": status.st_mtime_ns, "inode": status.st_ino}


def _memory(path: Path) -> Path:
    return cache_root() / "digests" / f"{hashlib.sha256(os.fsencode(path)).hexdigest()[:32]}.json"


@contextmanager
def _locked(memory: Path) -> Iterator[bool]:
    """Hold the lock of a memory file. Yields: False if there is none, because the cache cannot be written."""
    lock = FileLock(memory.with_suffix(".lock"))
    try:
        memory.parent.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except OSError:
        yield False
        return
    try:
        yield True
    finally:
        lock.release()


def _recall(memory: Path, identity: dict[str, str | int]) -> str | None:
    """What is remembered of this very file; None if nothing is, or nothing that can be read."""
    try:
        known = json.loads(memory.read_bytes())
        sha256 = known.pop("sha256")
        return sha256 if known == identity and _SHA256.fullmatch(sha256) else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _remember(memory: Path, identity: dict[str, str | int], sha256: str) -> None:
    partial = memory.with_suffix(".partial")
    with suppress(OSError):
        partial.write_text(json.dumps({**identity, "sha256": sha256}))
        partial.replace(memory)
