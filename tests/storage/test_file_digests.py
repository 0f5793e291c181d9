"""A large file is read once, as long as it stays what it was; whatever happens to the memory, digests are right."""

import hashlib
import os
import threading
from pathlib import Path

import pytest

from finemill.artifacts.manifest import sha256_file
from finemill.storage import file_digests
from finemill.storage.file_digests import REMEMBERED_BYTES, digest_of_files, forget_digest

LONG_AGO = 1_700_000_000


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache that the memory lies in, empty."""
    folder = tmp_path / "cache"
    monkeypatch.setenv("FINEMILL_CACHE", str(folder))
    return folder


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """The files that have been read, in order."""
    read: list[Path] = []

    def counted(path: Path) -> str:
        read.append(path)
        return sha256_file(path)

    monkeypatch.setattr(file_digests, "sha256_file", counted)
    return read


def write(path: Path, content: bytes = b"weights", size: int = REMEMBERED_BYTES, mtime: float = LONG_AGO) -> Path:
    """A file that begins with `content`, sparse up to `size`."""
    with path.open("wb") as file:
        file.write(content)
        file.truncate(size)
    os.utime(path, (mtime, mtime))
    return path


def digest(path: Path) -> str:
    (found,) = digest_of_files([path])
    return found.sha256


def test_large_file_is_read_once(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.safetensors")
    first, again = digest_of_files([path]), digest_of_files([path])
    assert (first[0].remembered, again[0].remembered) == (False, True)
    assert first[0].sha256 == again[0].sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert reads == [path]


def test_files_keep_their_order_and_links_lead_to_one_memory(tmp_path: Path, reads: list[Path]) -> None:
    blob = write(tmp_path / "blob")
    link, other = tmp_path / "link", write(tmp_path / "other", b"other")
    link.symlink_to(blob)
    digests = [found.sha256 for found in digest_of_files([link, other, blob])]
    assert digests == [sha256_file(blob), sha256_file(other), sha256_file(blob)]
    assert sorted(reads) == [blob, other]


def test_small_file_is_always_read(tmp_path: Path, reads: list[Path], cache: Path) -> None:
    path = write(tmp_path / "config.json", size=100)
    assert digest(path) == digest(path)
    assert len(reads) == 2
    assert not cache.exists()


def test_file_that_was_written_again_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    before = digest(path)
    assert digest(write(path, b"changed", mtime=LONG_AGO + 1)) == sha256_file(path) != before


def test_file_in_the_place_of_another_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    before = digest(path)
    write(tmp_path / "new", b"changed").replace(path)
    assert digest(path) == sha256_file(path) != before


def test_file_of_another_size_is_read_again(tmp_path: Path) -> None:
    path = write(tmp_path / "model.safetensors")
    before = digest(path)
    assert digest(write(path, size=REMEMBERED_BYTES + 1)) == sha256_file(path) != before


def test_file_that_could_change_within_a_tick_of_the_clock_is_not_remembered(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with path.open("wb") as file:
        file.truncate(REMEMBERED_BYTES)
    assert not any(found.remembered for _ in range(2) for found in digest_of_files([path]))


@pytest.mark.parametrize(
    "damage", [b"", b"{", b"[]", b"null", b"{}", b'{"sha256": 1}', b'{"sha256": "0"}', b"\xff\xfe"]
)
def test_damaged_memory_is_made_anew(damage: bytes, tmp_path: Path, cache: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.safetensors")
    before = digest(path)
    (memory,) = (cache / "digests").glob("*.json")
    memory.write_bytes(damage)
    assert [digest(path), digest(path)] == [before, before]
    assert len(reads) == 2


def test_cache_that_cannot_be_written_costs_time_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reads: list[Path]
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "file" / "cache"))
    path = write(tmp_path / "model.safetensors")
    assert digest(path) == digest(path) == sha256_file(path)
    assert len(reads) == 2


def test_who_comes_while_a_file_is_being_read_waits_for_its_digest(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.safetensors")
    threads = [threading.Thread(target=digest, args=[path]) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert reads == [path]


def test_forgotten_digest_is_computed_again(tmp_path: Path, reads: list[Path]) -> None:
    path = write(tmp_path / "model.safetensors")
    forget_digest(path)
    assert digest(path) == digest(path)
    forget_digest(path)
    digest(path)
    assert reads == [path, path]
