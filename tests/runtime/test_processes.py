"""Two processes train together as two GPUs would: on a CPU, over gloo."""

import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from threading import Thread

import pytest
import torch
from safetensors.torch import load_file

from finemill.errors import TemporaryError, UserError
from finemill.runtime.processes import num_processes, run_in_processes
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact, list_artifacts

pytestmark = pytest.mark.slow
BASE = "builtin:tiny-qwen3"
CONFIG = {
    "lora_r": 4,
    "max_steps": 6,
    "per_device_train_batch_size": 2,
    "gradient_accumulation_steps": 1,
    "learning_rate": 1e-3,
    "logging_steps": 1,
    "save_steps": 1,
    "gradient_checkpointing": False,
}


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> str:
    store = tmp_path_factory.mktemp("data").as_uri()
    config = {"sources": [{"uri": "example:reasoning", "max_rows": 60}]}
    rows = run_step("data-prep", store=store, inputs={}, config=config)
    inputs = {"rows": str(rows.reference), "base_model": BASE}
    return str(run_step("chat-format", store=store, inputs=inputs, config={}).reference)


def torchrun(dataset: str, store: str, *flags: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "finemill", "train-qlora"]
    command += ["--dataset", dataset, "--base-model", BASE, "--store", store, *flags]
    for name, value in CONFIG.items():
        command += [f"--{name.replace('_', '-')}", str(value).lower()]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "adapter_model.safetensors")


def test_two_processes_that_were_killed_and_stopped_go_on_and_publish_what_one_does_with_twice_the_accumulation(
    dataset: str,
    folder_store: str,
    tracking_uri: str,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
) -> None:
    from mlflow import MlflowClient

    inputs = {"dataset": dataset, "base_model": BASE}
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with monkeypatch.context() as two_gpus:
        two_gpus.setattr("finemill.runtime.run.num_idle_gpus", lambda: 2)
        killer = Thread(target=kill_a_process_at_the_first_checkpoint, args=(folder_store,))
        killer.start()
        with pytest.raises(TemporaryError, match=r"process 1 was killed \(SIGKILL\): run again to continue"):
            run_step("train-qlora", store=folder_store, inputs=inputs, config=CONFIG)
        killer.join()
    assert capfd.readouterr().out == ""

    process = torchrun(dataset, folder_store)
    assert process.stderr is not None
    said = []
    for line in process.stderr:
        said.append(line)
        assert "step 1/6" not in line
        if "step 4/6" in line:
            process.send_signal(signal.SIGTERM)
            break
    rest = process.communicate(timeout=300)[1]
    assert process.returncode != 0
    assert "checkpoint at step" in rest, "".join(said)
    assert not list_artifacts(f"{folder_store}/train-qlora")
    client = MlflowClient(tracking_uri)
    experiment = client.get_experiment_by_name("finemill")
    assert experiment
    assert {run.info.run_name for run in client.search_runs([experiment.experiment_id])} == {"train-qlora"}

    again = torchrun(dataset, folder_store)
    stdout, stderr = again.communicate(timeout=300)
    assert again.returncode == 0, stderr
    assert "step 4/6" not in stderr
    (reference,) = stdout.split()
    assert list_artifacts(f"{folder_store}/train-qlora") == [reference.partition("@")[0]]
    result = run_step("train-qlora", store=folder_store, inputs=inputs, config=CONFIG)
    assert (result.reused, str(result.reference)) == (True, reference)
    assert result.manifest.metrics["train/num_steps"] == CONFIG["max_steps"]

    alone = run_step(
        "train-qlora", store=folder_store, inputs=inputs, config={**CONFIG, "gradient_accumulation_steps": 2}
    )
    expected = weights(fetch_artifact(alone.reference)[0])
    for name, weight in weights(fetch_artifact(result.reference)[0]).items():
        torch.testing.assert_close(weight, expected[name], rtol=0, atol=1e-4, msg=name)


def kill_a_process_at_the_first_checkpoint(store: str) -> None:
    while not list(Path(store.removeprefix("file://"), "checkpoints").rglob("manifest.json")):
        time.sleep(0.05)
    for status in Path("/proc").glob("[0-9]*/environ"):
        with suppress(OSError):
            variables = status.read_bytes().split(b"\0")
            if b"RANK=1" in variables and store.encode() in (status.parent / "cmdline").read_bytes():
                os.kill(int(status.parent.name), signal.SIGKILL)


def test_a_number_of_processes_that_is_none_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE is 'two'"):
        num_processes()


def test_the_kind_of_failure_of_a_process_is_that_of_all() -> None:
    with pytest.raises(UserError, match="schema in 2 processes ended with exit code 2"):
        run_in_processes(["schema", "nonsense"], 2)
