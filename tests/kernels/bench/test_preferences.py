"""The benchmark of preferences runs on a CPU, and trains the same beside TRL's trainer and on the engine."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from finemill.kernels.bench import data as bench_data
from finemill.kernels.bench import preferences
from finemill.kernels.bench.runs import PreferenceRun, read_runs
from finemill.kernels.planning.planner import MARGIN, NoPlanError
from finemill.kernels.preferences import PreferenceSteps
from finemill.kernels.token_scores import TokenScorer

ARGUMENTS = "--shape qwen3-tiny --layers 1 --seq 12 --prompt 4 --bs 2 --accum 1 --steps 2 --warmup 1 --device cpu"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["dpo", "kto", "orpo"])
def test_both_trainers_are_measured_on_one_base_and_log_the_same(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    recorded = tmp_path / "runs.jsonl"
    arguments = [*ARGUMENTS.split(), "--loss", loss, "--lr", "1e-3", "--record", str(recorded)]
    assert preferences.main(arguments) == 0
    theirs, ours, agreement = (json.loads(line.split(" ", 1)[1]) for line in _lines(capsys))
    assert (theirs["implementation"], ours["implementation"]) == ("trl", "finemill")
    assert agreement["same"]
    assert agreement["gradient_cosine"] > 0.9999
    runs = [run for run in read_runs(recorded) if isinstance(run, PreferenceRun)]
    assert [(run.implementation, run.losses) for run in runs] == [
        ("trl", theirs["losses"]),
        ("finemill", ours["losses"]),
    ]
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
    assert ours["speed_ratio"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"], abs=1e-2)


@pytest.mark.filterwarnings("ignore")
def test_losses_or_gradients_that_are_not_trls_fail_the_benchmark(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    scored = TokenScorer.score

    def wrong(self: TokenScorer, *args: Any, **settings: Any) -> Any:
        scores: Any = scored(self, *args, **settings)
        scores.log_probs = scores.log_probs * torch.linspace(-1, 1, scores.log_probs.shape[1])
        return scores

    monkeypatch.setattr(TokenScorer, "score", wrong)
    assert preferences.main(ARGUMENTS.split()) == 1
    agreement = json.loads(_lines(capsys)[-1].removeprefix("AGREEMENT "))
    assert not agreement["same"]
    assert agreement["gradient_cosine"] < agreement["least_cosine"]


def test_a_limit_without_a_plan_becomes_what_the_leanest_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(self: Any) -> Any:
        if self._memory_gb < 2:
            raise NoPlanError(int(self._memory_gb * 2**30), 2**31)
        return self._memory_gb

    monkeypatch.setattr(PreferenceSteps, "_make_plan", plan)
    trainer = object.__new__(preferences.LeanestPlan)
    trainer._memory_gb = 1.0
    assert trainer._make_plan() == pytest.approx(2 / MARGIN, abs=1e-2)


def test_a_prompt_without_room_for_an_answer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preferences.main(["--seq", "8", "--prompt", "8", "--device", "cpu"])
    assert "--prompt 8 must be smaller than --seq 8" in capsys.readouterr().err


def _lines(capsys: pytest.CaptureFixture[str]) -> list[str]:
    return [line for line in capsys.readouterr().out.splitlines() if line.startswith(("BENCH ", "AGREEMENT "))]
