from pathlib import Path
from typing import Any

import bitsandbytes as bnb
import pytest
import torch
from peft import get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen2MoeConfig, set_seed

from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.training.adapter import lora_config
from finemill.training.config import LoRATrainingConfig
from finemill.training.quantized_base import load_base

CPU = torch.device("cpu")


def adapter_gradients(model: PreTrainedModel, *, evaluate_first: bool) -> dict[str, torch.Tensor]:
    """Gradients of one training step on fixed tokens and fixed, non-zero adapters."""
    set_seed(0)
    model = get_peft_model(model, lora_config(BUILTIN_MODELS["builtin:tiny-qwen3"], LoRATrainingConfig(lora_r=4)))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.02)
    tokens = torch.arange(64).reshape(2, 32) + 100
    if evaluate_first:
        model.eval()
        with torch.no_grad():
            model(input_ids=tokens, use_cache=False)
    model.train()
    model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def test_evaluating_before_training_leaves_the_gradients_as_they_are(tiny_model_dir: Path) -> None:
    config = LoRATrainingConfig()
    expected = adapter_gradients(load_base(tiny_model_dir, config, CPU), evaluate_first=False)
    found = adapter_gradients(load_base(tiny_model_dir, config, CPU), evaluate_first=True)
    assert expected
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=0, msg=name)


def test_linear_layers_are_nf4_and_the_output_layer_is_not(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, LoRATrainingConfig(), CPU)
    quantized = {name for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)}
    assert len(quantized) == 7 * model.config.num_hidden_layers
    assert not isinstance(model.lm_head, bnb.nn.Linear4bit)
    assert {model.get_submodule(name).weight.quant_state.quant_type for name in quantized} == {"nf4"}


@pytest.mark.parametrize("settings", [{}, {"load_in_8bit": True}])
def test_routers_that_are_trained_keep_their_16_bits(settings: dict[str, Any], tmp_path: Path) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    experts = {"num_experts": 4, "moe_intermediate_size": 64, "shared_expert_intermediate_size": 64}
    description = Qwen2MoeConfig(**sizes, **experts, num_key_value_heads=1, vocab_size=64)
    AutoModelForCausalLM.from_config(description).save_pretrained(tmp_path)
    kinds = []
    for train_router in (False, True):
        config = LoRATrainingConfig(train_router=train_router, **settings)
        model: Any = load_base(tmp_path, config, torch.device("cpu"))
        layer = model.model.layers[0]
        kinds.append([type(part) is nn.Linear for part in (layer.mlp.shared_expert_gate, model.lm_head)])
        assert type(layer.self_attn.q_proj) is not nn.Linear
    assert kinds == [[False, True], [True, True]]


def test_without_4_bit_the_base_is_loaded_as_it_is(tiny_model_dir: Path) -> None:
    model = load_base(tiny_model_dir, LoRATrainingConfig(load_in_4bit=False), CPU)
    assert not any(isinstance(module, bnb.nn.Linear4bit) for module in model.modules())


def test_a_base_in_4_bits_is_trained_on_as_it_is_stored(four_bit_dir: Path) -> None:
    model = load_base(four_bit_dir, LoRATrainingConfig(), CPU)
    layers = [module for name, module in model.named_modules() if isinstance(module, bnb.nn.Linear4bit)]
    assert len(layers) == 14 - 4
    assert {layer.compute_dtype for layer in layers} == {torch.float32}
    assert not any(layer.support_avx512bf16_for_cpu for layer in layers)
    assert type(model.get_submodule("model.layers.0.mlp.down_proj")) is torch.nn.Linear


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"load_in_4bit": False}, "16 bits"),
        ({"load_in_4bit": False, "load_in_8bit": True}, "8 bits"),
        ({"strategy": "fsdp2"}, "strategy 'fsdp2'"),
        ({"init_lora_weights": "loftq"}, "init_lora_weights 'loftq'"),
    ],
)
def test_what_a_base_in_4_bits_cannot_give_is_one_line(
    settings: dict[str, Any], found: str, four_bit_dir: Path
) -> None:
    with pytest.raises(UserError, match=f"is stored in 4 bits, and {found} cannot be had of it"):
        load_base(four_bit_dir, LoRATrainingConfig(**settings), CPU)
