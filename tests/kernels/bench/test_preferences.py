"""The benchmark of preferences runs on a CPU, and trains the same beside TRL's trainer and on the engine."""

import json
from pathlib import Path

import pytest

from finemill.kernels.bench import data as bench_data
from finemill.kernels.bench import preferences

ARGUMENTS = "--shape qwen3-tiny --layers 1 --seq 12 --prompt 4 --bs 2 --accum 1 --steps 2 --warmup 1 --device cpu"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("loss", ["dpo", "kto"])
def test_both_trainers_are_measured_on_one_base_and_log_the_same(
    loss: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    assert preferences.main([*ARGUMENTS.split(), "--loss", loss, "--lr", "1e-3"]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if line.startswith("BENCH ")]
    theirs, ours = (json.loads(line.removeprefix("BENCH ")) for line in lines)
    assert (theirs["implementation"], ours["implementation"]) == ("trl", "finemill")
    assert ours["losses"] == pytest.approx(theirs["losses"], abs=1e-3)
    assert ours["speed_ratio"] == pytest.approx(ours["tokens_per_s"] / theirs["tokens_per_s"], abs=1e-2)


def test_a_prompt_without_room_for_an_answer_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        preferences.main(["--seq", "8", "--prompt", "8", "--device", "cpu"])
    assert "--prompt 8 must be smaller than --seq 8" in capsys.readouterr().err
