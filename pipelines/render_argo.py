"""A pipeline as Argo Workflows sees it: a WorkflowTemplate with one container template per step, and its schedule."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hera.workflows import (
    DAG,
    Container,
    CronWorkflow,
    EmptyDirVolume,
    ExistingVolume,
    WorkflowTemplate,
)
from hera.workflows import Parameter as ArgoParameter
from hera.workflows import Task as ArgoTask
from hera.workflows.models import (
    Affinity,
    ConfigMapVolumeSource,
    LocalObjectReference,
    PersistentVolumeClaimVolumeSource,
    PodDisruptionBudgetSpec,
    PodGC,
    PodSecurityContext,
    Quantity,
    SeccompProfile,
    SecretVolumeSource,
    TTLStrategy,
    Volume,
    WorkflowTemplateRef,
)

from finemill.pipelines.argo_container import build_container
from finemill.pipelines.cluster import CACHE_PATH, ClusterConfig, Mount
from finemill.pipelines.graph import Parameter, Pipeline, Task
from finemill.pipelines.parameters import for_argo

# A firing that was missed by more than this, because the controller was down, is dropped: no catch-up.
STARTING_DEADLINE_S = 300


def compile_argo(
    pipeline: Pipeline,
    defaults: Mapping[str, Any],
    cluster: ClusterConfig,
    output: Path,
    *,
    schedule: str | None = None,
    timezone: str | None = None,
) -> None:
    """Write the pipeline as a WorkflowTemplate, followed by a CronWorkflow if there is a schedule."""
    documents = [build_argo_template(pipeline, defaults, cluster).to_yaml()]
    if schedule:
        documents.append(build_argo_schedule(pipeline, schedule, timezone).to_yaml())
    output.write_text("---\n".join(documents))


def build_argo_template(pipeline: Pipeline, defaults: Mapping[str, Any], cluster: ClusterConfig) -> WorkflowTemplate:
    """The WorkflowTemplate of a graph; arguments as for `build_kfp_pipeline`."""
    texts = for_argo(
        {item.name: item.default for item in pipeline.parameters if item.default is not None} | dict(defaults)
    )
    with WorkflowTemplate(
        name=pipeline.name,
        entrypoint=pipeline.name,
        arguments=[_argument(item, texts.get(item.name)) for item in pipeline.parameters],
        annotations={"workflows.argoproj.io/description": pipeline.description},
        labels={"app.kubernetes.io/name": "finemill", "app.kubernetes.io/component": pipeline.name},
        service_account_name=cluster.service_account,
        image_pull_secrets=[LocalObjectReference(name=name) for name in cluster.image_pull_secrets] or None,
        security_context=_security(cluster),
        volumes=_volumes(cluster),
        pod_priority_class_name=cluster.priority_class,
        affinity=Affinity.model_validate(cluster.affinity) if cluster.affinity else None,
        # More than a workflow has pods: none of them may be evicted.
        pod_disruption_budget=PodDisruptionBudgetSpec(min_available=9999) if cluster.pod_disruption_budget else None,
        active_deadline_seconds=cluster.run_timeout_s or None,
        ttl_strategy=TTLStrategy(seconds_after_completion=cluster.ttl_s),
        # Pods of failed steps stay as long as the workflow does: they hold the log that tells why.
        pod_gc=PodGC(strategy="OnPodSuccess", delete_delay_duration="10m"),
    ) as template:
        containers = {task.name: build_container(task, pipeline.checks(task), cluster) for task in pipeline.tasks}
        with DAG(name=pipeline.name):
            for task in pipeline.tasks:
                _add_task(task, containers[task.name])
    return template


def build_argo_schedule(pipeline: Pipeline, schedule: str, timezone: str | None = None) -> CronWorkflow:
    """A CronWorkflow that runs the pipeline's installed WorkflowTemplate: never two at once, none made up for.

    Args:
        pipeline: which template.
        schedule: five cron fields.
        timezone: a name of the time zone database; the controller's own (UTC as a rule) without one.
    """
    return CronWorkflow(
        name=pipeline.name,
        schedules=[schedule],
        timezone=timezone,
        concurrency_policy="Forbid",
        starting_deadline_seconds=STARTING_DEADLINE_S,
        successful_jobs_history_limit=3,
        failed_jobs_history_limit=3,
        workflow_template_ref=WorkflowTemplateRef(name=pipeline.name),
    )


def _argument(item: Parameter, text: str | None) -> ArgoParameter:
    if text is None:
        return ArgoParameter(name=item.name, description=item.description)
    return ArgoParameter(name=item.name, value=text, description=item.description)


def _security(cluster: ClusterConfig) -> PodSecurityContext:
    """Who the pods run as. A cache has many files, whose group is set once and not at each start."""
    return PodSecurityContext(
        run_as_non_root=True,
        run_as_user=cluster.run_as_user,
        run_as_group=cluster.run_as_group,
        fs_group=cluster.fs_group,
        fs_group_change_policy=None if cluster.fs_group is None else "OnRootMismatch",
        supplemental_groups=list(cluster.supplemental_groups) or None,
        seccomp_profile=SeccompProfile(type="RuntimeDefault"),
    )


def _volumes(cluster: ClusterConfig) -> list[Any]:
    """What every pod may write, with a root that is read-only: /tmp, and the cache of downloads."""
    temporary = EmptyDirVolume(name="tmp", mount_path="/tmp")
    if cluster.cache_claim:
        cache: Any = ExistingVolume(name="cache", claim_name=cluster.cache_claim, mount_path=CACHE_PATH)
    else:
        cache = EmptyDirVolume(name="cache", mount_path=CACHE_PATH)
    shared = EmptyDirVolume(
        name="shared-memory", mount_path="/dev/shm", medium="Memory", size_limit=Quantity(cluster.shared_memory)
    )
    return [temporary, cache, shared, *(_mounted(f"mount-{at}", item) for at, item in enumerate(cluster.all_mounts))]


def _mounted(name: str, mount: Mount) -> Volume:
    if mount.config_map:
        return Volume(name=name, config_map=ConfigMapVolumeSource(name=mount.config_map))
    if mount.secret:
        return Volume(name=name, secret=SecretVolumeSource(secret_name=mount.secret))
    return Volume(name=name, persistent_volume_claim=PersistentVolumeClaimVolumeSource(claim_name=str(mount.claim)))


def _add_task(task: Task, container: Container) -> None:
    ArgoTask(
        name=task.name,
        template=container.name,
        arguments=[
            ArgoParameter(name=port, value=f"{{{{tasks.{source.name}.outputs.parameters.{port}}}}}")
            for port, source in task.inputs.items()
            if isinstance(source, Task)
        ],
        dependencies=[item.name for item in task.upstream] or None,
        when=f"{{{{tasks.{task.when.name}.outputs.parameters.{task.when.step.verdict}}}}} == true"
        if task.when
        else None,
    )
