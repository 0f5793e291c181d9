"""Layers with LoRA on a CPU, where passes over memory take the time: each product is added to the sum that is there.

PEFT makes a tensor of the adapter's output, one of its scaled output and one of the sum, and autograd the same of their
gradients.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import bitsandbytes as bnb
import torch
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.nn import functional


def add_in_place(model: nn.Module) -> None:
    """Give float32 and 4-bit linear layers of a PEFT model a forward pass of the same values with fewer passes."""
    for layer in model.modules():
        if isinstance(layer, LoraLayer) and _is_plain(layer):
            layer.forward = partial(_forward, layer, layer.forward)


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    return (
        isinstance(base, nn.Linear)
        and set(layer.lora_A) == {"default"}
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.use_dora["default"]
        and (isinstance(base, bnb.nn.Linear4bit) or base.weight.dtype == torch.float32)
    )


def _forward(layer: Any, otherwise: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    in_float32 = x.dtype == a.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if args or kwargs or layer.disable_adapters or layer.merged or not in_float32:
        return otherwise(x, *args, **kwargs)
    output: Tensor = _LoRALinear.apply(x, base.weight, base.bias, a, b, layer.scaling["default"])
    return output


def _dense(weight: Tensor) -> Tensor:
    """The frozen weight (out, in), decoded where it has 4 bits."""
    state = getattr(weight, "quant_state", None)
    return weight if state is None else bnb.functional.dequantize_4bit(weight.data, state).float()


class _LoRALinear(torch.autograd.Function):
    """y = x W' + bias + s (x A') B', with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ a.T
        # No view is returned: some families add to a layer's output in place, which autograd forbids on one.
        output = functional.linear(x, _dense(weight), bias)
        output.view(-1, output.shape[-1]).addmm_(inner, b.T, alpha=scaling)
        ctx.save_for_backward(rows, a, b, inner)
        ctx.weight, ctx.scaling, ctx.shape = weight, scaling, x.shape
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        rows, a, b, inner = ctx.saved_tensors
        gradient = gradient.flatten(0, -2)
        inner_gradient = (gradient @ b).mul_(ctx.scaling)
        x_gradient = None
        if ctx.needs_input_grad[0]:
            x_gradient = (gradient @ _dense(ctx.weight)).addmm_(inner_gradient, a).view(ctx.shape)
        return x_gradient, None, None, inner_gradient.T @ rows, (gradient.T @ inner).mul_(ctx.scaling), None
