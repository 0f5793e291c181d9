"""A cluster with Argo Workflows, an S3 server, MLflow, the images, and the chart in a `restricted` namespace.

`make test-cluster` takes the cluster of $KUBECONFIG, or makes one on this machine where $FINEMILL_CLUSTER names the
program that can. With a cluster of your own, say where its pods find things: $FINEMILL_TEST_STORE (s3://bucket/prefix),
$AWS_ENDPOINT_URL, $MLFLOW_TRACKING_URI, and $FINEMILL_TEST_REGISTRY, which has the two images.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from finemill import __version__

ROOT = Path(__file__).parents[2]
SMALL = Path(__file__).parent / "small.yaml"
SMALL_ALIGN = Path(__file__).parent / "small-align.yaml"
NODE_ADDRESS = "10.250.0.1"


@dataclass
class Cluster:
    """How tests reach the cluster, and how its pods reach store and tracking server."""

    environment: dict[str, str]
    store: str
    tracking_uri: str
    registry: str
    namespace: str = "finemill-test"
    keys: dict[str, str] = field(default_factory=dict)
    model: str = field(default_factory=lambda: f"cluster-test-{time.time():.0f}")
    """A registered model that no earlier test has left a champion in."""

    @property
    def config(self) -> list[str]:
        """The flags of the small run."""
        return ["--config", str(SMALL), "--register.registered-model-name", self.model]

    def run(self, *command: str, check: bool = True, **options: Any) -> subprocess.CompletedProcess[str]:
        """Run a command with the cluster's environment."""
        result = subprocess.run(
            command, env={**os.environ, **self.environment}, capture_output=True, text=True, check=False, **options
        )
        assert result.returncode == 0 or not check, f"{' '.join(command)}\n{result.stdout}{result.stderr}"
        return result

    def kubectl(self, *arguments: str, **options: Any) -> str:
        """Standard output of kubectl in the namespace."""
        return self.run("kubectl", "--namespace", self.namespace, *arguments, **options).stdout

    def get(self, *arguments: str) -> dict[str, Any]:
        """An object as JSON."""
        loaded: dict[str, Any] = json.loads(self.kubectl("get", *arguments, "-o", "json"))
        return loaded

    def finemill(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """A finemill command against this cluster."""
        return self.run(sys.executable, "-m", "finemill", *arguments, check=False)

    def submit(self, pipeline: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Submit and wait."""
        place = ["--engine", "argo", "--namespace", self.namespace, "--wait"]
        return self.finemill("submit", pipeline, *place, *arguments)

    def helm(self, *settings: str) -> None:
        """Install or upgrade the chart with the development values and these."""
        values = {
            "store": self.store,
            "images.registry": self.registry,
            "mlflow.trackingUri": self.tracking_uri,
            "s3.endpointUrl": self.environment["AWS_ENDPOINT_URL"],
            "resources.gpu.cpu": "1500m",
        }
        options = [f"--set={key}={value}" for key, value in values.items()] + [f"--set={item}" for item in settings]
        chart = str(ROOT / "charts" / "finemill")
        values_file = str(ROOT / "charts" / "finemill" / "values-dev.yaml")
        self.run("helm", "upgrade", "--install", "mill", chart, "-n", self.namespace, "-f", values_file, *options)

    def secret(self, **values: str) -> None:
        """(Re)write the secret with the store's credentials."""
        self.kubectl("delete", "secret", "finemill-s3", "--ignore-not-found")
        literals = [f"--from-literal={key}={value}" for key, value in values.items()]
        self.kubectl("create", "secret", "generic", "finemill-s3", *literals)


def wait_until(what: Callable[[], Any], timeout_s: float, meaning: str) -> Any:
    """Poll until `what` gives something true."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        found = what()
        if found:
            return found
        time.sleep(1)
    raise AssertionError(f"not within {timeout_s:.0f} s: {meaning}")


@pytest.fixture(autouse=True)
def clean_environment() -> None:
    """The variables that other tests hide are what leads to the cluster."""


@pytest.fixture(scope="session")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """The chart installed; everything that was made is removed again."""
    program = os.environ.get("FINEMILL_CLUSTER")
    if program is None:
        pytest.skip("needs a Kubernetes cluster: `make test-cluster`")
    if os.environ.get("KUBECONFIG"):
        found = _given_cluster()
        yield from _with_chart(found)
    elif program and (Path.home() / ".cache" / "finemill-cluster" / "bin" / "kubelet").exists():
        yield from _own_cluster(program, tmp_path_factory.mktemp("mlflow"))
    else:
        pytest.skip("no cluster: set KUBECONFIG, or FINEMILL_CLUSTER to a program that starts one")


@pytest.fixture(scope="session")
def line(cluster: Cluster) -> subprocess.CompletedProcess[str]:
    """The whole line, submitted once."""
    return cluster.submit("finetune", *cluster.config)


@pytest.fixture(scope="session")
def trainer(cluster: Cluster) -> None:
    """Kubeflow Trainer in the cluster."""
    known = cluster.run("kubectl", "get", "crd", "trainjobs.trainer.kubeflow.org", check=False).returncode == 0
    if not known:
        if os.environ.get("KUBECONFIG"):
            pytest.skip("Kubeflow Trainer is not installed in this cluster")
        subprocess.run([os.environ["FINEMILL_CLUSTER"], "trainer"], check=True)


def _given_cluster() -> Cluster:
    names = ("FINEMILL_TEST_STORE", "AWS_ENDPOINT_URL", "MLFLOW_TRACKING_URI", "FINEMILL_TEST_REGISTRY")
    missing = [name for name in names if not os.environ.get(name)]
    if missing:
        pytest.skip(f"KUBECONFIG is set, {', '.join(missing)} are not")
    environment = {"AWS_ENDPOINT_URL": os.environ["AWS_ENDPOINT_URL"]}
    keys = {name: os.environ[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
    store, tracking, registry = (os.environ[name] for name in (names[0], names[2], names[3]))
    return Cluster(environment, store, tracking, registry, keys=keys)


def _own_cluster(program: str, folder: Path) -> Iterator[Cluster]:
    """Start one on this machine, import the images that buildah has, and run MLflow on the node's address."""
    for role in ("cpu", "train"):
        image = f"localhost/finemill-{role}:{__version__}"
        if subprocess.run(["buildah", "inspect", image], capture_output=True, check=False).returncode:
            pytest.skip(f"image {image} is not built: `make images`")
    try:
        for command in (
            ["up"],
            ["s3"],
            ["argo"],
            *(["import", f"localhost/finemill-{r}:{__version__}"] for r in ("cpu", "train")),
        ):
            subprocess.run([program, *command], check=True)
        exports = subprocess.run([program, "env"], check=True, capture_output=True, text=True).stdout
        environment = dict(
            item.split("=", 1)
            for item in exports.replace("export ", "").replace(":$PATH", f":{os.environ['PATH']}").split()
        )
        tracking_uri = f"http://{NODE_ADDRESS}:5000"
        keys = {name: environment[name] for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY")}
        found = Cluster(environment, "s3://finemill/test", tracking_uri, "localhost", keys=keys)
        with _tracking_server(folder):
            yield from _with_chart(found)
    finally:
        subprocess.run([program, "down"], check=False)


class _tracking_server:  # noqa: N801
    """MLflow on the node's address for the time of a `with` block."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __enter__(self) -> None:
        command = [sys.executable, "-m", "mlflow", "server", "--host", NODE_ADDRESS, "--port", "5000", "--workers", "1"]
        command += ["--backend-store-uri", f"sqlite:///{self.folder}/mlflow.db", "--allowed-hosts", "*"]
        log = (self.folder / "log").open("wb")
        self.process = subprocess.Popen(
            command, cwd=self.folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        log.close()
        address = f"http://{NODE_ADDRESS}:5000/health"
        healthy = ["curl", "-fsS", "-o", "/dev/null", address]
        wait_until(lambda: subprocess.run(healthy, capture_output=True, check=False).returncode == 0, 120, address)

    def __exit__(self, *error: object) -> None:
        os.killpg(self.process.pid, signal.SIGTERM)
        self.process.wait(30)


def _with_chart(cluster: Cluster) -> Iterator[Cluster]:
    if shutil.which("helm", path=cluster.environment.get("PATH")) is None:
        pytest.skip("helm is not installed")
    _make_bucket(cluster)
    cluster.run("kubectl", "create", "namespace", cluster.namespace)
    try:
        labels = [f"pod-security.kubernetes.io/{mode}=restricted" for mode in ("enforce", "audit", "warn")]
        cluster.run("kubectl", "label", "namespace", cluster.namespace, *labels)
        cluster.secret(**cluster.keys)
        cluster.helm()
        yield cluster
    finally:
        cluster.run("kubectl", "delete", "namespace", cluster.namespace, "--wait=false", check=False)


def _make_bucket(cluster: Cluster) -> None:
    import boto3

    client = boto3.client(
        "s3",
        endpoint_url=cluster.environment["AWS_ENDPOINT_URL"],
        region_name="us-east-1",
        aws_access_key_id=cluster.keys["AWS_ACCESS_KEY_ID"],
        aws_secret_access_key=cluster.keys["AWS_SECRET_ACCESS_KEY"],
    )
    bucket = cluster.store.removeprefix("s3://").split("/")[0]
    if bucket not in [item["Name"] for item in client.list_buckets()["Buckets"]]:
        client.create_bucket(Bucket=bucket)
