"""Skinny matrix products of LoRA: rank-r projections and one-read gradient reductions, with replayed dropout.

For G stacked adapters of rank r over one input (q|k|v, gate|up, or one layer), R = G r, N = N_1 + ... + N_G:

    xa[t,j]   = scale sum_k m[g(j)][t,k] x[t,k] A[j,k] / (1-p)                               lora_project
    dya[t,j]  = sum_{n in group g(j)} dy[t,n] B[n,j]                                         lora_backward_b
    dB[n,i]   = scale sum_t dy[t,n] xa[t, g(n) r + i]                                        lora_backward_b
    dA[j,k]   = sum_t dya[t,j] m[g(j)][t,k] x[t,k] / (1-p)                                   lora_backward_a
    dx[t,k]  += sum_j dya[t,j] A[j,k] m[g(j)][t,k] / (1-p)                                   lora_backward_x

m is the dropout mask of group g, 1 without dropout; then dx comes from the extended GEMM and lora_backward_x is not
needed. Shapes: x (T, K), dy (T, N), A (R, K), B (N, R) block-diagonal: row n uses columns [g r, (g+1) r); xa, dya
(T, R); dA (R, K), dB (N, r) fp32. Every matrix but dA and dB may be pitched.

Each kernel reads its large operand once. Sums over T or N are split over programs, which write fp32 partial sums that
a second launch adds in a fixed order: no atomics, so runs repeat bit for bit. Only xa is saved, no mask:
Philox-4x32-10 on (column / 8, token, stream, 0) gives eight 16-bit numbers, one per column, and drops those
below round(65536 p); the same counter in the backward gives the same mask. Every adapter has a stream of its own.
Triton has no tensor-core product for Turing: there the plain PyTorch path runs, through cuBLAS.

Source: Hu et al., LoRA (arXiv 2106.09685); Salmon et al., Parallel random numbers: as easy as 1, 2, 3 (SC 2011).
"""

from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.launch import check_rows, num_sms, use_kernel

# T tokens, K input width, N output width, G groups, r rank of one adapter, R = G r

MAX_GROUPS = 3
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


def _use_kernel(tensor: Tensor) -> bool:
    return use_kernel(tensor) and (
        not tensor.is_cuda or torch.cuda.get_device_capability(tensor.device) >= MMA_CAPABILITY
    )


def _dropped(x: Tensor, dropout: LoRADropout | None, group: int) -> Tensor:
    """`x` with one group's mask and scale applied, in fp32 (fp64 stays)."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    if dropout is None:
        return exact
    return exact * dropout_mask_reference(x.shape[0], x.shape[1], dropout, group) * dropout.scale


def lora_project_reference(
    x: Tensor, a: Tensor, scale: float = 1.0, dropout: LoRADropout | None = None, groups: int = 1
) -> Tensor:
    """Define xa in plain PyTorch: (T, K), (R, K) -> (T, R) of x's dtype, accumulated in fp32 (fp64 stays)."""
    parts = [
        _dropped(x, dropout, group) @ part.to(torch.promote_types(x.dtype, torch.float32)).t()
        for group, part in enumerate(a.chunk(groups))
    ]
    return (scale * torch.cat(parts, dim=1)).to(x.dtype)


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
        if THRESHOLD > 0:
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
def _lora_backward_kernel(
    wide_ptr,  # dy or x: (T, WIDTH)
    skinny_ptr,  # xa or dya: (T, R)
    b_ptr,
    reduced_ptr,  # partial sums over tokens: (G * token splits, ...), one (RANK, WIDTH) or (WIDTH, RANK) matrix each
    product_ptr,  # partial sums over columns: (column tiles, T, RANK)
    seed_ptr,
    wide_stride,
    skinny_stride,
    b_stride,
    reduced_column_stride,
    reduced_rank_stride,
    T,
    chunk,  # tokens per split, a multiple of BLOCK_T
    stream,
    WIDTH_0: tl.constexpr,
    WIDTH_1: tl.constexpr,
    WIDTH_2: tl.constexpr,
    RANK: tl.constexpr,
    PRODUCT: tl.constexpr,
    THRESHOLD: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_R: tl.constexpr,
):
    WIDTH: tl.constexpr = WIDTH_0 + WIDTH_1 + WIDTH_2
    TILES_0: tl.constexpr = (WIDTH_0 + BLOCK_N - 1) // BLOCK_N
    TILES_1: tl.constexpr = (WIDTH_1 + BLOCK_N - 1) // BLOCK_N
    tile, split = tl.program_id(0), tl.program_id(1)
    # Groups by column tile (dy: each tile belongs to one adapter), or one grid layer each (x: all adapters read it).
    group = tl.program_id(2) + tl.where(tile >= TILES_0, 1, 0) + tl.where(tile >= TILES_0 + TILES_1, 1, 0)
    first_tile = tl.where(tile >= TILES_0 + TILES_1, TILES_0 + TILES_1, tl.where(tile >= TILES_0, TILES_0, 0))
    begin = tl.where(tile >= TILES_0 + TILES_1, WIDTH_0 + WIDTH_1, tl.where(tile >= TILES_0, WIDTH_0, 0))
    end = tl.where(tile >= TILES_0 + TILES_1, WIDTH, tl.where(tile >= TILES_0, WIDTH_0 + WIDTH_1, WIDTH_0))
    first_column = begin + (tile - first_tile) * BLOCK_N
    column = first_column + tl.arange(0, BLOCK_N)
    rank = tl.arange(0, BLOCK_R)
    in_column, in_rank = column < end, rank < RANK
    if PRODUCT:
        b_offset = column[:, None].to(tl.int64) * b_stride + (group * RANK + rank)[None, :]
        b = tl.load(b_ptr + b_offset, mask=in_column[:, None] & in_rank[None, :], other=0.0)
    total = tl.zeros((BLOCK_N, BLOCK_R), tl.float32)
    first_token = split * chunk
    for start in range(0, chunk, BLOCK_T):
        token = (first_token + start + tl.arange(0, BLOCK_T)).to(tl.int64)
        in_token = token < T
        wide_offset = (token * wide_stride)[:, None] + column[None, :]
        wide = tl.load(wide_ptr + wide_offset, mask=in_token[:, None] & in_column[None, :], other=0.0)
        if THRESHOLD > 0:
            keep = _keep(seed_ptr, stream + group, token, first_column, THRESHOLD, BLOCK_N)
            wide = tl.where(keep, wide, 0.0).to(wide_ptr.dtype.element_ty)
        skinny_offset = (token * skinny_stride)[:, None] + (group * RANK + rank)[None, :]
        skinny = tl.load(skinny_ptr + skinny_offset, mask=in_token[:, None] & in_rank[None, :], other=0.0)
        total = tl.dot(tl.trans(wide), skinny, total, input_precision="ieee")
        if PRODUCT:
            product = tl.dot(wide, b, input_precision="ieee")
            product_offset = ((tile.to(tl.int64) * T + token) * RANK)[:, None] + rank[None, :]
            tl.store(product_ptr + product_offset, product, mask=in_token[:, None] & in_rank[None, :])
    layer = (tl.program_id(2) * tl.num_programs(1) + split).to(tl.int64) * (WIDTH * RANK)
    reduced_offset = column[:, None] * reduced_column_stride + rank[None, :] * reduced_rank_stride
    tl.store(reduced_ptr + layer + reduced_offset, total, mask=in_column[:, None] & in_rank[None, :])


@triton.jit
def _sum_splits_kernel(
    partial_ptr,  # (splits of group 0, then 1, then 2) x rows x columns
    out_ptr,
    out_row_stride,
    out_group_stride,
    rows,
    scale,
    COLUMNS: tl.constexpr,
    SPLITS_0: tl.constexpr,
    SPLITS_1: tl.constexpr,
    SPLITS_2: tl.constexpr,
    ACCUMULATE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(1)
    first = tl.where(group == 0, 0, tl.where(group == 1, SPLITS_0, SPLITS_0 + SPLITS_1))
    splits = tl.where(group == 0, SPLITS_0, tl.where(group == 1, SPLITS_1, SPLITS_2))
    element = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    size = rows.to(tl.int64) * COLUMNS
    mask = element < size
    # Eight partial sums in flight; the order of additions depends on their number alone.
    lane = tl.arange(0, 8)
    total = tl.zeros((8, BLOCK), tl.float32)
    for start in range(0, splits, 8):
        split = start + lane
        offset = (first + split).to(tl.int64)[:, None] * size + element[None, :]
        total += tl.load(partial_ptr + offset, mask=(split < splits)[:, None] & mask[None, :], other=0.0)
    row = element // COLUMNS
    target = out_ptr + group * out_group_stride + row * out_row_stride + (element - row * COLUMNS)
    result = scale * tl.sum(total, axis=0)
    if ACCUMULATE:
        result += tl.load(target, mask=mask, other=0.0).to(tl.float32)
    tl.store(target, result.to(out_ptr.dtype.element_ty), mask=mask)


def lora_project(
    x: Tensor,
    a: Tensor,
    out: Tensor | None = None,
    scale: float = 1.0,
    dropout: LoRADropout | None = None,
    groups: int = 1,
) -> Tensor:
    """Project x onto the rows of stacked A's: out = scale * dropout(x) A^T.

    Args:
        x: (T, K), bf16, fp16 or fp32, any row stride.
        a: (R, K), x's dtype, any row stride; `groups` adapters of R / groups rows.
        out: (T, R) to write, any row stride (the spare columns of an extended activation); new by default.
        scale: factor of the result.
        dropout: applied to x, with a mask of its own for every group.
        groups: number of stacked adapters; only matters with dropout.
    Returns: `out`.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, width), rank = x.shape, a.shape[0]
    check_rows("x", x, (tokens, width))
    check_rows("a", a, (rank, width), x.dtype)
    if out is None:
        out = torch.empty((tokens, rank), dtype=x.dtype, device=x.device)
    check_rows("out", out, (tokens, rank), x.dtype)
    groups = _programs_per_input(rank, groups, dropout)
    block_r = _rank_block(rank, groups)
    if not _use_kernel(x):
        return out.copy_(lora_project_reference(x, a, scale, dropout, groups))
    block_k = 32 if block_r > 128 else 64
    scale *= 1.0 if dropout is None else dropout.scale
    token_tiles = triton.cdiv(tokens, BLOCK_T)
    splits = _splits(token_tiles * groups, triton.cdiv(width, block_k), x.device)
    target = out if splits == 1 else _partial(splits * groups * tokens * (rank // groups), x.device)
    _lora_project_kernel[(token_tiles, splits, groups)](
        x,
        a,
        target,
        None if dropout is None else dropout.seed,
        x.stride(0),
        a.stride(0),
        out.stride(0),
        tokens,
        0 if dropout is None else dropout.stream,
        scale,
        K=width,
        RANK=rank // groups,
        SPLITS=splits,
        THRESHOLD=0 if dropout is None else dropout.threshold,
        BLOCK_T=BLOCK_T,
        BLOCK_K=block_k,
        BLOCK_R=block_r,
        num_warps=8 if block_r > 32 else 4,
        num_stages=3,
        enable_fp_fusion=True,
    )
    if splits > 1:
        _sum_splits(target, out, tokens, rank // groups, [splits] * groups, scale, out.stride(0), rank // groups)
    return out


def lora_backward_b(
    dy: Tensor,
    xa: Tensor,
    b: Tensor,
    grad_b: Tensor,
    widths: tuple[int, ...],
    out: Tensor | None = None,
    scale: float = 1.0,
    accumulate: bool = False,
) -> Tensor:
    """Read dy once for both dya = dy B and dB = scale * dy^T xa.

    Args:
        dy: (T, N) gradient of the stacked outputs, any row stride.
        xa: (T, R) from the forward, dy's dtype, any row stride.
        b: (N, R) block-diagonal stack of the B's (times scaling, if dya is to carry it), dy's dtype, any row stride;
            entries off the diagonal blocks are not read.
        grad_b: (N, r) fp32, the stacked dB's, contiguous; overwritten, or added to with `accumulate`.
        widths: (N_1, ..., N_G), at most three.
        out: (T, R) that receives dya, any row stride; new by default.
        scale: factor of dB.
        accumulate: whether grad_b is added to.
    Returns: dya, that is `out`.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, width), rank, groups = dy.shape, xa.shape[1], len(widths)
    if groups > MAX_GROUPS or sum(widths) != width:
        raise ValueError(f"widths {widths} must be at most {MAX_GROUPS} and sum to dy's width {width}")
    check_rows("dy", dy, (tokens, width))
    check_rows("xa", xa, (tokens, rank), dy.dtype)
    check_rows("b", b, (width, rank), dy.dtype)
    block_r = _rank_block(rank, groups)
    rank //= groups
    _check_grad("grad_b", grad_b, (width, rank))
    if out is None:
        out = torch.empty((tokens, rank * groups), dtype=dy.dtype, device=dy.device)
    check_rows("out", out, (tokens, rank * groups), dy.dtype)
    if not _use_kernel(dy):
        return _plain_backward_b(dy, xa, b, grad_b, widths, out, scale, accumulate)
    block_n = _column_block(block_r)
    tiles = [triton.cdiv(part, block_n) for part in widths]
    splits, chunk = _token_splits(tokens, sum(tiles), dy.device)
    reduced = _partial(splits * width * rank, dy.device)
    product = _partial(sum(tiles) * tokens * rank, dy.device)
    _lora_backward_kernel[(sum(tiles), splits, 1)](
        dy,
        xa,
        b,
        reduced,
        product,
        None,
        dy.stride(0),
        xa.stride(0),
        b.stride(0),
        rank,
        1,
        tokens,
        chunk,
        0,
        *_padded(list(widths)),
        RANK=rank,
        PRODUCT=True,
        THRESHOLD=0,
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4 if block_r < 32 else 8,
        num_stages=3 if block_n * BLOCK_T <= 8192 else 2,
        enable_fp_fusion=True,
    )
    _sum_splits(product, out, tokens, rank, tiles, 1.0, out.stride(0), rank)
    _sum_splits(reduced, grad_b, width, rank, [splits], scale, rank, 0, accumulate)
    return out


def lora_backward_a(
    dya: Tensor,
    x: Tensor,
    grad_a: Tensor,
    dropout: LoRADropout | None = None,
    groups: int = 1,
    accumulate: bool = False,
) -> Tensor:
    """Compute dA = dya^T dropout(x) from one read of x (one per group with dropout).

    Args:
        dya: (T, R), any row stride.
        x: (T, K), the forward's input, dya's dtype, any row stride.
        grad_a: (R, K) fp32, contiguous; overwritten, or added to with `accumulate`.
        dropout: the forward's, with an unchanged seed.
        groups: number of stacked adapters; only matters with dropout.
        accumulate: whether grad_a is added to.
    Returns: grad_a.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, width), rank = x.shape, dya.shape[1]
    check_rows("dya", dya, (tokens, rank), x.dtype)
    check_rows("x", x, (tokens, width))
    _check_grad("grad_a", grad_a, (rank, width))
    groups = _programs_per_input(rank, groups, dropout)
    block_r = _rank_block(rank, groups)
    if not _use_kernel(x):
        parts = [part.t() @ _dropped(x, dropout, g) for g, part in enumerate(dya.float().chunk(groups, dim=1))]
        return _write_grad(grad_a, torch.cat(parts), accumulate)
    rank //= groups
    block_n = _column_block(block_r)
    tiles = triton.cdiv(width, block_n)
    splits, chunk = _token_splits(tokens, tiles * groups, x.device)
    reduced = _partial(groups * splits * rank * width, x.device)
    _lora_backward_kernel[(tiles, splits, groups)](
        x,
        dya,
        None,
        reduced,
        None,
        None if dropout is None else dropout.seed,
        x.stride(0),
        dya.stride(0),
        0,
        1,
        width,
        tokens,
        chunk,
        0 if dropout is None else dropout.stream,
        *_padded([width]),
        RANK=rank,
        PRODUCT=False,
        THRESHOLD=0 if dropout is None else dropout.threshold,
        BLOCK_T=BLOCK_T,
        BLOCK_N=block_n,
        BLOCK_R=block_r,
        num_warps=4 if block_r < 32 else 8,
        num_stages=3 if block_n * BLOCK_T <= 8192 else 2,
        enable_fp_fusion=True,
    )
    scale = 1.0 if dropout is None else dropout.scale
    _sum_splits(reduced, grad_a, rank, width, [splits] * groups, scale, width, rank * width, accumulate)
    return grad_a


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


def lora_backward_x(dya: Tensor, a: Tensor, dx: Tensor, dropout: LoRADropout, groups: int = 1) -> Tensor:
    """Add the adapters' share to the gradient of a dropped-out input, in place; only needed with dropout.

    Args:
        dya: (T, R), any row stride.
        a: (R, K), dya's dtype, any row stride.
        dx: (T, K), added to, any row stride.
        dropout: the forward's, with an unchanged seed.
        groups: number of stacked adapters.
    Returns: dx.
    Raises: ValueError: shapes, dtypes or rank do not fit.
    """
    (tokens, rank), width = dya.shape, a.shape[1]
    check_rows("dya", dya, (tokens, rank))
    check_rows("a", a, (rank, width), dya.dtype)
    check_rows("dx", dx, (tokens, width), dya.dtype)
    block_r = _rank_block(rank, groups)
    if not _use_kernel(dx):
        exact = dx.to(torch.promote_types(dx.dtype, torch.float32))
        for group, (left, right) in enumerate(zip(dya.chunk(groups, dim=1), a.chunk(groups), strict=True)):
            share = left.to(exact.dtype) @ right.to(exact.dtype)
            exact = exact + _dropped(share, dropout, group)
        return dx.copy_(exact)
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
        RANK=rank // groups,
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


def _sum_splits(
    partial: Tensor,
    out: Tensor,
    rows: int,
    columns: int,
    splits: list[int],
    scale: float,
    out_row_stride: int,
    out_group_stride: int,
    accumulate: bool = False,
) -> None:
    block = 256
    _sum_splits_kernel[(triton.cdiv(rows * columns, block), len(splits))](
        partial,
        out,
        out_row_stride,
        out_group_stride,
        rows,
        scale,
        columns,
        *_padded(splits),
        ACCUMULATE=accumulate,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _plain_backward_b(
    dy: Tensor,
    xa: Tensor,
    b: Tensor,
    grad_b: Tensor,
    widths: tuple[int, ...],
    out: Tensor,
    scale: float,
    accumulate: bool,
) -> Tensor:
    rank = grad_b.shape[1]
    rows, grads = 0, []
    for group, width in enumerate(widths):
        part, columns = dy[:, rows : rows + width].float(), slice(group * rank, (group + 1) * rank)
        grads.append(scale * part.t() @ xa[:, columns].float())
        out[:, columns] = part @ b[rows : rows + width, columns].float()
        rows += width
    _write_grad(grad_b, torch.cat(grads), accumulate)
    return out


def _write_grad(target: Tensor, grad: Tensor, accumulate: bool) -> Tensor:
    return target.add_(grad) if accumulate else target.copy_(grad)


def _partial(size: int, device: torch.device) -> Tensor:
    return torch.empty(size, dtype=torch.float32, device=device)


def _padded(values: list[int]) -> list[int]:
    return values + [0] * (MAX_GROUPS - len(values))


def _splits(programs: int, most: int, device: torch.device) -> int:
    """Ways to split a sum: eight programs for every multiprocessor, so that the last wave of them costs little."""
    return max(1, min(most, -(-8 * num_sms(device) // programs)))


def _token_splits(tokens: int, programs: int, device: torch.device) -> tuple[int, int]:
    """Splits of the token range, and tokens per split, a multiple of BLOCK_T."""
    blocks = triton.cdiv(tokens, BLOCK_T)
    per_split = triton.cdiv(blocks, _splits(programs, blocks, device))
    return triton.cdiv(blocks, per_split), per_split * BLOCK_T


def _column_block(block_r: int) -> int:
    """Columns per program: as many as keep the fp32 accumulator at 64 registers a thread or below."""
    return max(32, min(256, 8192 // block_r))


def _programs_per_input(rank: int, groups: int, dropout: LoRADropout | None) -> int:
    """Groups that need a read of x of their own: all of them under dropout, or where their ranks pass one tile."""
    return 1 if dropout is None and rank <= MAX_RANK else groups


def _rank_block(rank: int, groups: int) -> int:
    if rank % groups or not 1 <= rank // groups <= MAX_RANK:
        raise ValueError(
            f"{rank} rows in {groups} groups: the rank of an adapter must be equal in all, 1 to {MAX_RANK}"
        )
    return max(16, int(triton.next_power_of_2(rank // groups)))


def _check_grad(name: str, grad: Tensor, shape: tuple[int, int]) -> None:
    check_rows(name, grad, shape, torch.float32)
    if not grad.is_contiguous():
        raise ValueError(f"{name} has strides {grad.stride()}: it must be contiguous")
