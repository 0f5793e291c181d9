"""Experts of a transformers module in NF4, decoded for the time of its forward.

transformers keeps a layer's experts as 3-D parameters, which bitsandbytes does not quantize. Here every expert's matrix
is quantized as the one that the hub's checkpoint has (ops/nf4_stack.py). Between forwards the parameters keep shape,
dtype and device without memory, which is all that PEFT's `target_parameters` ask of them; the engine takes the codes.
"""

from typing import Any

import torch
from torch import Tensor, nn

from finemill.kernels.engine.nf4_quantize import BLOCKSIZE, quantize_nf4_stack
from finemill.kernels.ops.nf4_stack import NF4Stack, dequantize_nf4_stack

_STACKS = "_finemill_stacks"
_HALVES = "gate_up_proj"
"""The parameter that holds two matrices of every expert, one above the other."""


def quantized_stacks(experts: nn.Module) -> dict[str, NF4Stack]:
    """The NF4 matrices of a module of experts by parameter; empty where it is not quantized."""
    stacks: dict[str, NF4Stack] = vars(experts).get(_STACKS, {})
    return stacks


def quantize_experts(experts: nn.Module, *, double_quant: bool = True) -> None:
    """Quantize the 3-D parameters (E, N, K) of a module of experts.

    Args:
        experts: as transformers has it, gate above up in one parameter.
        double_quant: quantize the scales too.
    Raises: ValueError: rows are not whole blocks.
    """
    weights = {name: weight.detach() for name, weight in experts.named_parameters(recurse=False) if weight.dim() == 3}
    for name, weight in weights.items():
        if weight.shape[2] % BLOCKSIZE:
            raise ValueError(f"{name} has rows of {weight.shape[2]} weights, and a block of NF4 has {BLOCKSIZE}")
    attach_stacks(
        experts,
        {
            name: quantize_nf4_stack(split_halves(name, weight), double_quant=double_quant)
            for name, weight in weights.items()
        },
    )


def split_halves(name: str, weight: Tensor) -> Tensor:
    """View a parameter of experts (E, N, K) as the matrices that the hub has (M, N E / M, K)."""
    parts = 2 if name == _HALVES else 1
    return weight.reshape(weight.shape[0] * parts, weight.shape[1] // parts, weight.shape[2])


def attach_stacks(experts: nn.Module, stacks: dict[str, NF4Stack]) -> None:
    """Put NF4 matrices in the place of a module's parameters; those stay as shapes.

    Args:
        experts: has the parameters, of the compute dtype and on the device, with memory or on "meta".
        stacks: by parameter; a later change of this mapping's values is a change of the weights.
    """
    for name, stack in stacks.items():
        shape, dtype = getattr(experts, name).shape, getattr(experts, name).dtype
        empty = torch.empty(1, dtype=dtype, device=stack.packed.device).expand(shape)
        setattr(experts, name, nn.Parameter(empty, requires_grad=False))
    hollow = {name: getattr(experts, name) for name in stacks}
    vars(experts)[_STACKS] = stacks

    def decode(module: nn.Module, *_: Any) -> None:
        for name, stack in stacks.items():
            like = hollow[name]
            weight = torch.empty(like.shape, dtype=like.dtype, device=like.device)
            _put(module, name, nn.Parameter(dequantize_nf4_stack(stack, weight), requires_grad=False))

    def release(module: nn.Module, *_: Any) -> None:
        for name, parameter in hollow.items():
            _put(module, name, parameter)

    experts.register_forward_pre_hook(decode)
    # Also when a recompute ends early by an exception.
    experts.register_forward_hook(release, always_call=True)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    """Set a parameter, below what PEFT adds to it during a forward."""
    added = getattr(module, "parametrizations", {})
    if name in added:
        added[name].original = parameter
    else:
        setattr(module, name, parameter)
