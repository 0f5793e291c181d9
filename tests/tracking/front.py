"""What stands in front of an MLflow server: a proxy that asks for credentials, adds a path, has a certificate."""

import json
import ssl
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec


@contextmanager
def registry_front(
    *, authorization: str | None = None, prefix: str = "", certificate: Path | None = None, broken: bool = False
) -> Iterator[str]:
    """The URI of an empty model registry.

    Args:
        authorization: the header without which every path, `/health` too, answers 401.
        prefix: the path that the server is under; there is nothing beside it, and no `/health`.
        certificate: the file of a certificate and its key; HTTPS with it.
        broken: every path answers 503.
    """

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._send(*self._answer())

        def _answer(self) -> tuple[int, dict[str, str]]:
            if broken:
                return 503, {}
            if authorization and self.headers.get("Authorization") != authorization:
                return 401, {}
            if self.path.startswith(f"{prefix}/api/2.0/mlflow/registered-models/get?"):
                return 404, {"error_code": "RESOURCE_DOES_NOT_EXIST", "message": "no such registered model"}
            return 404, {}

        def _send(self, code: int, body: dict[str, str]) -> None:
            data = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *arguments: Any) -> None:
            """Nothing on stderr."""

    class Server(ThreadingHTTPServer):
        def handle_error(self, *arguments: Any) -> None:
            """A client that does not trust the certificate hangs up; nothing on stderr."""

    server = Server(("127.0.0.1", 0), Handler)
    if certificate:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate)
        server.socket = context.wrap_socket(server.socket, server_side=True)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield f"{'https' if certificate else 'http'}://127.0.0.1:{server.server_port}{prefix}"
    server.shutdown()
    server.server_close()


def write_certificate(folder: Path) -> Path:
    """A self-signed certificate of 127.0.0.1 with its key, in one file."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "localhost")])
    now = datetime.now(UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ip_address("127.0.0.1"))]), critical=False)
        .sign(key, hashes.SHA256())
    )
    encoded = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    file = folder / "certificate.pem"
    file.write_bytes(encoded + certificate.public_bytes(serialization.Encoding.PEM))
    return file
