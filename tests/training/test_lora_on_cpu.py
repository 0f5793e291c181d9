"""Layers that add in place compute what PEFT's do."""

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from finemill.training.config import LoRATrainingConfig
from finemill.training.lora_on_cpu import add_in_place
from finemill.training.quantized_base import load_base

CPU = torch.device("cpu")
IDS = torch.arange(2 * 12).view(2, 12) + 5


def a_model(base: Path, config: LoRATrainingConfig, **settings: Any) -> Any:
    torch.manual_seed(0)
    adapters = LoraConfig(r=4, lora_alpha=6, target_modules="all-linear", **settings)
    model = get_peft_model(load_base(base, config, CPU), adapters)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.05)
    return model


def learned(model: Any) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Loss and gradients."""
    model.zero_grad()
    loss = model(input_ids=IDS, labels=IDS).loss
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters() if parameter.grad is not None]


@pytest.mark.parametrize("load_in_4bit", [True, False])
def test_loss_and_gradients_are_those_of_peft(load_in_4bit: bool, short_model_dir: Path) -> None:
    model = a_model(short_model_dir, LoRATrainingConfig(load_in_4bit=load_in_4bit))
    loss, gradients = learned(model)
    with torch.no_grad(), model.disable_adapter():
        base = model(input_ids=IDS).logits
    add_in_place(model)
    assert model.base_model.model.model.layers[0].self_attn.q_proj.forward.func.__name__ == "_forward"
    found_loss, found_gradients = learned(model)
    torch.testing.assert_close(found_loss, loss, rtol=1e-5, atol=0)
    for found, expected in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    with torch.no_grad(), model.disable_adapter():
        assert torch.equal(model(input_ids=IDS).logits, base)


def test_a_layer_s_output_may_be_added_to_in_place() -> None:
    """As Falcon does with that of its MLP."""
    torch.manual_seed(0)
    adapters = LoraConfig(r=2, target_modules=["0"], init_lora_weights=False)
    model: Any = get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 4)), adapters)
    rows = torch.randn(2, 3, 6)
    gradients = []
    for _ in range(2):
        model.zero_grad()
        output = model(rows)
        output += 1
        output.square().sum().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
        add_in_place(model)
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize("settings", [{"lora_dropout": 0.1}, {"use_dora": True}])
def test_other_layers_stay(settings: dict[str, Any], short_model_dir: Path) -> None:
    model = a_model(short_model_dir, LoRATrainingConfig(), **settings)
    add_in_place(model)
    assert not any("forward" in vars(module) and module is not model.base_model.model for module in model.modules())


def test_products_in_16_bits_are_left_to_peft(short_model_dir: Path) -> None:
    model = a_model(short_model_dir, LoRATrainingConfig())
    with torch.autocast("cpu", torch.bfloat16):
        expected = model(input_ids=IDS).logits
        add_in_place(model)
        assert torch.equal(model(input_ids=IDS).logits, expected)
