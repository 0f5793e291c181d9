"""A pipeline as Argo Workflows sees it: a WorkflowTemplate with one container template per step."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hera.workflows import DAG, Container, RetryStrategy, WorkflowTemplate
from hera.workflows import Parameter as ArgoParameter
from hera.workflows import Resources as ArgoResources
from hera.workflows import Task as ArgoTask
from hera.workflows.models import SecurityContext, ValueFrom

from finemill.pipelines.graph import Parameter, Pipeline, Resources, Task

# Exit code 75 is a preempted or temporarily failed step; a lost node or deleted pod has no exit code of its own.
RETRY_EXPRESSION = "lastRetry.status == 'Error' || asInt(lastRetry.exitCode) in [75, 137, 143]"
_OUTPUT_FILE = "/tmp/finemill/reference"


def compile_argo(pipeline: Pipeline, defaults: Mapping[str, Any], images: Mapping[str, str], output: Path) -> None:
    """Write the pipeline as a WorkflowTemplate."""
    output.write_text(build_argo_template(pipeline, defaults, images).to_yaml())


def build_argo_template(pipeline: Pipeline, defaults: Mapping[str, Any], images: Mapping[str, str]) -> WorkflowTemplate:
    """The WorkflowTemplate of a graph; arguments as for `build_kfp_pipeline`."""
    with WorkflowTemplate(
        name=pipeline.name,
        entrypoint=pipeline.name,
        arguments=[_argument(item, defaults) for item in pipeline.parameters],
        annotations={"workflows.argoproj.io/description": pipeline.description},
    ) as template:
        containers = {task.name: _container(task, images) for task in pipeline.tasks}
        with DAG(name=pipeline.name):
            for task in pipeline.tasks:
                ArgoTask(
                    name=task.name,
                    template=containers[task.name].name,
                    arguments=[
                        ArgoParameter(name=port, value=_source(port, source)) for port, source in task.inputs.items()
                    ],
                    dependencies=[item.name for item in task.upstream] or None,
                )
    return template


def _argument(item: Parameter, defaults: Mapping[str, Any]) -> ArgoParameter:
    default = defaults.get(item.name, item.default)
    value = json.dumps(default, sort_keys=True) if item.is_mapping else default
    return ArgoParameter(name=item.name, value=value, description=item.description)


def _source(port: str, source: Task | Parameter) -> str:
    if isinstance(source, Task):
        return f"{{{{tasks.{source.name}.outputs.parameters.{port}}}}}"
    return f"{{{{workflow.parameters.{source.name}}}}}"


def _container(task: Task, images: Mapping[str, str]) -> Container:
    inputs = [f"--{port.replace('_', '-')}={{{{inputs.parameters.{port}}}}}" for port in task.inputs]
    return Container(
        name=task.name,
        image=images[task.step.image],
        command=["finemill", task.name],
        args=[
            "--store={{workflow.parameters.store}}",
            *inputs,
            f"--config-json={{{{workflow.parameters.{task.config.name}}}}}",
            "--run-id={{workflow.uid}}",
            f"--output-file={_OUTPUT_FILE}",
        ],
        inputs=[ArgoParameter(name=port) for port in task.inputs],
        outputs=[ArgoParameter(name=task.step.output, value_from=ValueFrom(path=_OUTPUT_FILE))],
        resources=_resources(task.resources),
        retry_strategy=RetryStrategy(limit=task.retries, retry_policy="Always", expression=RETRY_EXPRESSION),
        security_context=SecurityContext(
            allow_privilege_escalation=False, run_as_non_root=True, capabilities={"drop": ["ALL"]}
        ),
    )


def _resources(resources: Resources) -> ArgoResources:
    return ArgoResources(
        cpu_request=resources.cpu,
        cpu_limit=resources.cpu,
        memory_request=resources.memory,
        memory_limit=resources.memory,
        gpus=resources.gpus or None,
    )
