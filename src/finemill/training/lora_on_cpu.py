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

KEPT_BYTES = 256 << 20
"""Decoded float32 weights of a model that stay in memory: of a larger one each is decoded for each pass."""


def add_in_place(model: nn.Module) -> None:
    """Give float32 and 4-bit linear layers of a PEFT model a forward pass of the same values with fewer passes."""
    layers = [layer for layer in model.modules() if isinstance(layer, LoraLayer) and _is_plain(layer)]
    keep = sum(4 * layer.in_features * layer.out_features for layer in layers) <= KEPT_BYTES
    for layer in layers:
        weight = _Weight(layer.get_base_layer(), keep=keep)
        layer.forward = partial(_forward, layer, weight, layer.forward)


class _Weight:
    """The frozen weight (out, in) of a layer, decoded where it has 4 bits: for each pass, or once to `keep` it."""

    def __init__(self, base: nn.Module, *, keep: bool) -> None:
        self._base, self._keep = base, keep
        self._kept: Tensor | None = None

    def dense(self) -> Tensor:
        """In float32."""
        if self._kept is not None:
            return self._kept
        weight: Tensor = self._base.weight  # type: ignore[assignment]
        state = getattr(weight, "quant_state", None)
        if state is None:
            return weight
        decoded: Tensor = bnb.functional.dequantize_4bit(weight.data, state).float()
        self._kept = decoded if self._keep else None
        return decoded


def _is_plain(layer: Any) -> bool:
    base = layer.get_base_layer()
    return (
        isinstance(base, nn.Linear)
        and set(layer.lora_A) == {"default"}
        and isinstance(layer.lora_dropout["default"], nn.Identity)
        and not layer.use_dora["default"]
        and (isinstance(base, bnb.nn.Linear4bit) or base.weight.dtype == torch.float32)
    )


def _forward(
    layer: Any, weight: _Weight, otherwise: Callable[..., Tensor], x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    base, a, b = layer.get_base_layer(), layer.lora_A["default"].weight, layer.lora_B["default"].weight
    in_float32 = x.dtype == a.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
    if args or kwargs or layer.disable_adapters or layer.merged or not in_float32:
        return otherwise(x, *args, **kwargs)
    output: Tensor = _LoRALinear.apply(x, weight, base.bias, a, b, layer.scaling["default"])
    return output


class _LoRALinear(torch.autograd.Function):
    """y = x W' + bias + s (x A') B', with gradients of x, A and B."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: _Weight, bias: Tensor | None, a: Tensor, b: Tensor, scaling: float
    ) -> Tensor:
        rows = x.flatten(0, -2)
        inner = rows @ a.T
        # No view is returned: some families add to a layer's output in place, which autograd forbids on one.
        output = functional.linear(x, weight.dense(), bias)
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
            x_gradient = (gradient @ ctx.weight.dense()).addmm_(inner_gradient, a).view(ctx.shape)
        return x_gradient, None, None, inner_gradient.T @ rows, (gradient.T @ inner).mul_(ctx.scaling), None
