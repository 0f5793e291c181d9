"""Curves arrive where they were asked for, read back from the files that the libraries write."""

import sys
import time
from pathlib import Path

import pytest
import torch

from finemill.errors import UserError
from finemill.runtime.context import StepContext
from finemill.training.config import LoRATrainingConfig
from finemill.training.report_to import reporting
from finemill.training.system import system_metrics
from tests.contexts import training_context
from tests.recorder import ListRecorder, recorded

POINTS = {1: {"train/loss": 2.5}, 2: {"train/loss": 2.25, "train/mfu": 0.5}}


@pytest.fixture
def context(folder_store: str) -> StepContext:
    return training_context(folder_store, ListRecorder(), key="0123456789abcdef")


def report(context: StepContext, *report_to: str) -> None:
    config = LoRATrainingConfig.model_validate({"report_to": report_to})
    with reporting(config, context) as recorder:
        for step, metrics in POINTS.items():
            recorder.log_metrics(metrics, step)
        recorder.log_progress("half")


@pytest.mark.parametrize(("report_to", "points"), [(("mlflow",), 2), ((), 0)])
def test_mlflow_gets_the_points_if_it_is_named(report_to: tuple[str, ...], points: int, context: StepContext) -> None:
    report(context, *report_to)
    assert len(recorded(context).points) == points
    assert recorded(context).lines == ["half"]


def test_mlflow_gets_how_busy_the_machine_is_with_every_point(context: StepContext) -> None:
    report(context, "mlflow")
    for step, metrics in recorded(context).points:
        system = {name: value for name, value in metrics.items() if name.startswith("system/")}
        assert {name: value for name, value in metrics.items() if name not in system} == POINTS[step]
        assert {"system/cpu_utilization_percentage", "system/system_memory_usage_megabytes"} <= set(system)
        assert all(isinstance(value, int | float) and value >= 0 for value in system.values())


def test_a_card_without_sensors_is_left_out_and_training_goes_on(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(*_: object) -> int:
        raise RuntimeError("NVML Shared Library Not Found")

    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _: (25, 100))
    monkeypatch.setattr(torch.cuda, "utilization", absent)
    found = system_metrics(torch.device("cuda", 1))
    assert found["system/gpu_1_memory_usage_percentage"] == 75
    assert "system/gpu_1_utilization_percentage" not in found
    monkeypatch.setattr(torch.cuda, "utilization", lambda _: 97)
    monkeypatch.setattr(torch.cuda, "power_draw", lambda _: 650_000)
    assert system_metrics(torch.device("cuda", 1))["system/gpu_1_power_usage_watts"] == 650


def test_tensorboard_holds_every_point(context: StepContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "runs"))
    report(context, "mlflow", "tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "runs" / "train-qlora-0123456789ab"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train/loss")] == [(1, 2.5), (2, 2.25)]
    assert [event.value for event in events.Scalars("train/mfu")] == [0.5]
    assert len(recorded(context).points) == 2


def test_wandb_writes_a_run_offline(context: StepContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"WANDB_MODE": "offline", "WANDB_DIR": str(tmp_path), "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    report(context, "wandb")
    (file,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
    # Its own process writes the file.
    until = time.monotonic() + 60
    while file.read_bytes().count(b"train/loss") < 2 and time.monotonic() < until:
        time.sleep(0.1)
    written = file.read_bytes()
    assert b"train-qlora-0123456789ab" in written
    assert written.count(b"train/loss") >= 2


@pytest.mark.parametrize(("name", "module"), [("wandb", "wandb"), ("tensorboard", "torch.utils.tensorboard")])
def test_a_missing_package_is_one_line(
    name: str, module: str, context: StepContext, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(UserError, match=rf"report_to {name} needs it: pip install 'finemill\[report\]'"):
        report(context, name)


def test_a_variable_that_wandb_does_not_take_is_one_line(context: StepContext, monkeypatch: pytest.MonkeyPatch) -> None:
    import wandb

    # It reads the variables once in a process.
    monkeypatch.setattr(wandb, "init", lambda **_: wandb.Settings(mode="of"))
    with pytest.raises(UserError, match=r"report_to wandb: its setting mode: .*'offline'.* variable WANDB_\*"):
        report(context, "wandb")
