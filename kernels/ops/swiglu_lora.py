"""SwiGLU's backward with the LoRA sums over the same tensors: the MLP's gradient in one read and one write.

With h = silu(g) u, dg and du as in swiglu.py, r the rank of gate's, up's and down's adapters, Bs = scaling B of gate|up
and xa (T, 2r) = [xa_g | xa_u] from the forward (projection.py), e = dya_down the gradient of down's xa:

    dya[t,j]    = sum_i dg[t,i] Bs[i,j],          dya[t,r+j]  = sum_i du[t,i] Bs[I+i,r+j]
    dB[i,j]    += scaling sum_t dg[t,i] xa[t,j],  dB[I+i,j]  += scaling sum_t du[t,i] xa[t,r+j]
    dA[j,i]    += sum_t e[t,j] h[t,i]

Shapes: dh (T, I), gate_up (T, 2I) = [g | u] that becomes [dg | du], xa and dya (T, 2r), Bs (2I, 2r), e (T, r), any row
pitch; dB (2I, r) and dA (r, I) fp32. dg, du and h are rounded to their 16 bits before they are multiplied, sums are
fp32. Apart, these take five passes over tensors of I columns; here dh, g and u are read once, dg and du written once,
and h never leaves the chip. Nothing is saved.

A program owns some columns and a chunk of tokens. It keeps its sums over tokens (dB, dA) in registers and writes
them once; its share of the sums over columns (dya) it writes for every token, over the dh that it has just read, so
that those partial sums take no memory of their own. split_sums.py adds both in a fixed order: runs repeat bit for bit.
This kernel is for every card; on Hopper swiglu_lora_hopper.py does the same 1.4 times as fast, and up to rank 32.

Source: Shazeer (arXiv 2002.05202) for SwiGLU, Hu et al. (arXiv 2106.09685) for LoRA; the sums are those of
projection.py.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops import swiglu_lora_hopper
from finemill.kernels.ops.division import (
    SWIGLU_LORA_LAUNCHES,
    rank_block,
    swiglu_lora_hopper_fits,
    swiglu_lora_hopper_split,
    swiglu_lora_split,
)
from finemill.kernels.ops.launch import INTERPRETED, check_gradient, check_rows, is_hopper, num_sms
from finemill.kernels.ops.lora import use_mma_kernel
from finemill.kernels.ops.split_sums import empty_partial, sum_splits
from finemill.kernels.ops.swiglu import swiglu_backward_reference, swiglu_reference
from finemill.kernels.ops.tma import can_address

# T tokens, I feed-forward width, r rank of one adapter


_COMPILED = tl.constexpr(not INTERPRETED)

Gradients = tuple[Tensor, Tensor, Tensor, Tensor]


def swiglu_lora_backward_reference(dh: Tensor, gate_up: Tensor, xa: Tensor, b: Tensor, dya_down: Tensor) -> Gradients:
    """Evaluate the header in plain PyTorch. Returns: d_gate_up, dya, and what dB (without scaling) and dA grow by."""
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    d_gate_up = swiglu_backward_reference(dh, gate_up)
    width, rank = dh.shape[1], dya_down.shape[1]
    parts = [(slice(0, width), slice(0, rank)), (slice(width, None), slice(rank, None))]
    grads = d_gate_up.to(compute)
    dya = torch.cat([grads[:, rows] @ b[rows, ranks].to(compute) for rows, ranks in parts], dim=1)
    grad_b = torch.cat([grads[:, rows].t() @ xa[:, ranks].to(compute) for rows, ranks in parts])
    grad_a = dya_down.to(compute).t() @ swiglu_reference(gate_up).to(compute)
    return d_gate_up, dya.to(gate_up.dtype), grad_b, grad_a


@triton.jit
def _once(x):
    """Return x, computed once: the compiler would redo SwiGLU in the register layout of every product that reads it."""
    if _COMPILED:
        x = tl.inline_asm_elementwise("mov.b32 $0, $1;", "=r,r", [x], dtype=x.dtype, is_pure=False, pack=2)
    return x


@triton.jit
def _swiglu_lora_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    d_gate_up_ptr,  # gate_up_ptr again: two names keep the addresses of stores out of the pipeline of loads
    xa_ptr,
    b_ptr,
    dya_down_ptr,
    dya_ptr,  # fp32, partial sums of every block of columns; may lie in dh
    grad_ptr,  # fp32, (splits, 3, RANK, I): dB of gate and of up, transposed, and dA
    dh_stride,
    gate_up_stride,
    xa_stride,
    b_stride,
    dya_down_stride,
    dya_stride,
    dya_block_stride,
    T,
    width,
    chunk,  # tokens per split, a multiple of BLOCK_T
    RANK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_I: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    block, split = tl.program_id(0), tl.program_id(1)
    row, rank = tl.arange(0, BLOCK_T), tl.arange(0, BLOCK_R)
    column = block * BLOCK_I + tl.arange(0, BLOCK_I)
    in_column, in_rank = column < width, rank < RANK
    b_ptrs = b_ptr + column.to(tl.int64)[:, None] * b_stride + rank[None, :]
    b_mask = in_column[:, None] & in_rank[None, :]
    b_gate = tl.load(b_ptrs, mask=b_mask, other=0.0)
    b_up = tl.load(b_ptrs + tl.cast(width, tl.int64) * b_stride + RANK, mask=b_mask, other=0.0)
    # Ranks are rows here: then the tensor cores' short side is the rank and the warps share the columns.
    grad_gate = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    grad_up = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    grad_a = tl.zeros((BLOCK_R, BLOCK_I), tl.float32)
    dtype = gate_up_ptr.dtype.element_ty
    begin = split * chunk
    for start in range(begin, tl.minimum(T, begin + chunk), BLOCK_T):
        first = tl.cast(start, tl.int64)
        in_token = row < T - start
        mask = in_token[:, None] & in_column[None, :]
        rank_mask = in_token[:, None] & in_rank[None, :]
        gate_ptrs = gate_up_ptr + first * gate_up_stride + (row[:, None] * gate_up_stride + column[None, :])
        gate = tl.load(gate_ptrs, mask=mask, other=0.0).to(tl.float32)
        up = tl.load(gate_ptrs + width, mask=mask, other=0.0).to(tl.float32)
        dh_ptrs = dh_ptr + first * dh_stride + (row[:, None] * dh_stride + column[None, :])
        dh = tl.load(dh_ptrs, mask=mask, other=0.0).to(tl.float32)
        xa_ptrs = xa_ptr + first * xa_stride + (row[:, None] * xa_stride + rank[None, :])
        xa_gate = tl.load(xa_ptrs, mask=rank_mask, other=0.0)
        xa_up = tl.load(xa_ptrs + RANK, mask=rank_mask, other=0.0)
        dya_down_ptrs = dya_down_ptr + first * dya_down_stride + (row[:, None] * dya_down_stride + rank[None, :])
        dya_down = tl.load(dya_down_ptrs, mask=rank_mask, other=0.0)
        sigmoid = 1.0 / (1.0 + tl.exp(-gate))
        silu = gate * sigmoid
        d_gate = _once((dh * up * (sigmoid + silu * (1.0 - sigmoid))).to(dtype))
        d_up = _once((dh * silu).to(dtype))
        h = _once((silu * up).to(dtype))
        d_gate_ptrs = d_gate_up_ptr + first * gate_up_stride + (row[:, None] * gate_up_stride + column[None, :])
        in_tokens = row + start < T
        store_mask = in_tokens[:, None] & in_column[None, :]
        tl.store(d_gate_ptrs, d_gate, mask=store_mask)
        tl.store(d_gate_ptrs + width, d_up, mask=store_mask)
        # Every dh of these rows and columns went into these products, so what they overwrite has been read.
        dya_gate = tl.dot(d_gate, b_gate, input_precision="ieee")
        dya_up = tl.dot(d_up, b_up, input_precision="ieee")
        dya_ptrs = dya_ptr + first * dya_stride + (row[:, None] * dya_stride + block * dya_block_stride + rank[None, :])
        dya_mask = in_tokens[:, None] & in_rank[None, :]
        tl.store(dya_ptrs, dya_gate, mask=dya_mask)
        tl.store(dya_ptrs + RANK, dya_up, mask=dya_mask)
        grad_gate = tl.dot(tl.trans(xa_gate), d_gate, grad_gate, input_precision="ieee")
        grad_up = tl.dot(tl.trans(xa_up), d_up, grad_up, input_precision="ieee")
        grad_a = tl.dot(tl.trans(dya_down), h, grad_a, input_precision="ieee")
    size = tl.cast(width, tl.int64) * RANK
    grad_mask = in_rank[:, None] & in_column[None, :]
    grad_ptrs = grad_ptr + 3 * split * size + (rank[:, None] * width + column[None, :])
    tl.store(grad_ptrs, grad_gate, mask=grad_mask)
    tl.store(grad_ptrs + size, grad_up, mask=grad_mask)
    tl.store(grad_ptrs + 2 * size, grad_a, mask=grad_mask)


def runs_fused(gate_up: Tensor, rank: int) -> bool:
    """Whether `swiglu_lora_backward` is one kernel for this tensor and rank; its plain PyTorch path runs otherwise.

    The other tensors must be such that TMA can address them (tma.py) where the rank is above 16.
    """
    return _runs_on_hopper(gate_up, rank) or _runs_anywhere(gate_up, rank)


def _runs_anywhere(gate_up: Tensor, rank: int) -> bool:
    has_kernel = gate_up.element_size() == 2 or INTERPRETED
    return rank_block(rank) in SWIGLU_LORA_LAUNCHES and has_kernel and use_mma_kernel(gate_up)


def _runs_on_hopper(gate_up: Tensor, rank: int, *others: Tensor) -> bool:
    fits = swiglu_lora_hopper_fits(gate_up.shape[1] // 2, rank)
    return fits and all(map(can_address, (gate_up, *others))) and is_hopper(gate_up)


def swiglu_lora_backward(
    dh: Tensor,
    gate_up: Tensor,
    xa: Tensor,
    b: Tensor,
    dya_down: Tensor,
    dya: Tensor,
    grad_a: Tensor,
    grad_b: Tensor,
    scaling: float,
) -> None:
    """Replace gate|up by its gradient, and compute the adapters' sums over it.

    Args:
        dh: (T, I), gradient of SwiGLU's output, any row stride; garbage afterwards.
        gate_up: (T, 2I), the forward's input, dh's dtype, any row stride; becomes d_gate_up.
        xa: (T, 2r), gate's columns, then up's, any row stride.
        b: (2I, 2r), scaled B of gate top left, of up bottom right, any row stride; the other blocks are not read.
        dya_down: (T, r), gradient of down's xa, any row stride.
        dya: (T, 2r) to write, any row stride: the spare columns of gate_up.
        grad_a: (r, I) fp32, contiguous, gradient of down's A; added to.
        grad_b: (2I, r) fp32, contiguous, gradient of the B's of gate and up; added to.
        scaling: factor of what is added to grad_b.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    (tokens, width), rank = dh.shape, dya_down.shape[1]
    check_rows("dh", dh, (tokens, width))
    check_rows("gate_up", gate_up, (tokens, 2 * width), dh.dtype)
    check_rows("xa", xa, (tokens, 2 * rank), dh.dtype)
    check_rows("b", b, (2 * width, 2 * rank), dh.dtype)
    check_rows("dya_down", dya_down, (tokens, rank), dh.dtype)
    check_rows("dya", dya, (tokens, 2 * rank), dh.dtype)
    check_gradient("grad_a", grad_a, (rank, width))
    check_gradient("grad_b", grad_b, (2 * width, rank))
    on_hopper = _runs_on_hopper(gate_up, rank, dh, xa, dya_down)
    if not on_hopper and not _runs_anywhere(gate_up, rank):
        d_gate_up, new_dya, more_b, more_a = swiglu_lora_backward_reference(dh, gate_up, xa, b, dya_down)
        gate_up.copy_(d_gate_up)
        dya.copy_(new_dya)
        grad_b.add_(more_b, alpha=scaling)
        grad_a.add_(more_a)
        return
    split = swiglu_lora_hopper_split if on_hopper else swiglu_lora_split
    work = split(tokens, width, rank_block(rank), num_sms(dh.device))
    blocks, splits = triton.cdiv(width, work.columns), work.chunks
    dya_partial, dya_stride, dya_block_stride = _dya_partial(dh, rank, work.columns)
    grad_partial = empty_partial(3 * splits * rank * width, dh.device)
    if on_hopper:
        tensors = (dh, gate_up, xa, b, dya_down, dya_partial, grad_partial)
        swiglu_lora_hopper.launch(*tensors, (dya_stride, dya_block_stride), work, rank_block(rank))
    else:
        launch = SWIGLU_LORA_LAUNCHES[rank_block(rank)]
        _swiglu_lora_backward_kernel[(blocks, splits)](
            dh,
            gate_up,
            gate_up,
            xa,
            b,
            dya_down,
            dya_partial,
            grad_partial,
            dh.stride(0),
            gate_up.stride(0),
            xa.stride(0),
            b.stride(0),
            dya_down.stride(0),
            dya_stride,
            dya_block_stride,
            tokens,
            width,
            work.tokens,
            RANK=rank,
            BLOCK_T=launch.tokens,
            BLOCK_I=launch.columns,
            BLOCK_R=rank_block(rank),
            num_warps=launch.warps,
            num_stages=launch.stages,
            enable_fp_fusion=True,
        )
    dya_strides = (0, dya_block_stride, dya_stride)
    sum_splits(dya_partial, dya, 1, blocks, (tokens, 2 * rank), 1.0, (0, dya.stride(0), 1), dya_strides)
    size, shape = rank * width, (rank, width)
    strides = (size, 3 * size, width)
    sum_splits(grad_partial, grad_b, 2, splits, shape, scaling, (size, 1, rank), strides, accumulate=True)
    sum_splits(grad_partial[2 * size :], grad_a, 1, splits, shape, 1.0, (0, width, 1), strides, accumulate=True)


def _dya_partial(dh: Tensor, rank: int, columns: int) -> tuple[Tensor, int, int]:
    """Return memory for dya's partial sums, fp32, and its strides from token to token and from block to block.

    A program finds room in its own columns of dh. Only widths that leave few columns to the last program, or an odd
    number, need memory apart.
    """
    (tokens, width), size = dh.shape, dh.element_size()
    blocks = triton.cdiv(width, columns)
    narrowest = width - (blocks - 1) * columns
    aligned = all(number * size % 4 == 0 for number in (dh.storage_offset(), dh.stride(0), width))
    if aligned and 8 * rank <= narrowest * size:
        return dh.view(torch.float32), dh.stride(0) * size // 4, columns * size // 4
    return empty_partial(tokens * blocks * 2 * rank, dh.device), blocks * 2 * rank, 2 * rank
