"""Sums that were split over programs: their fp32 partial sums added in a fixed order, so that runs repeat bit for bit.

    out[g,i,j] = scale sum_s partial[g,s,i,j]        or  out[g,i,j] += ...

A kernel that splits a sum writes one partial sum per split; this second launch adds them. No atomics: the order of the
additions depends on the number of splits alone.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 512


@triton.jit
def _sum_splits_kernel(
    partial_ptr,
    out_ptr,
    partial_group_stride,
    partial_split_stride,
    partial_row_stride,
    out_group_stride,
    out_row_stride,
    out_column_stride,
    rows,
    scale,
    splits,
    COLUMNS: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1).to(tl.int64)
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    row = element // COLUMNS
    column = element - row * COLUMNS
    mask = row < rows
    source = partial_ptr + group * partial_group_stride + row * partial_row_stride + column
    # Eight partial sums in flight.
    lane = tl.arange(0, 8).to(tl.int64)
    total = tl.zeros((8, BLOCK), tl.float32)
    for start in range(0, splits, 8):
        split = start + lane
        offset = (split * partial_split_stride)[:, None]
        total += tl.load(source[None, :] + offset, mask=(split < splits)[:, None] & mask[None, :], other=0.0)
    target = out_ptr + group * out_group_stride + row * out_row_stride + column * out_column_stride
    result = scale * tl.sum(total, axis=0)
    if ACCUMULATE:
        result += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=mask)


def empty_partial(size: int, device: torch.device) -> Tensor:
    """Memory for `size` partial sums."""
    return torch.empty(size, dtype=torch.float32, device=device)


def sum_splits(
    partial: Tensor,
    out: Tensor,
    groups: int,
    splits: int,
    shape: tuple[int, int],
    scale: float,
    out_strides: tuple[int, int, int],
    partial_strides: tuple[int, int, int] | None = None,
    *,
    accumulate: bool = False,
) -> None:
    """Add up partial sums.

    Args:
        partial: fp32, (groups, splits, *shape) in memory unless `partial_strides` says otherwise.
        out: the sums of any dtype, each rounded once.
        groups: number of independent matrices.
        splits: number of partial sums of each.
        shape: rows and columns of a matrix.
        scale: factor of the sums.
        out_strides: elements between groups, rows and columns of `out`.
        partial_strides: elements between groups, splits and rows of `partial`; columns are adjacent.
        accumulate: whether `out` is added to.
    """
    rows, columns = shape
    _sum_splits_kernel[(triton.cdiv(rows * columns, BLOCK), groups)](
        partial,
        out,
        *(partial_strides or (splits * rows * columns, rows * columns, columns)),
        *out_strides,
        rows,
        scale,
        splits,
        COLUMNS=columns,
        ACCUMULATE=accumulate,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
