"""The Kubernetes API as a pod sees it: a few calls with the rights of its own service account.

The `kubernetes` package is not in the images; what a step needs of it are four verbs on two kinds.
"""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self
from urllib.parse import urlencode

import urllib3

from finemill.errors import StepError, TemporaryError, UserError

ACCOUNT = Path("/var/run/secrets/kubernetes.io/serviceaccount")
"""Where the kubelet puts the token, the namespace and the certificate of the API server."""
_TIMEOUT_S = 30.0


class KubernetesAPI:
    """Calls the API server of the cluster that this pod is in.

    Raises: UserError: this is no pod, or it has no token.
    """

    def __init__(self) -> None:
        try:
            self.namespace = (ACCOUNT / "namespace").read_text(encoding="utf-8").strip()
            self._server = _server()
        except (OSError, KeyError) as error:
            raise UserError(
                f"no service account is mounted here ({error}): run this step in a pod with one, and "
                "automountServiceAccountToken true"
            ) from None
        certificate = ACCOUNT / "ca.crt"
        self._pool = urllib3.PoolManager(
            ca_certs=str(certificate) if certificate.is_file() else None, retries=False, timeout=_TIMEOUT_S
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.clear()

    def get(self, path: str, **query: str) -> dict[str, Any] | None:
        """What is at `path`; None for nothing."""
        return self._object("GET", path, query=query)

    def text(self, path: str, **query: str) -> str:
        """The text at `path`, of a log for instance; empty where there is none yet."""
        answer = self._call("GET", path, query=query)
        return answer.data.decode("utf-8", "replace") if answer.status == 200 else ""

    def create(self, path: str, body: Mapping[str, Any]) -> bool:
        """Create an object. Returns: False if one of its name is there."""
        return self._object("POST", path, body=body, allowed=(409,)) is not None

    def delete(self, path: str) -> None:
        """Delete an object, and what it owns after it; there need not be one."""
        self._object("DELETE", path, query={"propagationPolicy": "Background"})

    def _object(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, str] | None = None,
        body: Mapping[str, Any] | None = None,
        allowed: tuple[int, ...] = (404,),
    ) -> dict[str, Any] | None:
        answer = self._call(method, path, query=query, body=body)
        try:
            found: dict[str, Any] = json.loads(answer.data)
        except ValueError:
            found = {}
        if answer.status < 300:
            return found
        if answer.status in allowed:
            return None
        message = found.get("message") or answer.reason or f"status {answer.status}"
        if answer.status == 429 or answer.status >= 500:
            raise TemporaryError(f"the Kubernetes API answers {answer.status}: {message}")
        if answer.status == 403:
            raise forbidden(message, "bind the Role of the chart with trainingRuntime.enabled to this service account")
        if answer.status == 404:
            raise UserError(f"{path}: {message}: install Kubeflow Trainer 2 in this cluster")
        raise UserError(f"{path}: {message}")

    def _call(
        self, method: str, path: str, *, query: Mapping[str, str] | None = None, body: Mapping[str, Any] | None = None
    ) -> urllib3.BaseHTTPResponse:
        # The kubelet replaces the token every hour.
        headers = {"Authorization": f"Bearer {(ACCOUNT / 'token').read_text(encoding='utf-8').strip()}"}
        url = f"{self._server}{path}" + (f"?{urlencode(query)}" if query else "")
        try:
            return self._pool.request(method, url, headers=headers, json=body)
        except urllib3.exceptions.HTTPError as error:
            line = " ".join(str(error).split())
            raise TemporaryError(f"the Kubernetes API is out of reach: {line:.300}") from None


def forbidden(message: str, rights: str) -> StepError:
    """Why the API answers 403: rights, for which `rights` says what to do, a quota, or a webhook that says no."""
    if "exceeded quota" in message:
        return TemporaryError(f"{message}: run again when there is room")
    return UserError(f"{message}: {rights}" if re.search(r"\bcannot \w+ resource\b", message) else message)


def _server() -> str:
    """The API server's address, as every pod is told it."""
    host, port = os.environ["KUBERNETES_SERVICE_HOST"], os.environ["KUBERNETES_SERVICE_PORT"]
    return f"https://[{host}]:{port}" if ":" in host else f"https://{host}:{port}"
