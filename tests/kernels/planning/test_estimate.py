"""`finemill estimate` answers from a configuration alone."""

import json

import pytest

from finemill.kernels.bench.data import _config
from finemill.kernels.planning.estimate import EstimateError, main
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.kernels.planning.planner import NoPlanError


def estimate(capsys, *arguments: str) -> dict[str, object]:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_folder_and_the_name_of_its_shape_give_the_same_estimate(tmp_path, capsys):
    (tmp_path / "config.json").write_text(json.dumps(_config(SHAPES["qwen3-0.6b"])))
    by_name = estimate(capsys, "--model", "qwen3-0.6b", "--memory-gb", "8")
    assert by_name == estimate(capsys, "--model", str(tmp_path), "--memory-gb", "8")
    assert by_name["peak_gb"] <= 8


def test_a_higher_rank_takes_more_memory(capsys):
    small, large = (estimate(capsys, "--model", "qwen3-8b", "--rank", rank) for rank in ("16", "128"))
    assert large["static_gb"] > small["static_gb"]


def test_a_card_of_slower_memory_takes_longer(capsys):
    h100, h200 = (estimate(capsys, "--model", "qwen3-8b", "--gpu", gpu) for gpu in ("h100", "h200"))
    assert h100["step_s"] > h200["step_s"]
    assert h200 == estimate(capsys, "--model", "qwen3-8b")


def test_the_plain_listing_names_every_number(capsys):
    assert main(["--model", "llama3-8b"]) == 0
    assert {line.split()[0] for line in capsys.readouterr().out.splitlines()} >= {"peak_gb", "tokens_per_s", "step_s"}


def test_what_is_missing_is_said_in_a_line(tmp_path):
    with pytest.raises(EstimateError, match=r"config\.json not found"):
        main(["--model", str(tmp_path)])
    (tmp_path / "config.json").write_text('{"model_type": "gpt2"}')
    with pytest.raises(EstimateError, match="has no 'num_attention_heads'"):
        main(["--model", str(tmp_path)])
    with pytest.raises(NoPlanError, match="the leanest needs"):
        main(["--model", "qwen3-32b", "--memory-gb", "1"])
