"""One file into a bucket, with checksums for the server to compare, and a look at what it then holds.

Servers that compare nothing exist, as do proxies that answer for them: what was sent is believed to be there only when
its MD5 or SHA-256 comes back, or its bytes do.
"""

import hashlib
from base64 import b64encode
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from botocore.exceptions import BotoCoreError, ClientError

from finemill.artifacts.manifest import FileEntry
from finemill.errors import TemporaryError

_ATTEMPTS = 2
_READ_BYTES = 2**20
DAMAGED_CODES = frozenset({"BadDigest", "IncompleteBody", "XAmzContentChecksumMismatch", "XAmzContentSHA256Mismatch"})
"""S3's codes for a body that arrived otherwise than it was sent."""


@dataclass(frozen=True)
class _Sent:
    """What S3 says of an object with these bytes: its entity tag, unless it is encrypted, and its checksum."""

    etag: str
    sha256: str


def upload_file(
    client: Any, path: Path, bucket: str, key: str, entry: FileEntry, *, part_bytes: int, max_concurrency: int
) -> None:
    """Put a file, in parts if it has more than `part_bytes`, and find it there; once more if it is not.

    Raises: TemporaryError: the server does not hold what was sent.
    """
    for _ in range(_ATTEMPTS):
        try:
            if entry.size > part_bytes:
                sent = _put_parts(client, path, bucket, key, entry.size, part_bytes, max_concurrency)
            else:
                sent = _put(client, path.read_bytes(), bucket, key)
        except ClientError as error:
            if error.response["Error"].get("Code") not in DAMAGED_CODES:
                raise
            continue
        if _is_there(client, bucket, key, entry, sent):
            return
    raise TemporaryError(
        f"s3://{bucket}/{key} does not hold the bytes that were sent, {_ATTEMPTS} times: check AWS_ENDPOINT_URL and "
        "the network, and try again"
    )


def sha256_base64(data: bytes) -> str:
    """The value of S3's field ChecksumSHA256."""
    return b64encode(hashlib.sha256(data).digest()).decode()


def _put(client: Any, data: bytes, bucket: str, key: str) -> _Sent:
    checksum = sha256_base64(data)
    client.put_object(Bucket=bucket, Key=key, Body=data, ChecksumSHA256=checksum)
    return _Sent(_md5(data).hex(), checksum)


def _put_parts(
    client: Any, path: Path, bucket: str, key: str, size: int, part_bytes: int, max_concurrency: int
) -> _Sent:
    place = {"Bucket": bucket, "Key": key}
    place["UploadId"] = client.create_multipart_upload(**place, ChecksumAlgorithm="SHA256")["UploadId"]

    def put(start: int) -> tuple[dict[str, Any], bytes, bytes]:
        with path.open("rb") as file:
            file.seek(start)
            data = file.read(part_bytes)
        number, checksum = start // part_bytes + 1, sha256_base64(data)
        answer = client.upload_part(**place, PartNumber=number, Body=data, ChecksumSHA256=checksum)
        part = {"PartNumber": number, "ETag": answer.get("ETag", ""), "ChecksumSHA256": checksum}
        return part, _md5(data), hashlib.sha256(data).digest()

    try:
        with ThreadPoolExecutor(max_concurrency) as pool:
            parts, md5s, digests = zip(*pool.map(put, range(0, size, part_bytes)), strict=True)
        _complete(client, place, list(parts))
    except BaseException:
        # The first error is the one to tell.
        with suppress(ClientError, BotoCoreError):
            client.abort_multipart_upload(**place)
        raise
    return _Sent(f"{_md5(b''.join(md5s)).hex()}-{len(parts)}", f"{sha256_base64(b''.join(digests))}-{len(parts)}")


def _complete(client: Any, place: dict[str, Any], parts: list[dict[str, Any]]) -> None:
    try:
        client.complete_multipart_upload(**place, MultipartUpload={"Parts": parts})
    except ClientError as error:
        # The client asks again where an answer was lost, and the upload may have been completed by then.
        if error.response["Error"].get("Code") != "NoSuchUpload":
            raise


def _is_there(client: Any, bucket: str, key: str, entry: FileEntry, sent: _Sent) -> bool:
    try:
        head = client.head_object(Bucket=bucket, Key=key, ChecksumMode="ENABLED")
    except ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return False
        raise
    if head.get("ContentLength") != entry.size:
        return False
    if head.get("ETag", "").strip('"') == sent.etag:
        return True
    # An encrypted object's entity tag is no MD5, and neither is that of some servers.
    if head.get("ServerSideEncryption", "").startswith("aws:kms") and head.get("ChecksumSHA256") == sent.sha256:
        return True
    digest = hashlib.sha256()
    for data in client.get_object(Bucket=bucket, Key=key)["Body"].iter_chunks(_READ_BYTES):
        digest.update(data)
    return digest.hexdigest() == entry.sha256


def _md5(data: bytes) -> bytes:
    return hashlib.md5(data, usedforsecurity=False).digest()
