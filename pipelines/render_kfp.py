"""A pipeline as KFP sees it: the step's own components, wired by the graph."""

import inspect
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from kfp import compiler, dsl

from finemill.pipelines.graph import Parameter, Pipeline, Resources, Task

# KFP stops retrying an hour after the first attempt began unless told otherwise: longer than any training run.
BACKOFF_MAX_DURATION = "604800s"


def build_kfp_pipeline(
    pipeline: Pipeline, defaults: Mapping[str, Any], images: Mapping[str, str]
) -> Callable[..., Any]:
    """The `@dsl.pipeline` function of a graph.

    Args:
        pipeline: the graph.
        defaults: parameter values that replace the graph's own defaults.
        images: image name by role, `cpu` and `train`.
    """

    def body(**arguments: Any) -> None:
        outputs: dict[str, Any] = {}
        for task in pipeline.tasks:
            outputs[task.name] = _call(task, arguments, outputs, images)

    signature = inspect.Signature([_signature_entry(item, defaults) for item in pipeline.parameters])
    body.__signature__ = signature  # type: ignore[attr-defined]
    body.__annotations__ = {name: entry.annotation for name, entry in signature.parameters.items()}
    return dsl.pipeline(name=pipeline.name, description=pipeline.description)(body)


def compile_kfp(pipeline: Pipeline, defaults: Mapping[str, Any], images: Mapping[str, str], output: Path) -> None:
    """Write the pipeline's intermediate representation as YAML."""
    compiler.Compiler().compile(build_kfp_pipeline(pipeline, defaults, images), str(output))


def _signature_entry(item: Parameter, defaults: Mapping[str, Any]) -> inspect.Parameter:
    default = defaults.get(item.name, item.default)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=dict if item.is_mapping else str,
        default=inspect.Parameter.empty if default is None else default,
    )


def _call(task: Task, arguments: Mapping[str, Any], outputs: Mapping[str, Any], images: Mapping[str, str]) -> Any:
    component = getattr(import_module(f"finemill.components.{task.step.module_name}.component"), task.step.module_name)
    inputs = {
        port: outputs[source.name].outputs[port] if isinstance(source, Task) else arguments[source.name]
        for port, source in task.inputs.items()
    }
    call = component(
        store=arguments["store"],
        config=arguments[task.config.name],
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        **inputs,
    )
    call.set_display_name(task.name)
    call.set_container_image(images[task.step.image])
    # The steps find their own finished output, and check that it is whole; KFP's cache would not.
    call.set_caching_options(False)
    if task.retries:
        call.set_retry(
            task.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration=BACKOFF_MAX_DURATION
        )
    _set_resources(call, task.resources)
    return call


def _set_resources(call: Any, resources: Resources) -> None:
    call.set_cpu_request(resources.cpu).set_cpu_limit(resources.cpu)
    call.set_memory_request(resources.memory).set_memory_limit(resources.memory)
    if resources.gpus:
        call.set_accelerator_type("nvidia.com/gpu").set_accelerator_limit(resources.gpus)
