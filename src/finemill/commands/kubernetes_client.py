"""The Kubernetes API behind the user's kubeconfig, its errors in one line each, and pods' logs."""

import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Any

import yaml

from finemill.errors import StepError, TemporaryError, UserError
from finemill.runtime.kubernetes_api import forbidden
from finemill.runtime.pods import NO_PLACE, WAITING_IN_VAIN

# What Argo's executor says of itself, 3.x and 4.x.
_EXECUTOR_LINE = re.compile(r"time=\S+ .* argo=true( |$)|Error: exit status \d+$")


def load_client() -> Any:
    """The `kubernetes` package, configured. Raises: UserError: there is no configuration."""
    import kubernetes

    inside = "KUBERNETES_SERVICE_HOST" in os.environ and "KUBECONFIG" not in os.environ
    try:
        if inside:
            kubernetes.config.load_incluster_config()
        else:
            kubernetes.config.load_kube_config(config_file=os.environ.get("KUBECONFIG") or "~/.kube/config")
    except (kubernetes.config.ConfigException, OSError) as error:
        raise UserError(f"no Kubernetes cluster is configured ({error}): set KUBECONFIG") from None
    except (yaml.YAMLError, ValueError, TypeError, AttributeError, LookupError) as error:
        # The package reads the file as if it were right.
        line = " ".join(str(error).split())
        raise UserError(f"KUBECONFIG is no configuration of a cluster ({line:.200}): correct the file") from None
    # One attempt: an unreachable cluster is said at once, not after minutes.
    kubernetes.client.Configuration._default.retries = False
    return kubernetes.client


@contextmanager
def readable_errors(what: str, namespace: str) -> Iterator[None]:
    """Turn an API error into one line that says what to do.

    Args:
        what: the thing that was asked for, `WorkflowTemplate finetune`.
        namespace: where.
    """
    from kubernetes.client import ApiException
    from urllib3.exceptions import HTTPError

    try:
        yield
    except ApiException as error:
        raise _describe(error, what, namespace) from None
    except HTTPError as error:
        raise TemporaryError(f"the Kubernetes API is out of reach: {' '.join(str(error).split())[:300]}") from None


def _describe(error: Any, what: str, namespace: str) -> StepError:
    try:
        answer = json.loads(error.body or "")
    except ValueError:
        answer = {}
    message = answer.get("message") or error.reason or str(error)
    if "CERTIFICATE_VERIFY_FAILED" in message:
        return UserError(f"the Kubernetes API: {message}: correct certificate-authority in KUBECONFIG")
    if error.status == 401:
        return UserError("the Kubernetes API does not accept the credentials in KUBECONFIG: log in again")
    if error.status == 403:
        return forbidden(message, "bind the Role `<release>-submit` of the chart to this user")
    if error.status == 404 and not answer.get("details", {}).get("name"):
        return UserError(f"{what}: this cluster does not know the kind; install Argo Workflows and its CRDs")
    if error.status == 404:
        return UserError(f"{what} not found in namespace {namespace}: install the chart there, or correct --namespace")
    if error.status in (429, 500, 502, 503, 504):
        return TemporaryError(f"the Kubernetes API answers {error.status}: {message}")
    return UserError(f"{what}: {message}")


def waits_in_vain(pod: Any) -> str:
    """What somebody has to mend before the pod can start, nothing as a rule."""
    status = pod.status
    for container in [*(status.init_container_statuses or ()), *(status.container_statuses or ())]:
        waiting = container.state.waiting if container.state else None
        if waiting and waiting.reason in WAITING_IN_VAIN:
            return f"{WAITING_IN_VAIN[waiting.reason]} ({waiting.message or waiting.reason})"
    return ""


def waits_for_place(pod: Any) -> tuple[str, float]:
    """What the scheduler says of a pod that it has found no node for, and the pod's age in seconds; nothing and 0
    for any other.
    """
    for condition in pod.status.conditions or ():
        if condition.type == "PodScheduled" and condition.reason in NO_PLACE:
            age = datetime.now(UTC) - pod.metadata.creation_timestamp
            return f"{condition.reason}: {condition.message}", age.total_seconds()
    return "", 0.0


class PodLogs:
    """Follows the logs of a run's pods: each call returns what is new.

    `step_of` names the step that a pod runs; None leaves the pod out.
    """

    def __init__(self, client: Any, namespace: str, selector: str, step_of: Callable[[Any], str | None]) -> None:
        self._api = client.CoreV1Api()
        self._exception = client.ApiException
        self._namespace = namespace
        self._selector = selector
        self._step_of = step_of
        self._seen: dict[str, str] = {}
        self._last_read = 0.0

    def new_lines(self) -> list[str]:
        """Lines `<step>  <text>`, oldest pod first; a pod that is gone or not started has none."""
        with readable_errors("pods", self._namespace):
            pods = self._api.list_namespaced_pod(self._namespace, label_selector=self._selector).items
        # A little more than since the last call: timestamps sort out what was seen.
        since = math.ceil(time.monotonic() - self._last_read) + 5 if self._last_read else None
        self._last_read = time.monotonic()
        lines = []
        for pod in sorted(pods, key=lambda item: item.metadata.creation_timestamp):
            step = self._step_of(pod)
            if step is None:
                continue
            new = pod.metadata.name not in self._seen
            lines += [f"{step}  {line}" for line in self._read(pod.metadata.name, None if new else since)]
        return lines

    def _read(self, pod: str, since_seconds: int | None) -> list[str]:
        options = {} if since_seconds is None else {"since_seconds": since_seconds}
        try:
            text = self._api.read_namespaced_pod_log(pod, self._namespace, container="main", timestamps=True, **options)
        except self._exception:
            return []
        found = []
        # Not splitlines(): a progress bar returns the carriage, and what follows it has no timestamp.
        for line in text.split("\n"):
            stamp, _, content = line.partition(" ")
            if stamp > self._seen.get(pod, ""):
                self._seen[pod] = stamp
                content = content.rstrip("\r").rpartition("\r")[2]
                if not _EXECUTOR_LINE.match(content):
                    found.append(content)
        return found
