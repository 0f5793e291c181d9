"""The container template of one step for Argo: its command line, environment, retries, resources and rights."""

import json
from collections.abc import Iterable

from hera.workflows import Container, RetryStrategy
from hera.workflows import Parameter as ArgoParameter
from hera.workflows import Resources as ArgoResources
from hera.workflows.models import (
    Backoff,
    Capabilities,
    ConfigMapEnvSource,
    EnvFromSource,
    EnvVar,
    EnvVarSource,
    Mutex,
    ResourceFieldSelector,
    SecretEnvSource,
    SecretKeySelector,
    SecurityContext,
    Synchronization,
    Toleration,
    ValueFrom,
    VolumeMount,
)

from finemill.pipelines.cluster import (
    CACHE_PATH,
    CACHE_VARIABLES,
    SHARED_MEMORY_PATH,
    THREADS_VARIABLE,
    ClusterConfig,
    ContainerSize,
    SecretKey,
)
from finemill.pipelines.graph import GPUS, SMALL, STORE, Parameter, Task
from finemill.runtime.images import IMAGE_VARIABLE
from finemill.transport import TEXT_MARK

# 75: preempted, or a service out of reach. 143: ended by SIGTERM before the step could answer. 137: killed, by a node
# that goes down or for its memory. -1: evicted, or a node that was lost. What took more memory or disk than its limit
# would only do so again; what was evicted because its node had none left may find another.
RETRY_EXPRESSION = (
    "lastRetry.status == 'Error' || (asInt(lastRetry.exitCode) in [75, 137, 143, -1] && "
    "!(lastRetry.message matches 'OOMKilled|exceed(s|ed) (the|its local)'))"
)
_CPU_LIMIT = EnvVarSource(resource_field_ref=ResourceFieldSelector(container_name="main", resource="limits.cpu"))
OUTPUT_FILE = "/tmp/finemill-output/reference"
VERDICT_FILE = "/tmp/finemill-output/verdict"


def build_container(task: Task, checks: Iterable[Parameter], cluster: ClusterConfig) -> Container:
    """A container template named after the task, with an input parameter per port and one output parameter."""
    outputs = [ArgoParameter(name=task.step.output, value_from=ValueFrom(path=OUTPUT_FILE))]
    if task.step.verdict:
        outputs.append(ArgoParameter(name=task.step.verdict, value_from=ValueFrom(path=VERDICT_FILE)))
    gpu = task.resources.gpu
    size = cluster.size(task.resources)
    return Container(
        name=task.name,
        labels=_labels(task, cluster),
        image=cluster.image(task.step.image),
        image_pull_policy=cluster.image_pull_policy,
        command=["finemill", task.name],
        args=_arguments(task, checks),
        env=_variables(task, cluster),
        env_from=_environment(cluster),
        inputs=[ArgoParameter(name=port) for port, source in task.inputs.items() if isinstance(source, Task)],
        outputs=outputs,
        resources=ArgoResources(
            cpu_request=size.cpu,
            cpu_limit=size.cpu,
            memory_request=size.memory,
            memory_limit=size.memory,
            ephemeral_request=size.ephemeral_storage,
            ephemeral_limit=size.ephemeral_storage,
        ),
        volume_mounts=[
            VolumeMount(name="tmp", mount_path="/tmp"),
            VolumeMount(name="cache", mount_path=CACHE_PATH),
            *([VolumeMount(name="shared-memory", mount_path=SHARED_MEMORY_PATH)] if gpu else []),
            *(VolumeMount(name=f"mount-{at}", mount_path=item.path) for at, item in enumerate(cluster.all_mounts)),
        ],
        pod_spec_patch=_pod_spec_patch(task, cluster),
        retry_strategy=RetryStrategy(
            limit=task.retries,
            retry_policy="Always",
            expression=RETRY_EXPRESSION,
            backoff=Backoff(duration="10", factor=2, cap="5m"),
        ),
        annotations=dict(cluster.pod_annotations) or None,
        node_selector={**cluster.node_selector, **(cluster.gpu_node_selector if gpu else {})} or None,
        tolerations=[
            Toleration(**item.model_dump(exclude_none=True))
            for item in (*cluster.tolerations, *(cluster.gpu_tolerations if gpu else ()))
        ]
        or None,
        # The step itself takes a lock in the store, which also keeps other clusters out; this spares a pod that waits.
        synchronization=Synchronization(mutexes=[Mutex(name="finemill-promote")]) if task.name == "promote" else None,
        security_context=SecurityContext(
            allow_privilege_escalation=False,
            run_as_non_root=True,
            read_only_root_filesystem=True,
            capabilities=Capabilities(drop=["ALL"]),
        ),
    )


def _variables(task: Task, cluster: ClusterConfig) -> list[EnvVar]:
    """Those of the cluster in the place of our own of the same name."""
    own = [
        EnvVar(name=IMAGE_VARIABLE, value=cluster.image(task.step.image)),
        *(EnvVar(name=name, value=value) for name, value in CACHE_VARIABLES.items()),
        # Libraries count the node's cores, not the container's: too many threads only get in each other's way.
        EnvVar(name=THREADS_VARIABLE, value_from=_CPU_LIMIT),
    ]
    given = [
        *(EnvVar(name=name, value=value) for name, value in cluster.variables.items()),
        *(EnvVar(name=name, value_from=_key_of(item)) for name, item in cluster.secret_env.items()),
    ]
    names = {item.name for item in given}
    return [*(item for item in own if item.name not in names), *given]


def _labels(task: Task, cluster: ClusterConfig) -> dict[str, str]:
    queue = cluster.queue_labels if task.resources.gpu else {}
    return {
        **cluster.pod_labels,
        "app.kubernetes.io/name": "finemill",
        "app.kubernetes.io/component": task.name,
        "finemill/image": task.step.image,
        "finemill/size": task.resources.size,
        **queue,
    }


def _arguments(task: Task, checks: Iterable[Parameter]) -> list[str]:
    configs = [_parameter(task.config), *map(_checked, checks)]
    return [
        f"--store={_in_base64(_parameter(STORE))}",
        *(f"--{port.replace('_', '-')}={_in_base64(_input(port, source))}" for port, source in task.inputs.items()),
        *(f"--config-json={_in_base64(text)}" for text in configs),
        "--run-id={{workflow.uid}}",
        f"--output-file={OUTPUT_FILE}",
        *([f"--verdict-file={VERDICT_FILE}"] if task.step.verdict else []),
    ]


def _input(port: str, source: Task | Parameter) -> str:
    """A parameter of the run is taken from there: what goes through the graph is evaluated on its way."""
    return f"inputs.parameters.{port}" if isinstance(source, Task) else _parameter(source)


def _parameter(item: Parameter) -> str:
    return f"workflow.parameters.{item.name}"


def _checked(item: Parameter) -> str:
    """What preflight checks besides its own section, as an expression for JSON."""
    if item.is_mapping:
        # Two braces would end the expression.
        return f"""'{{"steps": {{"{item.name}": ' + {_parameter(item)} + '}} }}'"""
    return f"""'{{"{item.name}": ' + toJson({_parameter(item)}) + '}}'"""


def _in_base64(expression: str) -> str:
    """An argument that Argo makes of an expression, with nothing in it for Argo or the kubelet to expand."""
    return f"{TEXT_MARK}{{{{=sprig.b64enc({expression})}}}}"


def _environment(cluster: ClusterConfig) -> list[EnvFromSource]:
    secrets = (cluster.s3_secret, cluster.mlflow_secret, cluster.hub_secret)
    return [
        EnvFromSource(config_map_ref=ConfigMapEnvSource(name=cluster.config_map, optional=True)),
        *(EnvFromSource(secret_ref=SecretEnvSource(name=name, optional=True)) for name in secrets),
    ]


def _key_of(item: SecretKey) -> EnvVarSource:
    return EnvVarSource(secret_key_ref=SecretKeySelector(name=item.secret, key=item.key))


def _pod_spec_patch(task: Task, cluster: ClusterConfig) -> str:
    """What a template has no field for, and quantities that a run's parameters decide."""
    patch: dict[str, object] = {"terminationGracePeriodSeconds": cluster.termination_grace_period_s}
    if task.resources.gpu:
        gpus = f"workflow.parameters.{GPUS.name}"
        resources: dict[str, dict[str, str]] = {"limits": {cluster.gpu_resource: f"{{{{{gpus}}}}}"}}
        if task.step.multi_process:
            # Without `>`, `<` and `&`: Go's JSON, which Argo searches for expressions, and Helm's escape them.
            follows = f"(fromJSON({_parameter(task.config)}).num_nodes ?? 1) != 1"
            resources = _smaller_if(follows, cluster.size(SMALL), cluster.size(task.resources))
            resources["limits"][cluster.gpu_resource] = f"{{{{={follows} ? '0' : {gpus}}}}}"
        patch["containers"] = [{"name": "main", "resources": resources}]
    return json.dumps(patch)


def _smaller_if(condition: str, small: ContainerSize, size: ContainerSize) -> dict[str, dict[str, str]]:
    """Requests and limits of a step that computes itself, or only follows the nodes of a TrainJob that do."""
    names = ("cpu", "memory")
    quantities = {name: f"{{{{={condition} ? '{getattr(small, name)}' : '{getattr(size, name)}'}}}}" for name in names}
    return {"requests": dict(quantities), "limits": dict(quantities)}
