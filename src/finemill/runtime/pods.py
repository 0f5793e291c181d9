"""What a pod waits for, as Kubernetes says it."""

from collections.abc import Mapping
from typing import Any

WAITING_IN_VAIN: Mapping[str, str] = {
    "ErrImageNeverPull": "the image is not on the node and may not be pulled",
    "ErrImagePull": "the image cannot be pulled",
    "ImagePullBackOff": "the image cannot be pulled",
    "InvalidImageName": "the image's name is wrong",
    "CreateContainerConfigError": "a secret or config map is missing",
}
"""What somebody has to mend before a container starts, by the reason that it gives."""
NO_PLACE = ("Unschedulable", "SchedulingGated")
"""Reasons of a pod that waits for room in the cluster, or in Kueue's queue."""


def pod_waits_for(pod: Mapping[str, Any]) -> str:
    """What keeps a pod, as the API's JSON, from its start, nothing as a rule."""
    status = pod.get("status", {})
    for container in status.get("containerStatuses") or ():
        waiting = container.get("state", {}).get("waiting", {})
        if waiting.get("reason") in WAITING_IN_VAIN:
            return f"{WAITING_IN_VAIN[waiting['reason']]} ({waiting.get('message') or waiting['reason']})"
    for condition in status.get("conditions") or ():
        if condition["type"] == "PodScheduled" and condition.get("reason") in NO_PLACE:
            return f"{condition['reason']}: {condition.get('message', '')}"
    return ""
