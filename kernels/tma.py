"""Hopper's tensor memory accelerator (TMA), as Gluon kernels use it: descriptors of matrices, and what can have one."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Triton 3.6 has other names for the two copies.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


def can_address(matrix: Tensor) -> bool:
    """Whether TMA reads this matrix: 16 bits an element, its start and its rows multiples of 16 bytes."""
    starts = (matrix.storage_offset(), matrix.stride(0))
    return matrix.dtype in DTYPES and all(2 * start % 16 == 0 for start in starts)


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Describe a matrix that is copied in tiles; what a tile has beyond the matrix reads as zero and is not written."""
    block = [rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)
