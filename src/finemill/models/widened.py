"""A matrix in the 16 bits of its file that acts as one in float32, of which a few rows are in memory at a time."""

# N tokens, I input width, O output width

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.nn.functional import embedding, linear
from torch.utils._pytree import tree_map_only

# Widened at once: more would not stay in a core's cache, and be written to memory and read again.
_VALUES_AT_ONCE = 1 << 21


class Widened(torch.Tensor):
    """Values of any floating-point type; what is computed with them is computed in float32.

    A linear layer and a look-up widen the rows that they use, anything else the whole tensor.
    """

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Sequence[type], args: Any = (), kwargs: Any = None
    ) -> Any:
        """Called by torch in the place of `func`."""
        kwargs = kwargs or {}
        with torch._C.DisableTorchFunctionSubclass():
            if func is linear and isinstance(args[1], cls):
                return _linear(*args, **kwargs)
            if func is embedding:
                return embedding(*args, **kwargs).as_subclass(torch.Tensor).float()
            if getattr(func, "__self__", None) is torch.Tensor.dtype:
                return torch.float32
            # Its own numbers, such as the shape.
            is_number = getattr(func, "__name__", "") == "__get__" or func in _ABOUT
            found = func(*args, **kwargs) if is_number else None
            if found is not None and not isinstance(found, torch.Tensor):
                return found
            return func(*tree_map_only(cls, _whole, args), **tree_map_only(cls, _whole, kwargs))


_ABOUT = (torch.Tensor.size, torch.Tensor.dim, torch.Tensor.numel, torch.Tensor.stride, torch.Tensor.__len__)


def _whole(values: torch.Tensor) -> torch.Tensor:
    return values.as_subclass(torch.Tensor).float()


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
    weight_OI = weight.as_subclass(torch.Tensor)
    x_NI = x.reshape(-1, weight_OI.shape[1])
    step = max(1, _VALUES_AT_ONCE // weight_OI.shape[1])
    y_NO = torch.empty(len(x_NI), len(weight_OI))
    for rows in (slice(first, first + step) for first in range(0, len(weight_OI), step)):
        y_NO[:, rows] = linear(x_NI, weight_OI[rows].float(), None if bias is None else bias[rows])
    return y_NO.view(*x.shape[:-1], len(weight_OI))
