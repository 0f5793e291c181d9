"""The merged model in FP8 beside the one in 16 bits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finemill.artifacts.model import read_merge
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.parity import logits_of
from finemill.components.merge.step import run
from finemill.errors import StepError
from finemill.models.fp8 import encode, round_trip, rounded_inputs, rounded_model
from finemill.models.nf4.layers import quantized_layers
from finemill.models.stored_model import StoredModel
from finemill.runtime.context import StepContext


def test_transformers_opens_it_and_the_result_says_what_it_costs(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    metrics = run(
        base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path,
        config=MergeConfig(merged_fp8=True), context=step_context,
    )  # fmt: skip
    record = read_merge(tmp_path)
    assert record
    link = record.chain[-1]
    assert (link.against, link.name) == ("merged", "merged, FP8")
    assert metrics["merge/merged_fp8_kl"] == link.kl > metrics["merge/kl"]
    assert metrics["merge/merged_fp8_size_bytes"] < 0.7 * metrics["merge/size_bytes"]
    merged = load_file(tmp_path / "model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_fp8", dtype=torch.bfloat16)
    linear = model.model.layers[1].mlp.down_proj
    expected = round_trip(merged["model.layers.1.mlp.down_proj.weight"].float(), torch.bfloat16)
    assert torch.equal(linear.weight.float() * linear.weight_scale.float(), expected)
    assert torch.equal(model.lm_head.weight, merged["model.embed_tokens.weight"])
    # What was measured is what the library computes, inputs in FP8 included.
    opened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged_fp8", dtype=torch.float32)
    layers = quantized_layers(StoredModel(tmp_path))
    measured = rounded_model(tmp_path, layers, torch.bfloat16)
    with torch.inference_mode(), rounded_inputs(measured.model, layers):
        logits_TV = logits_of(measured.model, measured, [[5, 17, 200, 333]])[0]
        torch.testing.assert_close(opened(torch.tensor([[5, 17, 200, 333]])).logits[0], logits_TV)
    card = (tmp_path / "merged_fp8/README.md").read_text()
    assert "| merged, FP8 | merged |" in card
    assert not json.loads((tmp_path / "config.json").read_text()).get("quantization_config")


def test_a_loss_beyond_the_limit_ends_the_step(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = MergeConfig(merged_fp8=True, max_fp8_kl=1e-9)
    with pytest.raises(StepError, match=r"in FP8 the merged model differs by .* allowed 1e-09"):
        run(
            base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config,
            context=step_context,
        )  # fmt: skip


def test_rounding_keeps_three_bits_of_every_value_and_rows_of_zeros() -> None:
    values = torch.randn(5, 64) * torch.logspace(-6, 3, 5)[:, None]
    values[2] = 0
    codes, scale = encode(values, torch.bfloat16)
    assert codes.dtype == torch.float8_e4m3fn
    found = round_trip(values, torch.bfloat16)
    assert torch.isfinite(found).all()
    assert torch.equal(found[2], torch.zeros(64))
    error = (found - values).abs().amax(-1) / values.abs().amax(-1).clamp(min=1e-30)
    assert error.max() < 2**-4
    assert scale.shape == (5, 1)
