"""The merged model in 4 bits beside the one in 16."""

import json
from pathlib import Path

import bitsandbytes as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finemill.artifacts.model import read_merge
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.step import run
from finemill.errors import StepError
from finemill.models.nf4.encode import round_trip
from finemill.runtime.context import StepContext


def test_it_opens_in_transformers_and_the_result_says_what_it_costs(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = MergeConfig(merged_4bit=True)
    metrics = run(
        base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config, context=step_context
    )
    record = read_merge(tmp_path)
    assert record
    link = record.chain[-1]
    assert (link.against, link.name) == ("merged", "merged, 4-bit")
    assert metrics["merge/merged_4bit_kl"] == link.kl > metrics["merge/kl"]
    assert metrics["merge/merged_4bit_size_bytes"] < metrics["merge/size_bytes"] / 2
    merged = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_4bit")
    weight = model.model.layers[3].mlp.down_proj.weight
    expected = round_trip(merged["model.layers.3.mlp.down_proj.weight"], torch.bfloat16)
    found = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
    torch.testing.assert_close(found.reshape(expected.shape).float(), expected, rtol=2**-7, atol=1e-3)
    card = (tmp_path / "merged_4bit/README.md").read_text()
    assert "bitsandbytes" in card
    assert "| merged, 4-bit | merged |" in card
    assert not json.loads((tmp_path / "config.json").read_text()).get("quantization_config")


def test_a_loss_beyond_the_limit_ends_the_step(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = MergeConfig(merged_4bit=True, max_4bit_kl=1e-6)
    with pytest.raises(StepError, match=r"in 4 bits the merged model differs by .* allowed 1e-06.*quantize-4bit"):
        run(
            base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config,
            context=step_context,
        )  # fmt: skip
