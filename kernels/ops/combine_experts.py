"""A token's result from the rows of its experts, in a fixed order.

    out[t,:] = sum_j w[t,j] y[row(t, j),:]            w is 1 where no weights are given

Shapes: y (R, H), weights (T, k) fp32, out (T, H), any row pitch. fp32 sums, one rounding, no atomics. Its gradient with
respect to y is a gather (expert_lora.py), with respect to w a product of rows that swiglu_experts.py has at hand.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.expert_rows import ExpertRows
from finemill.kernels.ops.launch import check_rows, use_kernel

# T tokens, R rows, H width, k experts per token

BLOCK = 1024


def combine_experts_reference(y: Tensor, rows: ExpertRows, weights: Tensor | None = None) -> Tensor:
    """Define the op in plain PyTorch. Returns: (T, H) of y's dtype."""
    compute = torch.promote_types(y.dtype, torch.float32)
    taken = y[rows.pair_row].to(compute)
    return (taken if weights is None else taken * weights.to(compute)[..., None]).sum(dim=1).to(y.dtype)


@triton.jit
def _combine_experts_kernel(
    y_ptr,
    pair_row_ptr,
    weights_ptr,
    out_ptr,
    y_stride,
    out_stride,
    width,
    PER_TOKEN: tl.constexpr,
    WEIGHTED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK)
    token = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    total = tl.zeros((BLOCK,), tl.float32)
    for j in tl.static_range(PER_TOKEN):
        row = tl.load(pair_row_ptr + token * PER_TOKEN + j).to(tl.int64)
        part = tl.load(y_ptr + row * y_stride + column, mask=mask, other=0.0).to(tl.float32)
        if WEIGHTED:
            part *= tl.load(weights_ptr + token * PER_TOKEN + j)
        total += part
    tl.store(out_ptr + token * out_stride + column, total.to(out_ptr.dtype.element_ty), mask=mask)


def combine_experts(y: Tensor, rows: ExpertRows, out: Tensor, weights: Tensor | None = None) -> Tensor:
    """Add up each token's rows.

    Args:
        y: (R, H).
        rows: which pairs lie where.
        out: (T, H) to write.
        weights: (T, k) fp32; None for ones.
    Returns: `out`.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    tokens, per_token = rows.pair_row.shape
    width = y.shape[1]
    check_rows("y", y, (rows.num_rows, width))
    check_rows("out", out, (tokens, width), y.dtype)
    if not use_kernel(y):
        return out.copy_(combine_experts_reference(y, rows, weights))
    if weights is not None:
        check_rows("weights", weights, (tokens, per_token), torch.float32)
    _combine_experts_kernel[(tokens * triton.cdiv(width, BLOCK),)](
        y,
        rows.pair_row,
        weights,
        out,
        y.stride(0),
        out.stride(0),
        width,
        PER_TOKEN=per_token,
        WEIGHTED=weights is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return out
