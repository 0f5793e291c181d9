"""Artifacts: a folder of files under a prefix, complete when its `manifest.json` is there.

A step passes an artifact on as one string, the reference `<uri>@sha256:<digest>`: where the folder lies and what it
must contain. The digest covers every file's path, size and sha256, and what the manifest says besides: whoever follows
a reference knows that he reads the bytes, scores, parents and configuration that were written.
"""

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Any

from pydantic import BaseModel, ConfigDict

from finemill.artifacts.metrics import is_of_machine
from finemill.errors import UserError

MANIFEST_NAME = "manifest.json"
LAYOUT_VERSION = 2
DIGEST_MARK = "@sha256:"
# What no part of a file's name may hold: a drive in front, a backslash, control characters, halves of characters.
_FORBIDDEN = re.compile(r"^[A-Za-z]:|[\\\x00-\x1f\x7f\ud800-\udfff]")
_MAX_PART_BYTES = 255
"""Bytes of the longest name that file systems take."""
_MAX_NAME_BYTES = 1024
"""Bytes of the longest key that S3 takes; file systems take paths of four times as many."""


@dataclass(frozen=True)
class Reference:
    """An artifact's prefix and the sha256 of its contents."""

    uri: str
    digest: str

    def __str__(self) -> str:
        return f"{self.uri}{DIGEST_MARK}{self.digest}"

    @classmethod
    def parse(cls, text: str) -> "Reference":
        """Read `<uri>@sha256:<64 hex digits>`. Raises: UserError: the text has another form."""
        uri, mark, digest = text.rpartition(DIGEST_MARK)
        if not mark or len(digest) != 64 or set(digest) - set("0123456789abcdef"):
            raise UserError(
                f"{text!r:.300} is no artifact reference: write <uri>@sha256:<64 hex digits>, as its step printed it"
            )
        return cls(uri.rstrip("/"), digest)


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class _Layout(BaseModel):
    layout: int


class FileEntry(_Record):
    """Size in bytes and sha256 (hex) of one file."""

    size: int
    sha256: str


class Producer(_Record):
    """Which step and which code wrote an artifact."""

    step: str
    version: str
    code: str
    git_sha: str | None = None
    image: str | None = None


class Manifest(_Record):
    """What an artifact holds, who made it, and from what. Written last."""

    layout: int = LAYOUT_VERSION
    kind: str
    digest: str
    folder: str = ""
    """Where the files lie, relative to the manifest: "" in a folder store, a name of its own per content in S3, so that
    two attempts which write at once never mix their files."""
    files: dict[str, FileEntry]
    producer: Producer
    parents: dict[str, str]
    config: dict[str, Any]
    metrics: dict[str, float]
    warnings: list[str] = []
    """What a person should know of how it was made, a line each: rows left out, fallbacks, points lost."""
    seconds: float
    created: str

    def to_bytes(self) -> bytes:
        """JSON text, UTF-8, keys in order of definition."""
        return self.model_dump_json(indent=2).encode()

    def files_uri(self, uri: str) -> str:
        """Where the files lie, for an artifact under `uri`."""
        return f"{uri}/{self.folder}".rstrip("/")

    @classmethod
    def from_bytes(cls, data: bytes, where: str) -> "Manifest":
        """Parse and check a manifest.

        Raises: UserError: not a manifest, one of another layout, one whose digest is wrong, or one that names places
            outside of its folder.
        """
        _check_layout(data, where)
        try:
            manifest = cls.model_validate_json(data)
        except ValueError:
            raise UserError(
                f"damaged artifact: {where}/{MANIFEST_NAME} is not a manifest; "
                "delete the folder and run the step that writes it again"
            ) from None
        check_names([*manifest.files, *filter(None, [manifest.folder])], where)
        if manifest.digest != digest_manifest(manifest):
            raise UserError(
                f"damaged artifact: {where}/{MANIFEST_NAME} says what does not add up to its digest; "
                "delete the folder and run the step that writes it again"
            )
        return manifest


def _check_layout(data: bytes, where: str) -> None:
    """Raises: UserError: the manifest says that it has another layout than the one that is read here."""
    try:
        layout = _Layout.model_validate_json(data).layout
    except ValueError:
        return  # no manifest at all, which is found out next
    if layout != LAYOUT_VERSION:
        raise UserError(
            f"{where} is an artifact of layout {layout}, and this version of finemill reads layout {LAYOUT_VERSION}: "
            "run the step that writes it again, or use the version of finemill that wrote it"
        )


def check_names(names: Iterable[str], where: str) -> None:
    """Names of files stay inside their folder, on every system, and a name is a file or a folder, not both.

    Raises: UserError: a name is absolute, or has an empty part, `.`, `..`, a backslash, a drive or a control character,
        is longer than stores take, or is the manifest's own.
    """
    names = list(names)
    folders = {str(folder) for name in names for folder in PurePosixPath(name).parents}
    for name in names:
        parts = name.split("/")
        is_plain = parts[0] != MANIFEST_NAME and all(map(_is_plain, parts)) and len(name.encode()) <= _MAX_NAME_BYTES
        if name in folders or not is_plain:
            raise UserError(
                f"unsafe artifact: {where}/{MANIFEST_NAME} names {name!r:.100}: names are relative, with forward "
                f"slashes, without '..', of {_MAX_NAME_BYTES} bytes at most, and not the manifest's own; no step "
                "writes others, so find out who did and use another artifact"
            )


def _is_plain(part: str) -> bool:
    """Whether a part of a name is one of a file or a folder on every system."""
    return part not in ("", ".", "..") and not _FORBIDDEN.search(part) and len(part.encode()) <= _MAX_PART_BYTES


def new_manifest(
    kind: str,
    folder: Path,
    producer: Producer,
    *,
    parents: Mapping[str, str] | None = None,
    config: Mapping[str, object] | None = None,
    metrics: Mapping[str, float] | None = None,
    warnings: Sequence[str] = (),
    seconds: float = 0.0,
) -> Manifest:
    """Describe a finished staging folder."""
    files = list_files(folder)
    check_names(files, str(folder))
    manifest = Manifest(
        kind=kind,
        digest="",
        files=files,
        producer=producer,
        parents=dict(parents or {}),
        config=dict(config or {}),
        metrics=dict(metrics or {}),
        warnings=list(warnings),
        seconds=round(seconds, 3),
        created=datetime.now(UTC).isoformat(timespec="seconds"),
    )
    return manifest.model_copy(update={"digest": digest_manifest(manifest)})


def sha256_file(path: Path) -> str:
    """The sha256 of a file, hex, read in 1 MiB pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def list_files(folder: Path) -> dict[str, FileEntry]:
    """Every file under `folder` but a manifest, by path relative to it, in sorted order."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file() and path != folder / MANIFEST_NAME)
    return {
        path.relative_to(folder).as_posix(): FileEntry(size=path.stat().st_size, sha256=sha256_file(path))
        for path in paths
    }


def digest_files(files: Mapping[str, FileEntry]) -> str:
    """The sha256 over the sorted lines `<sha256> <size> <path>`."""
    lines = (f"{entry.sha256} {entry.size} {path}\n" for path, entry in sorted(files.items()))
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def digest_manifest(manifest: Manifest) -> str:
    """The sha256 over what a repeat of the step writes again, as JSON with sorted keys.

    Left out is when, where and how fast it was made: `created`, `seconds`, `folder`, metrics of the machine, and the
    addresses of parents, whose digests count.
    """
    content = json.loads(manifest.model_dump_json(exclude={"digest", "folder", "seconds", "created"}))
    content["parents"] = {port: text.rpartition(DIGEST_MARK)[2] for port, text in manifest.parents.items()}
    content["metrics"] = {name: value for name, value in manifest.metrics.items() if not is_of_machine(name)}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def verify_folder(folder: Path, manifest: Manifest, where: str) -> None:
    """Compare every file with the manifest. Raises: UserError: a file is missing, cut, changed or lies elsewhere."""
    check_links(folder, manifest, where)
    for name, entry in manifest.files.items():
        verify_file(folder / name, entry, f"{where}/{name}")


def unlisted_files(folder: Path, manifest: Manifest) -> list[str]:
    """Files under `folder`, and links to folders, that the manifest does not list, sorted."""
    paths = (path for path in folder.rglob("*") if path.is_symlink() or not path.is_dir())
    return sorted({path.relative_to(folder).as_posix() for path in paths} - {*manifest.files, MANIFEST_NAME})


def check_links(folder: Path, manifest: Manifest, where: str) -> None:
    """Raises: UserError: on the way to a file lies a link that leads out of the folder."""
    root = folder.resolve()
    for name in manifest.files:
        if not (folder / name).resolve().is_relative_to(root):
            raise UserError(
                f"unsafe artifact: {where}/{name} is reached by a link that leads out of the artifact's folder; put "
                "the file itself there, or run the step that writes it again"
            )


def verify_file(path: Path, entry: FileEntry, where: str) -> None:
    """Raises: UserError: the file is missing, or its size or sha256 is another than the manifest's."""
    advice = "delete the artifact's folder and run the step that writes it again"
    if not path.is_file():
        raise UserError(f"damaged artifact: {where} is missing; {advice}")
    size = path.stat().st_size
    if size != entry.size:
        raise UserError(f"damaged artifact: {where} has {size} bytes, its manifest says {entry.size}; {advice}")
    found = sha256_file(path)
    if found != entry.sha256:
        raise UserError(f"damaged artifact: {where} has sha256 {found}, its manifest says {entry.sha256}; {advice}")
