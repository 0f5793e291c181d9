"""Folders in the cache in which outputs are prepared: locked while their process lives, swept after its death."""

import shutil
import tempfile
from pathlib import Path

from filelock import FileLock, Timeout

from finemill.storage.cache import cache_root

_held: dict[Path, FileLock] = {}
"""Locks of this process's own folders, held until it ends, however it ends."""


def new_staging_folder(prefix: str) -> Path:
    """A new empty folder on the cache's file system; those of processes that were killed are removed."""
    root = cache_root() / "staging"
    root.mkdir(parents=True, exist_ok=True)
    with FileLock(root / ".lock"):
        _sweep(root)
        folder = Path(tempfile.mkdtemp(prefix=prefix, dir=root))
        _held[folder] = FileLock(_lock_file(folder))
        _held[folder].acquire()
    return folder


def _sweep(root: Path) -> None:
    for folder in [folder for folder in _held if not folder.exists()]:
        _held.pop(folder).release()
    for lock_file in root.glob("*.lock"):
        folder = lock_file.with_suffix("")
        if lock_file.name == ".lock" or folder in _held:
            continue
        lock = FileLock(lock_file)
        try:
            lock.acquire(timeout=0)
        except (Timeout, OSError):
            continue
        shutil.rmtree(folder, ignore_errors=True)
        lock_file.unlink(missing_ok=True)
        lock.release()


def _lock_file(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")
