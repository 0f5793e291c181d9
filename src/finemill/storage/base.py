"""What every kind of store can do, and how the addresses of folders are spelled."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from finemill.artifacts.manifest import Manifest
from finemill.errors import UserError


@dataclass(frozen=True)
class StoredFile:
    """A file in a store: `name` relative to what was asked for, size in bytes, when it was last written (UTC)."""

    name: str
    size: int
    modified: datetime


class Store(Protocol):
    """Artifacts by URI prefix. A prefix without a manifest does not exist for readers."""

    def check_writable(self) -> None:
        """Write and delete a probe. Raises: UserError: the place cannot be written."""

    def staging_folder(self, uri: str) -> Path:
        """A new empty local folder in which the artifact for `uri` is prepared."""

    def read_manifest(self, uri: str) -> Manifest | None:
        """The manifest under `uri`, None if there is none."""

    def publish(self, folder: Path, uri: str, manifest: Manifest) -> Manifest:
        """Put a staging folder under `uri`, manifest last; `folder` is gone afterwards.

        Returns: the manifest that stands: another one's if somebody else published under `uri` first.
        """

    def fetch(self, uri: str, manifest: Manifest) -> Path:
        """A local folder with the artifact's files, each verified against the manifest. Read only."""

    def list(self, uri: str) -> "list[str]":
        """The prefixes of complete artifacts directly under `uri`, sorted."""

    def files(self, uri: str) -> tuple[StoredFile, ...]:
        """Every file under `uri`, of complete artifacts or not."""

    def delete(self, uri: str) -> None:
        """Remove an artifact, its manifest first."""

    def lock(self, uri: str) -> AbstractContextManager[None]:
        """Hold the lock named `uri` while the block runs; for seconds, see `lock.py`."""


def normalize_uri(uri: str) -> str:
    """`file://` and an absolute path for a plain path or a file URI, anything else unchanged; no trailing slash."""
    parts = urlsplit(uri)
    if parts.scheme in ("", "file"):
        if parts.netloc:
            raise UserError(f"'{uri}': a file URI has three slashes, file:///folder; found the host '{parts.netloc}'")
        return local_path(uri).expanduser().resolve().as_uri()
    return uri.rstrip("/")


def local_path(uri: str) -> Path:
    """The path of a file URI, or of a plain path."""
    return Path(unquote(urlsplit(uri).path)) if uri.startswith("file:") else Path(uri)
