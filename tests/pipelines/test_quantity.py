from pathlib import Path

import pytest

from finemill.errors import UserError
from finemill.pipelines.cluster import read_cluster_config
from tests.pipelines.test_renderers import compile_both

pytestmark = pytest.mark.usefixtures("quick_kfp")


def sized(folder: Path, text: str) -> Path:
    file = folder / "cluster.yaml"
    file.write_text(f"sizes: {{gpu: {text}}}")
    return file


@pytest.mark.parametrize(
    ("given", "rendered"),
    [("32G", "31250000Ki"), ("34359738368", "32Gi"), ("1.5Gi", "1536Mi"), ("2e9", "1953125Ki"), ("16384Mi", "16Gi")],
)
def test_memory_as_kubernetes_writes_it_works_on_both_engines(given: str, rendered: str, tmp_path: Path) -> None:
    cluster = sized(tmp_path, f"{{cpu: 1.5, memory: {given}}}")
    cluster.write_text(f"{cluster.read_text()}\nshared_memory: 64Mi\n")
    (_, kfp), (_, argo) = compile_both("finetune", tmp_path, "--cluster", str(cluster))
    assert kfp["train-qlora"].memory == argo["train-qlora"].memory == rendered
    assert kfp["train-qlora"].cpu == argo["train-qlora"].cpu == "1500m"


@pytest.mark.parametrize("memory", ["2GB", "100K", "-1Gi", "16gi", "0", "true", "[1]", "5m", "1 Gi"])
def test_other_memory_is_refused_by_file_and_key(memory: str, tmp_path: Path) -> None:
    file = sized(tmp_path, f"{{cpu: 1, memory: {memory}}}")
    with pytest.raises(UserError, match=r"cluster\.yaml: 'sizes\.gpu\.memory'"):
        read_cluster_config(file)


@pytest.mark.parametrize("cpu", ["0", "0.0001", "two", "-1", "1Gi", "500M"])
def test_other_cores_are_refused_by_file_and_key(cpu: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cluster\.yaml: 'sizes\.gpu\.cpu'"):
        read_cluster_config(sized(tmp_path, f"{{cpu: {cpu}, memory: 1Gi}}"))


def test_a_size_that_no_step_has_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text("sizes: {smal: {cpu: 1, memory: 1Gi}}")
    with pytest.raises(UserError, match=r"sizes.*smal"):
        read_cluster_config(file)
