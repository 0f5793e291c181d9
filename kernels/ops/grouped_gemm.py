"""Products of rows with their expert's matrix, the expert's LoRA in the same sum: one rounding, one launch.

    y[i,:] = x[i,:] W_e^T + low[i,:] F_e^T            W (E, N, K), F (E, N, r): F = scaling B, low = x A^T
    y[i,:] = x[i,:] W_e   + low[i,:] F_e              transposed: W (E, K, N), F (E, r, N): F = A, low = dy B

e is the expert of row i (expert_rows.py). Shapes: x (R, K), low (R, r), y (R, N), any row stride that TMA can address:
multiples of 16 bytes; W and F contiguous; r a multiple of 16, zeros beyond the adapter's rank. Rows beyond those in use
are neither read nor written. The sum is fp32 over K and r.

The grid is as many programs as run at once. Each takes every so-manieth tile of y, all columns of some rows in
neighbouring programs, so that x comes from L2 after its first read. Tiles are read and written through tensor
descriptors: TMA on Hopper and later, plain loads before. Triton has no tensor-core product for Turing: there the plain
PyTorch path runs.

Source: Gale et al., MegaBlocks (arXiv 2211.15841), section 5, for the blocks of one expert; Hu et al., LoRA (arXiv
2106.09685).
"""

from itertools import pairwise
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from finemill.kernels.ops.expert_rows import ExpertRows
from finemill.kernels.ops.launch import check_rows, is_hopper, num_sms
from finemill.kernels.ops.lora import use_mma_kernel

# R rows, K input width, N output width, E experts, r rank


class Tile(NamedTuple):
    """How a program works.

    Columns of y, columns of x at a time, warps, tiles in flight, programs per multiprocessor; whether the tiles of all
    its outputs make one pipeline.
    """

    columns: int = 256
    depth: int = 64
    warps: int = 8
    stages: int = 3
    programs: int = 1
    flatten: bool = True


HOPPER_TILES = {128: Tile(), 64: Tile(128, 64, 4, 4, 2)}
"""Tiles by rows of a block, as measured on an H200 (bench/levers.md)."""
OTHER_TILE = Tile(64, 32, 8, 3, 1, flatten=False)
"""The tile of other cards: what fits the registers and the shared memory of all of them."""
SMALL_TILE = Tile(64, 32, 4, 2, 1, flatten=False)
"""The tile of small blocks and of fp32."""


def grouped_gemm_reference(
    x: Tensor,
    weight: Tensor,
    rows: ExpertRows,
    low: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    transposed: bool = False,
) -> Tensor:
    """Define the op in plain PyTorch, in fp32 (fp64 stays). Returns: (R, N), zero outside all rows."""
    compute = torch.promote_types(x.dtype, torch.float32)
    width = weight.shape[2 if transposed else 1]
    y = torch.zeros((x.shape[0], width), dtype=x.dtype, device=x.device)
    for expert, (begin, end) in enumerate(pairwise(rows.starts.tolist())):
        if begin == end:
            continue
        w = weight[expert].to(compute)
        total = x[begin:end].to(compute) @ (w if transposed else w.t())
        if low is not None and factor is not None:
            f = factor[expert].to(compute)
            total += low[begin:end].to(compute) @ (f if transposed else f.t())
        y[begin:end] = total.to(y.dtype)
    return y


@triton.jit
def _grouped_gemm_kernel(
    x_desc,
    w_desc,  # (E N, K), or (E K, N) transposed
    low_desc,
    factor_desc,  # (E N, r), or (E r, N) transposed
    y_desc,
    tile_expert_ptr,
    end_ptr,
    N,
    K,
    RANK: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    PROGRAMS: tl.constexpr,
    FLATTEN: tl.constexpr,
):
    # Columns of W beyond the expert's are another's: y has no such columns to write. Beyond K, x is zero.
    column_tiles = tl.cdiv(N, BLOCK_N)
    tiles = tl.load(end_ptr) // BLOCK_M * column_tiles
    for tile in tl.range(tl.program_id(0), tiles, PROGRAMS, flatten=FLATTEN):
        block = tile // column_tiles
        row = block * BLOCK_M
        column = (tile - block * column_tiles) * BLOCK_N
        expert = tl.load(tile_expert_ptr + block)
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, K, BLOCK_K):
            x = x_desc.load([row, k])
            w = w_desc.load([expert * K + k, column]) if TRANSPOSED else w_desc.load([expert * N + column, k]).T
            total = tl.dot(x, w, total, input_precision="ieee")
        if RANK:
            low = low_desc.load([row, 0])
            f = (
                factor_desc.load([expert * RANK, column])
                if TRANSPOSED
                else factor_desc.load([expert * N + column, 0]).T
            )
            total = tl.dot(low, f, total, input_precision="ieee")
        y_desc.store([row, column], total.to(y_desc.dtype))


def grouped_gemm(
    x: Tensor,
    weight: Tensor,
    rows: ExpertRows,
    out: Tensor,
    low: Tensor | None = None,
    factor: Tensor | None = None,
    *,
    transposed: bool = False,
    tile: Tile | None = None,
) -> Tensor:
    """Multiply every row with its expert's matrix.

    Args:
        x: (R, K).
        weight: (E, N, K), or (E, K, N) if `transposed`, contiguous.
        rows: which rows belong to which expert.
        out: (R, N) to write; rows that are not in use stay as they are.
        low: (R, r), what `factor` is multiplied with; None without LoRA.
        factor: (E, N, r), or (E, r, N) if `transposed`, contiguous.
        transposed: whether the sum runs over the rows of each matrix.
        tile: how a program works; by the block's size by default.
    Returns: `out`.
    Raises: ValueError: shapes, dtypes or strides do not fit.
    """
    num_rows, k = x.shape
    n = out.shape[1]
    experts = rows.num_experts
    if tuple(weight.shape) != ((experts, k, n) if transposed else (experts, n, k)) or not weight.is_contiguous():
        raise ValueError(f"weight is {tuple(weight.shape)} for {experts} experts, x of {k} and out of {n} columns")
    check_rows("x", x, (rows.num_rows, k), weight.dtype)
    check_rows("out", out, (num_rows, n), x.dtype)
    rank = 0 if factor is None else factor.shape[1 if transposed else 2]
    if factor is not None:
        if tuple(factor.shape) != ((experts, rank, n) if transposed else (experts, n, rank)) or rank % 16:
            raise ValueError(f"factor is {tuple(factor.shape)} for {experts} experts and {n} columns, rank {rank}")
        assert low is not None
        check_rows("low", low, (num_rows, rank), x.dtype)
    if not use_mma_kernel(x):
        return out.copy_(grouped_gemm_reference(x, weight, rows, low, factor, transposed=transposed))
    block = rows.block
    tile = tile or _default_tile(x, block)
    weights = weight.view(-1, weight.shape[2])
    w_block = [tile.depth, tile.columns] if transposed else [tile.columns, tile.depth]
    y_desc = _describe(out, [block, tile.columns])
    low_desc = factor_desc = y_desc
    if factor is not None and low is not None:
        low_desc = _describe(low, [block, rank])
        factor_desc = _describe(
            factor.view(-1, factor.shape[2]), [rank, tile.columns] if transposed else [tile.columns, rank]
        )
    programs = tile.programs * num_sms(x.device)
    _grouped_gemm_kernel[(programs,)](
        _describe(x, [block, tile.depth]),
        _describe(weights, w_block),
        low_desc,
        factor_desc,
        y_desc,
        rows.tile_expert,
        rows.starts[experts:],
        n,
        k,
        RANK=rank,
        TRANSPOSED=transposed,
        BLOCK_M=block,
        BLOCK_N=tile.columns,
        BLOCK_K=tile.depth,
        PROGRAMS=programs,
        FLATTEN=tile.flatten,
        num_warps=tile.warps,
        num_stages=tile.stages,
        enable_fp_fusion=True,
    )
    return out


def _default_tile(x: Tensor, block: int) -> Tile:
    if x.element_size() != 2 or block not in HOPPER_TILES:
        return SMALL_TILE
    return HOPPER_TILES[block] if is_hopper(x) else OTHER_TILE


def _describe(matrix: Tensor, block: list[int]) -> TensorDescriptor:
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), block)
