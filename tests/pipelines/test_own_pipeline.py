"""The page about pipelines of others says what works: its files are compiled, and run on this machine."""

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

PAGE = (Path(__file__).parents[2] / "pipelines" / "own-pipeline.md").read_text()
FILES = dict(re.findall(r"^```python\n# (\w+\.py)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """The page's files, in a folder of their own."""
    for name, text in FILES.items():
        (tmp_path / name).write_text(text)
    return tmp_path


def python(folder: Path, *arguments: str) -> str:
    environment = {**os.environ, "FINEMILL_CACHE": str(folder / "cache")}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def compiled(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """KFP's pipeline and what Kubernetes is told besides."""
    script = "import sys; from kfp import compiler; from own_pipeline import own_pipeline as p; "
    python(folder, "-c", script + "compiler.Compiler().compile(p, 'own.yaml')")
    pipeline, platform = yaml.safe_load_all((folder / "own.yaml").read_text())
    return pipeline, platform


@pytest.mark.slow
def test_the_page_s_pipeline_compiles_with_its_own_images_and_secrets_and_runs_here(folder: Path) -> None:
    pipeline, platform = compiled(folder)
    executors = pipeline["deploymentSpec"]["executors"]
    assert len(executors) == 3
    for name, executor in executors.items():
        container = executor["container"]
        assert container["image"] == "registry.example.com/ml/finemill-cpu:0.1.0"
        assert "pip install" not in " ".join(container["command"])
        of_pod = platform["platforms"]["kubernetes"]["deploymentSpec"]["executors"][name]
        assert [item["secretName"] for item in of_pod["secretAsEnv"]] == ["store-credentials"]
        assert [item["secretName"] for item in of_pod["imagePullSecret"]] == ["registry-credentials"]
    said = python(folder, "try_it.py")
    assert "FAILURE" not in said
    (data,) = folder.glob("store/chat-format/*/dataset.json")
    assert data.is_file()
    manifest = (data.parent / "manifest.json").read_text()
    assert r"Put the result in $$\\boxed{}$$." in manifest
