"""Every component's container, started as KFP's launcher starts it, without KFP.

The pod is what the driver of KFP 2.17 makes of the compiled pipeline: image, resources and variables from there, its
mounts, Pod Security `restricted`, and a command around the component's own that makes the folders of the outputs,
reads them afterwards, and turns every exit code into 1.
"""

import base64
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

import finemill
from finemill.cli import main
from finemill.pipelines.catalog import PIPELINES
from tests.cluster.conftest import SMALL, Cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(2700)]
# What KFP mounts. Nothing else can be written besides the image's own /tmp.
MOUNTS = ["kfp-launcher", "gcs", "s3", "minio", ".local", ".cache", ".config"]
SETTINGS = Path(finemill.__file__).parent / "pipelines" / "configs" / "cluster-dev.yaml"
PARAMETERS = "/tmp/kfp/outputs"
LAUNCHER = """
umask 0
artifacts=$1; shift
mkdir -p /tmp/kfp/outputs "$artifacts"
"$@"
code=$?
if [ $code -ne 0 ]; then echo "Component failed to execute successfully: exit status $code"; exit 1; fi
for file in /tmp/kfp/outputs/* "$artifacts"/output_metadata.json; do
    [ -f "$file" ] && printf '\\nOUTPUT %s %s\\n' "$(basename "$file")" "$(base64 -w0 < "$file")"
done
for file in "$artifacts"/*; do printf 'ARTIFACT %s %s\\n' "$(basename "$file")" "$(wc -c < "$file")"; done
"""


@dataclass(frozen=True)
class Executor:
    """What the compiled pipeline says of a step: its container, its Kubernetes settings, its interface."""

    container: dict[str, Any]
    kubernetes: dict[str, Any]
    component: dict[str, Any]


@pytest.fixture(scope="module")
def executors(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> dict[str, Executor]:
    """The compiled steps, and the ConfigMap that their pods read."""
    addresses = {"AWS_ENDPOINT_URL": cluster.environment["AWS_ENDPOINT_URL"], "AWS_DEFAULT_REGION": "us-east-1"}
    literals = [f"--from-literal={key}={value}" for key, value in addresses.items()]
    literals.append(f"--from-literal=MLFLOW_TRACKING_URI={cluster.tracking_uri}")
    cluster.kubectl("create", "configmap", "finemill", *literals)
    file = tmp_path_factory.mktemp("ir") / "retrain.yaml"
    images = [f"--image-{role}={cluster.registry}/finemill-{role}:{finemill.__version__}" for role in ("cpu", "train")]
    assert main(["compile", "retrain", "--engine", "kfp", "-o", str(file), "--cluster", str(SETTINGS), *images]) == 0
    return read_executors(file)


def read_executors(file: Path) -> dict[str, Executor]:
    pipeline, platform = yaml.safe_load_all(file.read_text())
    settings = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"]
    return {
        label.removeprefix("exec-"): Executor(
            item["container"], settings[label], pipeline["components"][f"comp-{label.removeprefix('exec-')}"]
        )
        for label, item in pipeline["deploymentSpec"]["executors"].items()
    }


def artifacts_folder(step: str) -> str:
    return f"/minio/mlpipeline/v2/artifacts/retrain/run/{step}/salt"


def executor_input(step: str, component: dict[str, Any], values: dict[str, Any]) -> str:
    """What the launcher puts in place of `{{$}}`."""
    types = {name: item["artifactType"] for name, item in component["outputDefinitions"]["artifacts"].items()}
    types["executor-logs"] = {"schemaTitle": "system.Artifact"}
    place = artifacts_folder(step)
    artifacts = {
        name: {"artifacts": [{"name": name, "type": kind, "uri": f"minio:/{place.removeprefix('/minio')}/{name}"}]}
        for name, kind in types.items()
    }
    parameters = component["outputDefinitions"]["parameters"]
    outputs = {
        "parameters": {name: {"outputFile": f"{PARAMETERS}/{name}"} for name in parameters},
        "artifacts": artifacts,
        "outputFile": f"{place}/output_metadata.json",
    }
    return json.dumps({"inputs": {"parameterValues": values}, "outputs": outputs})


def variables(executor: Executor, attempt: int) -> list[dict[str, Any]]:
    """The container's environment: nothing but what KFP sets and what the compiled pipeline asks for."""
    found: list[dict[str, Any]] = [{"name": "KFP_RETRY_INDEX", "value": str(attempt)}, *executor.container["env"]]
    for kind, reference in (("configMap", "configMapKeyRef"), ("secret", "secretKeyRef")):
        for source in executor.kubernetes[f"{kind}AsEnv"]:
            for item in source["keyToEnv"]:
                key = {"name": source[f"{kind}Name"], "key": item[f"{kind}Key"], "optional": source["optional"]}
                found.append({"name": item["envVar"], "valueFrom": {reference: key}})
    return found


def container_of(step: str, executor: Executor, values: dict[str, Any], attempt: int) -> dict[str, Any]:
    """The container `main` as KFP makes it, with an arbitrary uid and gid 0."""
    resources = executor.container["resources"]
    size = {"cpu": resources["resourceCpuLimit"], "memory": resources["resourceMemoryLimit"]}
    text = executor_input(step, executor.component, values)
    component = [item.replace("{{$}}", text) for item in executor.container["command"] + executor.container["args"]]
    shared = executor.kubernetes.get("emptyDirMounts", [])
    return {
        "name": "main",
        "image": executor.container["image"],
        "imagePullPolicy": executor.kubernetes["imagePullPolicy"],
        # KFP's launcher is a program of its own; the image's entry point is not used.
        "command": ["sh", "-c", LAUNCHER, "launcher", artifacts_folder(step)],
        "args": component,
        "env": variables(executor, attempt),
        "resources": {"requests": size, "limits": size},
        "volumeMounts": [
            *({"name": f"v{index}", "mountPath": f"/{mount}"} for index, mount in enumerate(MOUNTS)),
            *({"name": item["volumeName"], "mountPath": item["mountPath"]} for item in shared),
        ],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 123456,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }


def launch(
    cluster: Cluster, step: str, executor: Executor, values: dict[str, Any], attempt: int = 0
) -> tuple[int, str, dict[str, str]]:
    """Returns: exit code of the pod, its log, and its outputs by name."""
    name = f"{step}.{values['run_id']}.{attempt}"
    memory = [
        {"name": item["volumeName"], "emptyDir": {"medium": item["medium"], "sizeLimit": item["sizeLimit"]}}
        for item in executor.kubernetes.get("emptyDirMounts", [])
    ]
    pod = {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [container_of(step, executor, values, attempt)],
            "volumes": [*({"name": f"v{index}", "emptyDir": {}} for index in range(len(MOUNTS))), *memory],
        },
    }
    cluster.kubectl("create", "-f", "-", input=json.dumps(pod))
    ended = ("Succeeded", "Failed")
    wait_until(lambda: cluster.get("pod", name)["status"].get("phase") in ended, 900, f"the end of {name}")
    (status,) = cluster.get("pod", name)["status"]["containerStatuses"]
    log = cluster.kubectl("logs", name)
    return status["state"]["terminated"]["exitCode"], log, read_outputs(executor, log)


def read_outputs(executor: Executor, log: str) -> dict[str, str]:
    """The output parameters as the launcher collects them. Every artifact must have been written, none be empty."""
    lines = [line.split(" ") for line in log.splitlines()]
    files = {line[1]: base64.b64decode(line[2]).decode() for line in lines if line[0] == "OUTPUT"}
    if not files:
        return {}
    metadata = json.loads(files.pop("output_metadata.json"))
    sizes = {line[1]: int(line[2]) for line in lines if line[0] == "ARTIFACT"}
    for name in executor.component["outputDefinitions"]["artifacts"]:
        assert sizes[name] > 0, name
    for value in metadata["artifacts"]["metrics"]["artifacts"][0]["metadata"].values():
        assert isinstance(value, int | float)
    return files | {name: json.dumps(value) for name, value in metadata.get("parameterValues", {}).items()}


def test_every_component_runs_as_the_launcher_starts_it(cluster: Cluster, executors: dict[str, Executor]) -> None:
    config = yaml.safe_load(SMALL.read_text()) | {"register": {"registered_model_name": cluster.model}}
    references: dict[str, str] = {"base_model": "builtin:tiny-qwen3"}
    assert set(executors) == {task.name for task in PIPELINES["retrain"].tasks}
    for task in PIPELINES["retrain"].tasks:
        inputs = {port: references[port] for port in task.inputs}
        values = {"store": cluster.store, "run_id": "line", "config": config.get(task.config.name, {}), **inputs}
        if task.name == "preflight":
            values |= {"base_model": "builtin:tiny-qwen3", "train_qlora": {}, "register": {}}
        if task.resources.gpu:
            # The compiler hands the accelerators' count to the component too, which has no such parameter.
            values |= {"accelerator_count": "0", "pipelinechannel--gpus": "0"}
        code, log, outputs = launch(cluster, task.name, executors[task.name], values)
        assert code == 0, f"{task.name}: {log}"
        references[task.step.output] = outputs[task.step.output]
        assert references[task.step.output].startswith(f"{cluster.store}/{task.name}/")
        assert outputs.get("Output") == ("true" if task.step.verdict else None)


def test_a_hopeless_step_says_so_to_its_next_attempt(cluster: Cluster, executors: dict[str, Executor]) -> None:
    config = {"sources": [{"uri": "s3://no-such-bucket/rows"}]}
    values = {"store": cluster.store, "run_id": "hopeless", "config": config}
    code, first, _ = launch(cluster, "data-prep", executors["data-prep"], values)
    assert code == 1, first
    assert "exit status 2" in first
    assert "(not tried again)" not in first
    code, second, _ = launch(cluster, "data-prep", executors["data-prep"], values, attempt=1)
    assert code == 1
    assert "(not tried again)" in second


def test_a_step_without_the_store_s_secret_says_what_is_missing(
    cluster: Cluster, executors: dict[str, Executor]
) -> None:
    """Every key is optional, so that the pod starts and the step can tell."""
    cluster.kubectl("delete", "secret", "finemill-s3")
    try:
        values = {"store": cluster.store, "run_id": "nosecret", "config": {"sources": [{"uri": "example:chat"}]}}
        code, log, _ = launch(cluster, "data-prep", executors["data-prep"], values)
    finally:
        cluster.secret(**cluster.keys)
    assert code == 1
    assert "AWS_ACCESS_KEY_ID" in log
