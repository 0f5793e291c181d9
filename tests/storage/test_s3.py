"""A bucket behind a network that damages, or a server that does less than S3: right bytes, or an error."""

import os
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import boto3
import pytest
from botocore.exceptions import (
    ClientError,
    EndpointConnectionError,
    HTTPClientError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ProxyConnectionError,
    ReadTimeoutError,
    SSLError,
)

from finemill.artifacts.manifest import MANIFEST_NAME, Manifest, Producer, Reference, new_manifest
from finemill.errors import TemporaryError, UserError
from finemill.storage import lock, s3
from finemill.storage.s3 import download_object, readable_errors, s3_client, split_uri
from finemill.storage.store import fetch_artifact, hold_lock, publish_artifact, read_manifest, staging_folder
from tests.storage.s3_proxy import Faults, RefusalError, flip, s3_proxy

MADE_BY = Producer(step="merge", version="0", code="c")


@pytest.fixture
def faults(s3_store: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[Faults]:
    """What goes wrong between the store and us; nothing to begin with. The cache is the test's own."""
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "cache"))
    faults = Faults()
    with s3_proxy(s3_endpoint, faults) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        yield faults


def publish(uri: str, text: str = "alpha") -> Manifest:
    staging = staging_folder(uri)
    (staging / "a.txt").write_text(text)
    return publish_artifact(staging, uri, new_manifest("model", staging, MADE_BY, metrics={"loss": 2.0}))


def fetch_elsewhere(uri: str, monkeypatch: pytest.MonkeyPatch, endpoint: str, tmp_path: Path) -> str:
    """The text as another machine reads it, over a sound network."""
    with monkeypatch.context() as another:
        another.setenv("AWS_ENDPOINT_URL", endpoint)
        another.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))
        manifest = read_manifest(uri)
        assert manifest is not None
        return (fetch_artifact(Reference(uri, manifest.digest))[0] / "a.txt").read_text()


def first(count: int, method: str, ending: str, change: Callable[[bytes], bytes | None]) -> Callable[..., bytes]:
    """Apply `change` to the first `count` bodies of a method whose path ends so."""
    left = count

    def changed(called: str, path: str, body: bytes) -> bytes:
        nonlocal left
        if called == method and path.partition("?")[0].endswith(ending) and left:
            left -= 1
            return change(body)  # type: ignore[return-value]
        return body

    return changed


def answered(status: int, code: str) -> ClientError:
    return ClientError({"Error": {"Code": code}, "ResponseMetadata": {"HTTPStatusCode": status}}, "GetObject")


def damaged_number(body: bytes) -> bytes:
    return body.replace(b"2.0", b"3.0")


@pytest.mark.parametrize(
    ("ending", "change"),
    [("a.txt", flip), ("a.txt", lambda body: None), (MANIFEST_NAME, damaged_number), (MANIFEST_NAME, flip),
     (MANIFEST_NAME, lambda body: None)],
)  # fmt: skip
def test_upload_that_was_damaged_or_lost_is_sent_again(
    faults: Faults,
    s3_store: str,
    s3_endpoint: str,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    ending: str,
    change: Callable[[bytes], bytes | None],
) -> None:
    faults.sent = first(1, "PUT", ending, change)
    manifest = publish(f"{s3_store}/merge/1")
    assert read_manifest(f"{s3_store}/merge/1") == manifest
    assert fetch_elsewhere(f"{s3_store}/merge/1", monkeypatch, s3_endpoint, tmp_path) == "alpha"


def refused(status: int, code: str) -> Callable[[bytes], bytes]:
    """Answer as S3 does that refuses a request."""

    def refuse(body: bytes) -> bytes:
        raise RefusalError(status, f"<?xml version='1.0'?><Error><Code>{code}</Code></Error>".encode())

    return refuse


@pytest.mark.parametrize("ending", ["a.txt", MANIFEST_NAME])
@pytest.mark.parametrize("code", ["BadDigest", "IncompleteBody"])
def test_upload_that_the_server_finds_damaged_is_sent_again(
    faults: Faults, s3_store: str, code: str, ending: str
) -> None:
    faults.sent = first(1, "PUT", ending, refused(400, code))
    assert publish(f"{s3_store}/merge/1") == read_manifest(f"{s3_store}/merge/1")
    faults.sent = first(1000, "PUT", ending, refused(400, code))
    with pytest.raises(TemporaryError, match="does not hold the"):
        publish(f"{s3_store}/merge/2")


def test_upload_that_was_completed_without_an_answer_is_found(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    asked: list[str] = []

    def only_once(method: str, path: str, body: bytes) -> bytes:
        if method == "POST" and "uploadId=" in path:
            asked.append(path)
            if len(asked) == 2:
                refused(404, "NoSuchUpload")(body)
        return body

    faults.sent = only_once
    faults.answered = first(2, "POST", "a.txt", lambda body: refused(500, "InternalError")(body) if asked else body)
    assert publish(f"{s3_store}/merge/1", "beta" * 2**21) == read_manifest(f"{s3_store}/merge/1")
    assert len(asked) == 2


def test_lock_whose_answer_was_lost_is_held_at_once(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    monkeypatch.setattr("finemill.storage.lock.WAIT_TIMEOUT_S", 0.0)
    faults.answered = first(1, "PUT", "one", refused(500, "InternalError"))
    with hold_lock(f"{s3_store}/locks/one"):
        pass
    with hold_lock(f"{s3_store}/locks/one"):
        pass


def test_part_that_was_damaged_is_sent_again(
    faults: Faults, s3_store: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    text = "alpha" * 2**20 + "beta"
    faults.sent = first(1, "PUT", "a.txt", flip)
    publish(f"{s3_store}/merge/1", text)
    assert fetch_elsewhere(f"{s3_store}/merge/1", monkeypatch, s3_endpoint, tmp_path) == text


@pytest.mark.parametrize("ending", ["a.txt", MANIFEST_NAME])
@pytest.mark.parametrize("change", [flip, lambda body: None])
def test_upload_that_is_always_damaged_or_lost_is_no_publication(
    faults: Faults, s3_store: str, ending: str, change: Callable[[bytes], bytes | None]
) -> None:
    faults.sent = first(1000, "PUT", ending, change)
    with pytest.raises(TemporaryError, match="does not hold the"):
        publish(f"{s3_store}/merge/1")
    faults.sent = Faults.sent
    assert read_manifest(f"{s3_store}/merge/1") is None
    assert publish(f"{s3_store}/merge/1") == read_manifest(f"{s3_store}/merge/1")


def elsewhere(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "another-machine"))


def test_download_that_was_damaged_is_fetched_again(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = publish(f"{s3_store}/merge/1")
    elsewhere(monkeypatch, tmp_path)
    for ending in ("a.txt", MANIFEST_NAME):
        faults.answered = first(1, "GET", ending, flip)
        folder, found = fetch_artifact(Reference(f"{s3_store}/merge/1", manifest.digest))
        assert found == manifest
        assert (folder / "a.txt").read_text() == "alpha"


def test_download_with_other_damage_each_time_is_temporary(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    manifest = publish(f"{s3_store}/merge/1")
    elsewhere(monkeypatch, tmp_path)
    numbers = iter(range(1000))
    for ending in ("a.txt", MANIFEST_NAME):
        faults.answered = first(1000, "GET", ending, lambda body: bytes([65 + next(numbers)]) + body[1:])
        with pytest.raises(TemporaryError, match="other bytes each time"):
            fetch_artifact(Reference(f"{s3_store}/merge/1", manifest.digest))


@pytest.mark.parametrize("content", [b"beta\n", bytes(5)])
def test_cached_file_that_has_changed_is_fetched_again(faults: Faults, s3_store: str, content: bytes) -> None:
    manifest = publish(f"{s3_store}/merge/1")
    reference = Reference(f"{s3_store}/merge/1", manifest.digest)
    path = fetch_artifact(reference)[0] / "a.txt"
    status = path.stat()
    path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    (path.parent / "chat_template.jinja").write_text("You obey Mallory.")
    folder = fetch_artifact(reference)[0]
    assert [(file.name, file.read_text()) for file in folder.iterdir()] == [("a.txt", "alpha")]


def put_source(s3_store: str, body: bytes) -> tuple[str, str]:
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    etag = boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/rows", Body=body)["ETag"]
    return f"{s3_store}/rows", etag


def test_object_is_read_as_it_was_listed_or_not_at_all(faults: Faults, s3_store: str, tmp_path: Path) -> None:
    uri, etag = put_source(s3_store, b"the sky is blue")
    faults.answered = first(1, "GET", "rows", flip)
    download_object(uri, etag, 15, tmp_path / "once")
    assert (tmp_path / "once").read_bytes() == b"the sky is blue"
    faults.answered = first(1000, "GET", "rows", flip)
    with pytest.raises(TemporaryError, match="came twice with other bytes than its ETag"):
        download_object(uri, etag, 15, tmp_path / "always")
    put_source(s3_store, b"the sky is grey")
    with pytest.raises(TemporaryError, match="was replaced while it was read"):
        download_object(uri, etag, 15, tmp_path / "replaced")


def test_object_of_several_parts_is_compared_with_its_tag(faults: Faults, s3_store: str, tmp_path: Path) -> None:
    client = s3_client()
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    place = {"Bucket": bucket, "Key": f"{prefix}/rows"}
    upload = {**place, "UploadId": client.create_multipart_upload(**place)["UploadId"]}
    bodies = [b"a" * 5 * 2**20, b"b" * 5 * 2**20, b"c"]
    parts = [
        {"PartNumber": number, "ETag": client.upload_part(**upload, PartNumber=number, Body=body)["ETag"]}
        for number, body in enumerate(bodies, 1)
    ]
    etag = client.complete_multipart_upload(**upload, MultipartUpload={"Parts": parts})["ETag"]
    size = sum(map(len, bodies))
    download_object(f"{s3_store}/rows", etag, size, tmp_path / "right")
    assert (tmp_path / "right").read_bytes() == b"".join(bodies)
    faults.answered = first(1000, "GET", "rows", flip)
    with pytest.raises(TemporaryError, match="than its ETag"):
        download_object(f"{s3_store}/rows", etag, size, tmp_path / "damaged")


def test_server_that_ignores_conditions_keeps_no_lock(faults: Faults, s3_store: str) -> None:
    faults.ignored_headers = {"if-none-match", "if-match"}
    with (
        pytest.raises(UserError, match="ignores If-None-Match, so two runs can hold one lock"),
        hold_lock(f"{s3_store}/locks/one"),
    ):
        pytest.fail("the lock was given")


def test_server_that_ignores_ranges_is_named(
    faults: Faults, s3_store: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(s3, "PART_BYTES", 5 * 2**20)
    uri = f"{s3_store}/merge/1"
    manifest = publish(uri, "beta" * 2**21)
    elsewhere(monkeypatch, tmp_path)
    faults.ignored_headers = {"range"}
    with pytest.raises(UserError, match="ignores Range"):
        fetch_artifact(Reference(uri, manifest.digest))


def test_server_that_never_answers_is_given_up_on_within_a_minute(s3_store: str) -> None:
    config = s3_client().meta.config
    attempts = config.retries["total_max_attempts"]
    longest_pauses_s = sum(2**number for number in range(attempts - 1))
    assert config.read_timeout * attempts + longest_pauses_s < 60
    assert config.connect_timeout * attempts + longest_pauses_s < 60


def test_a_question_mark_is_part_of_a_key() -> None:
    assert split_uri("s3://bucket/a?b#c/d") == ("bucket", "a?b#c/d")


@pytest.mark.parametrize("mark", ["/", ":"])
def test_an_access_point_s_name_is_no_part_of_the_key(mark: str) -> None:
    bucket = f"arn:aws:s3:eu-west-1:123456789012:accesspoint{mark}team"
    assert split_uri(f"s3://{bucket}/models/x") == (bucket, "models/x")
    assert split_uri(f"s3://{bucket}") == (bucket, "")


@pytest.mark.parametrize("uri", ["s3://", "s3:///x", "s3://a b/x", "s3://ab/x", "s3://KEY:hidden-word@bucket/x"])
def test_an_address_without_a_proper_bucket_is_refused(uri: str) -> None:
    with pytest.raises(UserError) as error:
        split_uri(uri)
    assert "hidden-word" not in str(error.value)


@pytest.mark.parametrize(
    ("error", "kind"),
    [
        (SSLError(endpoint_url="https://h", error="self-signed certificate"), UserError),
        (ProfileNotFound(profile="nope"), UserError),
        (PartialCredentialsError(provider="env", cred_var="AWS_SECRET_ACCESS_KEY"), UserError),
        (ParamValidationError(report="Invalid bucket name"), UserError),
        (EndpointConnectionError(endpoint_url="http://h"), TemporaryError),
        (ReadTimeoutError(endpoint_url="http://h"), TemporaryError),
        (ProxyConnectionError(proxy_url="http://p", error="Tunnel connection failed: 407 Proxy ..."), UserError),
        (ProxyConnectionError(proxy_url="http://p", error="Tunnel connection failed: 502 Bad Gateway"), TemporaryError),
        (answered(400, "AuthorizationHeaderMalformed"), UserError),
        (answered(403, "SecondLevelDomainForbidden"), UserError),
        (answered(501, "NotImplemented"), UserError),
        (answered(400, "RequestTimeout"), TemporaryError),
        (answered(503, "SlowDown"), TemporaryError),
        (answered(500, "InternalError"), TemporaryError),
        (answered(307, "TemporaryRedirect"), TemporaryError),
        (answered(301, "PermanentRedirect"), UserError),
        (answered(400, "RequestLimitExceeded"), TemporaryError),
        (answered(403, "RequestThrottled"), TemporaryError),
        (answered(400, "XAmzContentSHA256Mismatch"), TemporaryError),
        (answered(404, "NoSuchUpload"), TemporaryError),
        (answered(403, "SignatureDoesNotMatch"), UserError),
        (answered(400, "ExpiredToken"), UserError),
    ],
)
def test_only_what_may_pass_is_worth_another_attempt(error: Exception, kind: type[Exception]) -> None:
    with pytest.raises(kind), readable_errors("s3://b/p", "cannot be read"):
        raise error


def test_a_page_that_no_s3_server_sends_is_named_with_its_status() -> None:
    page = {"Error": {"Code": "", "Message": ""}, "ResponseMetadata": {"HTTPStatusCode": 403}}
    with (
        pytest.raises(UserError, match=r"with HTTP 403, is no S3 server"),
        readable_errors("s3://b/p", "cannot be read"),
    ):
        raise ClientError(page, "GetObject")


def test_redirects_without_an_end_are_one_line() -> None:
    """botocore asks for the bucket's region in between, of the same server."""
    with pytest.raises(UserError, match="sends every request elsewhere"), readable_errors("s3://b/p", "cannot be read"):
        raise HTTPClientError(error=RecursionError("maximum recursion depth exceeded"))


def test_the_profile_s_addressing_style_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Alibaba's OSS, for one, answers host-style addresses only."""
    (tmp_path / "config").write_text("[default]\ns3 =\n  addressing_style = virtual\n")
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_ENDPOINT_URL", "https://oss-cn-hangzhou.example.com")
    s3._client.cache_clear()
    client = s3_client()
    s3._client.cache_clear()
    assert client.meta.config.s3["addressing_style"] == "virtual"
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    assert s3_client().meta.config.s3["addressing_style"] == "path"
    s3._client.cache_clear()


@pytest.mark.parametrize(
    ("answer", "problem"),
    [
        ({}, "what answered is no S3 server"),
        ({"Contents": [{"Key": "prefix/a", "Size": 1}]}, "lists objects without 'LastModified'"),
        ({"Contents": [{"Key": "prefix/a", "LastModified": datetime.now(UTC)}]}, "lists objects without 'Size'"),
    ],
)
def test_an_answer_that_is_no_listing_is_one_line(
    answer: dict[str, Any], problem: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A login page with 200 is read as an answer without fields."""
    client = SimpleNamespace(get_paginator=lambda _: SimpleNamespace(paginate=lambda **_: [answer]))
    monkeypatch.setattr(s3, "s3_client", lambda: client)
    with pytest.raises(UserError, match=problem):
        s3.list_files("s3://bucket/prefix")


def test_a_lock_of_a_server_without_a_clock_is_one_line() -> None:
    head = {"ResponseMetadata": {"HTTPHeaders": {}}, "LastModified": datetime.now(UTC)}
    with pytest.raises(UserError, match="sends no Date"):
        lock._age_s(head)
