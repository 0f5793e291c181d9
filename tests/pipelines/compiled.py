"""What a compiled pipeline says, in one form for both engines."""

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from finemill.pipelines.cluster import CACHE_VARIABLES
from finemill.runtime.catalog import STEPS

OWN_LABEL = re.compile(r"app\.kubernetes\.io/|finemill/|kueue\.x-k8s\.io/")


@dataclass(frozen=True)
class CompiledTask:
    inputs: dict[str, str]
    upstream: frozenset[str]
    condition: str | None
    image: str
    retries: int
    cpu: str
    memory: str
    gpus: str | None
    shared_memory: str | None
    secrets: frozenset[str]
    config_map: str
    pull_policy: str
    node_selector: tuple[tuple[str, str], ...]
    tolerations: tuple[str, ...]
    queue: str | None
    variables: dict[str, str]
    secret_variables: dict[str, str]
    node_affinity: dict[str, Any]
    mounts: dict[str, str]
    labels: dict[str, str]
    annotations: dict[str, str]


def read_argo(path: Path) -> tuple[dict[str, Any], dict[str, CompiledTask]]:
    """Default by parameter, and the tasks."""
    template = next(item for item in yaml.safe_load_all(path.read_text()) if item["kind"] == "WorkflowTemplate")
    spec = template["spec"]
    containers = {item["name"]: item for item in spec["templates"] if "container" in item}
    (dag,) = [item["dag"] for item in spec["templates"] if "dag" in item]
    volumes = {item["name"]: item for item in spec["volumes"]}
    parameters = {item["name"]: _argo_value(item.get("value")) for item in spec["arguments"]["parameters"]}
    affinity = spec.get("affinity", {}).get("nodeAffinity", {})
    return parameters, {
        item["name"]: _argo_task(item, containers[item["template"]], volumes, affinity) for item in dag["tasks"]
    }


def _argo_value(text: str | None) -> Any:
    return json.loads(text) if text is not None and text.startswith("{") else text


def _argo_task(
    task: dict[str, Any], template: dict[str, Any], volumes: dict[str, Any], affinity: dict[str, Any]
) -> CompiledTask:
    container = template["container"]
    patch = json.loads(template["podSpecPatch"])
    gpus = patch.get("containers", [{}])[0].get("resources", {}).get("limits", {}).get("nvidia.com/gpu")
    mounts = {item["name"]: item["mountPath"] for item in container["volumeMounts"]}
    environment = container["envFrom"]
    sources = {name: _argo_volume(volume) for name, volume in volumes.items()}
    given = task.get("arguments", {}).get("parameters", [])
    inputs = {item["name"]: _argo_source(item["value"]) for item in given}
    for argument in container["args"]:
        for name in re.findall(r"workflow\.parameters\.(\w+)", argument):
            inputs[f"parameter {name}"] = name
    when = re.fullmatch(r"{{tasks\.([\w-]+)\.outputs\.parameters\.(\w+)}} == true", task.get("when", ""))
    return CompiledTask(
        inputs=inputs,
        upstream=frozenset(task.get("dependencies", [])),
        condition=f"{when[1]}.{when[2]}" if when else None,
        image=container["image"],
        retries=int(template["retryStrategy"]["limit"]),
        cpu=container["resources"]["limits"]["cpu"],
        memory=container["resources"]["limits"]["memory"],
        gpus=re.sub(r"{{(=.* : )?workflow\.parameters\.(\w+)}}", r"\2", gpus) if gpus else None,
        shared_memory=volumes["shared-memory"]["emptyDir"]["sizeLimit"]
        if mounts.get("shared-memory") == "/dev/shm"
        else None,
        secrets=frozenset(item["secretRef"]["name"] for item in environment if "secretRef" in item),
        config_map=next(item["configMapRef"]["name"] for item in environment if "configMapRef" in item),
        pull_policy=container["imagePullPolicy"],
        node_selector=tuple(sorted(template.get("nodeSelector", {}).items())),
        tolerations=tuple(json.dumps(item, sort_keys=True) for item in template.get("tolerations", [])),
        queue=template["metadata"]["labels"].get("kueue.x-k8s.io/queue-name"),
        variables={
            item["name"]: item["value"]
            for item in container["env"]
            if "value" in item and item["name"] not in ("FINEMILL_IMAGE", *CACHE_VARIABLES)
        },
        secret_variables={
            item["name"]: " ".join(item["valueFrom"]["secretKeyRef"][key] for key in ("name", "key"))
            for item in container["env"]
            if "secretKeyRef" in item.get("valueFrom", {})
        },
        node_affinity=affinity,
        mounts={path: sources[name] for name, path in mounts.items() if name.startswith("mount-")},
        labels={key: value for key, value in template["metadata"]["labels"].items() if not OWN_LABEL.match(key)},
        annotations=template["metadata"].get("annotations", {}),
    )


def _argo_volume(volume: dict[str, Any]) -> str:
    kinds = {"configMap": "name", "secret": "secretName", "persistentVolumeClaim": "claimName"}
    return next((f"{kind} {volume[kind][key]}" for kind, key in kinds.items() if kind in volume), "")


def _argo_source(value: str) -> str:
    task = re.fullmatch(r"{{tasks\.([\w-]+)\.outputs\.parameters\.(\w+)}}", value)
    assert task, value
    return f"{task[1]}.{task[2]}"


def read_kfp(path: Path) -> tuple[dict[str, Any], dict[str, CompiledTask]]:
    """Default by parameter, and the tasks, those of conditions among them."""
    pipeline, platform = yaml.safe_load_all(path.read_text())
    definitions = pipeline["root"]["inputDefinitions"]["parameters"]
    parameters = {name: item.get("defaultValue") for name, item in definitions.items()}
    tasks: dict[str, CompiledTask] = {}
    for name, task in pipeline["root"]["dag"]["tasks"].items():
        component = pipeline["components"][task["componentRef"]["name"]]
        if "dag" not in component:
            tasks[name] = _kfp_task(task, pipeline, platform, {}, None)
            continue
        outer = {key: _kfp_source(value, {}) for key, value in task["inputs"]["parameters"].items()}
        trigger = task["triggerPolicy"]["condition"]
        found = re.fullmatch(r"inputs\.parameter_values\['(.+)'\] == true", " ".join(trigger.split()))
        assert found, trigger
        for inner_name, inner in component["dag"]["tasks"].items():
            tasks[inner_name] = _kfp_task(inner, pipeline, platform, outer, outer[found[1]])
    return parameters, tasks


def _kfp_task(
    task: dict[str, Any], pipeline: dict[str, Any], platform: dict[str, Any], outer: dict[str, str], gate: str | None
) -> CompiledTask:
    label = pipeline["components"][task["componentRef"]["name"]]["executorLabel"]
    container = pipeline["deploymentSpec"]["executors"][label]["container"]
    kubernetes = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][label]
    sources = {key: _kfp_source(value, outer) for key, value in task["inputs"]["parameters"].items()}
    data = {key: value for key, value in sources.items() if "." in value}
    internal = {"run_id", "accelerator_count", "pipelinechannel--gpus"}
    plain = {f"parameter {value}": value for key, value in sources.items() if "." not in value and key not in internal}
    gpus = container["resources"].get("accelerator", {}).get("resourceCount")
    if gpus:
        plain.pop("parameter gpus", None)
    upstream = {value.split(".")[0] for value in data.values()} | set(task.get("dependentTasks", []))
    return CompiledTask(
        inputs=data | plain,
        upstream=frozenset(upstream | ({gate.split(".")[0]} if gate else set())),
        condition=gate,
        image=container["image"],
        retries=task["retryPolicy"]["maxRetryCount"],
        cpu=container["resources"]["resourceCpuLimit"],
        memory=container["resources"]["resourceMemoryLimit"],
        gpus=re.sub(r"{{\$\.inputs\.parameters\['pipelinechannel--(\w+)'\]}}", r"\1", gpus) if gpus else None,
        shared_memory=next((item["sizeLimit"] for item in kubernetes.get("emptyDirMounts", [])), None),
        secrets=frozenset(item["secretName"] for item in kubernetes["secretAsEnv"] if item.get("optional")),
        config_map=kubernetes["configMapAsEnv"][0]["configMapName"],
        pull_policy=kubernetes["imagePullPolicy"],
        node_selector=tuple(sorted(kubernetes.get("nodeSelector", {}).get("labels", {}).items())),
        tolerations=tuple(
            json.dumps(_with_numbers(item), sort_keys=True) for item in kubernetes.get("tolerations", [])
        ),
        queue=kubernetes.get("podMetadata", {}).get("labels", {}).get("kueue.x-k8s.io/queue-name"),
        variables={
            item["name"]: item["value"]
            for item in container["env"]
            if item["name"] not in ("FINEMILL_IMAGE", "OMP_NUM_THREADS", *CACHE_VARIABLES)
        },
        secret_variables={
            key["envVar"]: f"{item['secretName']} {key['secretKey']}"
            for item in kubernetes["secretAsEnv"]
            if not item.get("optional")
            for key in item["keyToEnv"]
        },
        node_affinity=kubernetes["nodeAffinity"][0]["nodeAffinityJson"]["runtimeValue"]["constant"]
        if "nodeAffinity" in kubernetes
        else {},
        mounts={
            **{
                item["mountPath"]: f"configMap {item['configMapName']}"
                for item in kubernetes.get("configMapAsVolume", [])
            },
            **{item["mountPath"]: f"secret {item['secretName']}" for item in kubernetes.get("secretAsVolume", [])},
            **{
                item["mountPath"]: f"persistentVolumeClaim {item['constant']}"
                for item in kubernetes.get("pvcMount", [])
                if item["mountPath"] != "/cache"
            },
        },
        labels={
            key: value
            for key, value in kubernetes.get("podMetadata", {}).get("labels", {}).items()
            if not OWN_LABEL.match(key)
        },
        annotations=kubernetes.get("podMetadata", {}).get("annotations", {}),
    )


def _with_numbers(toleration: dict[str, Any]) -> dict[str, Any]:
    """Protobuf's JSON writes whole numbers of 64 bits as texts."""
    return {key: int(value) if key == "tolerationSeconds" else value for key, value in toleration.items()}


def _kfp_source(value: dict[str, Any], outer: dict[str, str]) -> str:
    if "taskOutputParameter" in value:
        producer = value["taskOutputParameter"]
        verdict = STEPS[producer["producerTask"]].verdict
        key = verdict if producer["outputParameterKey"] == "Output" else producer["outputParameterKey"]
        return f"{producer['producerTask']}.{key}"
    name: str = value.get("componentInputParameter", "constant")
    return outer.get(name, name)
