"""Experts of transformers in NF4: bitsandbytes' codes of every matrix, and the same model as decoded by hand."""

from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from finemill.kernels.accelerate import accelerate_model
from finemill.kernels.engine.quantized_experts import quantize_experts, quantized_stacks
from finemill.kernels.ops.nf4 import dequantize_nf4_reference

ADAPTERS: dict[str, Any] = {
    "r": 4,
    "target_modules": ["q_proj", "o_proj"],
    "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"],
}
MATRIX = "model.layers.1.mlp.experts.{}.{}_proj.weight"


def load(folder: Path, device: str, *, quantize: bool) -> Any:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).to(device)
    for layer in model.model.layers if quantize else ():
        quantize_experts(layer.mlp.experts)
    return model


def adapted(model: Any) -> Any:
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(**ADAPTERS))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_grads(model: Any, device: str) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    ids = torch.randint(0, 1500, (2, 24), generator=torch.Generator().manual_seed(1)).to(device)
    model.zero_grad()
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return loss.detach(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("double_quant", [True, False])
def test_every_matrix_has_the_codes_that_bitsandbytes_gives_it_alone(
    double_quant: bool, tiny_mixture_dir: Path, device: str
) -> None:
    experts = load(tiny_mixture_dir, device, quantize=False).model.layers[1].mlp.experts
    quantize_experts(experts, double_quant=double_quant)
    stored = load_file(tiny_mixture_dir / "model.safetensors")
    for name, index, parts in (("gate", 2 * 2, 1), ("up", 2 * 2 + 1, 1), ("down", 2, 0)):
        weight = stored[MATRIX.format(2, name)].float().to(device)
        packed, state = bitsandbytes.functional.quantize_4bit(
            weight, quant_type="nf4", compress_statistics=double_quant
        )
        matrix = quantized_stacks(experts)["gate_up_proj" if parts else "down_proj"].matrix(index)
        assert torch.equal(matrix.packed, packed.view(-1))
        assert torch.equal(matrix.absmax, state.absmax.view(-1))


def test_training_on_them_is_training_on_what_they_decode_to(tiny_mixture_dir: Path, device: str) -> None:
    quantized, decoded = load(tiny_mixture_dir, device, quantize=True), load(tiny_mixture_dir, device, quantize=False)
    for layer, source in zip(decoded.model.layers, quantized.model.layers, strict=True):
        for name, stack in quantized_stacks(source.mlp.experts).items():
            values = [dequantize_nf4_reference(stack.matrix(index)) for index in range(stack.shape[0])]
            parameter = getattr(layer.mlp.experts, name)
            parameter.data = torch.stack(values).view(parameter.shape)
    quantized, decoded = adapted(quantized), adapted(decoded)
    loss, grads = loss_and_grads(quantized, device)
    expected, expected_grads = loss_and_grads(decoded, device)
    assert torch.equal(loss, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[name], expected_grads[name]) for name in grads)
    # Between forwards nothing but the codes takes memory.
    held = quantized.get_base_model().model.layers[0].mlp.experts.get_base_layer().gate_up_proj
    assert held.untyped_storage().nbytes() == 4
    assert accelerate_model(quantized).active
    loss, grads = loss_and_grads(quantized, device)
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=1e-5)
    for name, grad in expected_grads.items():
        torch.testing.assert_close(grads[name], grad, rtol=1e-4, atol=1e-5, msg=name)


def test_rows_that_are_no_whole_blocks_are_named(device: str) -> None:
    experts = torch.nn.Module()
    experts.down_proj = torch.nn.Parameter(torch.zeros(2, 64, 40, device=device))
    with pytest.raises(ValueError, match="down_proj has rows of 40 weights, and a block of NF4 has 64"):
        quantize_experts(experts)
