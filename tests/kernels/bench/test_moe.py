"""The benchmark of mixtures trains one model on the engine and by transformers, and holds their losses together."""

import json
from pathlib import Path
from typing import Any

import pytest

from finemill.kernels.bench import moe
from finemill.kernels.bench.moe_losses import compare
from finemill.kernels.bench.runs import MixtureLosses, read_runs
from finemill.kernels.planning.model_shapes import MIXTURES

WIDTHS = {"HIDDEN": 64, "INTERMEDIATE": 64, "EXPERTS": 4, "HEADS": 4, "KV_HEADS": 2, "HEAD_DIM": 32, "VOCABULARY": 300}
CONFIGURATION = {
    "model_type": "qwen3_moe",
    "hidden_size": 64,
    "intermediate_size": 128,
    "moe_intermediate_size": 64,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "vocab_size": 300,
    "tie_word_embeddings": False,
}


@pytest.mark.filterwarnings("ignore")
def test_the_engine_and_transformers_train_one_mixture_alike(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    recorded = tmp_path / "runs.jsonl"
    for name, size in WIDTHS.items():
        monkeypatch.setattr(moe, name, size)
    monkeypatch.setitem(MIXTURES, "qwen3-30b-a3b", CONFIGURATION)
    words = (
        "losses --layers 2 --rows 2 --seq 16 --rank 4 --steps 5 --warmup 0 --sets 2 --seeds 2 --lr 5e-3 --device cpu"
    )
    assert moe.main([*words.split(), "--folder", str(tmp_path), "--record", str(recorded)]) == 0
    record = json.loads(capsys.readouterr().out.splitlines()[-1].removeprefix("BENCH "))
    losses = record["losses"]
    assert record["same"]
    assert losses.keys() == {"sdpa", "eager", "finemill", "float32"}
    for seed in range(2):
        assert losses["finemill"][seed] == pytest.approx(losses["float32"][seed], abs=1e-3)
        assert losses["finemill"][seed][4] < losses["finemill"][seed][0] - 0.01
    assert losses["finemill"][0] != losses["finemill"][1]
    (run,) = read_runs(recorded)
    assert isinstance(run, MixtureLosses)
    assert run.losses == losses


@pytest.mark.parametrize(("ours", "same"), [(2.05, True), (2.2, False), (float("nan"), False)])
def test_losses_are_the_same_where_they_are_as_near_to_float32_as_transformers(ours: float, same: bool) -> None:
    losses: dict[str, list[Any]] = {"sdpa": [[3.0, 2.0]], "eager": [[3.0, 2.05]], "float32": [[3.0, 2.01]]}
    outcome = compare(losses | {"finemill": [[3.0, ours]]})
    assert outcome["same"] == same
    assert outcome["from_float32"]["eager"] == pytest.approx(0.04 / 2**0.5, abs=1e-6)
