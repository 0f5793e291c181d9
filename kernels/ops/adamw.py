"""AdamW over all adapter tensors as one flat vector, and the gradient norm that clips it; both free of host reads.

With g the gradient, t the step, c = min(1, max_norm / (||g|| + 1e-6)):

    m = beta1 m + (1 - beta1) c g                v = beta2 v + (1 - beta2) (c g)^2
    p = (1 - lr weight_decay) p - lr / (1 - beta1^t) m / (sqrt(v / (1 - beta2^t)) + eps)

Shapes: p, g, m, v (n,), p and its math fp32, g any float dtype. m and v are fp32, or 8 bits in blocks of 256 with one
fp32 absmax each, on bitsandbytes' dynamic map (signed for m, unsigned for v): value = map[code] * absmax. The map's
levels are 0, 1 and, in decade i < 7, 10^(i-6) (0.1 + 0.9 (k + 1/2) / levels_i), so the nearest code is computed, not
searched. One difference: a positive v never rounds to 0, which would divide m by eps alone. t, lr and ||g|| are read on
the device: a CUDA graph replays the launch with new values. The norm is a two-stage sum over fixed ranges, so it
repeats bit for bit.

Source: Loshchilov and Hutter (arXiv 1711.05101), algorithm 2; Dettmers et al., 8-bit Optimizers (arXiv 2110.02861).
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

# n elements of the flat vector

QUANTIZATION_BLOCK = 256
BLOCKS_PER_PROGRAM = 4
NORM_PROGRAMS = 1024
NORM_BLOCK = 1024


@dataclass(frozen=True)
class AdamWState:
    """Both moments of a flat vector: fp32 (n,), or uint8 codes (n,) with an fp32 absmax per block of 256.

    The zero state decodes to zero, whatever the codes, because its absmax is zero.
    """

    exp_avg: Tensor
    exp_avg_sq: Tensor
    exp_avg_absmax: Tensor | None = None
    exp_avg_sq_absmax: Tensor | None = None
    signed_map: Tensor | None = None
    unsigned_map: Tensor | None = None

    @classmethod
    def zeros(cls, numel: int, device: torch.device | str, bits: int = 32) -> "AdamWState":
        """Return the state before the first step, in 32 or 8 bits per moment."""

        def zeros(size: int, dtype: torch.dtype) -> Tensor:
            return torch.zeros(size, dtype=dtype, device=device)

        if bits == 32:
            return cls(zeros(numel, torch.float32), zeros(numel, torch.float32))
        if bits != 8:
            raise ValueError(f"optimizer state of {bits} bits: allowed are 8 and 32")
        blocks = triton.cdiv(numel, QUANTIZATION_BLOCK)
        return cls(
            exp_avg=zeros(numel, torch.uint8),
            exp_avg_sq=zeros(numel, torch.uint8),
            exp_avg_absmax=zeros(blocks, torch.float32),
            exp_avg_sq_absmax=zeros(blocks, torch.float32),
            signed_map=dynamic_map(signed=True).to(device),
            unsigned_map=dynamic_map(signed=False).to(device),
        )

    def tensors(self) -> dict[str, Tensor]:
        """The state by field name, without the constant maps: what a checkpoint holds."""
        named = ("exp_avg", "exp_avg_sq", "exp_avg_absmax", "exp_avg_sq_absmax")
        return {name: tensor for name in named if (tensor := getattr(self, name)) is not None}


def dynamic_map(signed: bool) -> Tensor:
    """Return the 256 sorted levels of bitsandbytes' dynamic 8-bit type, fp32."""
    levels = [0.0, 1.0]
    for decade in range(7):
        count = 2**decade if signed else 2 ** (decade + 1)
        edges = torch.linspace(0.1, 1, count + 1, dtype=torch.float32)
        magnitudes = (10 ** (decade - 6) * ((edges[:-1] + edges[1:]) / 2)).tolist()
        levels += magnitudes + ([-magnitude for magnitude in magnitudes] if signed else [])
    return torch.tensor(sorted(levels), dtype=torch.float32)


def adamw_reference(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float = 1.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """Define the update in plain PyTorch on decoded moments, in param's dtype. Returns: param, exp_avg, exp_avg_sq."""
    grad = grad.to(param.dtype) * clip
    exp_avg = betas[0] * exp_avg + (1 - betas[0]) * grad
    exp_avg_sq = betas[1] * exp_avg_sq + (1 - betas[1]) * grad.square()
    denominator = (exp_avg_sq / (1 - betas[1] ** step)).sqrt() + eps
    param = (1 - lr * weight_decay) * param - lr / (1 - betas[0] ** step) * exp_avg / denominator
    return param, exp_avg, exp_avg_sq


def quantize_reference(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a flat vector to the nearest level of absmax per block. Returns: uint8 codes (n,), absmax (n / 256,)."""
    blocks = torch.nn.functional.pad(values, (0, -values.numel() % QUANTIZATION_BLOCK)).view(-1, QUANTIZATION_BLOCK)
    absmax = blocks.abs().amax(-1)
    scaled = (blocks / absmax.clamp_min(1e-38)[:, None]).reshape(-1)[: values.numel()]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    if levels[0] == 0:  # the unsigned map: positive values stay positive
        codes = codes.where(scaled <= 0, codes.clamp_min(1))
    return codes.to(torch.uint8), absmax


def dequantize_reference(codes: Tensor, absmax: Tensor, levels: Tensor) -> Tensor:
    """Decode a flat vector: levels[code] * absmax of its block, fp32."""
    return levels[codes.long()] * absmax.repeat_interleave(QUANTIZATION_BLOCK)[: codes.numel()]


@triton.jit
def _nearest_code(scaled, SIGNED: tl.constexpr):
    """Index of the nearest dynamic-map level to `scaled` in [-1, 1] ([0, 1] unsigned)."""
    FIRST: tl.constexpr = 1 if SIGNED else 2  # levels of decade 0
    magnitude = tl.abs(scaled)
    # Decade borders lie midway between a decade's last level and the next one's first.
    scale, count = magnitude * 1e6, tl.full(scaled.shape, FIRST, tl.int32)
    for i in tl.static_range(1, 7):
        last = 10.0 ** (i - 7) * (1.0 - 0.45 / (FIRST * 2 ** (i - 1)))
        first = 10.0 ** (i - 6) * (0.1 + 0.45 / (FIRST * 2**i))
        above = magnitude > 0.5 * (last + first)
        scale = tl.where(above, magnitude * (10.0 ** (6 - i)), scale)
        count = tl.where(above, FIRST * 2**i, count)
    level = tl.floor((scale - 0.1) * (count.to(tl.float32) * (1.0 / 0.9))).to(tl.int32)
    # Decades hold FIRST (2^i) levels, so FIRST (2^i - 1) = count - FIRST levels lie below this one.
    level = tl.minimum(tl.maximum(level, 0), count - 1) + count - FIRST
    level = tl.where(magnitude > 0.5 * (1.0 + 1.0 - 0.45 / (FIRST * 64)), FIRST * 127, level)
    if SIGNED:
        zero = magnitude <= 0.5 * 0.55e-6
        # The signed map has 1 but not -1.
        return tl.where(zero, 127, tl.where(scaled > 0, 128 + level, 126 - tl.minimum(level, 126)))
    return tl.where(magnitude > 0, 1 + level, 0)


@triton.jit
def _adamw_kernel(
    param_ptr,
    grad_ptr,
    exp_avg_ptr,
    exp_avg_sq_ptr,
    exp_avg_absmax_ptr,
    exp_avg_sq_absmax_ptr,
    signed_map_ptr,
    unsigned_map_ptr,
    step_ptr,
    lr_ptr,
    grad_norm_ptr,
    n,
    max_norm,
    beta1,
    beta2,
    one_minus_beta1,
    one_minus_beta2,
    log_beta1,
    log_beta2,
    eps,
    weight_decay,
    EIGHT_BITS: tl.constexpr,
    CLIP: tl.constexpr,
    BLOCKS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    element = block[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    mask, in_block = element < n, block * BLOCK < n
    param = tl.load(param_ptr + element, mask=mask, other=0.0)
    grad = tl.load(grad_ptr + element, mask=mask, other=0.0).to(tl.float32)
    lr = tl.load(lr_ptr)
    step = tl.load(step_ptr).to(tl.float32)
    if CLIP:
        grad *= tl.minimum(max_norm / (tl.load(grad_norm_ptr) + 1e-6), 1.0)
    exp_avg = tl.load(exp_avg_ptr + element, mask=mask, other=0)
    exp_avg_sq = tl.load(exp_avg_sq_ptr + element, mask=mask, other=0)
    if EIGHT_BITS:
        absmax = tl.load(exp_avg_absmax_ptr + block, mask=in_block, other=0.0)
        absmax_sq = tl.load(exp_avg_sq_absmax_ptr + block, mask=in_block, other=0.0)
        exp_avg = tl.load(signed_map_ptr + exp_avg.to(tl.int32)) * absmax[:, None]
        exp_avg_sq = tl.load(unsigned_map_ptr + exp_avg_sq.to(tl.int32)) * absmax_sq[:, None]

    exp_avg = beta1 * exp_avg + one_minus_beta1 * grad
    exp_avg_sq = beta2 * exp_avg_sq + one_minus_beta2 * grad * grad
    correction1, correction2 = _one_minus_exp(step * log_beta1), _one_minus_exp(step * log_beta2)
    update = exp_avg / (tl.sqrt(exp_avg_sq) / tl.sqrt(correction2) + eps)
    param = (1.0 - lr * weight_decay) * param - lr / correction1 * update
    tl.store(param_ptr + element, param, mask=mask)

    if EIGHT_BITS:
        absmax, absmax_sq = tl.max(tl.abs(exp_avg), axis=1), tl.max(exp_avg_sq, axis=1)
        code = _nearest_code(exp_avg / tl.maximum(absmax, 1e-38)[:, None], True)
        code_sq = _nearest_code(exp_avg_sq / tl.maximum(absmax_sq, 1e-38)[:, None], False)
        # All codes and scales of the tile have been read above: other programs own other blocks.
        tl.store(exp_avg_ptr + element, code.to(tl.uint8), mask=mask)
        tl.store(exp_avg_sq_ptr + element, code_sq.to(tl.uint8), mask=mask)
        tl.store(exp_avg_absmax_ptr + block, absmax, mask=in_block)
        tl.store(exp_avg_sq_absmax_ptr + block, absmax_sq, mask=in_block)
    else:
        tl.store(exp_avg_ptr + element, exp_avg, mask=mask)
        tl.store(exp_avg_sq_ptr + element, exp_avg_sq, mask=mask)


@triton.jit
def _one_minus_exp(x):
    """1 - exp(x) for x <= 0: a series near 0, where the difference loses digits (0.001 for beta2 at the first step)."""
    series = -x * (1.0 + x / 2 * (1.0 + x / 3 * (1.0 + x / 4 * (1.0 + x / 5 * (1.0 + x / 6 * (1.0 + x / 7))))))
    return tl.where(x > -0.25, series, 1.0 - tl.exp(x))


@triton.jit
def _square_sum_kernel(grad_ptr, partial_ptr, n, chunk, BLOCK: tl.constexpr):
    first = tl.program_id(0).to(tl.int64) * chunk
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, chunk, BLOCK):
        element = first + start + tl.arange(0, BLOCK)
        grad = tl.load(grad_ptr + element, mask=element < n, other=0.0).to(tl.float32)
        total += grad * grad
    tl.store(partial_ptr + tl.program_id(0), tl.sum(total, axis=0))


@triton.jit
def _root_of_sum_kernel(partial_ptr, out_ptr, count, BLOCK: tl.constexpr):
    index = tl.arange(0, BLOCK)
    tl.store(out_ptr, tl.sqrt(tl.sum(tl.load(partial_ptr + index, mask=index < count, other=0.0), axis=0)))


def grad_norm(grad: Tensor, out: Tensor | None = None) -> Tensor:
    """Return the 2-norm of a flat gradient, without a host read and the same for every run.

    Args:
        grad: (n,), contiguous, any float dtype.
        out: one fp32 element to write; new by default.
    Returns: the norm, fp32, on the device.
    Raises: ValueError: not flat or not contiguous.
    """
    check_rows("grad", grad, (grad.numel(),))
    if out is None:
        out = torch.empty((), dtype=torch.float32, device=grad.device)
    if not use_kernel(grad):
        return out.copy_(torch.linalg.vector_norm(grad, dtype=torch.float64))
    # Ranges are whole blocks, so their number depends on n alone.
    chunk = triton.cdiv(grad.numel(), NORM_PROGRAMS * NORM_BLOCK) * NORM_BLOCK
    programs = max(1, triton.cdiv(grad.numel(), chunk)) if chunk else 1
    partial = torch.empty(programs, dtype=torch.float32, device=grad.device)
    _square_sum_kernel[(programs,)](
        grad, partial, grad.numel(), chunk, BLOCK=NORM_BLOCK, num_warps=4, enable_fp_fusion=True
    )
    _root_of_sum_kernel[(1,)](partial, out, programs, BLOCK=NORM_PROGRAMS, num_warps=4, enable_fp_fusion=True)
    return out


def adamw_step(
    param: Tensor,
    grad: Tensor,
    state: AdamWState,
    *,
    step: Tensor,
    lr: Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    grad_norm: Tensor | None = None,
    max_norm: float | None = None,
) -> None:
    """Update a flat parameter vector in place.

    Args:
        param: (n,) fp32 master weights, contiguous, updated.
        grad: (n,) gradient, any float dtype; left as it is.
        state: both moments, updated.
        step: one element (int or float) on the device, the number of this step, from 1.
        lr: one fp32 element on the device.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.
        grad_norm: one fp32 element, the gradient's norm; with `max_norm` the gradient is clipped to it.
        max_norm: largest norm; None leaves the gradient alone.
    Raises: ValueError: shapes or dtypes do not fit, or only one of grad_norm and max_norm is given.
    """
    n = param.numel()
    check_rows("param", param, (n,), torch.float32)
    check_rows("grad", grad, (n,))
    check_rows("state.exp_avg", state.exp_avg, (n,))
    if (grad_norm is None) != (max_norm is None):
        raise ValueError("clipping needs both grad_norm and max_norm")
    for name, scalar in (("step", step), ("lr", lr)):
        if scalar.numel() != 1:
            raise ValueError(f"{name} has {scalar.numel()} elements, expected one, on the device")
    if not use_kernel(param):
        clip = 1.0
        if grad_norm is not None and max_norm is not None:
            clip = min(1.0, max_norm / (grad_norm.item() + 1e-6))
        _plain_step(param, grad, state, int(step.item()), lr.item(), betas, eps, weight_decay, clip)
        return
    _adamw_kernel[(triton.cdiv(n, BLOCKS_PER_PROGRAM * QUANTIZATION_BLOCK),)](
        param,
        grad,
        state.exp_avg,
        state.exp_avg_sq,
        state.exp_avg_absmax,
        state.exp_avg_sq_absmax,
        state.signed_map,
        state.unsigned_map,
        step,
        lr,
        grad_norm,
        n,
        0.0 if max_norm is None else max_norm,
        betas[0],
        betas[1],
        1 - betas[0],
        1 - betas[1],
        math.log(max(betas[0], 1e-30)),
        math.log(max(betas[1], 1e-30)),
        eps,
        weight_decay,
        EIGHT_BITS=state.exp_avg_absmax is not None,
        CLIP=grad_norm is not None,
        BLOCKS=BLOCKS_PER_PROGRAM,
        BLOCK=QUANTIZATION_BLOCK,
        num_warps=4,
        enable_fp_fusion=True,
    )


def _plain_step(
    param: Tensor,
    grad: Tensor,
    state: AdamWState,
    step: int,
    lr: float,
    betas: tuple[float, float],
    eps: float,
    weight_decay: float,
    clip: float,
) -> None:
    moments = [(state.exp_avg, state.exp_avg_absmax, state.signed_map)]
    moments += [(state.exp_avg_sq, state.exp_avg_sq_absmax, state.unsigned_map)]
    decoded = [
        moment if absmax is None or levels is None else dequantize_reference(moment, absmax, levels)
        for moment, absmax, levels in moments
    ]
    new_param, *new_moments = adamw_reference(
        param, grad, *decoded, step=step, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, clip=clip
    )
    param.copy_(new_param)
    for (moment, absmax, levels), new in zip(moments, new_moments, strict=True):
        if absmax is None or levels is None:
            moment.copy_(new)
        else:
            codes, new_absmax = quantize_reference(new, levels)
            moment.copy_(codes)
            absmax.copy_(new_absmax)
