"""An S3 server that does wrong: a proxy before a right one that damages, drops or overlooks what a test says."""

import http.client
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class RefusalError(Exception):
    """Raised by a fault: the proxy answers by itself, with this status and body."""

    def __init__(self, status: int, body: bytes = b"") -> None:
        super().__init__(status)
        self.status, self.body = status, body


@dataclass
class Faults:
    """What goes wrong. `sent` and `answered` get a method, a path and a body, and return the body that goes on.

    They may raise `RefusalError`, or `ConnectionResetError` to end the connection without an answer.
    """

    sent: Callable[[str, str, bytes], bytes | None] = lambda method, path, body: body
    """None: the request goes nowhere, and is answered with 200."""
    answered: Callable[[str, str, bytes], bytes] = lambda method, path, body: body
    ignored_headers: set[str] = field(default_factory=set)


def flip(body: bytes) -> bytes:
    """The same with the first byte's lowest bit changed."""
    return bytes([body[0] ^ 1]) + body[1:] if body else body


@contextmanager
def s3_proxy(endpoint: str, faults: Faults) -> Iterator[str]:
    """The address of the proxy of a server at `endpoint`."""
    host = endpoint.removeprefix("http://")

    class Handler(BaseHTTPRequestHandler):
        # Answers `Expect: 100-continue`, for which clients wait a second.
        protocol_version = "HTTP/1.1"

        def relay(self) -> None:
            try:
                self.forward()
            except RefusalError as refusal:
                self.send_response(refusal.status)
                self.send_header("Content-Length", str(len(refusal.body)))
                self.end_headers()
                self.wfile.write(b"" if self.command == "HEAD" else refusal.body)
            except (ConnectionResetError, BrokenPipeError):
                self.close_connection = True

        def forward(self) -> None:
            body = faults.sent(self.command, self.path, self.rfile.read(int(self.headers.get("Content-Length") or 0)))
            if body is None:
                self.send_response(200)
                self.send_header("ETag", f'"{"0" * 32}"')
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            ignored = {"expect", *faults.ignored_headers}
            upstream = http.client.HTTPConnection(host)
            upstream.request(
                self.command, self.path, body, {k: v for k, v in self.headers.items() if k.lower() not in ignored}
            )
            answer = upstream.getresponse()
            data = faults.answered(self.command, self.path, answer.read())
            self.send_response(answer.status)
            for key, value in answer.getheaders():
                if key.lower() not in ("transfer-encoding", "connection", "content-length", "server", "date"):
                    self.send_header(key, value)
            length = answer.getheader("Content-Length", "0") if self.command == "HEAD" else str(len(data))
            self.send_header("Content-Length", length)
            self.end_headers()
            self.wfile.write(b"" if self.command == "HEAD" else data)
            upstream.close()

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = relay  # noqa: N815

        def log_message(self, *args: object) -> None:
            """Say nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    thread.join()
    server.server_close()
