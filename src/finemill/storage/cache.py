"""A local cache of artifacts by digest, shared by processes: one writer at a time under a lock.

Once its files are verified and on the disk, an entry gets a stamp: every file's size and times. An entry whose files
are no longer those of its stamp, as after another's write, is to be verified again.
"""

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock

_STAMP = ".verified"


def cache_root() -> Path:
    """`$FINEMILL_CACHE`, or `finemill` in the user's cache folder."""
    configured = os.environ.get("FINEMILL_CACHE")
    if configured:
        # Nobody has expanded `~` in a variable that a service's or a container's file sets.
        return Path(configured).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").expanduser() / "finemill"


@contextmanager
def cached_folder(digest: str) -> Iterator[tuple[Path, bool]]:
    """Lock the cache entry of `digest` and yield its folder and whether its files are those that were verified.

    Leaving the block without an exception says that they are. An interrupted one keeps its partial files, which the
    next download resumes.
    """
    entry = cache_root() / "artifacts" / digest
    entry.mkdir(parents=True, exist_ok=True)
    stamp = entry / _STAMP
    with FileLock(entry / ".lock"):
        verified = stamp.is_file() and stamp.read_text() == _identities(entry / "files")
        yield entry / "files", verified
        if not verified:
            _flush(entry / "files")
            stamp.write_text(_identities(entry / "files"))


def _identities(folder: Path) -> str:
    """Of every file under a folder its name, size in bytes, inode, and times of modification and change, as JSON."""
    files = {}
    for path in sorted(folder.rglob("*")):
        if not path.is_dir():
            status = path.lstat()
            files[path.relative_to(folder).as_posix()] = (
                status.st_size,
                status.st_ino,
                status.st_mtime_ns,
                status.st_ctime_ns,
            )
    return json.dumps(files)


def _flush(folder: Path) -> None:
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
