"""Tiles in shared memory on Hopper, for kernels in Gluon, by the tensor memory accelerator (TMA) where it can."""

from typing import Any

import torch
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

DTYPES = {torch.bfloat16: gl.bfloat16, torch.float16: gl.float16}

# Triton 3.6 has other names for the two copies.
load_tile = getattr(tma, "async_load", None) or tma.async_copy_global_to_shared
store_tile = getattr(tma, "async_store", None) or tma.async_copy_shared_to_global


@gluon.jit
def new_barriers(COUNT: gl.constexpr):
    """Barriers for tiles that arrive."""
    barriers = gl.allocate_shared_memory(gl.int64, [COUNT, 1], mbarrier.MBarrierLayout())
    for slot in gl.static_range(COUNT):
        mbarrier.init(barriers.index(slot), count=1)
    fence_async_shared()
    return barriers


@gluon.jit
def copy_rows(ptr, stride, row, end, COLUMNS: gl.constexpr, tile, num_warps: gl.constexpr):
    """Fill a tile through registers with rows from `row` on; rows from `end` and columns from COLUMNS on are zero."""
    ROWS: gl.constexpr = tile.shape[0]
    WIDTH: gl.constexpr = tile.shape[1]
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [256 // WIDTH, WIDTH // 8], [num_warps, 1], [1, 0])
    rows = row + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
    columns = gl.arange(0, WIDTH, gl.SliceLayout(0, layout))
    ptrs = ptr + rows.to(gl.int64)[:, None] * stride + columns[None, :]
    tile.store(gl.load(ptrs, mask=(rows < end)[:, None] & (columns < COLUMNS)[None, :], other=0.0))


def can_address(matrix: Tensor) -> bool:
    """Whether TMA reads this matrix: 16 bits an element, its start and its rows multiples of 16 bytes."""
    starts = (matrix.storage_offset(), matrix.stride(0))
    return matrix.dtype in DTYPES and all(2 * start % 16 == 0 for start in starts)


def descriptor(matrix: Tensor, rows: int, columns: int) -> Any:
    """Describe a matrix that is copied in tiles; what a tile has beyond the matrix reads as zero and is not written."""
    block = [rows, columns]
    layout = gl.NVMMASharedLayout.get_default_for(block, DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block, layout)
