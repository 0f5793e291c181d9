"""Artifacts in an S3 bucket: parts up and down in parallel, downloads resumed, the manifest put last.

Endpoint, region and credentials come from the AWS variables and files that boto3 reads (`AWS_ENDPOINT_URL`, ...).
"""

import hashlib
import os
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache, partial
from pathlib import Path
from typing import Any

import boto3
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    CredentialRetrievalError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    ProxyConnectionError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as S3ConnectionError
from botocore.parsers import ResponseParserError
from botocore.session import get_session

from finemill.artifacts.manifest import MANIFEST_NAME, FileEntry, Manifest, check_links, unlisted_files
from finemill.errors import TemporaryError, UserError
from finemill.storage.base import StoredFile
from finemill.storage.cache import cached_folder
from finemill.storage.download import download_file, fetch_missing_parts
from finemill.storage.lock import object_lock
from finemill.storage.rights import follow_umask
from finemill.storage.staging import new_staging_folder
from finemill.storage.upload import DAMAGED_CODES, sha256_base64, upload_file

PART_BYTES = 64 * 2**20
MAX_CONCURRENCY = 8
_TIMEOUT_S = 12
_ATTEMPTS = 4
"""With the pauses between them, a server that never answers is given up on within a minute."""
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{2,62}|arn:[A-Za-z0-9:._/-]+")
_ACCESS_POINT = re.compile(r"(arn:[^/]+:accesspoint/[^/]+)/?(.*)", re.DOTALL)
"""Pattern of what follows `s3://` where a slash is before the access point's name, as AWS writes it."""
_MD5_TAG = re.compile(r"[0-9a-f]{32}(?:-([0-9]+))?")
_NETWORK_ERRORS = (
    HTTPClientError,
    S3ConnectionError,
    IncompleteReadError,
    ResponseStreamingError,
    CredentialRetrievalError,
)
"""What botocore raises where the network, or a server of credentials, was at fault."""
_LATER = re.compile(
    r"RequestTimeout.*|RequestTimeTooSkewed|SlowDown|.*Throttl.*|TooManyRequests.*|(Request|Bandwidth)LimitExceeded"
    r"|PriorRequestNotComplete|TemporaryRedirect|InternalError|ServiceUnavailable|NoSuchUpload"
)
"""S3's codes for requests that it would answer at another time."""
_REDIRECTED = "what answers there sends every request elsewhere, as no S3 server does: check AWS_ENDPOINT_URL"
"""What is said of a server whose redirects botocore follows, and asks for the bucket's region, without an end."""
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
    bucket, key = split_uri(f"{uri.rstrip('/')}/.probe-{os.getpid()}")
    client = s3_client()
    with readable_errors(uri, "cannot be written"):
        client.put_object(Bucket=bucket, Key=key, Body=b"")
        client.delete_object(Bucket=bucket, Key=key)


def staging_folder(uri: str) -> Path:
    """A new folder on the cache's file system, so that a published artifact can be kept there by a rename."""
    return new_staging_folder(f"{uri.rsplit('/', 1)[-1]}-")


def read_manifest(uri: str) -> Manifest | None:
    """The manifest under `uri`, None if there is none."""
    with readable_errors(uri, "cannot be read"):
        data = _read_object(s3_client(), f"{uri}/{MANIFEST_NAME}")
    return None if data is None else Manifest.from_bytes(data, uri)


def publish(folder: Path, uri: str, manifest: Manifest) -> Manifest:
    """Upload the files in parallel, then put the manifest unless one is there; keep the folder in the cache."""
    manifest = manifest.model_copy(update={"folder": manifest.digest[:12]})
    files_uri = manifest.files_uri(uri)
    client = s3_client()
    with readable_errors(uri, "cannot be written"):
        _upload(client, folder, files_uri, manifest)
        standing = _put_manifest(client, uri, manifest)
    if standing.digest != manifest.digest:
        shutil.rmtree(folder)
        return standing
    with cached_folder(manifest.digest) as (target, complete):
        if complete:
            shutil.rmtree(folder)
        else:
            shutil.rmtree(target, ignore_errors=True)
            follow_umask(folder)
            folder.rename(target)
    return standing


def fetch(uri: str, manifest: Manifest) -> Path:
    """The artifact in the local cache, downloaded unless it is there already."""
    client = s3_client()
    with cached_folder(manifest.digest) as (target, complete), readable_errors(uri, "cannot be read"):
        check_links(target, manifest, uri)
        if not complete:
            target.mkdir(parents=True, exist_ok=True)
            for name, entry in manifest.files.items():
                _download(client, f"{manifest.files_uri(uri)}/{name}", target / name, entry)
            for name in unlisted_files(target, manifest):
                (target / name).unlink()
    return target


def download_object(uri: str, etag: str, size: int, path: Path) -> None:
    """Fetch an object as it was when it had this entity tag; once more if the bytes do not fit to it.

    Raises: TemporaryError: the object was replaced, or came damaged twice.
    """
    bucket, key = split_uri(uri)
    client = s3_client()

    read_range = partial(_read_range, client, uri, size, IfMatch=etag)
    ledger = path.with_name(path.name + ".parts")
    with readable_errors(uri, "cannot be read"):
        for _ in range(2):
            try:
                fetch_missing_parts(read_range, path, ledger, size, uri, PART_BYTES, MAX_CONCURRENCY)
                expected = _etag_of(client, bucket, key, etag, path)
            except ClientError as error:
                if _code(error) not in ("PreconditionFailed", "412"):
                    raise
                raise TemporaryError(f"{uri} was replaced while it was read: run the step again") from None
            finally:
                ledger.unlink(missing_ok=True)
            if expected in (None, etag.strip('"')):
                return
    raise TemporaryError(f"{uri} came twice with other bytes than its ETag {etag} says: check the network, try again")


def _etag_of(client: Any, bucket: str, key: str, etag: str, path: Path) -> str | None:
    """The entity tag that an object with a file's bytes has; None if the server's tags are no MD5."""
    parts = _MD5_TAG.fullmatch(etag.strip('"'))
    if not parts:
        return None
    number = {"PartNumber": 1} if parts[1] else {}
    head = client.head_object(Bucket=bucket, Key=key, **number)
    if head.get("SSECustomerAlgorithm") or head.get("ServerSideEncryption", "").startswith("aws:kms"):
        return None
    with path.open("rb") as file:
        if not parts[1]:
            return hashlib.file_digest(file, _md5).hexdigest()
        part_bytes = head["ContentLength"]
        if not 0 < part_bytes < path.stat().st_size and parts[1] != "1":
            return None
        md5s = [_md5(data).digest() for data in iter(lambda: file.read(part_bytes), b"")]
    return f"{_md5(b''.join(md5s)).hexdigest()}-{len(md5s)}" if len(md5s) == int(parts[1]) else None


def list_artifacts(uri: str) -> list[str]:
    """The prefixes of complete artifacts directly under `uri`, sorted."""
    manifest = f"/{MANIFEST_NAME}"
    names = [file.name.removesuffix(manifest) for file in list_files(uri) if file.name.endswith(manifest)]
    return sorted(f"{uri}/{name}" for name in names if "/" not in name)


def list_files(uri: str) -> tuple[StoredFile, ...]:
    """Every object under `uri`."""
    bucket, prefix = split_uri(f"{uri}/")
    with readable_errors(uri, "cannot be listed"):
        pages = s3_client().get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
        return tuple(_stored_file(item, prefix) for page in pages for item in _listed(page, uri))


def _listed(page: Mapping[str, Any], uri: str) -> list[dict[str, Any]]:
    """The objects of a page. Raises: UserError: it is no listing, as what a login page is read as."""
    items: list[dict[str, Any]] = page.get("Contents", [])
    if not items and "IsTruncated" not in page and "KeyCount" not in page:
        raise UserError(f"store {uri} cannot be listed: what answered is no S3 server: check AWS_ENDPOINT_URL")
    return items


def _stored_file(item: Mapping[str, Any], prefix: str) -> StoredFile:
    """An object of a listing. Raises: UserError: its size or time is missing."""
    try:
        return StoredFile(item["Key"].removeprefix(prefix), item["Size"], item["LastModified"])
    except KeyError as error:
        raise UserError(f"the S3 server lists objects without {error}: check AWS_ENDPOINT_URL") from None


def delete(uri: str) -> None:
    """Remove an artifact, its manifest first."""
    bucket, prefix = split_uri(f"{uri}/")
    client = s3_client()
    with readable_errors(uri, "cannot be deleted"):
        client.delete_object(Bucket=bucket, Key=prefix + MANIFEST_NAME)
        for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
            for item in page.get("Contents", []):
                client.delete_object(Bucket=bucket, Key=item["Key"])


@contextmanager
def lock(uri: str) -> Iterator[None]:
    """A lock object of that name."""
    with readable_errors(uri, "cannot be locked"), object_lock(s3_client(), *split_uri(uri)):
        yield


def _upload(client: Any, folder: Path, files_uri: str, manifest: Manifest) -> None:
    """Small files side by side, large ones one after the other, as their parts go side by side."""

    def upload(name: str) -> None:
        bucket, key = split_uri(f"{files_uri}/{name}")
        entry = manifest.files[name]
        upload_file(client, folder / name, bucket, key, entry, part_bytes=PART_BYTES, max_concurrency=MAX_CONCURRENCY)

    _in_parallel(upload, [name for name, entry in manifest.files.items() if entry.size <= PART_BYTES])
    for name, entry in manifest.files.items():
        if entry.size > PART_BYTES:
            upload(name)


def _put_manifest(client: Any, uri: str, manifest: Manifest) -> Manifest:
    """Put the manifest unless one is there, and read it back; once more if it came out damaged.

    Returns: the one that stands.
    """
    bucket, key = split_uri(f"{uri}/{MANIFEST_NAME}")
    data = manifest.to_bytes()
    for _ in range(2):
        try:
            client.put_object(Bucket=bucket, Key=key, Body=data, IfNoneMatch="*", ChecksumSHA256=sha256_base64(data))
        except ClientError as error:
            if _code(error) in DAMAGED_CODES:
                continue
            if _code(error) not in ("PreconditionFailed", "ConditionalRequestConflict"):
                raise
            standing = read_manifest(uri)
            if standing is None:
                continue
            return standing
        try:
            standing = read_manifest(uri)
        except UserError:
            standing = None
        if standing == manifest or (standing and standing.digest != manifest.digest):
            return standing
        client.delete_object(Bucket=bucket, Key=key)
    raise TemporaryError(f"store {uri} does not hold the manifest that was sent: check the network, and try again")


def _read_object(client: Any, uri: str) -> bytes | None:
    """The bytes of a small object, read once more if they are not those of its entity tag; None if there is none.

    Raises: TemporaryError: other bytes each time.
    """
    bucket, key = split_uri(uri)
    found: list[bytes] = []
    while len(found) < 2:
        try:
            answer = client.get_object(Bucket=bucket, Key=key)
        except client.exceptions.NoSuchKey:
            return None
        data: bytes = answer["Body"].read()
        if data in found or answer.get("ETag", "").strip('"') == _md5(data).hexdigest():
            return data
        found.append(data)
    raise TemporaryError(f"{uri} came with other bytes each time: check the network, and try again")


def _md5(data: bytes = b"") -> Any:
    return hashlib.md5(data, usedforsecurity=False)


def _download(client: Any, uri: str, path: Path, entry: FileEntry) -> None:
    read_range = partial(_read_range, client, uri, entry.size)
    try:
        download_file(read_range, path, entry, uri, part_bytes=PART_BYTES, max_concurrency=MAX_CONCURRENCY)
    except client.exceptions.NoSuchKey:
        raise UserError(
            f"damaged artifact: {uri} is missing; delete the artifact and run the step that writes it again"
        ) from None


def _read_range(client: Any, uri: str, size: int, start: int, end: int, **condition: str) -> bytes:
    """Bytes of an object of `size` bytes. Raises: UserError: the server sends all of them whatever is asked for."""
    bucket, key = split_uri(uri)
    answer = client.get_object(Bucket=bucket, Key=key, Range=f"bytes={start}-{end - 1}", **condition)
    data: bytes = answer["Body"].read()
    if "ContentRange" not in answer and len(data) == size > end - start:
        raise UserError(
            f"the S3 server of s3://{bucket} ignores Range and sends all of {key}: files of more than "
            f"{PART_BYTES // 2**20} MiB cannot be read there; use a server that knows ranges"
        )
    return data


@cache
def _client(endpoint: str | None) -> Any:
    """One client per endpoint.

    S3-compatible servers often know no checksum trailers and no host-style addresses: those that know nothing else need
    `addressing_style` in the profile.
    """
    session = get_session()
    in_profile = session.get_scoped_config().get("s3", {})
    style = in_profile.get("addressing_style") if isinstance(in_profile, dict) else None
    config = Config(
        connect_timeout=_TIMEOUT_S,
        read_timeout=_TIMEOUT_S,
        retries={"mode": "standard", "total_max_attempts": _ATTEMPTS},
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        max_pool_connections=2 * MAX_CONCURRENCY,
        s3={"addressing_style": style or ("path" if endpoint else "auto")},
    )
    return boto3.Session(botocore_session=session).client("s3", config=config)


def split_uri(uri: str) -> tuple[str, str]:
    """Bucket and key. An S3 address has no query and no fragment: `?` and `#` are parts of the key."""
    place = uri.partition("://")[2]
    access_point = _ACCESS_POINT.fullmatch(place)
    bucket, key = access_point.groups() if access_point else (place.partition("/")[0], place.partition("/")[2])
    if "@" in bucket:
        raise UserError("an s3:// address holds no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY")
    if not _BUCKET.fullmatch(bucket):
        raise UserError(f"'{uri}' names no bucket: write s3://bucket/prefix")
    return bucket, key.lstrip("/")


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
        clock = ": set this machine's clock" if _code(error) == "RequestTimeTooSkewed" else ""
        line = f"store {uri} {what}: {error}{clock}" if _code(error) else f"store {uri} {what}: {_not_s3(error)}"
        raise (TemporaryError(line) if _may_pass(error) else UserError(line)) from None
    except SSLError as error:
        raise UserError(
            f"store {uri} {what}: no trusted connection ({error}): name the file of the certificate's authority in "
            "AWS_CA_BUNDLE"
        ) from None
    except (*_NETWORK_ERRORS, ResponseParserError) as error:
        if "maximum recursion depth" in str(error):
            raise UserError(f"store {uri} {what}: {_REDIRECTED}") from None
        if isinstance(error, ProxyConnectionError) and "407" in str(error.kwargs.get("error")):
            raise UserError(f"store {uri} {what}: {error} asks for a password: write it into HTTPS_PROXY") from None
        raise TemporaryError(f"store {uri} {what}: {error}; check AWS_ENDPOINT_URL and the network") from None
    except RecursionError:
        raise UserError(f"store {uri} {what}: {_REDIRECTED}") from None
    except BotoCoreError as error:
        raise UserError(
            f"store {uri} {what}: {error}: correct the address, the AWS_* variables or the profile"
        ) from None


def _status(error: ClientError) -> int:
    return int(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", 500))


def _not_s3(error: ClientError) -> str:
    """What is said of a page without a code of S3's, as logins, proxies and gateways have."""
    return f"what answers there, with HTTP {_status(error)}, is no S3 server: check AWS_ENDPOINT_URL and proxies"


def _may_pass(error: ClientError) -> bool:
    """Whether the same request may be answered otherwise later."""
    status = _status(error)
    return (
        (status >= 500 and status != 501) or status < 300 or status in (408, 409, 425, 429) or _is_later(_code(error))
    )


def _is_later(code: str) -> bool:
    return code in DAMAGED_CODES or _LATER.fullmatch(code) is not None
