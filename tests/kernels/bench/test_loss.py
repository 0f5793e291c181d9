"""The loss comparison runs end to end on a CPU, and its verdict is the documented one."""

import json
from pathlib import Path

import pytest
import torch

from finemill.kernels.bench import data as bench_data
from finemill.kernels.bench.data import chat_rows
from finemill.kernels.bench.loss import compare, main, table
from finemill.kernels.bench.runs import LossRun, read_runs

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    file = tmp_path / "rows.jsonl"
    words = [" ".join(f"t{(7 * row + i) % 50}" for i in range(4 + row % 5)) for row in range(24)]
    file.write_text("".join(json.dumps({"question": text, "answer": text}) + "\n" for text in words))
    return file


def test_both_trainers_see_the_same_rows_and_agree_inside_the_seed_spread(
    rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    arguments = "--shape qwen3-tiny --layers 1 --quant fp32 --device cpu --bs 2 --accum 2 --steps 3 --lr 1e-2 --rank 4"
    result = tmp_path / "loss.json"
    assert (
        main(
            [
                *arguments.split(),
                "--seeds",
                "1,2",
                "--rows",
                str(rows),
                "--json",
                str(result),
                "--record",
                str(tmp_path / "r.jsonl"),
            ]
        )
        == 0
    )
    (run,) = read_runs(tmp_path / "r.jsonl")
    assert isinstance(run, LossRun)
    assert run.inside
    assert set(run.by_seed) == {"1", "2"}
    assert "--rows rows.jsonl" in (run.command or "")
    record = json.loads(result.read_text())
    losses = torch.tensor([[record["losses"][impl][seed] for seed in ("1", "2")] for impl in ("hf", "finemill")])
    assert losses.shape == (2, 2, 3)
    # B starts at zero, so the first loss is the base model's on the first batch: the same rows in every run.
    torch.testing.assert_close(losses[..., 0], losses[:1, :1, 0].expand(2, 2), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-4)
    assert record["step_spread"] > 10 * record["by_seed"]["1"]["step_difference"]
    assert "inside the seed spread" in capsys.readouterr().out


@pytest.mark.parametrize(("ours", "inside"), [([3.0, 2.01], True), ([3.2, 1.8], False), ([3.0, float("nan")], False)])
def test_the_verdict_asks_for_every_step_and_for_the_end(ours: list[float], inside: bool) -> None:
    record = compare({"hf": {"1": [3.0, 2.0], "2": [3.1, 2.1]}, "finemill": {"1": ours, "2": [3.1, 2.1]}})
    assert record["step_spread"] == pytest.approx(0.1)
    assert record["end_spread"] == pytest.approx(0.1)
    assert record["inside"] is inside
    assert table(record).splitlines()[-1] == ("inside" if inside else "OUTSIDE") + " the seed spread"


def test_rows_are_labelled_on_the_answer_and_cut(rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    path = bench_data.ensure_checkpoint("qwen3-tiny", 1, torch.device("cpu"))
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(path)
    first = chat_rows([rows], tokenizer, 5, 6)[0]
    assert first == {"input_ids": [0, 1, 2, 3, 0, 1], "labels": [-100] * 4 + [0, 1]}
    assert chat_rows([rows], tokenizer, 24, 5)[0]["labels"][-1] == 0
    assert all(len(row["input_ids"]) <= 9 for row in chat_rows([rows], tokenizer, 24, 9))
