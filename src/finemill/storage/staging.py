"""Folders of a process's own: locked while it lives, swept after its death by the next one that makes such a folder."""

import atexit
import os
import shutil
import tempfile
from contextlib import suppress
from pathlib import Path

from filelock import FileLock, Timeout

from finemill.storage.cache import cache_root

_held: dict[Path, FileLock] = {}
"""Locks of this process's own folders, held until it ends, however it ends."""
_outer: list[Path] = []
"""Temporary folder of this process before it took one of its own."""


def new_staging_folder(prefix: str) -> Path:
    """A new empty folder on the cache's file system, in which an output is prepared."""
    root = cache_root() / "staging"
    root.mkdir(parents=True, exist_ok=True)
    return _new_folder(root, prefix)


def use_own_temporary_folder() -> None:
    """Have this process, and those that it starts, put temporary files into a folder that goes with it.

    Where none can be made they stay in the folder that they would be in anyway.
    """
    with suppress(OSError):
        root = Path(tempfile.gettempdir(), f"finemill-{os.getuid()}")
        root.mkdir(mode=0o700, exist_ok=True)
        if root.stat().st_uid == os.getuid():
            folder = _new_folder(root, "")
            _outer.append(root.parent)
            tempfile.tempdir = os.environ["TMPDIR"] = str(folder)
            atexit.register(shutil.rmtree, folder, ignore_errors=True)


def lasting_temporary_folder() -> Path:
    """Where a temporary file outlives this process."""
    return _outer[0] if _outer else Path(tempfile.gettempdir())


def _new_folder(root: Path, prefix: str) -> Path:
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
