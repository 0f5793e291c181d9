"""Artifacts in a local folder: prepared in a sibling, made visible by one rename."""

import fcntl
import os
import shutil
import tempfile
from contextlib import AbstractContextManager, suppress
from datetime import UTC, datetime
from pathlib import Path

from finemill.artifacts.manifest import MANIFEST_NAME, Manifest, unlisted_files, verify_folder
from finemill.errors import UserError
from finemill.storage.base import StoredFile, local_path, normalize_uri
from finemill.storage.lock import folder_lock
from finemill.storage.rights import follow_umask

_STAGING = ".staging"


def check_writable(uri: str) -> None:
    """Create the folder and a probe file in it. Raises: UserError: that fails."""
    root = local_path(normalize_uri(uri))
    try:
        root.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=root):
            pass
    except OSError as error:
        raise UserError(
            f"store {root.as_uri()} cannot be written ({error.strerror}): change its rights or choose another"
        ) from None


def staging_folder(uri: str) -> Path:
    """A new folder on the same file system as `uri`, so that a rename publishes it."""
    parent = local_path(uri).parent / _STAGING
    parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f"{local_path(uri).name}-", dir=parent))
    # Held until this process ends, however it ends: what nobody holds has been left by one that was killed.
    with suppress(OSError):
        fcntl.flock(os.open(folder, os.O_RDONLY), fcntl.LOCK_SH | fcntl.LOCK_NB)
    return folder


def abandoned_folders(uri: str) -> list[Path]:
    """The staging folders under `uri` that no process of this machine holds."""
    places = (pattern for depth in ("*", "*/*") for pattern in local_path(uri).glob(f"{depth}/{_STAGING}/*"))
    return sorted(path for path in places if path.is_dir() and not _is_held(path))


def _is_held(folder: Path) -> bool:
    try:
        descriptor = os.open(folder, os.O_RDONLY)
    except FileNotFoundError:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        # A file system without such locks: the folder's age has to do.
        return False
    finally:
        os.close(descriptor)
    return False


def read_manifest(uri: str) -> Manifest | None:
    """The manifest under `uri`, None if there is none."""
    try:
        data = (local_path(uri) / MANIFEST_NAME).read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    return Manifest.from_bytes(data, uri)


def publish(folder: Path, uri: str, manifest: Manifest) -> Manifest:
    """Write the manifest, flush everything to disk, rename the folder to its place."""
    target = local_path(uri)
    (folder / MANIFEST_NAME).write_bytes(manifest.to_bytes())
    follow_umask(folder)
    for path in folder.rglob("*"):
        _flush(path)
    try:
        folder.rename(target)
    except OSError:
        standing = read_manifest(uri) or _replace_leftovers(folder, uri)
        if standing is not None:
            shutil.rmtree(folder)
            return standing
    _flush(target.parent)
    return manifest


def _replace_leftovers(folder: Path, uri: str) -> Manifest | None:
    """Rename the folder to a place where files lie without a manifest, which are deleted.

    Returns: the manifest that stands, of somebody who was faster; None if the folder is in its place.
    """
    target = local_path(uri)
    with folder_lock(target.parent / _STAGING / f"{target.name}.lock"):
        standing = read_manifest(uri)
        if standing is None:
            delete(uri)
            folder.rename(target)
    return standing


def fetch(uri: str, manifest: Manifest) -> Path:
    """The folder itself, verified. Raises: UserError: a file is not the manifest's, or lies there beside those."""
    whole = read_manifest(uri) or manifest
    for name in unlisted_files(local_path(uri), whole):
        raise UserError(
            f"unsafe artifact: {uri} holds {name!r:.100}, which its manifest does not list: no step puts files there, "
            "so find out who did, and remove it"
        )
    verify_folder(local_path(uri), manifest, uri)
    return local_path(uri)


def list_artifacts(uri: str) -> list[str]:
    """The prefixes of complete artifacts directly under `uri`, sorted."""
    return sorted(path.parent.as_uri() for path in local_path(uri).glob(f"*/{MANIFEST_NAME}"))


def list_files(uri: str) -> tuple[StoredFile, ...]:
    """Every file under `uri`."""
    root = local_path(uri)
    # Unlike `rglob` it goes on where a folder is deleted meanwhile.
    paths = [Path(folder, name) for folder, _, names in os.walk(root) for name in names]
    return tuple(filter(None, (_stored_file(path, path.relative_to(root).as_posix()) for path in paths)))


def delete(uri: str) -> None:
    """Rename an artifact, after which it does not exist for readers, and remove its files.

    What a deletion that was killed has left is removed by the next one of the same artifact, and by `finemill gc`.
    Raises: UserError: the folder may not be changed.
    """
    path = local_path(uri)
    doomed = path if path.parent.name == _STAGING else path.parent / _STAGING / f"{path.name}.deleted"
    try:
        if path != doomed:
            _remove(doomed)
            doomed.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileNotFoundError):
                path.rename(doomed)
        _remove(doomed)
    except OSError as error:
        raise UserError(f"{uri} cannot be deleted ({error.strerror}): change the rights of its folder") from None


def lock(uri: str) -> AbstractContextManager[None]:
    """A lock file of that name."""
    return folder_lock(local_path(uri))


def _remove(path: Path) -> None:
    """Remove a folder, or a file in its place, if there is one; another process may do so at the same time."""
    while os.path.lexists(path):
        with suppress(FileNotFoundError):
            if path.is_symlink() or path.is_file():
                path.unlink()
            else:
                shutil.rmtree(path)


def _stored_file(path: Path, name: str) -> StoredFile | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return StoredFile(name, status.st_size, datetime.fromtimestamp(status.st_mtime, UTC))


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
