"""Files and folders with the rights that the umask gives, whoever wrote them."""

import os
from pathlib import Path


def follow_umask(folder: Path) -> None:
    """Give a folder and all in it the rights of new ones: `mkdtemp` and some libraries keep theirs to their owner.

    A folder's bits for its group's inheritance (2775) stay.
    """
    umask = os.umask(0o077)
    os.umask(umask)
    for path in (folder, *folder.rglob("*")):
        if not path.is_symlink():
            inherited = path.stat().st_mode & 0o7000
            path.chmod(inherited | ((0o777 if path.is_dir() else 0o666) & ~umask))
