"""A base in 4 bits is what transformers and PEFT open."""

from pathlib import Path

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

from finemill.models.causal_lm import load_causal_lm
from finemill.models.nf4.checkpoint import checkpoint_shapes
from finemill.models.nf4.config import is_quantized
from finemill.models.nf4.encode import round_trip
from finemill.models.nf4.layers import quantized_layers
from finemill.models.stored_model import StoredModel
from finemill.models.write_weights import total_bytes


def test_transformers_reads_the_codes_and_the_layers_in_16_bits(four_bit_dir: Path, short_model_dir: Path) -> None:
    model = load_causal_lm(four_bit_dir)
    stored = StoredModel(short_model_dir)
    kept = {name for name in quantized_layers(stored) if type(model.get_submodule(name)) is torch.nn.Linear}
    assert kept == {"model.layers.0.mlp.down_proj", *(f"model.layers.1.self_attn.{name}_proj" for name in "qkv")}
    for name in quantized_layers(stored):
        weight, original = model.get_submodule(name).weight, stored.read(f"{name}.weight")
        if name in kept:
            assert torch.equal(weight, original)
            continue
        decoded = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        assert torch.equal(decoded.float(), round_trip(original, torch.bfloat16))
        assert model.get_submodule(name).compute_dtype == torch.float32


def test_its_size_is_the_one_that_is_said_before_and_its_tokenizer_lies_beside_it(
    four_bit_dir: Path, short_model_dir: Path
) -> None:
    written = load_file(four_bit_dir / "model.safetensors")
    stored = StoredModel(short_model_dir)
    quantized = {name.removesuffix(".weight.absmax") for name in written if name.endswith(".absmax")}
    quantized = {name for name in quantized if "nested" not in name}
    assert total_bytes(checkpoint_shapes(stored, quantized, torch.bfloat16)) == sum(
        tensor.nbytes for tensor in written.values()
    )
    for name in ("tokenizer.json", "chat_template.jinja", "generation_config.json"):
        assert (four_bit_dir / name).read_bytes() == (short_model_dir / name).read_bytes()
    assert is_quantized(four_bit_dir)
    assert not is_quantized(short_model_dir)


def test_peft_trains_adapters_on_it(four_bit_dir: Path) -> None:
    model = get_peft_model(load_causal_lm(four_bit_dir), LoraConfig(r=2, target_modules="all-linear"))
    tokens = torch.arange(16)[None]
    model(input_ids=tokens, labels=tokens).loss.backward()
    gradients = [parameter.grad for name, parameter in model.named_parameters() if "lora_B" in name]
    assert len(gradients) == 14
    assert all(gradient is not None and gradient.any() for gradient in gradients)
