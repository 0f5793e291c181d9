"""A weight in NF4 with doubly quantized scales, by bitsandbytes: its tensors, its bytes, and what rounding leaves."""

import math
from collections.abc import Mapping
from typing import Any, Literal

import bitsandbytes as bnb
import torch

# bitsandbytes' own: weights per scale, scales per nested scale, and the two tables of levels, float32.
_BLOCK, _NESTED_BLOCK = 64, 256
_LEVELS, _NESTED_LEVELS = 16, 256
# The state is JSON whose numbers have no fixed length: spaces fill it up, which its reader passes over.
_STATE_BYTES = 256
_STATE = "quant_state.bitsandbytes__nf4"

Shape = tuple[tuple[int, ...], torch.dtype]


QuantType = Literal["nf4", "fp4"]


def quantize(
    values: torch.Tensor, dtype: torch.dtype, *, quant_type: QuantType = "nf4", double_quant: bool = True
) -> tuple[torch.Tensor, Any]:
    """Codes, shape (elements / 2, 1), and bitsandbytes' state of a weight that has `dtype` when it is decoded."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    packed, state = bnb.functional.quantize_4bit(
        values.to(device, dtype), blocksize=_BLOCK, quant_type=quant_type, compress_statistics=double_quant
    )
    return packed, state


def round_trip(
    values: torch.Tensor, dtype: torch.dtype, *, quant_type: QuantType = "nf4", double_quant: bool = True
) -> torch.Tensor:
    """What training computes with in the place of a weight: float32, on the weight's device."""
    packed, state = quantize(values, dtype, quant_type=quant_type, double_quant=double_quant)
    decoded: torch.Tensor = bnb.functional.dequantize_4bit(packed, state)
    return decoded.to(values.device, torch.float32)


def encoded(name: str, values: torch.Tensor, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """The tensors under which a checkpoint holds the weight `name`, on the CPU."""
    packed, state = quantize(values, dtype)
    tensors: Mapping[str, torch.Tensor] = state.as_dict(packed=True)
    text = bytes(tensors[_STATE].tolist()).ljust(_STATE_BYTES)
    parts = dict(tensors) | {_STATE: torch.frombuffer(bytearray(text), dtype=torch.uint8)}
    return {name: packed.cpu(), **{f"{name}.{part}": parts[part].cpu() for part in _parts(values.numel())}}


def encoded_shapes(name: str, num_elements: int) -> dict[str, Shape]:
    """Shapes and types of `encoded`, in its order."""
    packed = (-(-num_elements // 2), 1), torch.uint8
    return {name: packed, **{f"{name}.{part}": shape for part, shape in _parts(num_elements).items()}}


def _parts(num_elements: int) -> dict[str, Shape]:
    blocks = -(-num_elements // _BLOCK)
    return {
        "absmax": ((blocks,), torch.uint8),
        "quant_map": ((_LEVELS,), torch.float32),
        "nested_absmax": ((-(-blocks // _NESTED_BLOCK),), torch.float32),
        "nested_quant_map": ((_NESTED_LEVELS,), torch.float32),
        _STATE: ((_STATE_BYTES,), torch.uint8),
    }


def nf4_bytes(num_elements: int) -> int:
    """Bytes of a weight in a checkpoint."""
    shapes = encoded_shapes("", num_elements).values()
    return sum(math.prod(shape) * dtype.itemsize for shape, dtype in shapes)
