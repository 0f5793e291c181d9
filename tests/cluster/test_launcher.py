"""Every component's container, started as KFP's launcher starts it: see the environment in `launched_pod`."""

import json
from typing import Any

import pytest
import yaml

from finemill.cli import main
from finemill.components.steps import STEPS
from finemill.pipelines.catalog import PIPELINES
from tests.cluster.conftest import SMALL, Cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(1800)]
# What the launcher mounts, and nothing else can be written besides the image's own /tmp.
MOUNTS = ["kfp-launcher", "gcs", "s3", "minio", ".local", ".cache", ".config"]


@pytest.fixture(scope="module")
def executors(tmp_path_factory: pytest.TempPathFactory, cluster: Cluster) -> dict[str, dict[str, Any]]:
    """The compiled containers by step."""
    file = tmp_path_factory.mktemp("ir") / "retrain.yaml"
    images = [
        "--image-cpu",
        f"{cluster.registry}/finemill-cpu:0.1.0",
        "--image-train",
        f"{cluster.registry}/finemill-train:0.1.0",
    ]
    assert main(["compile", "retrain", "--engine", "kfp", "-o", str(file), *images]) == 0
    pipeline = next(iter(yaml.safe_load_all(file.read_text())))
    return {
        name.removeprefix("exec-"): {
            **item["container"],
            "component": pipeline["components"][f"comp-{name.removeprefix('exec-')}"],
        }
        for name, item in pipeline["deploymentSpec"]["executors"].items()
    }


def executor_input(step: str, component: dict[str, Any], values: dict[str, Any]) -> str:
    """What the launcher puts in place of `{{$}}`."""
    outputs = component["outputDefinitions"]
    artifacts = {
        name: {
            "artifacts": [
                {
                    "name": name,
                    "type": item["artifactType"],
                    "uri": f"minio://mlpipeline/v2/artifacts/retrain/run/{step}/{name}",
                    "metadata": {},
                }
            ]
        }
        for name, item in outputs.get("artifacts", {}).items()
    }
    parameters = {name: {"outputFile": f"/tmp/kfp/outputs/{name}"} for name in outputs.get("parameters", {})}
    return json.dumps(
        {
            "inputs": {"parameterValues": values},
            "outputs": {"parameters": parameters, "artifacts": artifacts, "outputFile": "/tmp/kfp_outputs/output.json"},
        }
    )


def launched_pod(
    name: str, executor: dict[str, Any], text: str, cluster: Cluster, attempt: str = "0"
) -> dict[str, Any]:
    """The launcher's command, an arbitrary uid with gid 0, HOME=/, and its mounts."""
    environment = {"HOME": "/", "KFP_RETRY_INDEX": attempt, "MLFLOW_TRACKING_URI": cluster.tracking_uri}
    environment |= {"AWS_ENDPOINT_URL": cluster.environment["AWS_ENDPOINT_URL"], "AWS_DEFAULT_REGION": "us-east-1"}
    container = {
        "name": "main",
        "image": executor["image"],
        "imagePullPolicy": "IfNotPresent",
        "command": executor["command"],
        "args": [item.replace("{{$}}", text) for item in executor["args"]],
        "workingDir": "/",
        "env": [{"name": key, "value": value} for key, value in environment.items()],
        "envFrom": [{"secretRef": {"name": "finemill-s3"}}],
        "volumeMounts": [{"name": f"v{index}", "mountPath": f"/{mount}"} for index, mount in enumerate(MOUNTS)],
        "securityContext": {
            "allowPrivilegeEscalation": False,
            "capabilities": {"drop": ["ALL"]},
            "runAsNonRoot": True,
            "runAsUser": 123456,
            "runAsGroup": 0,
            "seccompProfile": {"type": "RuntimeDefault"},
        },
    }
    return {
        "apiVersion": "v1",
        "kind": "Pod",
        "metadata": {"name": name},
        "spec": {
            "restartPolicy": "Never",
            "automountServiceAccountToken": False,
            "containers": [container],
            "volumes": [{"name": f"v{index}", "emptyDir": {}} for index in range(len(MOUNTS))],
        },
    }


def launch(
    cluster: Cluster, name: str, executor: dict[str, Any], values: dict[str, Any], attempt: str = "0"
) -> tuple[int, str]:
    """Returns: exit code and log of the container."""
    step = name.split(".")[0]
    text = executor_input(step, executor["component"], values)
    pod = launched_pod(name, executor, text, cluster, attempt)
    cluster.kubectl("create", "-f", "-", input=json.dumps(pod))
    ended = ("Succeeded", "Failed")
    wait_until(lambda: cluster.get("pod", name)["status"].get("phase") in ended, 900, f"the end of {name}")
    (status,) = cluster.get("pod", name)["status"]["containerStatuses"]
    return status["state"]["terminated"]["exitCode"], cluster.kubectl("logs", name)


def test_every_component_runs_as_the_launcher_starts_it(cluster: Cluster, executors: dict[str, dict[str, Any]]) -> None:
    config = yaml.safe_load(SMALL.read_text()) | {"register": {"registered_model_name": cluster.model}}
    references: dict[str, str] = {"base_model": "builtin:tiny-qwen3"}
    assert set(executors) == {task.name for task in PIPELINES["retrain"].tasks}
    for task in PIPELINES["retrain"].tasks:
        inputs = {port: references[port] for port in task.inputs}
        values = {"store": cluster.store, "run_id": "launcher", "config": config.get(task.config.name, {}), **inputs}
        if task.name == "preflight":
            values |= {"base_model": "builtin:tiny-qwen3", "train_qlora": {}, "register": {}}
        code, log = launch(cluster, task.name, executors[task.name], values)
        assert code == 0, f"{task.name}: {log}"
        found = [word for word in log.split() if word.startswith("s3://") and "@sha256:" in word]
        references[STEPS[task.name].output] = found[-1]


def test_a_hopeless_step_says_so_to_its_next_attempt(cluster: Cluster, executors: dict[str, dict[str, Any]]) -> None:
    values = {
        "store": cluster.store,
        "run_id": "hopeless",
        "config": {"sources": [{"uri": "s3://no-such-bucket/rows"}]},
    }
    code, first = launch(cluster, "data-prep.first", executors["data-prep"], values)
    assert code == 2, first
    code, second = launch(cluster, "data-prep.second", executors["data-prep"], values, attempt="1")
    assert code == 2
    assert "(not tried again)" in second
