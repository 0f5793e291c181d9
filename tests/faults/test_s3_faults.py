"""A bucket behind a network that fails in every way: right bytes or an error of the right kind, and never a loss."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from random import Random

import pytest

from finemill.artifacts.manifest import Manifest, Producer, Reference, new_manifest, sha256_file
from finemill.errors import StepError, TemporaryError, UserError
from finemill.storage.s3 import s3_client
from finemill.storage.store import fetch_artifact, publish_artifact, read_manifest, staging_folder
from tests.faults.conftest import rounds
from tests.storage.s3_proxy import Faults, RefusalError, flip, s3_proxy

MADE_BY = Producer(step="merge", version="0", code="c")
PAGE = b"<html><body>Please log in</body></html>"
Change = Callable[[bytes], bytes | None]


def refuse(status: int, code: str = "") -> Change:
    """Answer with this status, and S3's XML if there is a code."""

    def answer(body: bytes) -> bytes:
        text = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>no</Message></Error>" if code else ""
        raise RefusalError(status, text.encode())

    return answer


def reset(body: bytes) -> bytes:
    """Close the connection without an answer."""
    raise ConnectionResetError


SENT: dict[str, Change] = {
    "a bit flipped on the way up": flip,
    "a body cut on the way up": lambda body: body[: len(body) // 2],
    "an upload dropped, answered with 200": lambda body: None,
    "reset before the request": reset,
    "500": refuse(500, "InternalError"),
    "503": refuse(503, "SlowDown"),
    "503 of a proxy": refuse(503),
    "502 of a proxy": refuse(502),
    "429": refuse(429),
    "403": refuse(403, "AccessDenied"),
    "400 for time": refuse(400, "RequestTimeTooSkewed"),
}
ANSWERED: dict[str, Change] = {
    "a bit flipped on the way down": flip,
    "a body cut on the way down": lambda body: body[: len(body) // 2],
    "a longer body": lambda body: body + b"x",
    "an empty body": lambda body: b"",
    "a login page": lambda body: PAGE,
    "reset after the request": reset,
    "500 after the request": refuse(500, "InternalError"),
}
UPLOADS = frozenset({"an upload dropped, answered with 200"})
"""What happens to requests that send something only."""
PERMANENT = frozenset({"403"})
"""What no repeat mends."""


class Weather:
    """One fault at a time, for the next requests."""

    def __init__(self) -> None:
        self.name, self._left = "", 0

    def set(self, name: str, requests: int) -> None:
        self.name, self._left = name, requests

    def sent(self, method: str, path: str, body: bytes) -> bytes | None:
        return self._change(SENT, body) if method in ("PUT", "POST") or self.name not in UPLOADS else body

    def answered(self, method: str, path: str, body: bytes) -> bytes:
        return self._change(ANSWERED, body) or b""

    def _change(self, kind: dict[str, Change], body: bytes) -> bytes | None:
        if self._left <= 0 or self.name not in kind:
            return body
        self._left -= 1
        return kind[self.name](body)


def publish(uri: str, rng: Random) -> Manifest:
    staging = staging_folder(uri)
    for name, size in {"a.bin": rng.randrange(200_000), "sub/b.txt": 40, "empty": 0}.items():
        (staging / name).parent.mkdir(exist_ok=True)
        (staging / name).write_bytes(rng.randbytes(size))
    return publish_artifact(staging, uri, new_manifest("model", staging, MADE_BY, metrics={"loss": rng.random()}))


def check_fetched(uri: str, expected: Manifest) -> None:
    folder, _ = fetch_artifact(Reference(uri, expected.digest))
    for name, entry in expected.files.items():
        assert sha256_file(folder / name) == entry.sha256


def test_operations_through_faults_give_right_bytes_or_an_error(
    s3_store: str, s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, rng: Random
) -> None:
    # Pauses between botocore's attempts would be most of the time.
    monkeypatch.setattr("botocore.retries.standard.ExponentialBackoff.delay_amount", lambda *_: 0.0)
    weather = Weather()
    outcomes: dict[str, list[str]] = {}
    with s3_proxy(s3_endpoint, Faults(sent=weather.sent, answered=weather.answered)) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy)
        for number in range(rounds(500)):
            uri, seed = f"{s3_store}/merge/{number}", rng.random()
            monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / str(number) / "here"))
            name, count = rng.choice([*SENT, *ANSWERED]), rng.choice((1, 1, 2, 6, 1000))
            weather.set(name, count)
            made = attempted(name, count, outcomes, partial(publish, uri, Random(seed)))
            weather.set("", 0)
            monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / str(number) / "elsewhere"))
            if made is not None:
                check_fetched(uri, made)
                monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / str(number) / "third"))
            # The repeat, over a sound network, finds or makes what it is to be.
            standing = publish(uri, Random(seed))
            assert made is None or standing.digest == made.digest
            weather.set(name, count)
            attempted(name, count, outcomes, partial(check_fetched, uri, standing))
            weather.set("", 0)
            check_fetched(uri, standing)
            assert read_manifest(uri) == standing
    s3_client().close()
    print("\n".join(f"{name}: {', '.join(map(str, found))}" for name, found in sorted(outcomes.items())))


def attempted(
    name: str, count: int, outcomes: dict[str, list[str]], call: Callable[[], Manifest | None]
) -> Manifest | None:
    """What an operation gives, None if it fails as it may: 75 where a repeat helps, 2 where none does."""
    try:
        result = call()
    except (TemporaryError, UserError) as error:
        check_kind(name, count, error)
        outcomes.setdefault(name, []).append(type(error).__name__)
        return None
    except Exception as error:
        raise AssertionError(f"{name}, {count} requests: {error!r}") from error
    outcomes.setdefault(name, []).append("done")
    return result


def check_kind(name: str, count: int, error: StepError) -> None:
    """Temporary faults are worth another attempt, permanent ones are not; either is said in one line."""
    kind = UserError if name in PERMANENT else TemporaryError
    # A server that damages the same byte each time is taken for one that holds a damaged object.
    same_each_time = name in ANSWERED and count > 1
    assert isinstance(error, kind) or same_each_time, f"{name}, {count} requests: {type(error).__name__}: {error}"
    assert "\n" not in str(error)
