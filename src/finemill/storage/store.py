"""Where artifacts live: a folder (`file://`) or an S3 bucket (`s3://`), behind the same few operations."""

from pathlib import Path
from urllib.parse import urlsplit

from finemill.artifacts.manifest import Manifest, Reference
from finemill.errors import UserError
from finemill.storage.base import Store


def open_store(uri: str) -> Store:
    """The store that holds `uri` (`file:///folder`, a plain path, or `s3://bucket/prefix`)."""
    scheme = urlsplit(uri).scheme
    if scheme == "s3":
        from finemill.storage.s3 import S3Store

        return S3Store(uri)
    if scheme in ("", "file"):
        from finemill.storage.folder import FolderStore

        return FolderStore(uri)
    raise UserError(f"store '{uri}': unknown scheme '{scheme}'; allowed are file:///folder and s3://bucket/prefix")


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
