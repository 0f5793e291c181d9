"""RMSNorm with a frozen weight, alone or fused with the residual addition before it.

    s[t,h]   = x[t,h] + delta[t,h]                 rounded to the dtype, as the residual stream is (add_rms_norm only)
    rstd[t]  = (sum_h s[t,h]^2 / H + eps)^(-1/2)
    y[t,h]   = w[h] * s[t,h] * rstd[t]
    backward, with n = s * rstd and c[t] = sum_h w[h] dy[t,h] n[t,h] / H:
    ds[t,h]  = rstd[t] * (w[h] dy[t,h] - n[t,h] c[t]) + residual_grad[t,h]

Shapes: x, delta, y, dy, residual_grad (T, H) with any row pitch; w (H,); rstd (T,) fp32. All arithmetic is fp32 and
rounds once; Hugging Face's module also rounds n to the dtype before the weight. Saved: s (the residual stream, kept
anyway) and rstd; y is not needed. The base is frozen, so no dW: backward reads three tensors and writes one.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization (arXiv 1910.07467), equation 4.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

# T tokens, H model width

MAX_WIDTH = 65536


def rms_norm_reference(x: Tensor, weight: Tensor, eps: float, *, upcast: bool = True) -> Tensor:
    """Define the op in plain PyTorch.

    Args:
        x: (..., H), any float dtype.
        weight: (H,).
        eps: added to the mean square.
        upcast: round once, at the end; False rounds the normalized row first, as transformers' modules do.
    """
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    normalized = exact * torch.rsqrt(exact.square().mean(-1, keepdim=True) + eps)
    return (normalized * weight.to(normalized.dtype)).to(x.dtype) if upcast else weight * normalized.to(x.dtype)


def rms_norm_backward_reference(dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor) -> Tensor:
    """Evaluate the hand-derived gradient in the header, without the residual term. Returns: dx of x's dtype."""
    compute = torch.promote_types(x.dtype, torch.float32)
    normalized, weighted = x.to(compute) * rstd[:, None], dy.to(compute) * weight.to(compute)
    mean = (weighted * normalized).mean(-1, keepdim=True)
    return (rstd[:, None] * (weighted - normalized * mean)).to(x.dtype)


@triton.jit
def _rms_norm_forward_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    sum_ptr,
    y_ptr,
    rstd_ptr,
    x_stride,
    delta_stride,
    sum_stride,
    y_stride,
    num_rows,
    eps,
    H: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row, in_column = row < num_rows, column < H
    mask = in_row[:, None] & in_column[None, :]
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    if ADD:
        delta = tl.load(delta_ptr + row[:, None] * delta_stride + column[None, :], mask=mask, other=0.0)
        # The residual stream is stored in its dtype, and the norm sees what is stored.
        rounded = (x + delta.to(tl.float32)).to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + row[:, None] * sum_stride + column[None, :], rounded, mask=mask)
        x = rounded.to(tl.float32)
    rstd = 1.0 / tl.sqrt(tl.sum(x * x, axis=1) / H + eps)
    weight = tl.load(weight_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    y = x * rstd[:, None] * weight[None, :]
    tl.store(rstd_ptr + row, rstd, mask=in_row)
    tl.store(y_ptr + row[:, None] * y_stride + column[None, :], y.to(y_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _rms_norm_backward_kernel(
    dy_ptr,
    x_ptr,
    weight_ptr,
    rstd_ptr,
    residual_grad_ptr,
    dx_ptr,
    dy_stride,
    x_stride,
    residual_grad_stride,
    dx_stride,
    num_rows,
    H: tl.constexpr,
    ADD: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, BLOCK)
    in_row, in_column = row < num_rows, column < H
    mask = in_row[:, None] & in_column[None, :]
    dy = tl.load(dy_ptr + row[:, None] * dy_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    x = tl.load(x_ptr + row[:, None] * x_stride + column[None, :], mask=mask, other=0.0).to(tl.float32)
    weight = tl.load(weight_ptr + column, mask=in_column, other=0.0).to(tl.float32)
    rstd = tl.load(rstd_ptr + row, mask=in_row, other=0.0)
    normalized, weighted = x * rstd[:, None], dy * weight[None, :]
    mean = tl.sum(weighted * normalized, axis=1) / H
    dx = rstd[:, None] * (weighted - normalized * mean[:, None])
    if ADD:
        residual_grad_offset = row[:, None] * residual_grad_stride + column[None, :]
        dx += tl.load(residual_grad_ptr + residual_grad_offset, mask=mask, other=0.0).to(tl.float32)
    tl.store(dx_ptr + row[:, None] * dx_stride + column[None, :], dx.to(dx_ptr.dtype.element_ty), mask=mask)


def _tile(width: int) -> tuple[int, int, int]:
    """Rows and padded columns of a program's tile, and its warps.

    Up to 1024 columns one warp reduces without a barrier, 32 elements a thread, several narrow rows at once; wider rows
    take 16 elements a thread (32 spill 8 bytes on sm_80 to sm_90 with Triton 3.6).
    """
    block = max(16, triton.next_power_of_2(width))
    return max(1, min(16, 1024 // block)), block, 1 if block <= 1024 else min(32, block // 512)


class RMSNormFunction(torch.autograd.Function):
    """Autograd of `rms_norm`: saves x and rstd, returns no gradient for the frozen weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """Normalize the rows of x (..., H)."""
        rows = x.reshape(-1, x.shape[-1])
        y, rstd = rms_norm_forward(rows, weight, eps)
        ctx.save_for_backward(rows, weight, rstd)
        return y.view(x.shape)

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None]:
        """Return dx; one gradient flows in."""
        rows, weight, rstd = ctx.saved_tensors
        return rms_norm_backward(dy.reshape(rows.shape), rows, weight, rstd).view(dy.shape), None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Normalize rows by their root mean square; differentiable in x, the weight is taken as frozen.

    Args:
        x: (..., H), bf16, fp16 or fp32.
        weight: (H,).
        eps: added to the mean square.
    Returns: like x, contiguous.
    Raises: ValueError: the weight does not match, or wants a gradient, or H passes 65536.
    """
    if weight.requires_grad and torch.is_grad_enabled():
        raise ValueError("weight requires a gradient: this norm is for frozen bases; call weight.requires_grad_(False)")
    return RMSNormFunction.apply(x, weight, eps)  # type: ignore[no-any-return]


def rms_norm_forward(x: Tensor, weight: Tensor, eps: float, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Normalize the rows of a matrix, outside autograd.

    Args:
        x: (T, H), any row stride.
        weight: (H,).
        eps: added to the mean square.
        out: (T, H) to write, x's dtype, any row stride; may be x itself. New and contiguous by default.
    Returns: y (that is `out`), and rstd (T,) fp32 for the backward.
    """
    y = _output("out", out, x)
    _check_weight(x, weight)
    if not use_kernel(x):
        rstd = _rstd(x, eps)
        return y.copy_(rms_norm_reference(x, weight, eps)), rstd
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_forward(x, None, weight, eps, None, y, rstd)
    return y, rstd


def add_rms_norm_forward(
    x: Tensor, delta: Tensor, weight: Tensor, eps: float, out: Tensor | None = None, sum_out: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Add a block's output to the residual stream and normalize the sum, in one pass.

    Args:
        x: (T, H), the residual stream, any row stride.
        delta: (T, H), the block's output, x's dtype, any row stride.
        weight: (H,).
        eps: added to the mean square.
        out: (T, H) for y, any row stride.
        sum_out: (T, H) for the sum, any row stride; may be x or delta.
    Returns: x + delta rounded to the dtype, its norm y, rstd (T,) fp32. The backward of both is
        `rms_norm_backward(dy, sum, weight, rstd, residual_grad=dsum)`, the gradient of x and of delta alike.
    """
    check_rows("delta", delta, tuple(x.shape), x.dtype)
    y, total = _output("out", out, x), _output("sum_out", sum_out, x)
    _check_weight(x, weight)
    if not use_kernel(x):
        total.copy_(x + delta)
        rstd = _rstd(total, eps)
        return total, y.copy_(rms_norm_reference(total, weight, eps)), rstd
    rstd = torch.empty(x.shape[0], dtype=torch.float32, device=x.device)
    _launch_forward(x, delta, weight, eps, total, y, rstd)
    return total, y, rstd


def rms_norm_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    rstd: Tensor,
    residual_grad: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Differentiate the norm with respect to its input.

    Args:
        dy: (T, H), any row stride.
        x: (T, H), what was normalized, any row stride.
        weight: (H,).
        rstd: (T,) fp32 from the forward.
        residual_grad: (T, H) gradient that reaches x around the norm, added before the one rounding.
        out: (T, H) to write, any row stride; may be dy or residual_grad.
    Returns: dx (T, H), that is `out`.
    """
    check_rows("dy", dy, tuple(x.shape))
    dx = _output("out", out, x)
    _check_weight(x, weight)
    if residual_grad is not None:
        check_rows("residual_grad", residual_grad, tuple(x.shape))
    if not use_kernel(x):
        grad = rms_norm_backward_reference(dy, x.to(torch.promote_types(x.dtype, torch.float32)), weight, rstd)
        return dx.copy_(grad if residual_grad is None else grad + residual_grad)
    rows, block, num_warps = _tile(x.shape[1])
    _rms_norm_backward_kernel[(triton.cdiv(x.shape[0], rows),)](
        dy,
        x,
        weight,
        rstd,
        residual_grad,
        dx,
        dy.stride(0),
        x.stride(0),
        0 if residual_grad is None else residual_grad.stride(0),
        dx.stride(0),
        x.shape[0],
        H=x.shape[1],
        ADD=residual_grad is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )
    return dx


def _launch_forward(
    x: Tensor, delta: Tensor | None, weight: Tensor, eps: float, total: Tensor | None, y: Tensor, rstd: Tensor
) -> None:
    rows, block, num_warps = _tile(x.shape[1])
    _rms_norm_forward_kernel[(triton.cdiv(x.shape[0], rows),)](
        x,
        delta,
        weight,
        total,
        y,
        rstd,
        x.stride(0),
        0 if delta is None else delta.stride(0),
        0 if total is None else total.stride(0),
        y.stride(0),
        x.shape[0],
        eps,
        H=x.shape[1],
        ADD=delta is not None,
        ROWS=rows,
        BLOCK=block,
        num_warps=num_warps,
        enable_fp_fusion=True,
    )


def _rstd(x: Tensor, eps: float) -> Tensor:
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    return torch.rsqrt(exact.square().mean(-1) + eps)


def _output(name: str, out: Tensor | None, x: Tensor) -> Tensor:
    check_rows("x", x, (x.shape[0], x.shape[-1]))
    if out is None:
        return torch.empty(x.shape, dtype=x.dtype, device=x.device)
    return check_rows(name, out, tuple(x.shape), x.dtype)


def _check_weight(x: Tensor, weight: Tensor) -> None:
    if weight.shape != x.shape[-1:]:
        raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({x.shape[-1]},), the width of x")
    if x.shape[-1] > MAX_WIDTH:
        raise ValueError(f"x is {x.shape[-1]} wide: one program holds a row, at most {MAX_WIDTH} wide")
