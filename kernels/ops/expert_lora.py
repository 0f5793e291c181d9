"""LoRA of experts beside their large products: rows gathered and projected in one read, and the adapters' gradients.

    out[i,:] = x[token(i),:]                                       gather_project; zero where row i has no pair
    low[i,j] = sum_k out[i,k] F_e[j,k]   or  sum_k out[i,k] F_e[k,j]     also alone, of rows that are there: project
    grad_e[j,f] += scaling sum_i low[i,j] x[i,f]                   expert_gradient, over the rows i of expert e

e is the expert of row i (expert_rows.py). Shapes: x (T, K) or (R, K), low (R, r), F (E, r, K) or (E, K, r), 16 bits; r
a multiple of 16; grad (E, r, F) or any view of that shape, fp32. One program owns each number that is added to a
gradient, so runs repeat bit for bit. Triton has no tensor-core product for Turing: there the plain PyTorch path runs.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1, differentiated, one adapter per expert.
"""

from itertools import pairwise

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.expert_rows import ExpertRows
from finemill.kernels.ops.launch import check_rows
from finemill.kernels.ops.lora import use_mma_kernel

# T tokens, R rows, K width, E experts, r rank

PROJECT_COLUMNS = 128
GRADIENT_ROWS, GRADIENT_COLUMNS = 64, 128


def project_reference(x: Tensor, factor: Tensor, rows: ExpertRows, *, transposed: bool = False) -> Tensor:
    """Define low in plain PyTorch: (R, K), (E, r, K) or transposed (E, K, r) -> (R, r), zero outside all rows."""
    compute = torch.promote_types(x.dtype, torch.float32)
    low = torch.zeros((x.shape[0], factor.shape[2 if transposed else 1]), dtype=x.dtype, device=x.device)
    for expert, (begin, end) in enumerate(pairwise(rows.starts.tolist())):
        f = factor[expert].to(compute)
        low[begin:end] = (x[begin:end].to(compute) @ (f if transposed else f.t())).to(x.dtype)
    return low


def gather_reference(x: Tensor, rows: ExpertRows) -> Tensor:
    """Define out in plain PyTorch: (T, K) -> (R, K)."""
    per_token = rows.pair_row.shape[1]
    gathered = x[rows.row_pair.clamp(min=0) // per_token]
    return torch.where((rows.row_pair >= 0)[:, None], gathered, torch.zeros_like(gathered))


def expert_gradient_reference(low: Tensor, x: Tensor, rows: ExpertRows) -> Tensor:
    """Define what the gradient grows by, without scaling: (R, r), (R, F) -> (E, r, F), fp32 (fp64 stays)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    parts = pairwise(rows.starts.tolist())
    return torch.stack([low[b:e].to(compute).t() @ x[b:e].to(compute) for b, e in parts])


@triton.jit
def _project_kernel(
    x_ptr,
    factor_ptr,
    out_ptr,
    low_ptr,
    row_pair_ptr,
    tile_expert_ptr,
    end_ptr,
    x_stride,
    out_stride,
    low_stride,
    K,
    PER_TOKEN: tl.constexpr,
    RANK: tl.constexpr,
    GATHER: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    SPLIT: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    begin = tl.program_id(0) * BLOCK_M
    if begin < tl.load(end_ptr):
        expert = tl.load(tile_expert_ptr + tl.program_id(0) // SPLIT).to(tl.int64)
        row = begin + tl.arange(0, BLOCK_M)
        exists = row >= 0
        source = row.to(tl.int64)
        if GATHER:
            pair = tl.load(row_pair_ptr + row)
            exists = pair >= 0
            source = (pair // PER_TOKEN).to(tl.int64)
        if RANK:
            rank = tl.arange(0, RANK)
            low = tl.zeros((BLOCK_M, RANK), tl.float32)
        for k in range(0, K, BLOCK_K):
            column = k + tl.arange(0, BLOCK_K)
            mask = exists[:, None] & (column < K)[None, :]
            x = tl.load(x_ptr + source[:, None] * x_stride + column[None, :], mask=mask, other=0.0)
            if GATHER:
                out_ptrs = out_ptr + row.to(tl.int64)[:, None] * out_stride + column[None, :]
                tl.store(out_ptrs, x, mask=(column < K)[None, :])
            if RANK:
                if TRANSPOSED:
                    factor_ptrs = factor_ptr + expert * K * RANK + column[:, None] * RANK + rank[None, :]
                else:
                    factor_ptrs = factor_ptr + (expert * RANK + rank[None, :]) * K + column[:, None]
                factor = tl.load(factor_ptrs, mask=(column < K)[:, None], other=0.0)
                low = tl.dot(x, factor, low, input_precision="ieee")
        if RANK:
            low_ptrs = low_ptr + row.to(tl.int64)[:, None] * low_stride + rank[None, :]
            tl.store(low_ptrs, low.to(low_ptr.dtype.element_ty))


@triton.jit
def _expert_gradient_kernel(
    low_ptr,
    x_ptr,
    grad_ptr,
    starts_ptr,
    low_stride,
    x_stride,
    grad_expert_stride,
    grad_rank_stride,
    grad_column_stride,
    F,
    rank,
    scaling,
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_F: tl.constexpr,
):
    expert = tl.program_id(1)
    begin = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    if begin < end:
        column = tl.program_id(0) * BLOCK_F + tl.arange(0, BLOCK_F)
        lane = tl.arange(0, RANK)
        total = tl.zeros((BLOCK_F, RANK), tl.float32)
        for start in range(begin, end, BLOCK_T):
            row = (start + tl.arange(0, BLOCK_T)).to(tl.int64)
            x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=(column < F)[None, :], other=0.0)
            low = tl.load(low_ptr + row[:, None] * low_stride + lane[None, :])
            total = tl.dot(tl.trans(x), low, total, input_precision="ieee")
        offset = (
            expert.to(tl.int64) * grad_expert_stride
            + lane[None, :].to(tl.int64) * grad_rank_stride
            + column[:, None].to(tl.int64) * grad_column_stride
        )
        mask = (column < F)[:, None] & (lane < rank)[None, :]
        before = tl.load(grad_ptr + offset, mask=mask, other=0.0)
        tl.store(grad_ptr + offset, before + scaling * total, mask=mask)


def gather_project(
    x: Tensor, factor: Tensor | None, rows: ExpertRows, out: Tensor, low: Tensor | None, *, transposed: bool = False
) -> None:
    """Gather the tokens of every row and project them, if there is something to project with.

    Args:
        x: (T, K), any row stride.
        factor: (E, r, K), or (E, K, r) if `transposed`, contiguous; None with `low`.
        rows: which pairs lie where.
        out: (R, K) to write: rows in use alone.
        low: (R, r) to write, likewise.
        transposed: the factor's orientation.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    check_rows("x", x, (rows.pair_row.shape[0], x.shape[1]))
    check_rows("out", out, (rows.num_rows, x.shape[1]), x.dtype)
    if not use_mma_kernel(x):
        out.copy_(gather_reference(x, rows))
        if factor is not None and low is not None:
            low.copy_(project_reference(out, factor, rows, transposed=transposed))
        return
    _launch_project(x, factor, rows, out, low, gather=True, transposed=transposed)


def project(x: Tensor, factor: Tensor, rows: ExpertRows, low: Tensor, *, transposed: bool = False) -> None:
    """Project rows (R, K) that are there already, otherwise as `gather_project`."""
    check_rows("x", x, (rows.num_rows, x.shape[1]))
    if not use_mma_kernel(x):
        low.copy_(project_reference(x, factor, rows, transposed=transposed))
        return
    _launch_project(x, factor, rows, x, low, gather=False, transposed=transposed)


def _launch_project(
    x: Tensor,
    factor: Tensor | None,
    rows: ExpertRows,
    out: Tensor,
    low: Tensor | None,
    *,
    gather: bool,
    transposed: bool,
) -> None:
    width, experts = x.shape[1], rows.num_experts
    rank = 0 if low is None else low.shape[1]
    if low is not None and factor is not None:
        if tuple(factor.shape) != ((experts, width, rank) if transposed else (experts, rank, width)) or rank % 16:
            raise ValueError(f"factor is {tuple(factor.shape)} for {experts} experts, {width} columns and rank {rank}")
        if not factor.is_contiguous():
            raise ValueError(f"factor has strides {factor.stride()}: it must be contiguous")
        check_rows("low", low, (rows.num_rows, rank), x.dtype)
    block = min(rows.block, 64)
    split = rows.block // block
    _project_kernel[(rows.num_rows // block,)](
        x,
        factor,
        out,
        low,
        rows.row_pair,
        rows.tile_expert,
        rows.starts[experts:],
        x.stride(0),
        out.stride(0),
        0 if low is None else low.stride(0),
        width,
        PER_TOKEN=rows.pair_row.shape[1],
        RANK=rank,
        GATHER=gather,
        TRANSPOSED=transposed,
        BLOCK_M=block,
        SPLIT=split,
        BLOCK_K=PROJECT_COLUMNS,
        num_warps=4,
        num_stages=3,
        enable_fp_fusion=True,
    )


def expert_gradient(low: Tensor, x: Tensor, rows: ExpertRows, grad: Tensor, scaling: float) -> None:
    """Add to every expert's gradient.

    Args:
        low: (R, r).
        x: (R, F), the same dtype.
        rows: which rows belong to which expert.
        grad: (E, rank, F) fp32, any strides, rank at most r; added to.
        scaling: factor of what is added.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    width, ranks = x.shape[1], low.shape[1]
    experts, rank, columns = grad.shape
    check_rows("low", low, (rows.num_rows, ranks), x.dtype)
    check_rows("x", x, (rows.num_rows, width))
    if experts != rows.num_experts or rank > ranks or columns != width or grad.dtype != torch.float32:
        raise ValueError(
            f"grad is {tuple(grad.shape)} {grad.dtype} for {rows.num_experts} experts of {ranks} x {width}"
        )
    if not use_mma_kernel(x):
        grad.add_(expert_gradient_reference(low, x, rows)[:, :rank].to(grad.dtype), alpha=scaling)
        return
    _expert_gradient_kernel[(triton.cdiv(width, GRADIENT_COLUMNS), experts)](
        low,
        x,
        grad,
        rows.starts,
        low.stride(0),
        x.stride(0),
        *grad.stride(),
        width,
        rank,
        scaling,
        RANK=ranks,
        BLOCK_T=min(rows.block, GRADIENT_ROWS),
        BLOCK_F=GRADIENT_COLUMNS,
        num_warps=4,
        num_stages=4,
        enable_fp_fusion=True,
    )
