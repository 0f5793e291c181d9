"""FlashAttention-4 for long sequences: 1.25 times as fast as cuDNN at 16384 tokens, in memory linear in the length.

Its deterministic backward lets the blocks of keys add to dq in a fixed order, where cuDNN's keeps the gradient of all
scores. At `FA4_LENGTH` tokens both take as long, and a step with this one draws less power (bench/levers.md). The
kernels are written in CuTe's Python, whose import takes seconds, and compiled when a machine first uses them, in about
ten; torch calls the same two functions (torch.nn.attention's FA4).

Source: Dao et al., flash-attn-4 (BSD 3-Clause), flash_attn/cute/interface.py.
"""

import functools
import importlib
import os
import warnings
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
import triton
from torch import Tensor

from finemill.kernels.ops.launch import HOPPER, capability
from finemill.kernels.ops.packing import Sequences


@functools.cache
def available(device: torch.device) -> bool:
    """Whether this is a Hopper card, the only one it was measured on, and the package is installed."""
    if device.type != "cuda" or capability(device) != HOPPER:
        return False
    try:
        version("flash-attn-4")  # looking for the module would import it, which takes seconds
    except PackageNotFoundError:
        return False
    return True


@functools.cache
def _module() -> Any:
    # Compiled kernels are kept beside Triton's: the default is a folder of a known name that anybody may write.
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_ENABLED", "1")
    folder = Path(triton.knobs.cache.dir) / "flash_attention_4"
    os.environ.setdefault("FLASH_ATTENTION_CUTE_DSL_CACHE_DIR", str(folder))
    warnings.filterwarnings("ignore", module=r"cutlass\b")  # the compiler's, about its own library
    return importlib.import_module("flash_attn.cute.interface")


def forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, out: Tensor) -> Tensor:
    """Write `out` for these sequences; shapes as in attention.py. Returns: log-sum-exp."""
    tensors = [_rows(tensor, sequences) for tensor in (q, k, v)]
    options = {"softmax_scale": scale, "causal": True} | _boundaries(sequences)
    _, lse, *_ = _module()._flash_attn_fwd(*tensors, return_lse=True, out=_rows(out, sequences), **options)
    return lse  # type: ignore[no-any-return]


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    sequences: Sequences,
    scale: float,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq, dk and dv for these sequences."""
    tensors = [_rows(tensor, sequences) for tensor in (q, k, v, out, dout)]
    dq, dk, dv = (_rows(grad, sequences) for grad in grads)
    options = {"softmax_scale": scale, "causal": True} | _boundaries(sequences)
    _module()._flash_attn_bwd(*tensors, lse, deterministic=True, dq=dq, dk=dk, dv=dv, **options)


def _rows(tensor: Tensor, sequences: Sequences) -> Tensor:
    """(T, N, D) as (B, S, N, D) if all sequences have S tokens."""
    return tensor if sequences.uniform is None else tensor.unflatten(0, sequences.uniform)


def _boundaries(sequences: Sequences) -> dict[str, Any]:
    if sequences.uniform is not None:
        return {}
    bounds = {f"cu_seqlens_{side}": sequences.cu_seqlens for side in "qk"}
    return bounds | {f"max_seqlen_{side}": sequences.max_length for side in "qk"}
