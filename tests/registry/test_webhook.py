import json
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from finemill.registry.webhook import SECRET_VARIABLE, check_webhook_url, send_champion
from tests.serving import serving


class Receiver(ThreadingHTTPServer):
    """Answers with the statuses it is told, then 200; keeps what it got."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.statuses: list[int] = []
        self.got: list[tuple[dict[str, str], bytes]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class _Handler(BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers.items()), body))
        self.send_response(self.server.statuses.pop(0) if self.server.statuses else 200)
        self.send_header("Location", self.server.url)
        self.end_headers()

    def log_message(self, *_args: object) -> None:
        """Requests are no news."""


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    with serving(Receiver()) as server:
        yield server


def send(receiver: Receiver) -> bool:
    return send_champion(receiver.url, "assistant", 3, "champion", {"gguf": "s3://b/g@sha256:1"}, pause_s=0.01)


def test_the_event_is_mlflows_own_and_so_is_its_signature(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    from mlflow.webhooks.delivery import _generate_hmac_signature

    monkeypatch.setenv(SECRET_VARIABLE, "secret")
    assert send(receiver)
    ((headers, body),) = receiver.got
    found: dict[str, Any] = json.loads(body)
    assert (found["entity"], found["action"]) == ("model_version_alias", "created")
    assert found["data"] == {"name": "assistant", "version": "3", "alias": "champion"}
    assert found["artifacts"] == {"gguf": "s3://b/g@sha256:1"}
    expected = _generate_hmac_signature(
        "secret", headers["X-Mlflow-Delivery-Id"], headers["X-Mlflow-Timestamp"], body.decode()
    )
    assert headers["X-Mlflow-Signature"] == expected


def test_without_a_secret_nothing_is_signed(receiver: Receiver, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(SECRET_VARIABLE, raising=False)
    assert send(receiver)
    assert "X-Mlflow-Signature" not in receiver.got[0][0]


@pytest.mark.parametrize(
    ("statuses", "taken", "requests"),
    [([500, 503], True, 3), ([500, 500, 500], False, 3), ([404], False, 1), ([302], False, 1), ([429], True, 2)],
)
def test_a_receiver_that_is_down_is_asked_again_and_warned_of(
    statuses: list[int], taken: bool, requests: int, receiver: Receiver, caplog: pytest.LogCaptureFixture
) -> None:
    receiver.statuses = statuses.copy()
    assert send(receiver) is taken
    assert len(receiver.got) == requests
    # Its path is a secret with some services.
    assert "/hook" not in caplog.text
    # Attempts of one delivery carry its id, so that a receiver knows it again.
    assert len({headers["X-Mlflow-Delivery-Id"] for headers, _ in receiver.got}) == 1
    assert ("was not told" in caplog.text) is not taken


@pytest.mark.parametrize("url", ["file:///etc/passwd", "host/path", "https://user:word@host/path"])
def test_what_is_no_address_is_refused(url: str) -> None:
    with pytest.raises(ValueError, match="address"):
        check_webhook_url(url)
