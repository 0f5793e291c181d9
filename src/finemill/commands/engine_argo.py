"""Runs on Argo Workflows: submitted to the chart's WorkflowTemplates through the Kubernetes API."""

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from finemill.commands.kubernetes_client import PodLogs, load_client, readable_errors
from finemill.commands.run_status import Phase, RunStatus, StepStatus
from finemill.errors import UserError
from finemill.pipelines.graph import Pipeline
from finemill.pipelines.parameters import for_argo
from finemill.runtime.catalog import STEPS
from finemill.runtime.pods import NO_PLACE, WAITING_IN_VAIN

_GROUP, _VERSION = "argoproj.io", "v1alpha1"
_PHASES: Mapping[str, Phase] = {
    "": "waiting",
    "Pending": "waiting",
    "Running": "running",
    "Succeeded": "done",
    "Failed": "failed",
    "Error": "failed",
    "Skipped": "skipped",
    "Omitted": "skipped",
}


class ArgoEngine:
    """Argo Workflows in one namespace of the cluster in KUBECONFIG.

    `prefix` stands before the pipelines' names, as the chart's `workflow.namePrefix` does.
    """

    def __init__(self, namespace: str, prefix: str = "") -> None:
        self.namespace = namespace
        self._prefix = prefix
        self._client = load_client()
        self._objects = self._client.CustomObjectsApi()
        self._logs: dict[str, PodLogs] = {}

    def submit(self, pipeline: Pipeline, parameters: Mapping[str, Any]) -> str:
        """Create a Workflow that refers to the installed WorkflowTemplate."""
        installed = self._installed(pipeline)["name"]
        with readable_errors(f"Workflow of {installed}", self.namespace):
            created = self._objects.create_namespaced_custom_object(
                _GROUP,
                _VERSION,
                self.namespace,
                "workflows",
                {
                    "apiVersion": f"{_GROUP}/{_VERSION}",
                    "kind": "Workflow",
                    "metadata": {
                        "generateName": f"{installed}-",
                        "labels": {"app.kubernetes.io/name": "finemill", "app.kubernetes.io/component": pipeline.name},
                    },
                    "spec": _spec(installed, parameters),
                },
            )
        name: str = created["metadata"]["name"]
        return name

    def schedule(self, pipeline: Pipeline, parameters: Mapping[str, Any], cron: str, timezone: str | None) -> str:
        """Create or replace the CronWorkflow of the pipeline's name."""
        from finemill.pipelines.render_argo import build_argo_schedule

        template = self._installed(pipeline)
        installed: str = template["name"]
        body = build_argo_schedule(replace(pipeline, name=installed), cron, timezone).to_dict()
        body["spec"]["workflowSpec"] = _spec(installed, parameters)
        place = (_GROUP, _VERSION, self.namespace, "cronworkflows")
        with readable_errors(f"CronWorkflow {installed}", self.namespace):
            try:
                standing = self._objects.get_namespaced_custom_object(*place, installed)
            except self._client.ApiException as error:
                if error.status != 404:
                    raise
                # It goes with the pipeline when that is uninstalled.
                owner = {"kind": "WorkflowTemplate", "name": installed, "uid": template["uid"]}
                body["metadata"]["ownerReferences"] = [{"apiVersion": f"{_GROUP}/{_VERSION}", **owner}]
                self._objects.create_namespaced_custom_object(*place, body)
            else:
                # Its labels say who else looks after it, the chart for instance.
                body["metadata"] = standing["metadata"]
                self._objects.replace_namespaced_custom_object(*place, installed, body)
        return installed

    def status(self, run: str) -> RunStatus:
        """The Workflow's own view of its nodes."""
        with readable_errors(f"Workflow {run}", self.namespace):
            workflow = self._objects.get_namespaced_custom_object(_GROUP, _VERSION, self.namespace, "workflows", run)
        return read_workflow(workflow)

    def new_log_lines(self, run: str) -> list[str]:
        """See `PodLogs`."""
        selector = f"workflows.argoproj.io/workflow={run}"
        logs = self._logs.setdefault(run, PodLogs(self._client, self.namespace, selector, _step_of))
        return logs.new_lines()

    def stop(self, run: str) -> None:
        """Terminate the Workflow; its pods go at once."""
        place = (_GROUP, _VERSION, self.namespace, "workflows", run)
        with readable_errors(f"Workflow {run}", self.namespace):
            self._objects.patch_namespaced_custom_object(*place, {"spec": {"shutdown": "Terminate"}})

    def come_back(self, run: str) -> str:
        """The command that follows the run again."""
        return f"finemill watch {run} --engine argo --namespace {self.namespace}"

    def _installed(self, pipeline: Pipeline) -> Mapping[str, Any]:
        """The metadata of the pipeline's WorkflowTemplate. Raises: StepError: it is not there."""
        name = f"{self._prefix}{pipeline.name}"
        place = (_GROUP, _VERSION, self.namespace, "workflowtemplates", name)
        with readable_errors(f"WorkflowTemplate {name}", self.namespace):
            metadata: Mapping[str, Any] = self._objects.get_namespaced_custom_object(*place)["metadata"]
        return metadata


def _step_of(pod: Any) -> str:
    name: str = (pod.metadata.labels or {}).get("app.kubernetes.io/component", pod.metadata.name)
    return name


def _spec(template: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    values = [{"name": name, "value": text} for name, text in for_argo(parameters).items()]
    return {"workflowTemplateRef": {"name": template}, "arguments": {"parameters": values}}


def read_workflow(workflow: Mapping[str, Any]) -> RunStatus:
    """The status of a run from its Workflow object."""
    name = workflow["metadata"]["name"]
    status = workflow.get("status", {})
    nodes = status.get("nodes", {})
    template = status.get("storedWorkflowTemplateSpec", {})
    order = [task["name"] for item in template.get("templates", []) for task in item.get("dag", {}).get("tasks", [])]
    by_name = {node["name"]: node for node in nodes.values()}
    steps = [_step(task, by_name.get(f"{name}.{task}"), nodes) for task in order]
    phase = status.get("phase", "")
    return RunStatus(name, _PHASES[phase], status.get("message", ""), tuple(steps), claimed=phase != "")


def _step(name: str, node: Mapping[str, Any] | None, nodes: Mapping[str, Any]) -> StepStatus:
    if node is None:
        return StepStatus(name, "waiting")
    attempts = [nodes[child] for child in node.get("children", []) if child in nodes] if node["type"] == "Retry" else []
    last = attempts[-1] if attempts else node
    message = last.get("message", "") or node.get("message", "")
    reason = message.split(":")[0].strip()
    pending = last.get("phase") == "Pending"
    blocked = pending and reason in WAITING_IN_VAIN
    outputs = last.get("outputs", {})
    code = outputs.get("exitCode")
    return StepStatus(
        name,
        _PHASES[node.get("phase", "")],
        seconds=_seconds(node),
        attempts=max(1, len(attempts)),
        message=f"{WAITING_IN_VAIN[reason]} ({message})" if blocked else message,
        blocked=blocked,
        unplaced_s=_seconds(last) if pending and reason in NO_PLACE else 0.0,
        exit_code=int(code) if code and int(code) > 0 else None,
        verdict=_verdict(name, outputs),
    )


def _verdict(name: str, outputs: Mapping[str, Any]) -> tuple[str, str] | None:
    wanted = STEPS[name].verdict if name in STEPS else None
    values = {item["name"]: item.get("value", "") for item in outputs.get("parameters", [])}
    return (wanted, values[wanted]) if wanted and wanted in values else None


def _seconds(node: Mapping[str, Any]) -> float:
    if not node.get("startedAt"):
        return 0.0
    start = datetime.fromisoformat(node["startedAt"])
    end = datetime.fromisoformat(node["finishedAt"]) if node.get("finishedAt") else datetime.now(UTC)
    return max(0.0, (end - start).total_seconds())


def parse_namespace(text: str | None) -> str:
    """Raises: UserError: no namespace was given."""
    if not text:
        raise UserError("--engine argo needs --namespace, where the chart is installed")
    return text
