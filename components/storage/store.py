"""Where artifacts live: a folder (`file://`) or an S3 bucket (`s3://`), behind the same few operations."""

from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Protocol
from urllib.parse import unquote, urlsplit

from finemill.components.artifacts import Manifest, Reference
from finemill.components.errors import UserError


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


def open_store(uri: str) -> Store:
    """The store that holds `uri` (`file:///folder`, a plain path, or `s3://bucket/prefix`)."""
    scheme = urlsplit(uri).scheme
    if scheme == "s3":
        from finemill.components.storage.s3 import S3Store

        return S3Store(uri)
    if scheme in ("", "file"):
        from finemill.components.storage.folder import FolderStore

        return FolderStore(uri)
    raise UserError(f"store '{uri}': unknown scheme '{scheme}'; allowed are file:///folder and s3://bucket/prefix")


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


def fetch_artifact(reference: Reference) -> tuple[Path, Manifest]:
    """Follow a reference to a verified local folder. Raises: UserError: nothing is there, or something else is."""
    store = open_store(reference.uri)
    manifest = read_artifact(reference)
    return store.fetch(reference.uri, manifest), manifest


def read_artifact(reference: Reference) -> Manifest:
    """The manifest a reference points to. Raises: UserError: nothing is there, or something else is."""
    manifest = open_store(reference.uri).read_manifest(reference.uri)
    if manifest is None:
        raise UserError(f"no complete artifact at {reference.uri}: run its step, or correct the reference")
    if manifest.digest != reference.digest:
        raise UserError(
            f"artifact at {reference.uri} has digest {manifest.digest}, the reference says {reference.digest}: "
            "it was written anew; use the reference its step printed last"
        )
    return manifest
