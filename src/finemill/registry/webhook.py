"""A signed webhook when the champion changes, in the form and with the headers of MLflow's own.

An MLflow server sends its own webhooks (`mlflow.create_webhook`); this one is for a registry without a server, and
for serving systems that want to know where the new champion's files are.
"""

import base64
import hashlib
import hmac
import json
import logging
import os
import time
import urllib.error
import urllib.request
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from http.client import HTTPException
from urllib.parse import urlsplit

logger = logging.getLogger(__name__)

SECRET_VARIABLE = "FINEMILL_WEBHOOK_SECRET"
_ATTEMPTS = 3
_TIMEOUT_S = 10.0
_PAUSE_S = 1.0


def check_webhook_url(url: str) -> str:
    """`url` as it is. Raises: ValueError: it is no address, or holds credentials."""
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ValueError(f"'{url:.160}' is no address: write https://host/path")
    if parts.username or parts.password:
        raise ValueError(f"the address of {parts.hostname} holds credentials: sign with {SECRET_VARIABLE} instead")
    return url


def signature_of(secret: str, delivery_id: str, timestamp: str, body: str) -> str:
    """`v1,<base64>`: HMAC-SHA256 over `<delivery id>.<timestamp>.<body>`, as MLflow and Standard Webhooks sign."""
    signed = f"{delivery_id}.{timestamp}.{body}"
    digest = hmac.new(secret.encode(), signed.encode(), hashlib.sha256).digest()
    return f"v1,{base64.b64encode(digest).decode()}"


def send_champion(
    url: str, name: str, version: int, alias: str, artifacts: Mapping[str, str], *, pause_s: float = _PAUSE_S
) -> bool:
    """Tell `url` that `version` carries `alias`: MLflow's event `model_version_alias.created`, and where its files are.

    Signed with the secret in `FINEMILL_WEBHOOK_SECRET`, unsigned without one. The champion has moved already, so that
    a receiver that is down is a warning, after three attempts.
    Returns: whether it was taken.
    """
    body = json.dumps(
        {
            "entity": "model_version_alias",
            "action": "created",
            "timestamp": datetime.now(UTC).isoformat(),
            "data": {"name": name, "version": str(version), "alias": alias},
            "artifacts": dict(artifacts),
        }
    )
    delivery_id = str(uuid.uuid4())
    error = "no answer"
    for attempt in range(_ATTEMPTS):
        if attempt:
            time.sleep(pause_s * 2 ** (attempt - 1))
        try:
            _post(url, body, delivery_id)
        except urllib.error.HTTPError as refusal:
            refusal.close()
            error = f"{refusal.code} {refusal.reason}"
            if refusal.code < 500 and refusal.code != 429:
                break
        except (urllib.error.URLError, TimeoutError, ConnectionError, HTTPException) as fault:
            error = str(getattr(fault, "reason", None) or fault)
        else:
            return True
    # The path is a secret with some services, whoever knows it may post there.
    host = urlsplit(url).netloc
    logger.warning("%s version %d is @%s, but the webhook at %s was not told (%s)", name, version, alias, host, error)
    return False


def _post(url: str, body: str, delivery_id: str) -> None:
    timestamp = str(int(time.time()))
    headers = {
        "Content-Type": "application/json",
        "X-MLflow-Delivery-Id": delivery_id,
        "X-MLflow-Timestamp": timestamp,
    }
    secret = os.environ.get(SECRET_VARIABLE)
    if secret:
        headers["X-MLflow-Signature"] = signature_of(secret, delivery_id, timestamp, body)
    request = urllib.request.Request(url, body.encode(), headers)
    # A redirect would send the event, signed, to another host.
    with urllib.request.build_opener(_NoRedirect).open(request, timeout=_TIMEOUT_S):
        pass


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_args: object) -> None:
        """None: an answer of 3xx is an error."""
        return
