"""Per-head RMSNorm of queries and keys (Qwen3) and rotary position embedding, in one launch for both.

Per token t, head a and half-head index i < D/2, with x the head's slice of qkv and w its norm weight:

    rstd[t,a] = (sum_d x[t,a,d]^2 / D + eps)^(-1/2)               1 where the family has no QK-norm
    n[d]      = w[d] x[d] rstd                                    x[d] without QK-norm
    y[i]      = n[i] cos[p,i] - n[i+D/2] sin[p,i]                 p = position_ids[t]
    y[i+D/2]  = n[i+D/2] cos[p,i] + n[i] sin[p,i]
    backward:  dn[i] = dy[i] cos + dy[i+D/2] sin,   dn[i+D/2] = dy[i+D/2] cos - dy[i] sin
               dx[d] = rstd (w[d] dn[d] - x[d] rstd c),   c = sum_d w[d] dn[d] x[d] rstd / D

Shapes: qkv and dqkv (T, (N+2K)D) with any row pitch, heads in the order q, k, v; q (T, N, D), k (T, K, D); cos and sin
tables (positions, D/2 or more: both halves of transformers' tables are equal, the first is read); rstd (T, N+K) fp32.
Saved: qkv (for v and the norm's input) and rstd. The backward writes dq | dk | dv into one matrix for one grouped GEMM.
fp32 math, one rounding; transformers rounds after the norm, after both products and after the sum. A tile holds tokens
x heads as two half-head vectors, so that rotate-half needs no shuffle and cos and sin serve all heads of the tile.

Source: Su et al., RoFormer (arXiv 2104.09864), equation 34, in the half-split layout of GPT-NeoX; Qwen3 report
(arXiv 2505.09388), section 2, for QK-norm.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

# T tokens, N query heads, K key and value heads, D head width

TILE = 2048
"""Elements of each half-head vector per program of 4 warps: 16 per thread, two 16-byte accesses."""
MAX_HEADS_PER_TILE = 8


def qk_norm_rope_reference(
    x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, eps: float, *, upcast: bool = True
) -> Tensor:
    """Define the op on one of q and k in plain PyTorch.

    Args:
        x: (T, heads, D), any float dtype.
        weight: (D,) or None for plain RoPE.
        cos: (T, D/2), rows already picked by position.
        sin: like cos.
        eps: added to the mean square.
        upcast: round once, at the end; False rounds where transformers does.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    normalized = x.to(compute)
    if weight is not None:
        normalized = normalized * torch.rsqrt(normalized.square().mean(-1, keepdim=True) + eps)
        normalized = normalized * weight.to(compute) if upcast else weight * normalized.to(x.dtype)
    dtype = compute if upcast else x.dtype
    left, right = normalized.to(dtype).chunk(2, dim=-1)
    cos, sin = cos.to(dtype)[:, None], sin.to(dtype)[:, None]
    return torch.cat((left * cos - right * sin, right * cos + left * sin), dim=-1).to(x.dtype)


def qk_norm_rope_backward_reference(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor, sin: Tensor, rstd: Tensor
) -> Tensor:
    """Evaluate the hand-derived gradient in the header for one of q and k, (T, heads, D); rstd (T, heads)."""
    compute = torch.promote_types(x.dtype, torch.float32)
    left, right = dy.to(compute).chunk(2, dim=-1)
    cos, sin = cos.to(compute)[:, None], sin.to(compute)[:, None]
    grad = torch.cat((left * cos + right * sin, right * cos - left * sin), dim=-1)
    if weight is None:
        return grad.to(x.dtype)
    scale = rstd.to(compute)[..., None]
    weighted, normalized = grad * weight.to(compute), x.to(compute) * scale
    return (scale * (weighted - normalized * (weighted * normalized).mean(-1, keepdim=True))).to(x.dtype)


@triton.jit
def _load_halves(ptr, offset, mask, HALF: tl.constexpr):
    left = tl.load(ptr + offset, mask=mask, other=0.0).to(tl.float32)
    return left, tl.load(ptr + offset + HALF, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _store_halves(ptr, offset, left, right, mask, HALF: tl.constexpr):
    tl.store(ptr + offset, left.to(ptr.dtype.element_ty), mask=mask)
    tl.store(ptr + offset + HALF, right.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _qk_norm_rope_forward_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    q_ptr,
    k_ptr,
    rstd_ptr,
    qkv_stride,
    cos_stride,
    q_stride,
    k_stride,
    T,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    Q_TILES: tl.constexpr = (N + HEADS - 1) // HEADS
    tile = tl.program_id(1)
    is_q = tile < Q_TILES
    first_head = tl.where(is_q, tile, tile - Q_TILES) * HEADS
    num_heads = tl.where(is_q, N, K)

    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    in_half, in_token, in_head = i < HALF, token < T, head < num_heads
    mask = in_token[:, None, None] & in_head[None, :, None] & in_half[None, None, :]
    within = (head * (2 * HALF))[None, :, None] + i[None, None, :]
    qkv_offset = (token * qkv_stride)[:, None, None] + tl.where(is_q, 0, N * 2 * HALF) + within
    left, right = _load_halves(qkv_ptr, qkv_offset, mask, HALF)

    if NORM:
        rstd = 1.0 / tl.sqrt(tl.sum(left * left + right * right, axis=2) / (2 * HALF) + eps)
        rstd_offset = (token * (N + K))[:, None] + tl.where(is_q, 0, N) + head[None, :]
        tl.store(rstd_ptr + rstd_offset, rstd, mask=in_token[:, None] & in_head[None, :])
        weight_ptr = q_weight_ptr
        if not is_q:
            weight_ptr = k_weight_ptr
        w_left, w_right = _load_halves(weight_ptr, i, in_half, HALF)
        left = left * rstd[:, :, None] * w_left[None, None, :]
        right = right * rstd[:, :, None] * w_right[None, None, :]

    position = tl.load(position_ptr + token, mask=in_token, other=0).to(tl.int64)
    table_offset = (position * cos_stride)[:, None] + i[None, :]
    table_mask = in_token[:, None] & in_half[None, :]
    cos = tl.load(cos_ptr + table_offset, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + table_offset, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]

    out_ptr, out_stride = q_ptr, q_stride
    if not is_q:
        out_ptr, out_stride = k_ptr, k_stride
    out_offset = (token * out_stride)[:, None, None] + within
    _store_halves(out_ptr, out_offset, left * cos - right * sin, right * cos + left * sin, mask, HALF)


@triton.jit
def _qk_norm_rope_backward_kernel(
    dq_ptr,
    dk_ptr,
    dv_ptr,
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    position_ptr,
    rstd_ptr,
    dqkv_ptr,
    dq_stride,
    dk_stride,
    dv_stride,
    dq_head_stride,
    dk_head_stride,
    dv_head_stride,
    qkv_stride,
    cos_stride,
    dqkv_stride,
    T,
    N: tl.constexpr,
    K: tl.constexpr,
    HALF: tl.constexpr,
    NORM: tl.constexpr,
    TOKENS: tl.constexpr,
    HEADS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    Q_TILES: tl.constexpr = (N + HEADS - 1) // HEADS
    K_TILES: tl.constexpr = (K + HEADS - 1) // HEADS
    tile = tl.program_id(1)
    is_q, is_v = tile < Q_TILES, tile >= Q_TILES + K_TILES
    first_head = tl.where(is_q, tile, tl.where(is_v, tile - Q_TILES - K_TILES, tile - Q_TILES)) * HEADS
    first_column = tl.where(is_q, 0, tl.where(is_v, N + K, N)) * (2 * HALF)
    num_heads = tl.where(is_q, N, K)

    token = (tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)).to(tl.int64)
    head = first_head + tl.arange(0, HEADS)
    i = tl.arange(0, BLOCK)
    in_half, in_token, in_head = i < HALF, token < T, head < num_heads
    mask = in_token[:, None, None] & in_head[None, :, None] & in_half[None, None, :]
    column = first_column + (head * (2 * HALF))[None, :, None] + i[None, None, :]
    dqkv_offset = (token * dqkv_stride)[:, None, None] + column

    if is_v:
        dv_offset = (token * dv_stride)[:, None, None] + (head * dv_head_stride)[None, :, None] + i[None, None, :]
        left, right = _load_halves(dv_ptr, dv_offset, mask, HALF)
        _store_halves(dqkv_ptr, dqkv_offset, left, right, mask, HALF)
        return

    dy_ptr, dy_stride, dy_head_stride = dq_ptr, dq_stride, dq_head_stride
    if not is_q:
        dy_ptr, dy_stride, dy_head_stride = dk_ptr, dk_stride, dk_head_stride
    dy_offset = (token * dy_stride)[:, None, None] + (head * dy_head_stride)[None, :, None] + i[None, None, :]
    dy_left, dy_right = _load_halves(dy_ptr, dy_offset, mask, HALF)
    position = tl.load(position_ptr + token, mask=in_token, other=0).to(tl.int64)
    table_offset = (position * cos_stride)[:, None] + i[None, :]
    table_mask = in_token[:, None] & in_half[None, :]
    cos = tl.load(cos_ptr + table_offset, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]
    sin = tl.load(sin_ptr + table_offset, mask=table_mask, other=0.0).to(tl.float32)[:, None, :]
    left = dy_left * cos + dy_right * sin
    right = dy_right * cos - dy_left * sin

    if NORM:
        weight_ptr = q_weight_ptr
        if not is_q:
            weight_ptr = k_weight_ptr
        w_left, w_right = _load_halves(weight_ptr, i, in_half, HALF)
        rstd_offset = (token * (N + K))[:, None] + tl.where(is_q, 0, N) + head[None, :]
        rstd = tl.load(rstd_ptr + rstd_offset, mask=in_token[:, None] & in_head[None, :], other=0.0)[:, :, None]
        x_left, x_right = _load_halves(qkv_ptr, (token * qkv_stride)[:, None, None] + column, mask, HALF)
        n_left, n_right = x_left * rstd, x_right * rstd
        left, right = left * w_left[None, None, :], right * w_right[None, None, :]
        mean = tl.sum(left * n_left + right * n_right, axis=2) / (2 * HALF)
        left = rstd * (left - n_left * mean[:, :, None])
        right = rstd * (right - n_right * mean[:, :, None])
    _store_halves(dqkv_ptr, dqkv_offset, left, right, mask, HALF)


def qk_norm_rope_forward(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    eps: float,
    num_heads: int,
    num_kv_heads: int,
    out: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Normalize and rotate the queries and keys of a projected qkv matrix, outside autograd.

    Args:
        qkv: (T, (N + 2K) D), any row stride; v is not touched.
        q_weight: (D,) QK-norm weight of the queries, None for families without QK-norm.
        k_weight: the same for the keys; both or neither.
        cos: (positions, D/2 or D), bf16, fp16 or fp32; only the first D/2 columns are read.
        sin: like cos, with the same row stride.
        position_ids: (T,) integers, rows of the tables.
        eps: added to the mean square.
        num_heads: N.
        num_kv_heads: K.
        out: q (T, N, D) and k (T, K, D) to write, heads contiguous, any token stride; new by default.
    Returns: q, k, and rstd (T, N + K) fp32 for the backward (empty without QK-norm).
    Raises: ValueError: shapes do not fit together.
    """
    tokens, head_dim = _check(qkv, q_weight, k_weight, cos, sin, position_ids, num_heads, num_kv_heads)
    if out is None:
        q = torch.empty((tokens, num_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
        k = torch.empty((tokens, num_kv_heads, head_dim), dtype=qkv.dtype, device=qkv.device)
    else:
        q, k = out
        _check_heads("q", q, (tokens, num_heads, head_dim))
        _check_heads("k", k, (tokens, num_kv_heads, head_dim))
    norm = q_weight is not None
    rstd = torch.empty((tokens, num_heads + num_kv_heads if norm else 0), dtype=torch.float32, device=qkv.device)
    if not use_kernel(qkv):
        half = head_dim // 2
        cos, sin = cos[position_ids, :half], sin[position_ids, :half]
        heads = qkv.view(tokens, -1, head_dim)[:, : num_heads + num_kv_heads]
        q.copy_(qk_norm_rope_reference(heads[:, :num_heads], q_weight, cos, sin, eps))
        k.copy_(qk_norm_rope_reference(heads[:, num_heads:], k_weight, cos, sin, eps))
        if norm:
            rstd.copy_(torch.rsqrt(heads.to(torch.float32).square().mean(-1) + eps))
        return q, k, rstd
    token_tile, head_tile, block = _tile(head_dim, num_kv_heads)
    head_tiles = triton.cdiv(num_heads, head_tile) + triton.cdiv(num_kv_heads, head_tile)
    _qk_norm_rope_forward_kernel[(triton.cdiv(tokens, token_tile), head_tiles)](
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        position_ids,
        q,
        k,
        rstd,
        qkv.stride(0),
        cos.stride(0),
        q.stride(0),
        k.stride(0),
        tokens,
        eps,
        N=num_heads,
        K=num_kv_heads,
        HALF=head_dim // 2,
        NORM=norm,
        TOKENS=token_tile,
        HEADS=head_tile,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return q, k, rstd


def qk_norm_rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor | None,
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    rstd: Tensor,
    num_heads: int,
    num_kv_heads: int,
    out: Tensor | None = None,
) -> Tensor:
    """Differentiate with respect to qkv.

    Args:
        dq: (T, N, D), last dimension contiguous, any other strides.
        dk: (T, K, D), likewise.
        dv: (T, K, D), copied to the v columns; None leaves those columns of `out` as they are.
        qkv: the forward's input, any row stride.
        q_weight: as in the forward.
        k_weight: as in the forward.
        cos: as in the forward.
        sin: as in the forward.
        position_ids: as in the forward.
        rstd: the forward's third output.
        num_heads: N.
        num_kv_heads: K.
        out: (T, (N + 2K) D) to write, any row stride; may be qkv itself. New by default.
    Returns: dqkv, that is `out`.
    Raises: ValueError: shapes do not fit together.
    """
    tokens, head_dim = _check(qkv, q_weight, k_weight, cos, sin, position_ids, num_heads, num_kv_heads)
    for name, grad, heads in (("dq", dq, num_heads), ("dk", dk, num_kv_heads), ("dv", dv, num_kv_heads)):
        if grad is not None and (tuple(grad.shape) != (tokens, heads, head_dim) or grad.stride(2) != 1):
            raise ValueError(
                f"{name} has shape {tuple(grad.shape)}, expected {(tokens, heads, head_dim)}, D contiguous"
            )
    dqkv = torch.empty(qkv.shape, dtype=qkv.dtype, device=qkv.device) if out is None else out
    check_rows("out", dqkv, tuple(qkv.shape), qkv.dtype)
    if not use_kernel(qkv):
        half, split = head_dim // 2, (num_heads, num_kv_heads, num_kv_heads)
        cos, sin = cos[position_ids, :half], sin[position_ids, :half]
        q, k, _ = qkv.view(tokens, -1, head_dim).split(split, dim=1)
        q_rstd, k_rstd = rstd[:, :num_heads], rstd[:, num_heads:]
        grads = dqkv.view(tokens, -1, head_dim).split(split, dim=1)
        grads[0].copy_(qk_norm_rope_backward_reference(dq, q, q_weight, cos, sin, q_rstd))
        grads[1].copy_(qk_norm_rope_backward_reference(dk, k, k_weight, cos, sin, k_rstd))
        if dv is not None:
            grads[2].copy_(dv)
        return dqkv
    token_tile, head_tile, block = _tile(head_dim, num_kv_heads)
    kv_tiles = triton.cdiv(num_kv_heads, head_tile)
    head_tiles = triton.cdiv(num_heads, head_tile) + kv_tiles * (1 if dv is None else 2)
    _qk_norm_rope_backward_kernel[(triton.cdiv(tokens, token_tile), head_tiles)](
        dq,
        dk,
        dqkv if dv is None else dv,  # of which no tile is launched: the kernel is compiled with any tensor
        qkv,
        q_weight,
        k_weight,
        cos,
        sin,
        position_ids,
        rstd,
        dqkv,
        dq.stride(0),
        dk.stride(0),
        0 if dv is None else dv.stride(0),
        dq.stride(1),
        dk.stride(1),
        0 if dv is None else dv.stride(1),
        qkv.stride(0),
        cos.stride(0),
        dqkv.stride(0),
        tokens,
        N=num_heads,
        K=num_kv_heads,
        HALF=head_dim // 2,
        NORM=q_weight is not None,
        TOKENS=token_tile,
        HEADS=head_tile,
        BLOCK=block,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return dqkv


def _tile(head_dim: int, num_kv_heads: int) -> tuple[int, int, int]:
    """Tokens, heads and padded half-head width of one program's tile."""
    block = triton.next_power_of_2(head_dim // 2)
    heads = min(MAX_HEADS_PER_TILE, triton.next_power_of_2(num_kv_heads))
    return max(1, TILE // (heads * block)), heads, block


def _check_heads(name: str, tensor: Tensor, shape: tuple[int, int, int]) -> None:
    if tuple(tensor.shape) != shape or tensor.stride()[1:] != (shape[2], 1):
        raise ValueError(
            f"{name} has shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected {shape} "
            "with adjacent heads"
        )


def _check(
    qkv: Tensor,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    num_heads: int,
    num_kv_heads: int,
) -> tuple[int, int]:
    heads = num_heads + 2 * num_kv_heads
    if qkv.dim() != 2 or qkv.shape[1] % (2 * heads):
        raise ValueError(
            f"qkv has shape {tuple(qkv.shape)}, expected (T, {heads} D): {num_heads} + 2 x {num_kv_heads} "
            "heads of even width D"
        )
    tokens, head_dim = qkv.shape[0], qkv.shape[1] // heads
    check_rows("qkv", qkv, tuple(qkv.shape))
    if (q_weight is None) != (k_weight is None):
        raise ValueError("QK-norm needs both q_weight and k_weight, plain RoPE neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None and tuple(weight.shape) != (head_dim,):
            raise ValueError(f"{name} has shape {tuple(weight.shape)}, expected ({head_dim},)")
    if cos.shape != sin.shape or cos.stride() != sin.stride() or cos.shape[1] < head_dim // 2 or cos.stride(1) != 1:
        raise ValueError(
            f"cos {tuple(cos.shape)} and sin {tuple(sin.shape)} must be tables of one layout, "
            f"at least {head_dim // 2} wide"
        )
    if tuple(position_ids.shape) != (tokens,):
        raise ValueError(f"position_ids has shape {tuple(position_ids.shape)}, expected ({tokens},)")
    return tokens, head_dim
