"""A pipeline as KFP sees it: the step's own components, wired by the graph."""

import inspect
import re
from collections.abc import Callable, Iterable, Mapping
from contextlib import nullcontext
from importlib import import_module
from itertools import groupby
from pathlib import Path
from typing import Any

from kfp import compiler, dsl, kubernetes
from kfp.compiler.compiler_utils import KubernetesManifestOptions

from finemill.errors import UserError
from finemill.pipelines.cluster import (
    CACHE_PATH,
    CACHE_VARIABLES,
    CONFIG_KEYS,
    HUB_KEYS,
    MLFLOW_KEYS,
    S3_KEYS,
    SHARED_MEMORY_PATH,
    THREADS_VARIABLE,
    ClusterConfig,
)
from finemill.pipelines.graph import GPUS, Parameter, Pipeline, Task
from finemill.pipelines.names import SHORT_NAME
from finemill.pipelines.parameters import ARGUMENT_CHARACTERS, for_kfp
from finemill.runtime.images import IMAGE_VARIABLE
from finemill.runtime.kfp_task import TRACKING_PREFIX

# KFP stops retrying an hour after the first attempt began unless told otherwise: longer than any training run.
BACKOFF_MAX_DURATION = "604800s"


def compile_kfp(
    pipeline: Pipeline, defaults: Mapping[str, Any], cluster: ClusterConfig, output: Path, *, manifests: bool = False
) -> None:
    """Write the pipeline as YAML: KFP's intermediate representation, or with `manifests` the Kubernetes objects
    `Pipeline` and `PipelineVersion` that hold it.
    """
    options = KubernetesManifestOptions(
        pipeline_name=pipeline.name, pipeline_version_name=pipeline.name, include_pipeline_manifest=True
    )
    compiler.Compiler().compile(
        build_kfp_pipeline(pipeline, defaults, cluster),
        str(output),
        kubernetes_manifest_format=manifests,
        kubernetes_manifest_options=options if manifests else None,
    )


def build_kfp_pipeline(pipeline: Pipeline, defaults: Mapping[str, Any], cluster: ClusterConfig) -> Callable[..., Any]:
    """The `@dsl.pipeline` function of a graph.

    Args:
        pipeline: the graph.
        defaults: parameter values that replace the graph's own defaults.
        cluster: images, secrets by name, sizes, placement.
    Raises: UserError: the settings ask for what KFP cannot do, or a default is too long.
    """
    _refuse_argo_s(cluster)

    def body(*values: Any) -> None:
        arguments = dict(zip(signature.parameters, values, strict=True))
        calls: dict[str, Any] = {}
        for _, tasks in groupby(pipeline.tasks, key=lambda task: task.when and task.when.name):
            group = list(tasks)
            with _condition(group[0].when, calls):
                for task in group:
                    calls[task.name] = _call(task, pipeline.checks(task), arguments, calls)
                    _set_execution(calls[task.name], task, arguments, cluster)

    packed = for_kfp(defaults, ARGUMENT_CHARACTERS)
    signature = inspect.Signature([_signature_entry(item, packed) for item in pipeline.parameters])
    body.__signature__ = signature  # type: ignore[attr-defined]
    body.__annotations__ = {name: entry.annotation for name, entry in signature.parameters.items()}
    rendered: Callable[..., Any] = dsl.pipeline(name=pipeline.name, description=pipeline.description)(body)
    return rendered


def _signature_entry(item: Parameter, defaults: Mapping[str, Any]) -> inspect.Parameter:
    default = defaults.get(item.name, item.default)
    return inspect.Parameter(
        item.name,
        inspect.Parameter.KEYWORD_ONLY,
        annotation=dict if item.is_mapping else str,
        default=inspect.Parameter.empty if default is None else default,
    )


def _condition(gate: Task | None, calls: Mapping[str, Any]) -> Any:
    if gate is None:
        return nullcontext()
    # kfp's local runner resolves a condition on a component's return value only, which is called so.
    return dsl.If(calls[gate.name].outputs["Output"] == True, name=f"if-{gate.step.verdict}")  # noqa: E712


def _call(task: Task, checks: Iterable[Parameter], arguments: Mapping[str, Any], calls: Mapping[str, Any]) -> Any:
    component = getattr(import_module(f"finemill.components.{task.step.module_name}.component"), task.step.module_name)
    inputs = {
        port: calls[source.name].outputs[port] if isinstance(source, Task) else arguments[source.name]
        for port, source in task.inputs.items()
    }
    call = component(
        store=arguments["store"],
        config=arguments[task.config.name],
        run_id=dsl.PIPELINE_JOB_ID_PLACEHOLDER,
        **inputs,
        **{item.name: arguments[item.name] for item in checks},
    )
    data_sources = {source.name for source in task.inputs.values() if isinstance(source, Task)}
    call.after(*(calls[item.name] for item in task.upstream if item.name not in data_sources and item != task.when))
    return call.set_display_name(task.name)


def _set_execution(call: Any, task: Task, arguments: Mapping[str, Any], cluster: ClusterConfig) -> None:
    """Image, retries, resources, secrets and placement of a task's pod."""
    image = cluster.image(task.step.image)
    call.set_container_image(image).set_env_variable(IMAGE_VARIABLE, image)
    # The steps find their own finished output, and check that it is whole; KFP's cache would not.
    call.set_caching_options(False)
    if task.retries:
        call.set_retry(
            task.retries, backoff_duration="30s", backoff_factor=2, backoff_max_duration=BACKOFF_MAX_DURATION
        )
    size = cluster.size(task.resources)
    call.set_cpu_request(size.cpu).set_cpu_limit(size.cpu)
    call.set_memory_request(size.memory).set_memory_limit(size.memory)
    # Libraries count the node's cores, not the container's: too many threads only get in each other's way.
    call.set_env_variable(THREADS_VARIABLE, str(size.threads))
    kubernetes.set_image_pull_policy(call, cluster.image_pull_policy)
    if cluster.image_pull_secrets:
        kubernetes.set_image_pull_secrets(call, list(cluster.image_pull_secrets))
    kubernetes.set_security_context(call, cluster.run_as_user, cluster.run_as_group, run_as_non_root=True)
    _set_environment(call, cluster)
    _set_pod(call, cluster)
    if task.resources.gpu:
        _set_gpu(call, arguments[GPUS.name], cluster)


def _set_environment(call: Any, cluster: ClusterConfig) -> None:
    kubernetes.use_config_map_as_env(call, cluster.config_map, _variables(CONFIG_KEYS), optional=True)
    for secret, keys in (
        (cluster.s3_secret, S3_KEYS),
        (cluster.mlflow_secret, MLFLOW_KEYS),
        (cluster.hub_secret, HUB_KEYS),
    ):
        kubernetes.use_secret_as_env(call, secret, _variables(keys), optional=True)
    if cluster.cache_claim:
        kubernetes.mount_pvc(call, cluster.cache_claim, CACHE_PATH)
        for name, value in CACHE_VARIABLES.items():
            call.set_env_variable(name, value)


def _set_pod(call: Any, cluster: ClusterConfig) -> None:
    """What a platform adds to every pod."""
    for name, value in cluster.variables.items():
        call.set_env_variable(name, value)
    for name, item in cluster.secret_env.items():
        kubernetes.use_secret_as_env(call, item.secret, {item.key: name})
    for mount in cluster.all_mounts:
        if mount.config_map:
            kubernetes.use_config_map_as_volume(call, mount.config_map, mount.path)
        elif mount.secret:
            kubernetes.use_secret_as_volume(call, mount.secret, mount.path)
        elif mount.claim:
            kubernetes.mount_pvc(call, mount.claim, mount.path)
    for label, value in cluster.node_selector.items():
        kubernetes.add_node_selector(call, label, value)
    for toleration in cluster.tolerations:
        kubernetes.add_toleration(call, **toleration.model_dump(exclude_none=True))
    if cluster.affinity:
        kubernetes.add_node_affinity_json(call, cluster.affinity["nodeAffinity"])
    for label, value in cluster.pod_labels.items():
        kubernetes.add_pod_label(call, label, value)
    for name, value in cluster.pod_annotations.items():
        kubernetes.add_pod_annotation(call, name, value)


def _refuse_argo_s(cluster: ClusterConfig) -> None:
    sized = [f"sizes.{name}.ephemeral_storage" for name, size in cluster.sizes.items() if size.ephemeral_storage]
    affinity = [f"affinity.{name}" for name in cluster.affinity if name != "nodeAffinity"]
    own = [name for name in ("priority_class", "pod_disruption_budget") if getattr(cluster, name)]
    groups = [name for name in ("fs_group", "supplemental_groups") if getattr(cluster, name) not in (None, ())]
    given = [*sized, *affinity, *own, *groups]
    if given:
        raise UserError(f"cluster settings: {', '.join(given)}: KFP's pods have no such field, leave it out")
    _check_volumes(cluster)


def _check_volumes(cluster: ClusterConfig) -> None:
    """KFP names a pod's volumes after what is in them. Raises: UserError: a name would be none, or be there twice."""
    sources = [mount.config_map or mount.secret or mount.claim for mount in cluster.all_mounts]
    names = [name for name in (*sources, cluster.cache_claim) if name]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"cluster settings: '{name}' is mounted twice, which KFP cannot do: mount it once")
        if not re.fullmatch(SHORT_NAME, name):
            raise UserError(
                f"cluster settings: KFP names a volume after '{name}', and a volume's name has no dots and up to 63 "
                "characters: mount something of another name"
            )


def _variables(keys: Iterable[str]) -> dict[str, str]:
    """The environment variable of each key."""
    return {key: f"{TRACKING_PREFIX}{key}" if key.startswith("MLFLOW_") else key for key in keys}


def _set_gpu(call: Any, gpus: Any, cluster: ClusterConfig) -> None:
    call.set_accelerator_type(cluster.gpu_resource).set_accelerator_limit(gpus)
    # Without this kfp would not hand a pipeline's parameter down into a condition for the sake of resources alone.
    call.register_pipeline_channels([gpus])
    kubernetes.empty_dir_mount(
        call, "shared-memory", SHARED_MEMORY_PATH, medium="Memory", size_limit=cluster.shared_memory
    )
    for label, value in cluster.gpu_node_selector.items():
        kubernetes.add_node_selector(call, label, value)
    for toleration in cluster.gpu_tolerations:
        kubernetes.add_toleration(call, **toleration.model_dump(exclude_none=True))
    for label, value in cluster.queue_labels.items():
        kubernetes.add_pod_label(call, label, value)
