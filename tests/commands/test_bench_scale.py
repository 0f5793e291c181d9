"""Rows are trained by several processes, and every run becomes a line."""

from pathlib import Path

import pytest

from finemill.commands.bench_scale import main, table
from finemill.commands.bench_scale_run import alone
from finemill.kernels.bench.runs import ScaleRun, read_runs


@pytest.mark.slow
def test_two_processes_are_measured_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    file = tmp_path / "runs.jsonl"
    arguments = "--gpus 2 --strategy fsdp2 --shape qwen3-tiny --method lora --device cpu --seq 32 --bs 1 --rows 4"
    more = ["--steps", "2", "--warmup", "1", "--record", str(file), "--profile", str(tmp_path)]
    assert main([*arguments.split(), *more]) == 0
    (both,) = (run for run in read_runs(file) if isinstance(run, ScaleRun))
    assert (both.processes, both.strategy, len(both.losses), len(both.peak_bytes)) == (2, "fsdp2", 2, 2)
    assert (both.waiting or 0) > 0
    assert "100.0%" in table([both])
    profile = (tmp_path / "finemill-fsdp2-2.txt").read_text()
    assert "gloo:all_gather" in profile
    assert "whole_loss.py" in profile or "training_step" in profile


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy fsdp3", "'fsdp3' is none of ddp, shard, fsdp2, zero2, zero3"),
        ("--gpus 1,3 --rows 16", "--rows 16 cannot be shared by 3 GPUs"),
        ("--warmup 8", "--warmup 8 must be smaller than --steps 8"),
    ],
)
def test_what_cannot_run_is_said_in_a_line(arguments: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main([*arguments.split(), "--device", "cpu"])
    assert message in capsys.readouterr().err


def test_time_that_is_communication_alone() -> None:
    assert alone([(0, 4), (3, 6), (10, 12)], [(5, 11), (1, 2)]) == 5
    assert alone([(0, 4)], []) == 4
    assert alone([], [(0, 4)]) == 0
