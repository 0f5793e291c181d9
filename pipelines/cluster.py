"""How pipelines are set into a cluster: images, secrets by name, resources, placement. The same for KFP and Argo."""

import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import AfterValidator, Field, model_validator

from finemill.config import StepConfig
from finemill.credentials import SECRET_VARIABLES
from finemill.errors import UserError
from finemill.pipelines.affinity import check_affinity
from finemill.pipelines.graph import Resources
from finemill.pipelines.names import (
    ARGO_PATH,
    HIGHEST_ID,
    IMAGE_PATHS,
    LONGEST_S,
    OWN_LABEL,
    PASSWORD,
    QUEUE_LABEL,
    QUEUE_PRIORITY_LABEL,
    RESOURCE,
    FileKey,
    Image,
    LabelKey,
    LabelValue,
    MountPath,
    Name,
    ShortName,
    Variable,
)
from finemill.pipelines.quantity import CPU, Memory, gibibytes
from finemill.runtime.images import IMAGES

SHARED_MEMORY_PATH = "/dev/shm"
CACHE_PATH = "/cache"
THREADS_VARIABLE = "OMP_NUM_THREADS"
CACHE_VARIABLES = {
    "FINEMILL_CACHE": f"{CACHE_PATH}/finemill",
    "HF_HOME": f"{CACHE_PATH}/huggingface",
    "TRITON_CACHE_DIR": f"{CACHE_PATH}/triton",
    "CUDA_CACHE_PATH": f"{CACHE_PATH}/cuda",
}
"""Models and compiled kernels."""

_CA_PATH = "/etc/finemill/ca"
_CA_VARIABLES = ("AWS_CA_BUNDLE", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE")

# Keys that a step reads from each object. All are optional: a pod identity may stand in for keys, a hub may be open.
CONFIG_KEYS = ("AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION", "MLFLOW_TRACKING_URI", "HF_ENDPOINT")
S3_KEYS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
MLFLOW_KEYS = ("MLFLOW_TRACKING_USERNAME", "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN")
HUB_KEYS = ("HF_TOKEN",)


def _plain(text: str) -> str:
    if "\0" in text:
        raise ValueError(f"{text!r} holds a NUL character, which no process can be given: leave it out")
    if "{{" in text:
        raise ValueError(f"'{text}' holds '{{{{', which Argo, and KFP on it, would evaluate: leave it out")
    return text


def _affinity(value: Mapping[str, Any]) -> Mapping[str, Any]:
    """The same, if Kubernetes takes it and knows every key in it."""
    from hera.workflows.models import Affinity

    known = Affinity.model_validate(value).model_dump(by_alias=True, exclude_none=True)
    if known != value:
        raise ValueError(f"Kubernetes would read {json.dumps(known)} of it: correct the key that is missing there")
    check_affinity(value)
    return value


def _not_secret(variables: Mapping[str, str]) -> Mapping[str, str]:
    """The same, if no variable is one that nobody may read, or holds a password in an address."""
    secret = sorted(SECRET_VARIABLES & variables.keys())
    if secret:
        raise ValueError(f"{secret[0]} would be written out for everybody: put it into a Secret and into secret_env")
    with_password = sorted(name for name, value in variables.items() if re.search(PASSWORD, value))
    if with_password:
        raise ValueError(
            f"the password in {with_password[0]} would be written out for everybody: put the address into a Secret and "
            "into secret_env"
        )
    return variables


def _not_own(labels: Mapping[str, str]) -> Mapping[str, str]:
    """The same, if no label is one that steps have already."""
    own = [name for name in labels if re.match(OWN_LABEL, name)]
    if own:
        raise ValueError(f"{own[0]} is what steps are found by: choose another name")
    return labels


Plain = Annotated[str, AfterValidator(_plain)]
"""Type of texts that arrive in a pod as they are."""
Labels = Mapping[LabelKey, LabelValue]
"""Type of labels by name."""


class ContainerSize(StepConfig):
    """Requests and limits of a container."""

    cpu: CPU
    """Cores, `4` or `500m`."""

    memory: Memory
    """Memory, `16Gi`. Shared memory counts into it."""

    ephemeral_storage: Memory | None = None
    """Disk, /tmp and the cache in it, `50Gi`; none leaves it to the node. Argo only."""

    @property
    def threads(self) -> int:
        """Whole cores, rounded up."""
        return math.ceil(int(self.cpu[:-1]) / 1000) if self.cpu.endswith("m") else int(self.cpu)


class Toleration(StepConfig):
    """A taint that pods tolerate, as Kubernetes spells it."""

    key: LabelKey | None = None
    """The taint's key; none tolerates all."""

    operator: Literal["Exists", "Equal"] = "Equal"
    """Whether `value` has to be the taint's."""

    value: LabelValue | None = None
    """The taint's value, for `Equal`."""

    effect: Literal["NoSchedule", "PreferNoSchedule", "NoExecute"] | None = None
    """The taint's effect; none tolerates all."""

    toleration_seconds: int | None = Field(default=None, alias="tolerationSeconds")
    """Seconds after which a taint with `NoExecute` ends the pod all the same."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.operator == "Exists" and self.value:
            raise ValueError("'Exists' takes no value: leave it out, or write operator: Equal")
        if self.operator == "Equal" and not self.key:
            raise ValueError("'Equal' takes a key: give one, or write operator: Exists")
        if self.toleration_seconds is not None and self.effect != "NoExecute":
            raise ValueError("'tolerationSeconds' is about effect: NoExecute alone: write that, or leave it out")
        return self


class Mount(StepConfig):
    """A folder of every step's container; exactly one of the other fields says what is in it."""

    path: MountPath
    """Where it is, `/etc/certificates`."""

    config_map: Name | None = None
    """Name of a ConfigMap whose keys are the files."""

    secret: Name | None = None
    """Name of a Secret whose keys are the files."""

    claim: Name | None = None
    """Name of a PersistentVolumeClaim."""

    @model_validator(mode="after")
    def _has_one_source(self) -> Self:
        if sum(source is not None for source in (self.config_map, self.secret, self.claim)) != 1:
            raise ValueError(f"{self.path}: give one of config_map, secret and claim")
        return self


def _apart(mounts: tuple[Mount, ...]) -> tuple[Mount, ...]:
    """The same, if every folder has one content."""
    paths = ["/tmp", CACHE_PATH, SHARED_MEMORY_PATH, _CA_PATH, ARGO_PATH, *(mount.path for mount in mounts)]
    twice = [path for path in paths if paths.count(path) > 1]
    if twice:
        raise ValueError(f"{twice[0]} is mounted already: choose another path")
    needed = [mount.path for mount in mounts if mount.path in IMAGE_PATHS]
    if needed:
        raise ValueError(f"{needed[0]} holds what the image needs: mount a folder in it, or another one")
    return mounts


class SecretKey(StepConfig):
    """A value of a secret."""

    secret: Name
    """The secret's name."""

    key: FileKey
    """The value's key in it."""


class ClusterConfig(StepConfig):
    """What a platform engineer decides, and a pipeline's author need not know."""

    image_cpu: Image = IMAGES["cpu"]
    """Image of the steps that need no torch."""

    image_train: Image = IMAGES["train"]
    """Image of the steps that compute with torch."""

    image_pull_policy: Literal["IfNotPresent", "Always", "Never"] = "IfNotPresent"
    """When nodes look for a newer image of the same name."""

    image_pull_secrets: tuple[Name, ...] = ()
    """Names of secrets with registry credentials."""

    service_account: Name = "finemill"
    """Service account of Argo's pods; it needs `create` and `patch` on `workflowtaskresults`. KFP sets its own."""

    config_map: Name = "finemill"
    """Name of the ConfigMap with AWS_ENDPOINT_URL, AWS_DEFAULT_REGION, MLFLOW_TRACKING_URI."""

    s3_secret: Name = "finemill-s3"
    """Name of the Secret with AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY; not needed with a pod identity."""

    mlflow_secret: Name = "finemill-mlflow"
    """Name of the Secret with the tracking server's credentials, where it asks for some."""

    hub_secret: Name = "finemill-hub"
    """Name of the Secret with HF_TOKEN, for gated base models."""

    sizes: Mapping[Literal["small", "large", "gpu"], ContainerSize] = Field(default_factory=dict)
    """Requests and limits per size of task (`small`, `large`, `gpu`) in place of the pipeline's own."""

    gpu_resource: str = Field(default="nvidia.com/gpu", pattern=RESOURCE)
    """Name of the extended resource that a GPU is."""

    gpu_node_selector: Labels = Field(default_factory=dict)
    """Labels of the nodes that GPU steps run on."""

    gpu_tolerations: tuple[Toleration, ...] = (Toleration(key="nvidia.com/gpu", operator="Exists"),)
    """Taints that GPU steps tolerate."""

    node_selector: Labels = Field(default_factory=dict)
    """Labels of the nodes that all steps run on."""

    tolerations: tuple[Toleration, ...] = ()
    """Taints that all steps tolerate."""

    affinity: Annotated[Mapping[str, Any], AfterValidator(_affinity)] = Field(default_factory=dict)
    """Affinity of all steps' pods, as Kubernetes spells it. KFP knows `nodeAffinity` only."""

    env: Annotated[Mapping[Variable, Plain], AfterValidator(_not_secret)] = Field(default_factory=dict)
    """Environment variables of all steps: proxies, MLFLOW_TRACKING_INSECURE_TLS. No secrets: they are written out."""

    secret_env: Mapping[Variable, SecretKey] = Field(default_factory=dict)
    """Environment variables of all steps that are secret, each a key of a Secret."""

    mounts: Annotated[tuple[Mount, ...], AfterValidator(_apart)] = ()
    """Folders of every step's container."""

    ca_config_map: Name | None = None
    """Name of a ConfigMap with the certificates of all authorities to trust; none trusts the image's."""

    ca_key: FileKey = "ca.crt"
    """Key in that ConfigMap."""

    pod_labels: Annotated[Labels, AfterValidator(_not_own)] = Field(default_factory=dict)
    """Labels of all steps' pods."""

    pod_annotations: Mapping[LabelKey, Plain] = Field(default_factory=dict)
    """Annotations of all steps' pods."""

    priority_class: Name | None = None
    """Name of the PriorityClass of all steps' pods. Argo only."""

    pod_disruption_budget: bool = False
    """Keep nodes from being drained while a step runs. Argo only."""

    queue: ShortName | None = None
    """Kueue's LocalQueue that GPU steps wait in."""

    queue_priority: ShortName | None = None
    """Kueue's WorkloadPriorityClass of GPU steps in that queue; none has it go by the pods' own priority."""

    run_as_user: int | None = Field(default=None, ge=1, le=HIGHEST_ID)
    """Numeric user of all steps' pods; none takes the image's (65532), or the one that OpenShift gives a namespace."""

    run_as_group: int | None = Field(default=None, ge=0, le=HIGHEST_ID)
    """Numeric group of all steps' pods; none takes the image's (0)."""

    fs_group: int | None = Field(default=None, ge=0, le=HIGHEST_ID)
    """Group that volumes belong to, where a claim that root owns is to be written. None where the platform sets one,
    as OpenShift does. Argo only."""

    supplemental_groups: tuple[Annotated[int, Field(ge=0, le=HIGHEST_ID)], ...] = ()
    """Further groups of all steps' pods, for shared folders as NFS has them. Argo only."""

    cache_claim: Name | None = None
    """Name of a PersistentVolumeClaim shared by the steps: a base model is pulled and kernels are compiled once.

    Without it each pod pulls, and compiles for about 15 s on a Hopper card.
    """

    shared_memory: Memory = "2Gi"
    """Size limit of /dev/shm in GPU steps; counts into their memory."""

    termination_grace_period_s: int = Field(default=120, gt=0, le=LONGEST_S)
    """Seconds that a step told to stop has for its checkpoint. Argo only: KFP gives none."""

    run_timeout_s: int = Field(default=7 * 24 * 3600, ge=0, le=LONGEST_S)
    """Seconds after which a run is ended that nobody follows, a wait for GPUs among them; 0: never. Argo only."""

    ttl_s: int = Field(default=7 * 24 * 3600, gt=0, le=LONGEST_S)
    """Seconds after which a finished Argo workflow is deleted; artifacts, MLflow and logs in them stay."""

    @model_validator(mode="after")
    def _says_each_thing_once(self) -> Self:
        twice = sorted(self.env.keys() & self.secret_env.keys())
        if twice:
            raise ValueError(f"{twice[0]} is in env and in secret_env: leave one out")
        if self.queue_priority and not self.queue:
            raise ValueError("queue_priority is about the pods of a queue: name it in queue")
        return self

    @property
    def queue_labels(self) -> dict[str, str]:
        """Labels by which Kueue takes up a pod."""
        labels = {QUEUE_LABEL: self.queue, QUEUE_PRIORITY_LABEL: self.queue_priority}
        return {name: value for name, value in labels.items() if value and self.queue}

    @property
    def all_mounts(self) -> tuple[Mount, ...]:
        """The folders, that of the certificates among them."""
        ca = (Mount(path=_CA_PATH, config_map=self.ca_config_map),) if self.ca_config_map else ()
        return (*self.mounts, *ca)

    @property
    def variables(self) -> dict[str, str]:
        """Environment variables of all steps, those for the certificates among them; the kubelet expands nothing."""
        ca = dict.fromkeys(_CA_VARIABLES, f"{_CA_PATH}/{self.ca_key}") if self.ca_config_map else {}
        return {**ca, **{name: value.replace("$", "$$") for name, value in self.env.items()}}

    def image(self, role: str) -> str:
        """The image of a role in `src/finemill/runtime/images.py`."""
        return {"cpu": self.image_cpu, "train": self.image_train}[role]

    def host_memory_gib(self, resources: Resources) -> float:
        """GiB that a GPU task's process may have beside its shared memory. Raises: UserError: there is nothing left."""
        memory = self.size(resources).memory
        left = gibibytes(memory) - gibibytes(self.shared_memory)
        if left <= 0:
            raise UserError(
                f"cluster settings: shared_memory of {self.shared_memory} counts into the {memory} of GPU steps "
                "(sizes.gpu.memory): give less of the one, or more of the other"
            )
        return left

    def size(self, resources: Resources) -> ContainerSize:
        """Requests and limits of a task."""
        return self.sizes.get(resources.size, ContainerSize(cpu=resources.cpu, memory=resources.memory))


def read_cluster_config(path: Path | None, **overrides: Any) -> ClusterConfig:
    """The settings in a YAML file; `overrides` that are not None win. Raises: UserError: a key or value is wrong."""
    from finemill.config import parse_config
    from finemill.config_file import read_mapping

    values = read_mapping(path, "cluster settings") if path else {}
    given = {key: value for key, value in overrides.items() if value is not None}
    return parse_config(ClusterConfig, {**values, **given}, str(path or "cluster settings"))
