"""What a benchmark of single ops is made of."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

Call = Callable[[], object]


@dataclass(frozen=True)
class Case:
    """One op at one shape.

    Args:
        op: the file it lives in, kebab-case: what the command line selects.
        name: op, variant and shape.
        bytes: what must be read and written once, for 16-bit activations.
        build: (device, dtype) -> the call and the eager code it replaces, None where there is no such code.
    """

    op: str
    name: str
    bytes: int
    build: Callable[[torch.device, torch.dtype], tuple[Call, Call | None]]


def rand(device: torch.device, dtype: torch.dtype, *shape: int) -> Tensor:
    """Normal random numbers, drawn in fp32."""
    return torch.randn(shape, device=device, dtype=torch.float32).to(dtype)
