"""LoRA's gradients that read the outputs' gradient: dy B and dB in one pass over dy, on Hopper.

    dya[t,gr+j]  = sum_n dy[t,n] Bs[n,gr+j]          n over the rows of group g
    dB[n,j]     += scaling sum_t dy[t,n] xa[t,gr+j]

Shapes: dy (T, N), the groups' columns side by side, xa and dya (T, G r), Bs = scaling B (N, G r), whose blocks off the
diagonal are not read, any row pitch; dB (N, r) fp32. As two products of cuBLAS they read dy twice.

A program owns some columns of one group and a chunk of tokens. TMA brings tiles of dy, which the tensor cores read from
shared memory as they lie for dya and transposed for dB. Both sums are split over programs; split_sums.py adds them in
a fixed order. Nothing is saved. Elsewhere projection.py calls cuBLAS.

Source: Hu et al., LoRA (arXiv 2106.09685), section 4.1, differentiated.
"""

from itertools import groupby

import torch
import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from finemill.kernels.ops.division import LORA_B_COLUMNS, LORA_B_TOKENS, lora_b_fits, lora_b_split, rank_block
from finemill.kernels.ops.launch import check_gradient, check_rows, is_hopper, num_sms
from finemill.kernels.ops.split_sums import empty_partial, sum_splits
from finemill.kernels.ops.tma import can_address, copy_rows, descriptor, load_tile, new_barriers

# T tokens, N outputs of all groups, G groups, r rank of one adapter

STAGES = 4
WARPS = 4


def lora_backward_b_reference(
    dy: Tensor, xa: Tensor, b: Tensor, groups: list[tuple[int, int]], rank: int
) -> tuple[Tensor, Tensor]:
    """Evaluate the header in plain PyTorch. Returns: dya, and what dB grows by (without scaling)."""
    compute = torch.promote_types(dy.dtype, torch.float32)
    parts = [(slice(*rows), slice(g * rank, (g + 1) * rank)) for g, rows in enumerate(groups)]
    dya = torch.cat([dy[:, rows].to(compute) @ b[rows, ranks].to(compute) for rows, ranks in parts], dim=1)
    grad = torch.cat([dy[:, rows].to(compute).t() @ xa[:, ranks].to(compute) for rows, ranks in parts])
    return dya.to(dy.dtype), grad


@gluon.jit
def _request(
    number,
    dy_desc,
    xa_desc,
    tiles,
    xa_tiles,
    arrived,
    begin,
    end,
    column,
    xa_column,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    XA_STAGES: gl.constexpr,
):
    """Ask for the program's tile of this number, and with the first of a row of tiles for xa's."""
    step, part, stage = number // TILES, number % TILES, number % STAGES
    row = begin + step * dy_desc.block_type.shape[0]
    exists = row < end
    first = exists & (part == 0)
    barrier = arrived.index(stage)
    mbarrier.expect(barrier, dy_desc.block_type.nbytes, pred=exists & (part != 0))
    mbarrier.expect(barrier, dy_desc.block_type.nbytes + xa_desc.block_type.nbytes, pred=first)
    load_tile(dy_desc, [row, column + part * dy_desc.block_type.shape[1]], barrier, tiles.index(stage), pred=exists)
    load_tile(xa_desc, [row, xa_column], barrier, xa_tiles.index(step % XA_STAGES), pred=first)


@gluon.jit
def _lora_backward_b_kernel(
    dy_desc,
    xa_desc,
    b_ptr,
    dya_ptr,  # fp32, (blocks, T, RANK)
    grad_ptr,  # fp32, (chunks, RANK, N)
    b_stride,
    T,
    N,
    chunk,
    second_row,
    third_row,
    RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = dy_desc.dtype
    BLOCK_T: gl.constexpr = dy_desc.block_type.shape[0]
    BLOCK_N: gl.constexpr = dy_desc.block_type.shape[1]
    # A row's xa is asked for up to STAGES - 1 tiles early: the one in use must not be overwritten.
    XA_STAGES: gl.constexpr = (STAGES + TILES - 2) // TILES + 1
    block, split = gl.program_id(0), gl.program_id(1)
    column = block * (BLOCK_N * TILES)
    xa_column = ((column >= second_row).to(gl.int32) + (column >= third_row).to(gl.int32)) * RANK
    begin = split * chunk
    end = gl.minimum(T, begin + chunk)
    tiles = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_T, BLOCK_N], dy_desc.layout)
    xa_tiles = gl.allocate_shared_memory(dtype, [XA_STAGES, BLOCK_T, BLOCK_R], xa_desc.layout)
    arrived = new_barriers(STAGES)
    for early in gl.static_range(STAGES - 1):
        _request(
            early, dy_desc, xa_desc, tiles, xa_tiles, arrived, begin, end, column, xa_column, TILES, STAGES, XA_STAGES
        )

    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, BLOCK_R], dtype)
    b_tiles = gl.allocate_shared_memory(dtype, [TILES, BLOCK_N, BLOCK_R], b_layout)
    for part in gl.static_range(TILES):
        copy_rows(b_ptr + xa_column, b_stride, column + part * BLOCK_N, N, RANK, b_tiles.index(part), num_warps)
    fence_async_shared()

    grad_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    dya_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, num_warps // 4], [16, 4 * BLOCK_R // num_warps, 16]
    )
    grads = (gl.zeros([BLOCK_N, BLOCK_R], gl.float32, grad_layout),) * TILES
    token = gl.arange(0, BLOCK_T, gl.SliceLayout(1, dya_layout))
    rank = gl.arange(0, BLOCK_R, gl.SliceLayout(0, dya_layout))
    for step in range(0, gl.cdiv(end - begin, BLOCK_T)):
        row = begin + step * BLOCK_T
        xa_tile = xa_tiles.index(step % XA_STAGES)
        dya = gl.zeros([BLOCK_T, BLOCK_R], gl.float32, dya_layout)
        for part in gl.static_range(TILES):
            number = step * TILES + part
            stage = number % STAGES
            mbarrier.wait(arrived.index(stage), (number // STAGES) & 1)
            dy_tile = tiles.index(stage)
            dya = warpgroup_mma(dy_tile, b_tiles.index(part), dya, is_async=True)
            grad = warpgroup_mma(dy_tile.permute((1, 0)), xa_tile, grads[part], is_async=True)
            # The products of the last tile are done: its memory is free.
            _request(
                number + STAGES - 1, dy_desc, xa_desc, tiles, xa_tiles, arrived,
                begin, end, column, xa_column, TILES, STAGES, XA_STAGES,
            )  # fmt: skip
            dya, grad = warpgroup_mma_wait(0, deps=[dya, grad])
            grads = grads[:part] + (grad,) + grads[part + 1 :]  # noqa: RUF005
        rows = row + token
        dya_ptrs = dya_ptr + (block.to(gl.int64) * T + rows.to(gl.int64))[:, None] * RANK + rank[None, :]
        gl.store(dya_ptrs, dya, mask=(rows < T)[:, None] & (rank < RANK)[None, :])
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(slot))
    grad_rank = gl.arange(0, BLOCK_R, gl.SliceLayout(0, grad_layout))
    grad_block_ptr = grad_ptr + split.to(gl.int64) * RANK * N
    for part in gl.static_range(TILES):
        grad_column = column + part * BLOCK_N + gl.arange(0, BLOCK_N, gl.SliceLayout(1, grad_layout))
        grad_mask = (grad_rank < RANK)[None, :] & (grad_column < N)[:, None]
        gl.store(grad_block_ptr + (grad_rank[None, :] * N + grad_column[:, None]), grads[part], mask=grad_mask)


def has_kernel(dy: Tensor, xa: Tensor, groups: list[tuple[int, int]], rank: int) -> bool:
    """Whether `lora_backward_b` runs for these tensors: a Hopper card, groups of whole tiles, rows TMA can address."""
    return lora_b_fits(groups, rank) and can_address(dy) and can_address(xa) and is_hopper(dy)


def lora_backward_b(
    dy: Tensor, xa: Tensor, b: Tensor, groups: list[tuple[int, int]], dya: Tensor, grad_b: Tensor, scaling: float
) -> None:
    """Compute dya and add to dB.

    Args:
        dy: (T, N), gradient of the outputs, bf16 or fp16, any row stride.
        xa: (T, G r), dy's dtype, any row stride.
        b: (N, G r), scaled B's on the diagonal, any row stride; the other blocks are not read.
        groups: (first, end) of each group's columns in dy, three at most; `has_kernel` said that they fit.
        dya: (T, G r) to write, any row stride.
        grad_b: (N, r) fp32, contiguous, gradient of the stacked B's; added to.
        scaling: factor of what is added to grad_b.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    (tokens, width), rank = dy.shape, grad_b.shape[1]
    check_rows("xa", xa, (tokens, len(groups) * rank), dy.dtype)
    check_rows("b", b, (width, len(groups) * rank), dy.dtype)
    check_rows("dya", dya, (tokens, len(groups) * rank), dy.dtype)
    check_gradient("grad_b", grad_b, (width, rank))
    work = lora_b_split(tokens, groups, num_sms(dy.device))
    blocks = triton.cdiv(width, work.columns)
    dya_partial = empty_partial(blocks * tokens * rank, dy.device)
    grad_partial = empty_partial(work.chunks * rank * width, dy.device)
    starts = [begin for begin, _ in groups[1:]] + [width] * (3 - len(groups))
    _lora_backward_b_kernel[(blocks, work.chunks)](
        descriptor(dy, LORA_B_TOKENS, LORA_B_COLUMNS),
        descriptor(xa, LORA_B_TOKENS, rank_block(rank)),
        b,
        dya_partial,
        grad_partial,
        b.stride(0),
        tokens,
        width,
        work.tokens,
        *starts,
        RANK=rank,
        BLOCK_R=rank_block(rank),
        TILES=work.columns // LORA_B_COLUMNS,
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
    first_block = first_group = 0
    for of_each, alike in groupby(triton.cdiv(end - begin, work.columns) for begin, end in groups):
        count = len(list(alike))
        sum_splits(
            dya_partial[first_block * tokens * rank :],
            dya[:, first_group * rank :],
            count,
            of_each,
            (tokens, rank),
            1.0,
            (rank, dya.stride(0), 1),
        )
        first_block, first_group = first_block + count * of_each, first_group + count
    strides = (0, rank * width, width)
    sum_splits(grad_partial, grad_b, 1, work.chunks, (rank, width), scaling, (0, 1, rank), strides, accumulate=True)
