"""swiglu_lora.py's kernel for Hopper: tiles come and go by TMA, products read them from shared memory.

The mathematics is that file's. A warp group multiplies 64 rows at once and takes both operands, transposed or not, from
shared memory, so a tile is laid out once for all five products. SwiGLU overwrites the tiles it was loaded from; the
same memory is then stored and multiplied. Tiles are requested `STAGES - 1` ahead. A program keeps its share of dya in
registers over `tiles` of columns: with fewer, partial sums are as much traffic as a fifth of the gradient.

Gluon is Triton's own lower level, compiled by the same compiler: layouts, barriers and copies are written out.
"""

import triton
from torch import Tensor
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from finemill.kernels.ops.division import (
    SWIGLU_LORA_HOPPER_COLUMNS,
    SWIGLU_LORA_HOPPER_TILES,
    SWIGLU_LORA_HOPPER_TOKENS,
    Split,
)
from finemill.kernels.ops.tma import copy_rows, descriptor, load_tile, new_barriers, store_tile

# T tokens, I feed-forward width, r rank of one adapter

STAGES = 3
WARPS = 8


@gluon.jit
def _request(
    number,
    gate_desc,
    up_desc,
    dh_desc,
    xa_desc,
    dya_down_desc,
    tiles,
    rank_tiles,
    arrived,
    begin,
    end,
    column,
    RANK: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    RANK_STAGES: gl.constexpr,
):
    """Ask for the program's tile of this number, and with the first of a row of tiles for the rank's columns."""
    step, part, stage = number // TILES, number % TILES, number % STAGES
    row = begin + step * gate_desc.block_type.shape[0]
    column += part * gate_desc.block_type.shape[1]
    exists = row < end
    first = exists & (part == 0)
    barrier = arrived.index(stage)
    mbarrier.expect(barrier, 3 * gate_desc.block_type.nbytes, pred=exists & (part != 0))
    mbarrier.expect(barrier, 3 * gate_desc.block_type.nbytes + 3 * xa_desc.block_type.nbytes, pred=first)
    load_tile(gate_desc, [row, column], barrier, tiles.index(3 * stage), pred=exists)
    load_tile(up_desc, [row, column], barrier, tiles.index(3 * stage + 1), pred=exists)
    load_tile(dh_desc, [row, column], barrier, tiles.index(3 * stage + 2), pred=exists)
    rank_stage = step % RANK_STAGES
    load_tile(xa_desc, [row, 0], barrier, rank_tiles.index(3 * rank_stage), pred=first)
    load_tile(xa_desc, [row, RANK], barrier, rank_tiles.index(3 * rank_stage + 1), pred=first)
    load_tile(dya_down_desc, [row, 0], barrier, rank_tiles.index(3 * rank_stage + 2), pred=first)


@gluon.jit
def _swiglu_lora_backward_hopper_kernel(
    gate_desc,  # tiles of gate and of up, which become their gradients
    up_desc,
    dh_desc,
    xa_desc,
    dya_down_desc,
    b_ptr,
    dya_ptr,  # fp32, partial sums of every block of columns; may lie in dh
    grad_ptr,  # fp32, (chunks, 3, RANK, I): dB of gate and of up, transposed, and dA
    b_stride,
    dya_stride,
    dya_block_stride,
    T,
    width,
    chunk,
    RANK: gl.constexpr,
    BLOCK_R: gl.constexpr,
    TILES: gl.constexpr,
    STAGES: gl.constexpr,
    num_warps: gl.constexpr,
):
    dtype: gl.constexpr = gate_desc.dtype
    BLOCK_T: gl.constexpr = gate_desc.block_type.shape[0]
    BLOCK_I: gl.constexpr = gate_desc.block_type.shape[1]
    # A row's ranks are asked for up to STAGES - 1 tiles early: those in use must not be overwritten.
    RANK_STAGES: gl.constexpr = (STAGES + TILES - 2) // TILES + 1
    block, split = gl.program_id(0), gl.program_id(1)
    column = block * (BLOCK_I * TILES)
    begin = split * chunk
    end = gl.minimum(T, begin + chunk)
    tiles = gl.allocate_shared_memory(dtype, [3 * STAGES, BLOCK_T, BLOCK_I], gate_desc.layout)
    rank_tiles = gl.allocate_shared_memory(dtype, [3 * RANK_STAGES, BLOCK_T, BLOCK_R], xa_desc.layout)
    arrived = new_barriers(STAGES)
    for early in gl.static_range(STAGES - 1):
        _request(
            early, gate_desc, up_desc, dh_desc, xa_desc, dya_down_desc, tiles, rank_tiles, arrived,
            begin, end, column, RANK, TILES, STAGES, RANK_STAGES,
        )  # fmt: skip

    b_layout: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_I, BLOCK_R], dtype)
    b_tiles = gl.allocate_shared_memory(dtype, [2 * TILES, BLOCK_I, BLOCK_R], b_layout)
    b_up_ptr = b_ptr + gl.to_tensor(width).to(gl.int64) * b_stride + RANK
    for part in gl.static_range(TILES):
        b_row = column + part * BLOCK_I
        copy_rows(b_ptr, b_stride, b_row, width, RANK, b_tiles.index(2 * part), num_warps)
        copy_rows(b_up_ptr, b_stride, b_row, width, RANK, b_tiles.index(2 * part + 1), num_warps)

    by_vector: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [num_warps, 1], [1, 0])
    grad_layout: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [num_warps, 1], [16, BLOCK_R, 16])
    dya_layout: gl.constexpr = gl.NVMMADistributedLayout(
        [3, 0], [4, num_warps // 4], [16, 4 * BLOCK_R // num_warps, 16]
    )
    zero = gl.zeros([BLOCK_I, BLOCK_R], gl.float32, grad_layout)
    grads_gate = (zero,) * TILES
    grads_up = (zero,) * TILES
    grads_a = (zero,) * TILES
    token = gl.arange(0, BLOCK_T, gl.SliceLayout(1, dya_layout))
    rank = gl.arange(0, BLOCK_R, gl.SliceLayout(0, dya_layout))
    for step in range(0, gl.cdiv(end - begin, BLOCK_T)):
        row = begin + step * BLOCK_T
        rank_stage = 3 * (step % RANK_STAGES)
        dya_gate = gl.zeros([BLOCK_T, BLOCK_R], gl.float32, dya_layout)
        dya_up = gl.zeros([BLOCK_T, BLOCK_R], gl.float32, dya_layout)
        for part in gl.static_range(TILES):
            number = step * TILES + part
            stage = number % STAGES
            mbarrier.wait(arrived.index(stage), (number // STAGES) & 1)
            gate_tile, up_tile, dh_tile = tiles.index(3 * stage), tiles.index(3 * stage + 1), tiles.index(3 * stage + 2)
            gate = gate_tile.load(by_vector).to(gl.float32)
            up = up_tile.load(by_vector).to(gl.float32)
            dh = dh_tile.load(by_vector).to(gl.float32)
            tma.store_wait(0)  # the last tiles have left the memory that the next will fill
            _request(
                number + STAGES - 1, gate_desc, up_desc, dh_desc, xa_desc, dya_down_desc, tiles, rank_tiles, arrived,
                begin, end, column, RANK, TILES, STAGES, RANK_STAGES,
            )  # fmt: skip
            sigmoid = 1.0 / (1.0 + gl.exp(-gate))
            silu = gate * sigmoid
            gate_tile.store((dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype))
            up_tile.store((dh * silu).to(dtype))
            dh_tile.store((silu * up).to(dtype))  # h
            fence_async_shared()
            store_tile(gate_desc, [row, column + part * BLOCK_I], gate_tile)
            store_tile(up_desc, [row, column + part * BLOCK_I], up_tile)
            dya_gate = warpgroup_mma(gate_tile, b_tiles.index(2 * part), dya_gate, is_async=True)
            dya_up = warpgroup_mma(up_tile, b_tiles.index(2 * part + 1), dya_up, is_async=True)
            xa_gate, xa_up = rank_tiles.index(rank_stage), rank_tiles.index(rank_stage + 1)
            grad_gate = warpgroup_mma(gate_tile.permute((1, 0)), xa_gate, grads_gate[part], is_async=True)
            grad_up = warpgroup_mma(up_tile.permute((1, 0)), xa_up, grads_up[part], is_async=True)
            dya_down = rank_tiles.index(rank_stage + 2)
            grad_a = warpgroup_mma(dh_tile.permute((1, 0)), dya_down, grads_a[part], is_async=True)
            sums = [dya_gate, dya_up, grad_gate, grad_up, grad_a]
            dya_gate, dya_up, grad_gate, grad_up, grad_a = warpgroup_mma_wait(0, deps=sums)
            grads_gate = grads_gate[:part] + (grad_gate,) + grads_gate[part + 1 :]  # noqa: RUF005
            grads_up = grads_up[:part] + (grad_up,) + grads_up[part + 1 :]  # noqa: RUF005
            grads_a = grads_a[:part] + (grad_a,) + grads_a[part + 1 :]  # noqa: RUF005
        # Every dh of these rows and columns has been read: their sums may overwrite it.
        rows = row + token
        dya_ptrs = dya_ptr + rows.to(gl.int64)[:, None] * dya_stride + (block * dya_block_stride + rank[None, :])
        dya_mask = (rows < T)[:, None] & (rank < RANK)[None, :]
        gl.store(dya_ptrs, dya_gate, mask=dya_mask)
        gl.store(dya_ptrs + RANK, dya_up, mask=dya_mask)
    tma.store_wait(0)
    for slot in gl.static_range(STAGES):
        mbarrier.invalidate(arrived.index(slot))
    size = gl.to_tensor(width).to(gl.int64) * RANK
    grad_rank = gl.arange(0, BLOCK_R, gl.SliceLayout(0, grad_layout))
    for part in gl.static_range(TILES):
        grad_column = column + part * BLOCK_I + gl.arange(0, BLOCK_I, gl.SliceLayout(1, grad_layout))
        grad_mask = (grad_rank < RANK)[None, :] & (grad_column < width)[:, None]
        grad_ptrs = grad_ptr + 3 * split * size + (grad_rank[None, :] * width + grad_column[:, None])
        gl.store(grad_ptrs, grads_gate[part], mask=grad_mask)
        gl.store(grad_ptrs + size, grads_up[part], mask=grad_mask)
        gl.store(grad_ptrs + 2 * size, grads_a[part], mask=grad_mask)


def launch(
    dh: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    b: Tensor,
    dya_down: Tensor,
    dya_partial: Tensor,
    grad_partial: Tensor,
    dya_strides: tuple[int, int],
    work: Split,
    rank_block: int,
) -> None:
    """Launch the kernel; tensors as in `swiglu_lora_backward`, dya_strides from token to token and block to block."""
    tokens, width = dh.shape
    _swiglu_lora_backward_hopper_kernel[(triton.cdiv(width, work.columns), work.chunks)](
        *(
            descriptor(matrix, SWIGLU_LORA_HOPPER_TOKENS, SWIGLU_LORA_HOPPER_COLUMNS)
            for matrix in (gate_up[:, :width], gate_up[:, width:], dh)
        ),
        *(descriptor(matrix, SWIGLU_LORA_HOPPER_TOKENS, rank_block) for matrix in (xa, dya_down)),
        b,
        dya_partial,
        grad_partial,
        b.stride(0),
        *dya_strides,
        tokens,
        width,
        work.tokens,
        RANK=dya_down.shape[1],
        BLOCK_R=rank_block,
        TILES=SWIGLU_LORA_HOPPER_TILES[rank_block],
        STAGES=STAGES,
        num_warps=WARPS,
        enable_fp_fusion=True,
    )
