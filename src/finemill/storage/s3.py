"""Artifacts in an S3 bucket: parts up and down in parallel, downloads resumed, the manifest put last.

Endpoint, region and credentials come from the AWS variables and files that boto3 reads (`AWS_ENDPOINT_URL`, ...).
"""

import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from finemill.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, check_links
from finemill.errors import TemporaryError, UserError
from finemill.storage.base import StoredFile
from finemill.storage.cache import cached_folder, staging_root
from finemill.storage.download import download_file
from finemill.storage.lock import object_lock

PART_BYTES = 64 * 2**20
MAX_CONCURRENCY = 8
# What a caller can mend, by the code S3 answers with.
_USER_ERRORS = {
    "AccessDenied": "the credentials may not do this: check the bucket policy and the role",
    "403": "the credentials may not do this: check the bucket policy and the role",
    "InvalidAccessKeyId": "the access key is not known there: check AWS_ACCESS_KEY_ID and AWS_ENDPOINT_URL",
    "SignatureDoesNotMatch": "the secret key is wrong: check AWS_SECRET_ACCESS_KEY",
    "ExpiredToken": "the session token has expired: log in again",
    "NoSuchBucket": "there is no such bucket: create it or correct the store URI",
}


def s3_client() -> Any:
    """The boto3 client of the endpoint that the environment names; made by one thread, it serves many."""
    return _client(os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL"))


def check_writable(uri: str) -> None:
    """Put and delete a probe object. Raises: UserError: that is refused."""
    bucket, key = _split(f"{uri.rstrip('/')}/.probe-{os.getpid()}")
    client = s3_client()
    with readable_errors(uri, "cannot be written"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
        client.delete_object(Bucket=bucket, Key=key)


def staging_folder(uri: str) -> Path:
    """A new folder on the cache's file system, so that a published artifact can be kept there by a rename."""
    return Path(tempfile.mkdtemp(prefix=f"{uri.rsplit('/', 1)[-1]}-", dir=staging_root()))


def read_manifest(uri: str) -> Manifest | None:
    """The manifest under `uri`, None if there is none."""
    bucket, key = _split(f"{uri}/{MANIFEST_NAME}")
    client = s3_client()
    with readable_errors(uri, "cannot be read"):
        try:
            data = client.get_object(Bucket=bucket, Key=key)["Body"].read()
        except client.exceptions.NoSuchKey:
            return None
    return Manifest.from_bytes(data, uri)


def publish(folder: Path, uri: str, manifest: Manifest) -> Manifest:
    """Upload the files in parallel, then put the manifest unless one is there; keep the folder in the cache."""
    manifest = manifest.model_copy(update={"folder": manifest.digest[:12]})
    files_uri = manifest.files_uri(uri)
    client = s3_client()
    with readable_errors(uri, "cannot be written"):
        _in_parallel(lambda name: _upload(client, folder / name, f"{files_uri}/{name}"), manifest.files)
        standing = _put_manifest(client, uri, manifest)
    if standing.digest != manifest.digest:
        shutil.rmtree(folder)
        return standing
    with cached_folder(manifest.digest) as (target, complete):
        if complete:
            shutil.rmtree(folder)
        else:
            shutil.rmtree(target, ignore_errors=True)
            folder.rename(target)
    return standing


def fetch(uri: str, manifest: Manifest) -> Path:
    """The artifact in the local cache, downloaded unless it is there already."""
    client = s3_client()
    with cached_folder(manifest.digest) as (target, complete), readable_errors(uri, "cannot be read"):
        check_links(target, manifest, uri)
        if not (complete and _has_all_files(target, manifest)):
            target.mkdir(parents=True, exist_ok=True)
            for name, entry in manifest.files.items():
                _download(client, f"{manifest.files_uri(uri)}/{name}", target / name, entry)
    return target


def list_artifacts(uri: str) -> list[str]:
    """The prefixes of complete artifacts directly under `uri`, sorted."""
    manifest = f"/{MANIFEST_NAME}"
    names = [file.name.removesuffix(manifest) for file in list_files(uri) if file.name.endswith(manifest)]
    return sorted(f"{uri}/{name}" for name in names if "/" not in name)


def list_files(uri: str) -> tuple[StoredFile, ...]:
    """Every object under `uri`."""
    bucket, prefix = _split(f"{uri}/")
    with readable_errors(uri, "cannot be listed"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return tuple(
            StoredFile(item["Key"].removeprefix(prefix), item["Size"], item["LastModified"])
            for page in pages
            for item in page.get("Contents", [])
        )


def delete(uri: str) -> None:
    """Remove an artifact, its manifest first."""
    bucket, prefix = _split(f"{uri}/")
    client = s3_client()
    with readable_errors(uri, "cannot be deleted"):
        client.delete_object(Bucket=bucket, Key=prefix + MANIFEST_NAME)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=item["Key"])


@contextmanager
def lock(uri: str) -> Iterator[None]:
    """A lock object of that name."""
    with readable_errors(uri, "cannot be locked"), object_lock(s3_client(), *_split(uri)):
        yield


def _upload(client: Any, path: Path, uri: str) -> None:
    bucket, key = _split(uri)
    config = TransferConfig(
        multipart_chunksize=PART_BYTES, multipart_threshold=PART_BYTES, max_concurrency=MAX_CONCURRENCY
    )
    try:
        client.upload_file(str(path), bucket, key, Config=config)
    except S3UploadFailedError as error:
        # boto3 wraps what the server said into an exception that is no ClientError.
        raise error.__context__ or error from None


def _put_manifest(client: Any, uri: str, manifest: Manifest) -> Manifest:
    bucket, key = _split(f"{uri}/{MANIFEST_NAME}")
    try:
        client.put_object(Bucket=bucket, Key=key, Body=manifest.to_bytes(), IfNoneMatch="*")
    except ClientError as error:
        if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
            raise
        return read_manifest(uri) or manifest
    return manifest


def _download(client: Any, uri: str, path: Path, entry: FileEntry) -> None:
    bucket, key = _split(uri)

    def read_range(start: int, end: int) -> bytes:
        body = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}")["Body"]
        data: bytes = body.read()
        return data

    try:
        download_file(read_range, path, entry, uri, part_bytes=PART_BYTES, max_concurrency=MAX_CONCURRENCY)
    except client.exceptions.NoSuchKey:
        raise UserError(
            f"damaged artifact: {uri} is missing; delete the artifact and run the step that writes it again"
        ) from None


@cache
def _client(endpoint: str | None) -> Any:
    """One client per endpoint. S3-compatible servers often know no checksum trailers and no host-style addresses."""
    config = Config(
        retries={"mode": "standard", "max_attempts": 5},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=2 * MAX_CONCURRENCY,
        s3={"addressing_style": "path" if endpoint else "auto"},
    )
    return boto3.client("s3", config=config)


def _split(uri: str) -> tuple[str, str]:
    parts = urlsplit(uri, allow_fragments=False)
    if not parts.netloc:
        raise UserError(f"'{uri}' names no bucket: write s3://bucket/prefix")
    return parts.netloc, parts.path.lstrip("/")


def _has_all_files(folder: Path, manifest: Manifest) -> bool:
    """Whether sizes match: contents were verified when they were downloaded."""
    return all(
        (folder / name).is_file() and (folder / name).stat().st_size == entry.size
        for name, entry in manifest.files.items()
    )


def _in_parallel(work: Callable[[str], None], names: Iterable[str]) -> None:
    with ThreadPoolExecutor(max_workers=4) as pool:
        for _ in pool.map(work, names):
            pass


def _code(error: ClientError) -> str:
    return str(error.response.get("Error", {}).get("Code", ""))


@contextmanager
def readable_errors(uri: str, what: str) -> Iterator[None]:
    """Turn boto3's exceptions into one line: the caller's to mend, or worth another attempt."""
    try:
        yield
    except NoCredentialsError:
        raise UserError(
            f"store {uri} {what}: no S3 credentials found; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY or a profile"
        ) from None
    except ClientError as error:
        if _code(error) in _USER_ERRORS:
            raise UserError(f"store {uri} {what} ({_code(error)}): {_USER_ERRORS[_code(error)]}") from None
        raise TemporaryError(f"store {uri} {what}: {error}") from None
    except BotoCoreError as error:
        raise TemporaryError(f"store {uri} {what}: {error}; check AWS_ENDPOINT_URL and the network") from None
