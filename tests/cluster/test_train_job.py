"""A training step of two nodes, by Kubeflow Trainer: one is lost, the step is told to stop, a node says no."""

import json
import re
import subprocess
from pathlib import Path

import pytest

from finemill.artifacts.manifest import Reference
from finemill.storage.store import fetch_files
from tests.cluster.conftest import Cluster, wait_until
from tests.cluster.test_line import logs, nodes, outputs

pytestmark = [pytest.mark.cluster, pytest.mark.slow, pytest.mark.timeout(3600)]
TWO_NODES = ["--train-qlora.num-nodes", "2", "--train-qlora.gradient-accumulation-steps", "1"]
"""With the sum over as many rows as one process takes in two micro-batches."""
OF_NODES = "jobset.sigs.k8s.io/jobset-name"


@pytest.fixture
def two_nodes(cluster: Cluster, trainer: None) -> list[str]:
    """Where to submit, in a release whose steps make TrainJobs of nodes that fit on two cores."""
    sizes = ("resources.small.cpu=200m", "resources.gpu.cpu=500m", "resources.gpu.memory=3Gi")
    cluster.helm("trainingRuntime.enabled=true", *sizes, "gpu.count=0")
    return ["--engine", "argo", "--namespace", cluster.namespace]


@pytest.fixture
def store(cluster: Cluster, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The environment in which this process reads the cluster's store."""
    for name, value in {**cluster.environment, **cluster.keys, "FINEMILL_CACHE": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)


def losses(cluster: Cluster, run: str) -> dict[int, float]:
    """The loss of each step that the run's adapter has a line of."""
    reference = Reference.parse(outputs(cluster, run, "train-qlora")["adapter"])
    record = json.loads((fetch_files(reference, ["training.json"]) / "training.json").read_text())
    return {item["step"]: item["loss"] for item in record["log_history"] if "loss" in item}


def log_of_main_node(cluster: Cluster) -> str:
    selector = f"{OF_NODES},batch.kubernetes.io/job-completion-index=0"
    return cluster.kubectl("logs", "-l", selector, "-c", "node", "--tail=-1", check=False)


def nothing_left(cluster: Cluster) -> bool:
    kinds = "trainjobs,jobsets,jobs"
    return not cluster.get(kinds)["items"] and not cluster.get("pods", "-l", OF_NODES)["items"]


def test_a_training_that_loses_one_of_two_nodes_ends_as_in_one_process(
    line: subprocess.CompletedProcess[str], cluster: Cluster, two_nodes: list[str], store: None
) -> None:
    run = cluster.finemill("submit", "finetune", *two_nodes, *cluster.config, *TWO_NODES).stdout.strip()
    wait_until(lambda: "step 4/12" in log_of_main_node(cluster), 600, "four steps of training")
    lost = f"{OF_NODES},batch.kubernetes.io/job-completion-index=1"
    cluster.kubectl("delete", "pod", "-l", lost, "--force", "--grace-period=0")
    step = f"{run}.train-qlora"
    wait_until(lambda: nodes(cluster, run).get(step, {}).get("finishedAt"), 600, "the end of training")
    found = nodes(cluster, run)
    assert found[step]["phase"] == "Succeeded"
    assert found[f"{step}(0)"]["outputs"]["exitCode"] == "75"
    assert "a node was lost" in logs(cluster, run, "train-qlora")
    alone, together = losses(cluster, line.stdout.split()[0]), losses(cluster, run)
    assert together.keys() == alone.keys()
    # The first line after the loss is of the steps since the checkpoint, not of a whole interval.
    assert sum(together[step] == pytest.approx(alone[step], rel=1e-4) for step in alone) >= len(alone) - 1
    cluster.kubectl("patch", "workflow", run, "--type=merge", "-p", '{"spec": {"shutdown": "Terminate"}}')
    wait_until(lambda: nothing_left(cluster), 60, "nothing left of the TrainJobs")


def test_a_run_that_is_terminated_takes_its_train_job_along(cluster: Cluster, two_nodes: list[str]) -> None:
    flags = [*cluster.config, *TWO_NODES, "--train-qlora.seed", "11"]
    run = cluster.finemill("submit", "finetune", *two_nodes, *flags).stdout.strip()
    wait_until(lambda: "step 2/12" in log_of_main_node(cluster), 600, "two steps of training")
    cluster.kubectl("patch", "workflow", run, "--type=merge", "-p", '{"spec": {"shutdown": "Terminate"}}')
    wait_until(lambda: nothing_left(cluster), 90, "nothing left of the TrainJob")
    said = r"told to stop, TrainJob train-qlora-\w+ with it"
    wait_until(lambda: re.search(said, logs(cluster, run, "train-qlora")), 60, "the step's last line")


def test_what_a_node_refuses_is_not_tried_again(cluster: Cluster, two_nodes: list[str]) -> None:
    """Nodes without a GPU cannot divide a base; only they know that they have none."""
    result = cluster.submit(
        "finetune", *cluster.config, *TWO_NODES, "--train-qlora.strategy", "shard", "--train-qlora.seed", "13"
    )
    assert result.returncode == 2, result.stdout + result.stderr
    attempts = [name for name in nodes(cluster, result.stdout.split()[0]) if ".train-qlora(" in name]
    assert len(attempts) == 1
    assert nothing_left(cluster)
