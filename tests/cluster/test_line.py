"""The proof on a real cluster, in the order in which a platform engineer would meet it. About half an hour."""

import json
import re
import subprocess
import threading
import time
from typing import Any

import pytest

from tests.cluster.conftest import SMALL_ALIGN, Cluster, wait_until

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]


@pytest.fixture
def registry(cluster: Cluster) -> Any:
    """MLflow's client."""
    from mlflow import MlflowClient

    return MlflowClient(cluster.tracking_uri)


def nodes(cluster: Cluster, run: str) -> dict[str, dict[str, Any]]:
    """A workflow's nodes by name."""
    return {node["name"]: node for node in cluster.get("workflow", run)["status"]["nodes"].values()}


def outputs(cluster: Cluster, run: str, step: str) -> dict[str, str]:
    """A step's output parameters."""
    return {item["name"]: item["value"] for item in nodes(cluster, run)[f"{run}.{step}"]["outputs"]["parameters"]}


def last_run(cluster: Cluster, pipeline: str) -> str:
    """The newest workflow of a pipeline."""
    listed = cluster.get("workflows", "-l", f"app.kubernetes.io/component={pipeline}")["items"]
    newest = max(listed, key=lambda item: item["metadata"]["creationTimestamp"])
    name: str = newest["metadata"]["name"]
    return name


def logs(cluster: Cluster, run: str, step: str) -> str:
    """The step's containers' output."""
    selector = f"workflows.argoproj.io/workflow={run},app.kubernetes.io/component={step}"
    return cluster.kubectl("logs", "-l", selector, "-c", "main", "--tail=-1", "--prefix")


def test_wrong_credentials_end_in_seconds_with_one_line(cluster: Cluster) -> None:
    cluster.secret(**{**cluster.keys, "AWS_SECRET_ACCESS_KEY": "wrong"})
    try:
        started = time.monotonic()
        result = cluster.submit("finetune", *cluster.config)
        assert time.monotonic() - started < 120
    finally:
        cluster.secret(**cluster.keys)
    assert result.returncode == 2, result.stderr
    assert "failed in preflight: store " in result.stdout
    assert "AWS_SECRET_ACCESS_KEY" in result.stdout
    phases = {node["displayName"]: node["phase"] for node in nodes(cluster, last_run(cluster, "finetune")).values()}
    assert phases["train-qlora"] == "Omitted"
    # Exit code 2 is not tried again.
    assert "preflight(1)" not in phases


def test_a_missing_secret_is_said(cluster: Cluster) -> None:
    cluster.kubectl("delete", "secret", "finemill-s3")
    try:
        result = cluster.submit("finetune", *cluster.config)
    finally:
        cluster.secret(**cluster.keys)
    assert result.returncode == 2, result.stderr
    assert "preflight cannot start: a secret or config map is missing" in result.stderr
    assert "finemill-s3" in result.stderr
    cluster.kubectl("delete", "workflow", last_run(cluster, "finetune"))


def test_a_user_without_rights_is_told_which_role_to_bind(cluster: Cluster, tmp_path: Any) -> None:
    cluster.kubectl("create", "serviceaccount", "stranger")
    token = cluster.kubectl("create", "token", "stranger").strip()
    config = json.loads(cluster.run("kubectl", "config", "view", "--raw", "--minify", "-o", "json").stdout)
    config["users"][0]["user"] = {"token": token}
    (tmp_path / "config").write_text(json.dumps(config))
    stranger = Cluster(
        {**cluster.environment, "KUBECONFIG": str(tmp_path / "config")},
        cluster.store,
        cluster.tracking_uri,
        cluster.registry,
        cluster.namespace,
    )
    refused = stranger.submit("finetune", *cluster.config)
    assert refused.returncode == 2
    assert "forbidden" in refused.stderr
    assert "bind the Role `<release>-submit`" in refused.stderr
    cluster.kubectl(
        "create", "rolebinding", "stranger", "--role=mill-submit", f"--serviceaccount={cluster.namespace}:stranger"
    )
    accepted = stranger.finemill(
        "submit", "finetune", "--engine", "argo", "--namespace", cluster.namespace, *cluster.config
    )
    assert accepted.returncode == 0, accepted.stderr
    cluster.kubectl("delete", "workflow", accepted.stdout.strip())


def test_the_whole_line_ends_in_a_promoted_version(
    line: subprocess.CompletedProcess[str], cluster: Cluster, registry: Any
) -> None:
    assert line.returncode == 0, line.stdout + line.stderr
    assert line.stdout.splitlines()[-1].endswith("done, promoted")
    version = registry.get_model_version_by_alias(cluster.model, "champion")
    assert version.source.startswith(cluster.store)


def test_every_pod_ran_on_the_built_images_as_restricted(
    line: subprocess.CompletedProcess[str], cluster: Cluster
) -> None:
    run = line.stdout.split()[0]
    pods = cluster.get("pods", "-l", f"workflows.argoproj.io/workflow={run}")["items"]
    assert pods
    for pod in pods:
        (main,) = [item for item in pod["spec"]["containers"] if item["name"] == "main"]
        assert re.match(rf"{cluster.registry}/finemill-(cpu|train)[:@]", main["image"])
        assert main["securityContext"]["readOnlyRootFilesystem"] is True
        assert pod["spec"]["securityContext"]["runAsNonRoot"] is True
        assert not any("hostPath" in volume for volume in pod["spec"]["volumes"])


def test_the_same_again_is_reused(line: subprocess.CompletedProcess[str], cluster: Cluster) -> None:
    again = cluster.submit("finetune", *cluster.config)
    assert again.returncode == 0, again.stderr
    first, second = line.stdout.split()[0], again.stdout.split()[0]
    for step, port in (("data-prep", "rows"), ("train-qlora", "adapter"), ("gguf-quantize", "gguf")):
        assert outputs(cluster, first, step)[port] == outputs(cluster, second, step)[port]
    started = nodes(cluster, second)[f"{second}.train-qlora"]
    assert "reused" in logs(cluster, second, "train-qlora") or started["phase"] == "Succeeded"


def test_a_killed_training_pod_goes_on_from_its_checkpoint(
    line: subprocess.CompletedProcess[str], cluster: Cluster
) -> None:
    place = ["--engine", "argo", "--namespace", cluster.namespace]
    run = cluster.finemill("submit", "finetune", *place, *cluster.config, "--train-qlora.seed", "7").stdout.strip()
    selector = f"workflows.argoproj.io/workflow={run},app.kubernetes.io/component=train-qlora"

    def training_step() -> str:
        found = cluster.kubectl("logs", "-l", selector, "-c", "main", "--tail=-1", check=False)
        reached = re.findall(r"step (\d+)/12", found)
        return reached[-1] if reached and int(reached[-1]) >= 3 else ""

    wait_until(training_step, 1200, "three steps of training")
    cluster.kubectl("delete", "pod", "-l", selector)
    result = cluster.finemill("watch", run, *place)
    assert result.returncode == 0, result.stdout + result.stderr
    attempts = [name for name in nodes(cluster, run) if re.fullmatch(rf"{run}\.train-qlora\(\d\)", name)]
    assert len(attempts) == 2
    assert re.search(r"resum|continu|checkpoint", logs(cluster, run, "train-qlora"))


def test_of_two_promotions_at_once_one_wins(
    line: subprocess.CompletedProcess[str], cluster: Cluster, registry: Any
) -> None:
    other = cluster.submit("finetune", *cluster.config, "--train-qlora.seed", "7")
    assert other.returncode == 0, other.stdout + other.stderr
    runs = [line.stdout.split()[0], other.stdout.split()[0]]
    registry.delete_registered_model_alias(cluster.model, "champion")
    results: list[dict[str, Any]] = []

    def promote(run: str) -> None:
        values = {
            "version": outputs(cluster, run, "register")["version"],
            "evaluation": outputs(cluster, run, "eval")["evaluation"],
            "promote": json.dumps({"gates": [{"metric": "loss", "direction": "lower", "min_delta": 0.0}]}),
            "store": f"{cluster.store}/two-promotions",
        }
        workflow = {
            "apiVersion": "argoproj.io/v1alpha1",
            "kind": "Workflow",
            "metadata": {"generateName": "promote-"},
            "spec": {
                "workflowTemplateRef": {"name": "finetune"},
                "entrypoint": "promote",
                "arguments": {"parameters": [{"name": key, "value": value} for key, value in values.items()]},
            },
        }
        name = cluster.kubectl("create", "-f", "-", "-o", "name", input=json.dumps(workflow)).strip()
        wait_until(lambda: cluster.get(name).get("status", {}).get("finishedAt"), 600, f"the end of {name}")
        results.append(cluster.get(name)["status"])

    threads = [threading.Thread(target=promote, args=(run,)) for run in runs]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [item["phase"] for item in results] == ["Succeeded"] * 2
    passed = [
        parameter["value"]
        for item in results
        for node in item["nodes"].values()
        for parameter in node.get("outputs", {}).get("parameters", [])
        if parameter["name"] == "promotion_passed" and node["type"] == "Pod"
    ]
    champion = registry.get_model_version_by_alias(cluster.model, "champion")
    assert "true" in passed
    # The second was compared with the first: it lost, or it beat it and the first is the previous champion.
    if passed.count("true") == 2:
        assert registry.get_model_version_by_alias(cluster.model, "previous_champion").version != champion.version


def test_the_schedule_fires_and_without_new_data_ends_as_unchanged(
    line: subprocess.CompletedProcess[str], cluster: Cluster
) -> None:
    place = ["--engine", "argo", "--namespace", cluster.namespace]
    cluster.helm("schedule.enabled=true", "schedule.cron=* * * * *", "schedule.suspend=true")
    uid = cluster.get("cronworkflow", "retrain")["metadata"]["uid"]
    scheduled = cluster.finemill(
        "submit", "retrain", *place, *cluster.config, "--schedule", "* * * * *", "--timezone", "UTC"
    )
    assert scheduled.returncode == 0, scheduled.stderr
    label = "workflows.argoproj.io/cron-workflow=retrain"

    def finished() -> list[dict[str, Any]]:
        items = cluster.get("workflows", "-l", label)["items"]
        return sorted(
            (item for item in items if item.get("status", {}).get("finishedAt")),
            key=lambda item: item["metadata"]["creationTimestamp"],
        )

    wait_until(lambda: len(finished()) >= 2, 1500, "two firings")
    cluster.kubectl("patch", "cronworkflow", "retrain", "--type=merge", "-p", '{"spec": {"suspend": true}}')
    run = finished()[1]["metadata"]["name"]
    watched = cluster.finemill("watch", run, *place)
    assert watched.returncode == 0, watched.stderr
    assert "unchanged" in watched.stdout
    assert nodes(cluster, run)[f"{run}.train-qlora"]["type"] == "Skipped"
    cluster.helm("schedule.enabled=true", "schedule.cron=0 3 * * *", "images.cpu.tag=0.1.0")
    upgraded = cluster.get("cronworkflow", "retrain")
    assert upgraded["metadata"]["uid"] == uid
    assert upgraded["status"]["lastScheduledTime"]


def test_new_data_is_trained_on_and_compared_with_the_champion_on_the_same_rows(
    line: subprocess.CompletedProcess[str], cluster: Cluster, registry: Any
) -> None:
    before = registry.get_model_version_by_alias(cluster.model, "champion")
    sources = (
        '[{uri: "example:reasoning", weight: 75, max_rows: 300}, {uri: "example:chat", weight: 25, max_rows: 100}]'
    )
    result = cluster.submit("retrain", *cluster.config, "--data-prep.sources", sources)
    assert result.returncode == 0, result.stdout + result.stderr
    run = result.stdout.split()[0]
    assert "was scored on other rows: scoring it" in logs(cluster, run, "score-champion")
    champion = registry.get_model_version(cluster.model, before.version)
    (scores,) = [value for key, value in champion.tags.items() if key.startswith("finemill.evaluation.")]
    assert scores.startswith(cluster.store)
    passed = outputs(cluster, run, "promote")["promotion_passed"] == "true"
    newest = registry.get_model_version_by_alias(cluster.model, "champion" if passed else "challenger")
    assert int(newest.version) > int(before.version)
    assert newest.tags["finemill.decision"]


def test_preferences_are_aligned(cluster: Cluster, registry: Any) -> None:
    name = f"{cluster.model}-aligned"
    config = ["--config", str(SMALL_ALIGN), "--register.registered-model-name", name]
    result = cluster.submit("align", *config)
    assert result.returncode == 0, result.stdout + result.stderr
    assert outputs(cluster, result.stdout.split()[0], "promote")["promotion_passed"] in ("true", "false")
    assert registry.get_model_version(name, "1").tags["finemill.decision"]


def test_a_trainjob_of_two_nodes_publishes_one_adapter(
    line: subprocess.CompletedProcess[str], cluster: Cluster, trainer: None
) -> None:
    sizes = ["gpu.count=0", "resources.gpu.cpu=700m", "resources.gpu.memory=3Gi"]
    cluster.helm("trainingRuntime.enabled=true", *sizes)
    dataset = outputs(cluster, line.stdout.split()[0], "chat-format")["dataset"]
    store = f"{cluster.store}/trainjob"
    flags = [
        "--max-steps=4",
        "--logging-steps=1",
        "--gradient-accumulation-steps=1",
        "--max-length=256",
        "--save-steps=2",
    ]
    arguments = ["-m", "finemill", "train-qlora", f"--store={store}", f"--dataset={dataset}", *flags]
    job = {
        "apiVersion": "trainer.kubeflow.org/v1alpha1",
        "kind": "TrainJob",
        "metadata": {"name": "two-nodes"},
        "spec": {
            "runtimeRef": {
                "apiGroup": "trainer.kubeflow.org",
                "kind": "TrainingRuntime",
                "name": cluster.kubectl("get", "trainingruntime", "-o", "jsonpath={.items[0].metadata.name}"),
            },
            "trainer": {"numNodes": 2, "args": [*arguments, "--base-model=builtin:tiny-qwen3"]},
        },
    }
    cluster.kubectl("create", "-f", "-", input=json.dumps(job))

    def ended() -> str:
        conditions = cluster.get("trainjob", "two-nodes").get("status", {}).get("conditions", [])
        return next((item["type"] for item in conditions if item["status"] == "True" and item["type"] != "Created"), "")

    assert wait_until(ended, 900, "the end of the TrainJob") == "Complete"
    said = cluster.kubectl("logs", "-l", "jobset.sigs.k8s.io/jobset-name=two-nodes", "--tail=-1")
    assert len(set(re.findall(rf"{store}/train-qlora/\S+@sha256:[0-9a-f]{{64}}", said))) == 1
    assert "step 4/4" in said
