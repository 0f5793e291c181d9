import hashlib
from pathlib import Path

import pytest

from finemill.artifacts.manifest import FileEntry
from finemill.errors import TemporaryError, UserError
from finemill.storage.download import download_file

DATA = bytes(range(256)) * 40
ENTRY = FileEntry(size=len(DATA), sha256=hashlib.sha256(DATA).hexdigest())


def fetch(read_range: object, path: Path) -> None:
    download_file(read_range, path, ENTRY, "s3://b/x", part_bytes=1000, max_concurrency=3)  # type: ignore[arg-type]


def test_interrupted_download_fetches_only_what_is_missing(tmp_path: Path) -> None:
    asked: list[int] = []

    def broken(start: int, end: int) -> bytes:
        if start >= 5000:
            raise ConnectionError("lost")
        return DATA[start:end]

    def whole(start: int, end: int) -> bytes:
        asked.append(start)
        return DATA[start:end]

    with pytest.raises(ConnectionError):
        fetch(broken, tmp_path / "x")
    assert not (tmp_path / "x").exists()
    fetch(whole, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == DATA
    assert asked
    assert min(asked) >= 5000
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_short_answer_is_temporary(tmp_path: Path) -> None:
    with pytest.raises(TemporaryError, match="came back as 1 bytes"):
        fetch(lambda start, end: DATA[start : start + 1], tmp_path / "x")


def test_wrong_bytes_leave_nothing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="has sha256"):
        fetch(lambda start, end: b"\0" * (end - start), tmp_path / "x")
    assert list(tmp_path.iterdir()) == []
