"""SwiGLU's gradient on rows sorted by expert, with the routing weights' in the same pass.

    h[i,n]  = silu(g[i,n]) u[i,n]
    dg[i,n] = w[i] dh[i,n] u[i,n] s (1 + g (1 - s)),   du[i,n] = w[i] dh[i,n] silu(g[i,n]),   s = 1 / (1 + exp(-g))
    dw[i]   = sum_n dh[i,n] h[i,n]

dh is the gradient of h before the routing weight w of its row: the weight multiplies a row's result after the down
projection, so dw = <dy, y> = <dy, h W^T> = <dy W, h>, and y need not be kept (SonicMoE's observation).

Shapes: gate_up (R, 2I) = [g | u], dh (R, I), w and dw (R,) fp32; any row pitch. In place: gate_up becomes its gradient,
dh becomes h, which down's LoRA gradient reads. fp32 math, one rounding. Rows that are not in use are left alone.

Source: Shazeer, GLU Variants (arXiv 2002.05202), equation 5; Guo et al., SonicMoE (arXiv 2512.14080), section 4.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.expert_rows import ExpertRows
from finemill.kernels.ops.launch import check_rows, use_kernel

# R rows, I feed-forward width of one expert


def swiglu_experts_backward_reference(dh: Tensor, gate_up: Tensor, weights: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Define the op in plain PyTorch. Returns: d_gate_up, h, and dw in fp32 (fp64 stays)."""
    compute = torch.promote_types(gate_up.dtype, torch.float32)
    gate, up = gate_up.to(compute).chunk(2, dim=-1)
    sigmoid, grad = torch.sigmoid(gate), dh.to(compute)
    h = gate * sigmoid * up
    scaled = weights.to(compute)[:, None] * grad
    d_gate_up = torch.cat((scaled * up * sigmoid * (1 + gate * (1 - sigmoid)), scaled * gate * sigmoid), dim=-1)
    return d_gate_up.to(gate_up.dtype), h.to(gate_up.dtype), (grad * h).sum(dim=-1)


@triton.jit
def _swiglu_experts_backward_kernel(
    dh_ptr,
    gate_up_ptr,
    weights_ptr,
    d_weights_ptr,
    end_ptr,
    dh_stride,
    gate_up_stride,
    width,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    if row < tl.load(end_ptr):
        weight = tl.load(weights_ptr + row)
        d_weight = tl.zeros((BLOCK,), tl.float32)
        for start in range(0, width, BLOCK):
            column = start + tl.arange(0, BLOCK)
            mask = column < width
            gate_ptr = gate_up_ptr + row * gate_up_stride + column
            gate = tl.load(gate_ptr, mask=mask, other=0.0).to(tl.float32)
            up = tl.load(gate_ptr + width, mask=mask, other=0.0).to(tl.float32)
            dh = tl.load(dh_ptr + row * dh_stride + column, mask=mask, other=0.0).to(tl.float32)
            sigmoid = 1.0 / (1.0 + tl.exp(-gate))
            silu = gate * sigmoid
            h = silu * up
            d_weight += dh * h
            dh *= weight
            d_gate = dh * up * (sigmoid + silu * (1.0 - sigmoid))
            tl.store(gate_ptr, d_gate.to(gate_up_ptr.dtype.element_ty), mask=mask)
            tl.store(gate_ptr + width, (dh * silu).to(gate_up_ptr.dtype.element_ty), mask=mask)
            tl.store(dh_ptr + row * dh_stride + column, h.to(dh_ptr.dtype.element_ty), mask=mask)
        tl.store(d_weights_ptr + row, tl.sum(d_weight, axis=0))


def swiglu_experts_backward(dh: Tensor, gate_up: Tensor, rows: ExpertRows, weights: Tensor) -> Tensor:
    """Make `gate_up` its gradient and `dh` the activation h.

    Args:
        dh: (R, I), gradient of h without the routing weights; becomes h.
        gate_up: (R, 2I); becomes its gradient.
        rows: which rows are in use.
        weights: (R,) fp32, `ExpertRows.of_rows` of the routing weights.
    Returns: (R,) fp32, gradient of the routing weights; rows that are not in use are undefined.
    Raises: ValueError: shapes or dtypes do not fit.
    """
    num_rows, width = dh.shape
    check_rows("gate_up", gate_up, (num_rows, 2 * width), dh.dtype)
    if not use_kernel(dh):
        d_gate_up, h, d_weights = swiglu_experts_backward_reference(dh, gate_up, weights)
        gate_up.copy_(d_gate_up)
        dh.copy_(h)
        return d_weights
    d_weights = torch.empty((num_rows,), dtype=torch.float32, device=dh.device)
    _swiglu_experts_backward_kernel[(num_rows,)](
        dh,
        gate_up,
        weights,
        d_weights,
        rows.starts[rows.num_experts :],
        dh.stride(0),
        gate_up.stride(0),
        width,
        BLOCK=min(1024, triton.next_power_of_2(width)),
        num_warps=4,
        enable_fp_fusion=True,
    )
    return d_weights
