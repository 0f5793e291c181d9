"""SwiGLU on a gate|up matrix: one pass forward, one pass backward that can also recompute the output.

    h[t,i]  = silu(g[t,i]) u[t,i],   silu(g) = g s,   s = 1 / (1 + exp(-g))
    dg[t,i] = dh[t,i] u[t,i] s (1 + g (1 - s))
    du[t,i] = dh[t,i] silu(g[t,i])

Shapes: gate_up (T, 2I) = [g | u], d_gate_up (T, 2I) = [dg | du], h and dh (T, I); every row pitch is free. fp32 math,
one rounding. Saved: gate_up only. h is recomputed in the backward from tiles that are on chip anyway, and written only
if the caller wants it (down_proj's LoRA gradient does). Both outputs may overwrite their inputs.

Source: Shazeer, GLU Variants Improve Transformer (arXiv 2002.05202), equation 5.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

# T tokens, I feed-forward width

BLOCK = 1024


def swiglu_reference(gate_up: Tensor, *, upcast: bool = True) -> Tensor:
    """Define the op in plain PyTorch, (..., 2I) -> (..., I); `upcast=False` rounds silu(g) as transformers does."""
    gate, up = gate_up.chunk(2, dim=-1)
    if not upcast:
        return torch.nn.functional.silu(gate) * up
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    return (torch.nn.functional.silu(gate.to(compute)) * up.to(compute)).to(gate_up.dtype)


def swiglu_backward_reference(dh: Tensor, gate_up: Tensor) -> Tensor:
    """Evaluate the hand-derived gradient in the header. Returns: d_gate_up like gate_up."""
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    sigmoid = torch.sigmoid(gate)
    d_gate = dh.to(compute) * up * sigmoid * (1 + gate * (1 - sigmoid))
    return torch.cat((d_gate, dh.to(compute) * gate * sigmoid), dim=-1).to(gate_up.dtype)


@triton.jit
def _swiglu_forward_kernel(gate_up_ptr, h_ptr, gate_up_stride, h_stride, width, BLOCK: tl.constexpr):
    # Neighbouring programs take neighbouring columns of a row.
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
    h = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(h_ptr + row * h_stride + column, h.to(h_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _swiglu_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    d_gate_up_ptr,
    h_ptr,
    dh_stride,
    gate_up_stride,
    d_gate_up_stride,
    h_stride,
    width,
    WRITE_H: tl.constexpr,
    BLOCK: tl.constexpr,
):
    tiles = tl.cdiv(width, BLOCK)
    row = (tl.program_id(0) // tiles).to(tl.int64)
    column = (tl.program_id(0) % tiles) * BLOCK + tl.arange(0, BLOCK)
    mask = column < width
    gate_ptr = gate_up_ptr + row * gate_up_stride + column
    gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + row * dh_stride + column, mask=mask, other=0.0).to(tl.float32)
    sigmoid = 1.0 / (1.0 + tl.exp(-gate))
    silu = gate * sigmoid
    d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
    d_gate_ptr = d_gate_up_ptr + row * d_gate_up_stride + column
    tl.store(d_gate_ptr, d_gate.to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    tl.store(d_gate_ptr + width, (dh * silu).to(d_gate_up_ptr.dtype.element_ty), mask=mask)
    if WRITE_H:
        tl.store(h_ptr + row * h_stride + column, (silu * up).to(h_ptr.dtype.element_ty), mask=mask)


class SwiGLUFunction(torch.autograd.Function):
    """Autograd of `swiglu`: saves gate_up."""

    @staticmethod
    def forward(ctx: Any, gate_up: Tensor) -> Tensor:
        """Map (..., 2I) to (..., I)."""
        rows = gate_up.reshape(-1, gate_up.shape[-1])
        ctx.save_for_backward(rows)
        return swiglu_forward(rows).view(*gate_up.shape[:-1], -1)

    @staticmethod
    def backward(ctx: Any, dh: Tensor) -> Tensor:
        """Return d_gate_up."""
        (rows,) = ctx.saved_tensors
        d_gate_up = swiglu_backward(dh.reshape(-1, dh.shape[-1]), rows)
        return d_gate_up.view(*dh.shape[:-1], -1)


def swiglu(gate_up: Tensor) -> Tensor:
    """Gate the right half of the last dimension by the SiLU of the left: (..., 2I) -> (..., I), differentiable."""
    return SwiGLUFunction.apply(gate_up)  # type: ignore[no-any-return]


def swiglu_forward(gate_up: Tensor, out: Tensor | None = None) -> Tensor:
    """Compute h outside autograd.

    Args:
        gate_up: (T, 2I), any row stride.
        out: (T, I) to write, gate_up's dtype, any row stride; new and contiguous by default.
    Returns: h, that is `out`.
    Raises: ValueError: odd width, wrong shape or dtype.
    """
    width = _half_width(gate_up)
    h = _output("out", out, gate_up, width)
    if not use_kernel(gate_up):
        return h.copy_(swiglu_reference(gate_up))
    _swiglu_forward_kernel[(gate_up.shape[0] * triton.cdiv(width, BLOCK),)](
        gate_up, h, gate_up.stride(0), h.stride(0), width, BLOCK=BLOCK, num_warps=4, enable_fp_fusion=True
    )
    return h


def swiglu_backward(dh: Tensor, gate_up: Tensor, out: Tensor | None = None, h_out: Tensor | None = None) -> Tensor:
    """Differentiate, and recompute h in the same pass if asked.

    Args:
        dh: (T, I), any row stride.
        gate_up: (T, 2I), the forward's input, any row stride.
        out: (T, 2I) to write, any row stride; may be gate_up itself.
        h_out: (T, I) that receives h again; may be dh itself.
    Returns: d_gate_up, that is `out`.
    Raises: ValueError: wrong shape or dtype.
    """
    width = _half_width(gate_up)
    check_rows("dh", dh, (gate_up.shape[0], width))
    d_gate_up = _output("out", out, gate_up, 2 * width)
    if h_out is not None:
        check_rows("h_out", h_out, (gate_up.shape[0], width), gate_up.dtype)
    if not use_kernel(gate_up):
        grad = swiglu_backward_reference(dh, gate_up)
        if h_out is not None:
            h_out.copy_(swiglu_reference(gate_up))
        return d_gate_up.copy_(grad)
    _swiglu_backward_kernel[(gate_up.shape[0] * triton.cdiv(width, BLOCK),)](
        dh,
        gate_up,
        d_gate_up,
        h_out,
        dh.stride(0),
        gate_up.stride(0),
        d_gate_up.stride(0),
        0 if h_out is None else h_out.stride(0),
        width,
        WRITE_H=h_out is not None,
        BLOCK=BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return d_gate_up


def _half_width(gate_up: Tensor) -> int:
    if gate_up.dim() != 2 or gate_up.shape[1] % 2:
        raise ValueError(f"gate_up has shape {tuple(gate_up.shape)}, expected (T, 2I): gate columns, then up columns")
    check_rows("gate_up", gate_up, tuple(gate_up.shape))
    return gate_up.shape[1] // 2


def _output(name: str, out: Tensor | None, like: Tensor, width: int) -> Tensor:
    if out is None:
        return torch.empty((like.shape[0], width), dtype=like.dtype, device=like.device)
    return check_rows(name, out, (like.shape[0], width), like.dtype)
