"""Where artifacts lie: in a folder (`file://`, or a plain path) or an S3 bucket (`s3://`), by URI.

A URI without a manifest does not exist for readers.
"""

from collections.abc import Collection
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Protocol
from urllib.parse import urlsplit

from finemill.artifacts.manifest import DIGEST_MARK, Manifest, Reference, digest_files
from finemill.errors import UserError
from finemill.storage.base import StoredFile


class _Backend(Protocol):
    """What the module of a kind of store offers, as the functions below describe it."""

    def check_writable(self, uri: str) -> None: ...
    def staging_folder(self, uri: str) -> Path: ...
    def read_manifest(self, uri: str) -> Manifest | None: ...
    def publish(self, folder: Path, uri: str, manifest: Manifest) -> Manifest: ...
    def fetch(self, uri: str, manifest: Manifest) -> Path: ...
    def list_artifacts(self, uri: str) -> list[str]: ...
    def list_files(self, uri: str) -> tuple[StoredFile, ...]: ...
    def delete(self, uri: str) -> None: ...
    def lock(self, uri: str) -> AbstractContextManager[None]: ...


def check_writable(uri: str) -> None:
    """Write and delete a probe. Raises: UserError: nothing can be written there."""
    _backend(uri).check_writable(uri)


def staging_folder(uri: str) -> Path:
    """A new empty local folder in which the artifact for `uri` is prepared."""
    return _backend(uri).staging_folder(uri)


def publish_artifact(folder: Path, uri: str, manifest: Manifest) -> Manifest:
    """Put a staging folder under `uri`, manifest last; `folder` is gone afterwards.

    Returns: the manifest that stands: another one's if somebody else published under `uri` first.
    """
    return _backend(uri).publish(folder, uri, manifest)


def read_manifest(uri: str) -> Manifest | None:
    """The manifest under `uri`, None if there is none."""
    return _backend(uri).read_manifest(uri)


def read_artifact(reference: Reference) -> Manifest:
    """The manifest a reference points to. Raises: UserError: nothing is there, or something else is."""
    manifest = read_manifest(reference.uri)
    if manifest is None:
        raise UserError(f"no complete artifact at {reference.uri}: run its step, or correct the reference")
    if manifest.digest != reference.digest:
        raise UserError(
            f"artifact at {reference.uri} has digest {manifest.digest}, the reference says {reference.digest}: "
            "it was written anew; use the reference its step printed last"
        )
    return manifest


def fetch_artifact(reference: Reference) -> tuple[Path, Manifest]:
    """Follow a reference to a local folder, read only, each file verified against the manifest.

    Raises: UserError: nothing is there, or something else is.
    """
    manifest = read_artifact(reference)
    return _backend(reference.uri).fetch(reference.uri, manifest), manifest


def artifact_folder(text: str, kind: str, writer: str, otherwise: str = "") -> Path:
    """The local folder of an artifact that a user names: by its reference, verified, or by the folder itself.

    Args:
        text: what the user gave.
        kind: the artifact's.
        writer: the step that writes such artifacts.
        otherwise: what else the user may give, for the message.
    Raises: UserError: it names neither, or an artifact of another kind.
    """
    if DIGEST_MARK in text:
        folder, manifest = fetch_artifact(Reference.parse(text))
        if manifest.kind != kind:
            raise UserError(f"{text} is of the kind '{manifest.kind}', not '{kind}': give what {writer} printed")
        return folder
    if not Path(text).is_dir():
        raise UserError(
            f"{text}: no such file or folder; give the reference, <uri>{DIGEST_MARK}<digest>, that {writer} printed, "
            f"or its folder{otherwise}"
        )
    return Path(text)


def fetch_files(reference: Reference, names: Collection[str]) -> Path:
    """The same for some of its files: a model's tokenizer without its weights. Returns: a folder that holds them."""
    manifest = read_artifact(reference)
    wanted = {name: entry for name, entry in manifest.files.items() if name in names}
    part = manifest.model_copy(update={"files": wanted, "digest": digest_files(wanted)})
    return _backend(reference.uri).fetch(reference.uri, part)


def list_artifacts(uri: str) -> list[str]:
    """The URIs of complete artifacts directly under `uri`, sorted."""
    return _backend(uri).list_artifacts(uri)


def list_stored_files(uri: str) -> tuple[StoredFile, ...]:
    """Every file under `uri`, of complete artifacts or not."""
    return _backend(uri).list_files(uri)


def delete_artifact(uri: str) -> None:
    """Remove an artifact: first for readers, then its files. Raises: UserError: that is refused."""
    _backend(uri).delete(uri)


def hold_lock(uri: str) -> AbstractContextManager[None]:
    """Hold the lock named `uri` while the block runs; for seconds, see `lock.py`."""
    return _backend(uri).lock(uri)


def _backend(uri: str) -> _Backend:
    scheme = urlsplit(uri).scheme
    if scheme == "s3":
        from finemill.storage import s3

        return s3
    if scheme in ("", "file"):
        from finemill.storage import folder

        return folder
    raise UserError(f"store '{uri}': unknown scheme '{scheme}'; allowed are file:///folder and s3://bucket/prefix")
