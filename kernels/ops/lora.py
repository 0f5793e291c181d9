"""LoRA under dropout: the rank-r projection, its gradients, and a mask that is replayed instead of stored.

For G stacked adapters of rank r over one input (q|k|v, gate|up, or one layer), R = G r, j a row of group g:

    xa[t,j]   = sum_k m_g[t,k] x[t,k] A[j,k] / (1-p)                  lora_project
    dA[j,k]   = sum_t dya[t,j] m_g[t,k] x[t,k] / (1-p)                lora_backward_a
    dx[t,k]  += sum_j dya[t,j] A[j,k] m_g[t,k] / (1-p)                lora_backward_x

m_g is the group's dropout mask, dya (T, R) the gradient of xa. Without dropout these are plain matrix products, which
projection.py leaves to cuBLAS. Shapes: x, dx (T, K), A (R, K), xa and dya (T, R), any row pitch; dA (R, K) fp32.

The sums over K and T are split over programs, which write fp32 partial sums that a second launch adds in a fixed order:
no atomics, so runs repeat bit for bit. Only xa is saved. The mask: Philox-4x32-10 on (column / 8, token, stream, 0)
gives eight 16-bit numbers, one per column, and drops those below round(65536 p); the same counter in the backward gives
the same mask. Every adapter has a stream of its own. Triton has no tensor-core product for Turing: there the plain
PyTorch path runs, through cuBLAS.

Source: Hu et al., LoRA (arXiv 2106.09685); Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.division import rank_block
from finemill.kernels.ops.launch import capability, check_gradient, check_rows, num_sms, use_kernel
from finemill.kernels.ops.split_sums import empty_partial, sum_splits

# T tokens, K input width, G groups, r rank of one adapter, R = G r

MAX_RANK = 256
BLOCK_T = 64
MMA_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class LoRADropout:
    """Dropout on the adapters' input, replayed from a counter instead of a stored mask.

    Args:
        p: probability to drop; applied as round(65536 p) / 65536, and kept values are scaled by its complement.
        seed: one int64 element on the device of the data; change it for every micro-batch (a graph replays the read).
        stream: number of the first adapter among all of the model, so that no two share a mask; group g adds g.
    """

    p: float
    seed: Tensor
    stream: int = 0

    def __post_init__(self) -> None:
        """Refuse a probability without survivors and a seed that is not one int64."""
        if not 0.0 <= self.p < 1.0:
            raise ValueError(f"lora_dropout is {self.p}, allowed are 0 <= p < 1")
        if self.seed.numel() != 1 or self.seed.dtype != torch.int64:
            raise ValueError(f"seed is {tuple(self.seed.shape)} {self.seed.dtype}, expected one int64 element")

    @property
    def threshold(self) -> int:
        """16-bit numbers below this are dropped."""
        return round(self.p * 65536)

    @property
    def scale(self) -> float:
        """What kept values are multiplied by."""
        return 65536 / (65536 - self.threshold)


def dropout_mask_reference(tokens: int, width: int, dropout: LoRADropout, group: int = 0) -> Tensor:
    """Return the keep mask (tokens, width), bool, of one group: Philox-4x32-10 in plain PyTorch."""
    device, low = dropout.seed.device, 0xFFFFFFFF

    def multiply(a: int, b: Tensor) -> tuple[Tensor, Tensor]:
        """High and low word of a 32 x 32 bit product, in two halves to stay inside int64."""
        upper, lower = a * (b >> 16), a * (b & 0xFFFF)
        return (upper + (lower >> 16)) >> 16, ((upper << 16) + lower) & low

    column = torch.arange(triton.cdiv(width, 8), device=device)
    c0, c1 = column[None, :].expand(tokens, -1), torch.arange(tokens, device=device)[:, None].expand(-1, len(column))
    c2, c3 = torch.full_like(c0, dropout.stream + group), torch.zeros_like(c0)
    seed = dropout.seed.reshape(())
    k0, k1 = seed & low, (seed >> 32) & low
    for _ in range(10):
        (high_b, low_b), (high_a, low_a) = multiply(0xCD9E8D57, c2), multiply(0xD2511F53, c0)
        c0, c1, c2, c3 = high_b ^ c1 ^ k0, low_b, high_a ^ c3 ^ k1, low_a
        k0, k1 = (k0 + 0x9E3779B9) & low, (k1 + 0xBB67AE85) & low
    halves = torch.stack([half for word in (c0, c1, c2, c3) for half in (word & 0xFFFF, word >> 16)], dim=-1)
    return (halves.reshape(tokens, -1) >= dropout.threshold)[:, :width]


def use_mma_kernel(tensor: Tensor) -> bool:
    """Whether an op with matrix products launches its kernel: `use_kernel`, where tensor cores are there for Triton."""
    return use_kernel(tensor) and (not tensor.is_cuda or capability(tensor.device) >= MMA_CAPABILITY)


def _dropped(x: Tensor, dropout: LoRADropout, group: int) -> Tensor:
    """`x` with one group's mask and scale applied, in fp32 (fp64 stays)."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return exact * dropout_mask_reference(x.shape[0], x.shape[1], dropout, group) * dropout.scale


def lora_project_reference(x: Tensor, a: Tensor, dropout: LoRADropout, groups: int = 1) -> Tensor:
    """Define xa in plain PyTorch: (T, K), (R, K) -> (T, R) of x's dtype, accumulated in fp32 (fp64 stays)."""
    parts = [
        _dropped(x, dropout, group) @ part.to(torch.promote_types(x.dtype, torch.float32)).t()
        for group, part in enumerate(a.chunk(groups))
    ]
    return torch.cat(parts, dim=1).to(x.dtype)


@triton.jit
def _keep(seed_ptr, stream, token, first_column, THRESHOLD: tl.constexpr, COLUMNS: tl.constexpr):
    """Dropout mask of a tile: token (BT,), columns first_column + [0, COLUMNS), first_column a multiple of 8."""
    column = first_column // 8 + tl.arange(0, COLUMNS // 8)
    zero = token[:, None].to(tl.int32) * 0 + column[None, :] * 0
    r0, r1, r2, r3 = tl.philox(
        tl.load(seed_ptr), zero + column[None, :], zero + token[:, None].to(tl.int32), zero + stream, zero
    )
    words = tl.join(tl.join(r0, r2), tl.join(r1, r3))
    halves = tl.join(words & 0xFFFF, words >> 16)
    return tl.reshape(halves, (token.shape[0], COLUMNS)) >= THRESHOLD


@triton.jit
def _lora_project_kernel(
    x_ptr,
    a_ptr,
    out_ptr,
    seed_ptr,
    x_stride,
    a_stride,
    out_stride,
    T,
    stream,
    scale,
    K: tl.constexpr,
    RANK: tl.constexpr,
    SPLITS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    # With SPLITS > 1 `out` is the fp32 partial sums (G * SPLITS, T, RANK), else the result itself.
    CHUNK: tl.constexpr = ((K + SPLITS - 1) // SPLITS + BLOCK_K - 1) // BLOCK_K * BLOCK_K
    split, group = tl.program_id(1), tl.program_id(2)
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    rank = tl.arange(0, BLOCK_R)
    in_token, in_rank = token < T, rank < RANK
    first = split * CHUNK
    total = tl.zeros((BLOCK_T, BLOCK_R), tl.float32)
    for start in range(0, CHUNK, BLOCK_K):
        k = first + start + tl.arange(0, BLOCK_K)
        in_k = k < K
        x_offset = (token * x_stride)[:, None] + k[None, :]
        x = tl.load(x_ptr + x_offset, mask=in_token[:, None] & in_k[None, :], other=0.0)
        keep = _keep(seed_ptr, stream + group, token, first + start, THRESHOLD, BLOCK_K)
        x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
        a_offset = (group * RANK + rank)[:, None] * a_stride + k[None, :]
        a = tl.load(a_ptr + a_offset, mask=in_rank[:, None] & in_k[None, :], other=0.0)
        total = tl.dot(x, tl.trans(a), total, input_precision="ieee")
    mask = in_token[:, None] & in_rank[None, :]
    if SPLITS > 1:
        partial = ((group * SPLITS + split).to(tl.int64) * T + token) * RANK
        tl.store(out_ptr + partial[:, None] + rank[None, :], total, mask=mask)
    else:
        out_offset = (token * out_stride)[:, None] + (group * RANK + rank)[None, :]
        tl.store(out_ptr + out_offset, (scale * total).to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _lora_backward_a_kernel(
    dya_ptr,
    x_ptr,
    partial_ptr,  # (G * token splits, RANK, K)
    seed_ptr,
    dya_stride,
    x_stride,
    T,
    chunk,  # tokens per split, a multiple of BLOCK_T
    stream,
    K: tl.constexpr,
    RANK: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    first_column, split, group = tl.program_id(0) * BLOCK_K, tl.program_id(1), tl.program_id(2)
    k, rank = first_column + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    in_k, in_rank = k < K, rank < RANK
    total = tl.zeros((BLOCK_K, BLOCK_R), tl.float32)
    for start in range(0, chunk, BLOCK_T):
        token = (split * chunk + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_token = token < T
        x_offset = (token * x_stride)[:, None] + k[None, :]
        x = tl.load(x_ptr + x_offset, mask=in_token[:, None] & in_k[None, :], other=0.0)
        keep = _keep(seed_ptr, stream + group, token, first_column, THRESHOLD, BLOCK_K)
        x = tl.where(keep, x, 0.0).to(x_ptr.dtype.element_ty)
        dya_offset = (token * dya_stride)[:, None] + (group * RANK + rank)[None, :]
        dya = tl.load(dya_ptr + dya_offset, mask=in_token[:, None] & in_rank[None, :], other=0.0)
        total = tl.dot(tl.trans(x), dya, total, input_precision="ieee")
    layer = (group * tl.num_programs(1) + split).to(tl.int64) * (RANK * K)
    offset = k[:, None] + rank[None, :] * K
    tl.store(partial_ptr + layer + offset, total, mask=in_k[:, None] & in_rank[None, :])


@triton.jit
def _lora_backward_x_kernel(
    dya_ptr,
    a_ptr,
    dx_ptr,
    seed_ptr,
    dya_stride,
    a_stride,
    dx_stride,
    T,
    stream,
    scale,
    K: tl.constexpr,
    RANK: tl.constexpr,
    GROUPS: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    token = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    first_column = tl.program_id(1) * BLOCK_K
    k, rank = first_column + tl.arange(0, BLOCK_K), tl.arange(0, BLOCK_R)
    in_token, in_k, in_rank = token < T, k < K, rank < RANK
    total = tl.zeros((BLOCK_T, BLOCK_K), tl.float32)
    for group in tl.static_range(GROUPS):
        dya_offset = (token * dya_stride)[:, None] + (group * RANK + rank)[None, :]
        dya = tl.load(dya_ptr + dya_offset, mask=in_token[:, None] & in_rank[None, :], other=0.0)
        a_offset = (group * RANK + rank)[:, None] * a_stride + k[None, :]
        a = tl.load(a_ptr + a_offset, mask=in_rank[:, None] & in_k[None, :], other=0.0)
        keep = _keep(seed_ptr, stream + group, token, first_column, THRESHOLD, BLOCK_K)
        total += tl.where(keep, tl.dot(dya, a, input_precision="ieee"), 0.0)
    mask = in_token[:, None] & in_k[None, :]
    dx_ptrs = dx_ptr + (token * dx_stride)[:, None] + k[None, :]
    dx = tl.load(dx_ptrs, mask=mask, other=0.0).to(tl.float32) + scale * total
    tl.store(dx_ptrs, dx.to(dx_ptr.dtype.element_ty), mask=mask)


def lora_project(x: Tensor, a: Tensor, out: Tensor | None = None, *, dropout: LoRADropout, groups: int = 1) -> Tensor:
    """Project the dropped-out x onto the rows of stacked A's.

    Args:
        x: (T, K), bf16, fp16 or fp32, any row stride.
        a: (R, K), x's dtype, any row stride; `groups` adapters of R / groups rows, each with a mask of its own.
        out: (T, R) to write, any row stride (the spare columns of an extended activation); new by default.
        dropout: applied to x.
        groups: number of stacked adapters.
    Returns: xa, that is `out`.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, width), ranks = x.shape, a.shape[0]
    check_rows("x", x, (tokens, width))
    check_rows("a", a, (ranks, width), x.dtype)
    if out is None:
        out = torch.empty((tokens, ranks), dtype=x.dtype, device=x.device)
    check_rows("out", out, (tokens, ranks), x.dtype)
    rank = _rank_of(ranks, groups)
    if not use_mma_kernel(x):
        return out.copy_(lora_project_reference(x, a, dropout, groups))
    block_r = rank_block(rank)
    block_k = 32 if block_r > 128 else 64
    token_tiles = triton.cdiv(tokens, BLOCK_T)
    splits = _splits(token_tiles * groups, triton.cdiv(width, block_k), x.device)
    target = out if splits == 1 else empty_partial(groups * splits * tokens * rank, x.device)
    _lora_project_kernel[(token_tiles, splits, groups)](
        x,
        a,
        target,
        dropout.seed,
        x.stride(0),
        a.stride(0),
        out.stride(0),
        tokens,
        dropout.stream,
        dropout.scale,
        K=width,
        RANK=rank,
        SPLITS=splits,
        THRESHOLD=dropout.threshold,
        BLOCK_T=BLOCK_T,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=8 if block_r > 32 else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    if splits > 1:
        sum_splits(target, out, groups, splits, (tokens, rank), dropout.scale, (rank, out.stride(0), 1))
    return out


def lora_backward_a(
    dya: Tensor, x: Tensor, grad_a: Tensor, dropout: LoRADropout, groups: int = 1, *, accumulate: bool = False
) -> Tensor:
    """Compute dA from one read of x for every group.

    Args:
        dya: (T, R), any row stride.
        x: (T, K), the forward's input, dya's dtype, any row stride.
        grad_a: (R, K) fp32, contiguous; overwritten, or added to with `accumulate`.
        dropout: the forward's, with an unchanged seed.
        groups: number of stacked adapters.
        accumulate: whether grad_a is added to.
    Returns: grad_a.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, width), ranks = x.shape, dya.shape[1]
    check_rows("dya", dya, (tokens, ranks), x.dtype)
    check_rows("x", x, (tokens, width))
    check_gradient("grad_a", grad_a, (ranks, width))
    rank = _rank_of(ranks, groups)
    if not use_mma_kernel(x):
        parts = [part.t() @ _dropped(x, dropout, g) for g, part in enumerate(dya.float().chunk(groups, dim=1))]
        return grad_a.add_(torch.cat(parts)) if accumulate else grad_a.copy_(torch.cat(parts))
    block_r = rank_block(rank)
    block_k = _column_block(block_r)
    tiles, blocks = triton.cdiv(width, block_k), triton.cdiv(tokens, BLOCK_T)
    per_split = triton.cdiv(blocks, _splits(tiles * groups, blocks, x.device))
    splits = triton.cdiv(blocks, per_split)
    partial = empty_partial(groups * splits * rank * width, x.device)
    _lora_backward_a_kernel[(tiles, splits, groups)](
        dya,
        x,
        partial,
        dropout.seed,
        dya.stride(0),
        x.stride(0),
        tokens,
        per_split * BLOCK_T,
        dropout.stream,
        K=width,
        RANK=rank,
        THRESHOLD=dropout.threshold,
        BLOCK_T=BLOCK_T,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=4 if block_r < 32 else 8,
        num_stages=3 if block_k * BLOCK_T <= 8192 else 2,
        enable_fp_fusion=True,
    )
    shape, strides = (rank, width), (rank * width, width, 1)
    sum_splits(partial, grad_a, groups, splits, shape, dropout.scale, strides, accumulate=accumulate)
    return grad_a


def lora_backward_x(dya: Tensor, a: Tensor, dx: Tensor, dropout: LoRADropout, groups: int = 1) -> Tensor:
    """Add the adapters' share to the gradient of the input, in place.

    Args:
        dya: (T, R), any row stride.
        a: (R, K), dya's dtype, any row stride.
        dx: (T, K), added to, any row stride.
        dropout: the forward's, with an unchanged seed.
        groups: number of stacked adapters.
    Returns: dx.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, ranks), width = dya.shape, a.shape[1]
    check_rows("dya", dya, (tokens, ranks))
    check_rows("a", a, (ranks, width), dya.dtype)
    check_rows("dx", dx, (tokens, width), dya.dtype)
    rank = _rank_of(ranks, groups)
    if not use_mma_kernel(dx):
        exact = dx.to(torch.promote_types(dx.dtype, torch.float32))
        for group, (left, right) in enumerate(zip(dya.chunk(groups, dim=1), a.chunk(groups), strict=True)):
            share = left.to(exact.dtype) @ right.to(exact.dtype)
            exact = exact + _dropped(share, dropout, group)
        return dx.copy_(exact)
    block_r = rank_block(rank)
    block_k = min(128, _column_block(block_r))
    _lora_backward_x_kernel[(triton.cdiv(tokens, BLOCK_T), triton.cdiv(width, block_k))](
        dya,
        a,
        dx,
        dropout.seed,
        dya.stride(0),
        a.stride(0),
        dx.stride(0),
        tokens,
        dropout.stream,
        dropout.scale,
        K=width,
        RANK=rank,
        GROUPS=groups,
        THRESHOLD=dropout.threshold,
        BLOCK_T=BLOCK_T,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=8,
        num_stages=2,
        enable_fp_fusion=True,
    )
    return dx


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Ways to split a sum: eight programs for every multiprocessor, so that the last wave of them costs little."""
    return max(1, min(most, -(-8 * num_sms(device) // programs)))


def _column_block(block_r: int) -> int:
    """Columns per program: as many as keep the fp32 accumulator at 64 registers per thread or below."""
    return max(32, min(256, 8192 // block_r))


def _rank_of(ranks: int, groups: int) -> int:
    if ranks % groups or not 1 <= ranks // groups <= MAX_RANK:
        raise ValueError(f"{ranks} rows in {groups} groups: the rank must be equal in all, 1 to {MAX_RANK}")
    return ranks // groups
