"""A lock in the store: one holder at a time among processes and machines that share nothing but the store."""

import hashlib
import random
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from finemill.errors import TemporaryError, UserError

WAIT_TIMEOUT_S = 120.0
EXPIRY_S = 60.0
"""Age after which an object lock is taken to be left over from a holder that died. Hold it for seconds, not minutes."""
_POLL_INTERVAL_S = 0.5


@contextmanager
def folder_lock(path: Path) -> Iterator[None]:
    """Hold a lock on a file; the system releases it when the process ends, whatever the reason."""
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with FileLock(path, timeout=WAIT_TIMEOUT_S):
            yield
    except Timeout:
        raise TemporaryError(f"{path} is locked by another process for {WAIT_TIMEOUT_S:.0f} s: try again") from None


@contextmanager
def object_lock(client: Any, bucket: str, key: str) -> Iterator[None]:
    """Hold a lock by an S3 object that only one can create (`If-None-Match`), and only one can take over when it is
    too old (`If-Match`). Ages are by the server's clock.

    Raises: TemporaryError: somebody else holds it for longer than `WAIT_TIMEOUT_S`. UserError: the server puts objects
        without looking at conditions.
    """
    deadline = time.monotonic() + WAIT_TIMEOUT_S
    while (etag := _try_lock(client, bucket, key)) is None:
        if time.monotonic() > deadline:
            raise TemporaryError(f"s3://{bucket}/{key} is held by another run for {WAIT_TIMEOUT_S:.0f} s: try again")
        time.sleep(_POLL_INTERVAL_S * (0.5 + random.random()))
    if _put_if(client, bucket, key, IfNoneMatch="*") is not None:
        client.delete_object(Bucket=bucket, Key=key)
        raise _no_conditions(bucket, "If-None-Match")
    try:
        yield
    finally:
        standing = _head(client, bucket, key)
        if standing and standing["ETag"] == etag:
            client.delete_object(Bucket=bucket, Key=key)


def _try_lock(client: Any, bucket: str, key: str) -> str | None:
    """The entity tag of our lock object; None if the lock is another's."""
    etag = _put_if(client, bucket, key, IfNoneMatch="*")
    if etag is None:
        standing = _head(client, bucket, key)
        if standing is not None and _age_s(standing) > EXPIRY_S:
            etag = _put_if(client, bucket, key, IfMatch=standing["ETag"])
            if etag is not None and _put_if(client, bucket, key, IfMatch=standing["ETag"]) is not None:
                client.delete_object(Bucket=bucket, Key=key)
                raise _no_conditions(bucket, "If-Match")
    return etag


def _no_conditions(bucket: str, header: str) -> UserError:
    return UserError(
        f"the S3 server of s3://{bucket} ignores {header}, so two runs can hold one lock: nothing is registered or "
        "promoted there; use a server with conditional writes (AWS, MinIO, Ceph, ...) or a folder store"
    )


def _put_if(client: Any, bucket: str, key: str, **condition: str) -> str | None:
    """The entity tag of an object put under a condition; None if the condition did not hold."""
    body = uuid.uuid4().hex.encode()
    try:
        answer = client.put_object(Bucket=bucket, Key=key, Body=body, **condition)
    except client.exceptions.ClientError as error:
        # 404: the object that If-Match names is gone; 409: two conditional writes at once.
        if error.response["ResponseMetadata"]["HTTPStatusCode"] not in (404, 409, 412):
            raise
        if error.response["Error"].get("Code") == "NoSuchBucket":
            raise
        # The client asks again where an answer was lost: what stands may be of its first request.
        standing = _head(client, bucket, key)
        own = hashlib.md5(body, usedforsecurity=False).hexdigest()
        return str(standing["ETag"]) if standing and standing["ETag"].strip('"') == own else None
    if "ETag" not in answer:
        raise TemporaryError(f"s3://{bucket}/{key}: the answer to PUT has no ETag: check AWS_ENDPOINT_URL, try again")
    return str(answer["ETag"])


def _head(client: Any, bucket: str, key: str) -> Any:
    try:
        return client.head_object(Bucket=bucket, Key=key)
    except client.exceptions.ClientError as error:
        if error.response["ResponseMetadata"]["HTTPStatusCode"] == 404:
            return None
        raise


def _age_s(head: Any) -> float:
    """Seconds since the object was put. Raises: UserError: the server does not say what time it is."""
    from email.utils import parsedate_to_datetime

    date = head["ResponseMetadata"]["HTTPHeaders"].get("date")
    if date is None:
        raise UserError("the S3 server, or a proxy before it, sends no Date, so nobody knows how old a lock is")
    now = parsedate_to_datetime(date)
    age: float = (now - head["LastModified"]).total_seconds()
    return age
