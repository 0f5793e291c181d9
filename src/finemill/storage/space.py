"""Room on the disk, asked for before the work and not found missing after it."""

import shutil
from pathlib import Path

from finemill.errors import UserError

# File systems need some room of their own, and a step writes small files besides.
_MARGIN_BYTES = 64 * 2**20


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises: UserError: `folder`'s disk has less room than `what` will take."""
    free = shutil.disk_usage(folder).free
    if free < num_bytes + _MARGIN_BYTES:
        raise UserError(
            f"{what} takes {num_bytes / 1e9:.2f} GB, and {folder} has {free / 1e9:.2f} GB left: free some, or choose "
            "another --store (an S3 store prepares its files under TMPDIR)"
        )
