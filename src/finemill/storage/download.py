"""One file in ranges, in parallel, into a `.partial` sibling that survives an interruption."""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from finemill.artifacts.manifest import FileEntry, sha256_file, verify_file
from finemill.errors import TemporaryError, UserError

ReadRange = Callable[[int, int], bytes]


def download_file(
    read_range: ReadRange, path: Path, entry: FileEntry, where: str, *, part_bytes: int, max_concurrency: int
) -> None:
    """Fetch `entry.size` bytes through `read_range(start, end)` and rename the file to `path` once its sha256 is right.

    Parts that an interrupted call completed are listed in a `.parts` sibling and are not fetched again. Bytes with
    another sha256 are fetched once more.
    Raises: UserError: the bytes have another sha256, the same one twice. TemporaryError: a range came back short, or
        other bytes each time.
    """
    if path.is_file() and path.stat().st_size == entry.size:
        try:
            verify_file(path, entry, where)
        except UserError:
            path.unlink()
        else:
            return
    path.parent.mkdir(parents=True, exist_ok=True)
    partial, ledger = path.with_name(path.name + ".partial"), path.with_name(path.name + ".parts")
    found: list[str] = []
    while True:
        fetch_missing_parts(read_range, partial, ledger, entry.size, where, part_bytes, max_concurrency)
        ledger.unlink()
        try:
            verify_file(partial, entry, where)
        except UserError:
            found.append(sha256_file(partial))
            partial.unlink()
            if len(set(found)) < len(found):
                raise
            if len(found) > 1:
                raise TemporaryError(f"{where} came with other bytes each time: check the network, try again") from None
        else:
            partial.replace(path)
            return


def fetch_missing_parts(
    read_range: ReadRange, partial: Path, ledger: Path, size: int, where: str, part_bytes: int, max_concurrency: int
) -> None:
    """Fetch the ranges of `size` bytes that the file `ledger` does not name into the file `partial`."""
    done = set(ledger.read_text().split()) if ledger.is_file() and partial.is_file() else set()
    descriptor = os.open(partial, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        os.truncate(descriptor, size)
        with ledger.open("a") as finished, ThreadPoolExecutor(max_concurrency) as pool:

            def fetch(start: int) -> None:
                end = min(start + part_bytes, size)
                data = read_range(start, end)
                if len(data) != end - start:
                    raise TemporaryError(f"{where}: bytes {start}-{end} came back as {len(data)} bytes; try again")
                os.pwrite(descriptor, data, start)
                finished.write(f"{start}:{part_bytes}\n")
                finished.flush()

            starts = [start for start in range(0, size, part_bytes) if f"{start}:{part_bytes}" not in done]
            for _ in pool.map(fetch, starts):
                pass
    finally:
        os.close(descriptor)
