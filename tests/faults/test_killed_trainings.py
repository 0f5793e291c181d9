"""A training is killed at any moment, between its checkpoints and within one, or its node is drained: it ends in the
same adapter.
"""

import multiprocessing
import os
import signal
import sys
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path
from random import Random

import pytest

from finemill.artifacts.manifest import Reference
from finemill.storage.store import fetch_artifact
from tests.faults.conftest import rounds
from tests.line.commands import finemill

BASE = "builtin:tiny-qwen3"
TRAIN = ["--base-model", BASE, "--max-steps", "10", "--save-steps", "1", "--max-length", "128"]
TRAIN += ["--per-device-train-batch-size", "1", "--gradient-accumulation-steps", "2"]
# Kills, rows, step and settings.
TRAININGS: dict[str, tuple[int, str, list[str]]] = {
    "adapters, AdamW, linear": (100, "example:reasoning", ["train-qlora", "--lora-dropout", "0.1"]),
    "preferences, 8-bit AdamW, cosine": (
        50,
        "example:preferences",
        ["train-dpo", "--optim", "adamw_8bit", "--lr-scheduler-type", "cosine", "--lora-dropout", "0.1"],
    ),
    "whole model, Lion, restarts, early stopping": (
        50,
        "example:reasoning",
        [
            *("train-qlora", "--method", "full", "--optim", "lion_8bit", "--eval-steps", "2"),
            *("--lr-scheduler-type", "cosine_with_restarts", "--lr-num-cycles", "2", "--early-stopping-patience", "4"),
        ],
    ),
}
LIBRARIES = ["finemill.cli", "finemill.components.train_qlora.step", "finemill.components.train_dpo.step"]
LIBRARIES += ["bitsandbytes", "mlflow"]
KILLS_PER_TRAINING = 10
GRACE_S = 30
"""What Kubernetes gives a pod between SIGTERM and SIGKILL when its node is drained."""


def train(arguments: list[str], folder: Path) -> None:
    """What a child does: the command, in a folder, with what it prints in files."""
    from finemill.cli import main

    os.chdir(folder)
    for name, descriptor in {"stdout": 1, "stderr": 2}.items():
        os.dup2(os.open(folder / name, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), descriptor)
    sys.exit(main(arguments))


@pytest.fixture(scope="module")
def forks() -> ForkServerContext:
    """Processes that begin with the libraries imported, which takes longer than the training."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(LIBRARIES)
    return context


def ended(
    context: ForkServerContext,
    arguments: list[str],
    folder: Path,
    after_s: float | None = None,
    *,
    drained: bool = False,
) -> float:
    """Train until the end, or kill it after a while, as Kubernetes does where its node is drained. Returns: seconds."""
    began = time.monotonic()
    process = context.Process(target=train, args=(arguments, folder))
    process.start()
    process.join(after_s)
    if after_s is None:
        assert process.exitcode == 0, (folder / "stderr").read_text()
    elif drained:
        process.terminate()
        process.join(GRACE_S)
        # 75 with a checkpoint, SIGTERM's own before there is anything to keep: both are tried again on Argo.
        assert process.exitcode in (0, 75, -signal.SIGTERM), (folder / "stderr").read_text()
    else:
        process.kill()
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), (folder / "stderr").read_text()
    assert not (folder / "stderr").exists() or "Traceback" not in (folder / "stderr").read_text()
    return time.monotonic() - began


def adapter(folder: Path) -> dict[str, str]:
    """The digest of each file of the adapter that a training printed, all verified."""
    _, manifest = fetch_artifact(Reference.parse((folder / "stdout").read_text().strip()))
    return {name: file.sha256 for name, file in manifest.files.items()}


@pytest.mark.parametrize("name", TRAININGS)
def test_a_training_that_is_killed_ends_in_the_same_adapter(
    name: str, forks: ForkServerContext, tmp_path: Path, rng: Random, monkeypatch: pytest.MonkeyPatch
) -> None:
    kills, source, settings = TRAININGS[name]
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path / "cache"))
    rows = finemill("data-prep", "--sources", f'[{{uri: "{source}", max_rows: 60}}]', "--store", "store", cwd=tmp_path)
    assert rows.returncode == 0, rows.stderr
    made = ["chat-format", "--rows", rows.stdout.strip(), "--base-model", BASE, "--store", "store"]
    dataset = finemill(*made, cwd=tmp_path)
    assert dataset.returncode == 0, dataset.stderr
    arguments = [*settings, *TRAIN, "--dataset", dataset.stdout.strip()]

    def folder_of(name: str) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        return folder

    ended(forks, arguments, folder_of("first"))  # this one starts the server of forks, too
    took = ended(forks, arguments, folder_of("calm"))
    expected = adapter(tmp_path / "calm")
    assert "adapter_model.safetensors" in expected
    assert adapter(tmp_path / "first") == expected
    left = rounds(kills)
    while left > 0:
        folder = folder_of(f"killed-{left}")
        for _ in range(min(left, KILLS_PER_TRAINING)):
            left -= 1
            ended(forks, arguments, folder, rng.uniform(0.1, took), drained=rng.random() < 0.3)
        ended(forks, arguments, folder)
        assert adapter(folder) == expected
