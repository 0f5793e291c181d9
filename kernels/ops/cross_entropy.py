"""Cross-entropy on a block of logits that turns the logits into their gradient, in place.

    lse[t]        = log sum_v exp(z[t,v])
    loss[t]       = lse[t] - z[t, y[t]]                                       0 where y[t] = -100
    dz[t,v]       = scale (exp(z[t,v] - lse[t]) - [v = y[t]])                 0 where y[t] = -100
    entropy[t]    = lse[t] - sum_v p[t,v] z[t,v],   p = exp(z - lse)
    correct[t]    = z[t, y[t]] = max_v z[t,v]

Shapes: logits z (T, V) with any row pitch, overwritten by dz; labels y (T,) integers; loss, entropy, correct (T,) fp32.
One program owns a row: the first sweep keeps a running maximum and sum per group of eight columns (one exponential an
element, no barrier), the second rewrites the row backwards, so that it starts on what the first left in the caches.
fp32 math; dz rounds once. Nothing is saved: with the head frozen, dz is consumed by the next GEMM.

Source: Milakov and Gimelshein, Online normalizer calculation for softmax (arXiv 1805.02867), algorithm 3.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel
from finemill.kernels.ops.packing import IGNORE_INDEX

# T tokens, V vocabulary

BLOCK = 8192
"""Columns per sweep step of 16 warps: 16 elements per thread, two 16-byte loads in flight."""
LOG2_E = tl.constexpr(1.4426950408889634)


def cross_entropy_reference(logits: Tensor, labels: Tensor, *, upcast: bool = True) -> Tensor:
    """Define the loss in plain PyTorch: (T, V), (T,) -> (T,), 0 at label -100; `upcast=False` stays in the dtype."""
    compute = torch.promote_types(logits.dtype, torch.float32) if upcast else logits.dtype
    return torch.nn.functional.cross_entropy(logits.to(compute), labels, reduction="none", ignore_index=IGNORE_INDEX)


def cross_entropy_backward_reference(logits: Tensor, labels: Tensor, scale: Tensor | float) -> Tensor:
    """Evaluate the hand-derived gradient in the header. Returns: dz like logits."""
    labelled = labels != IGNORE_INDEX
    probability = torch.softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)), dim=-1)
    one_hot = torch.nn.functional.one_hot(labels.where(labelled, 0).long(), logits.shape[1])
    return ((probability - one_hot) * labelled[:, None] * scale).to(logits.dtype)


@triton.jit
def _cross_entropy_kernel(
    logits_ptr,
    labels_ptr,
    scale,  # a number, or a pointer to one fp32
    loss_ptr,
    entropy_ptr,
    correct_ptr,
    logits_stride,
    V,
    SCALE_ON_DEVICE: tl.constexpr,
    GRAD: tl.constexpr,
    ENTROPY: tl.constexpr,
    CORRECT: tl.constexpr,
    IGNORE: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    row_ptr = logits_ptr + row * logits_stride
    label = tl.load(labels_ptr + row)
    column = tl.arange(0, BLOCK // 8)[:, None] * 8 + tl.arange(0, 8)[None, :]
    if label == IGNORE:
        tl.store(loss_ptr + row, 0.0)
        if ENTROPY:
            tl.store(entropy_ptr + row, 0.0)
        if CORRECT:
            tl.store(correct_ptr + row, 0.0)
        if GRAD:
            zero = tl.zeros((BLOCK // 8, 8), dtype=logits_ptr.dtype.element_ty)
            for start in range(0, V, BLOCK):
                tl.store(row_ptr + start + column, zero, mask=start + column < V)
        return

    # Finite, so that a lane that saw only padding stays at 0 instead of turning into inf - inf.
    maximum = tl.full((BLOCK // 8,), -1e30, tl.float32)
    total = tl.zeros((BLOCK // 8,), tl.float32)
    weighted = tl.zeros((BLOCK // 8,), tl.float32)  # sum of exp(z - maximum) (z - maximum)
    for start in range(0, V, BLOCK):
        z = tl.load(row_ptr + start + column, mask=start + column < V, other=float("-inf")).to(tl.float32)
        larger = tl.maximum(maximum, tl.max(z, axis=1))
        rescale = tl.exp2((maximum - larger) * LOG2_E)
        shifted = z - larger[:, None]
        exponential = tl.exp2(shifted * LOG2_E)
        if ENTROPY:
            # A logit of -inf has weight 0; bounded first, 0 times it is 0.
            product = exponential * tl.maximum(shifted, -1e30)
            weighted = rescale * (weighted + total * (maximum - larger)) + tl.sum(product, axis=1)
        total = total * rescale + tl.sum(exponential, axis=1)
        maximum = larger
    row_maximum = tl.max(maximum, axis=0)
    rescale = tl.exp2((maximum - row_maximum) * LOG2_E)
    row_total = tl.sum(total * rescale, axis=0)
    lse = row_maximum + tl.log(row_total)

    in_vocabulary = (label >= 0) & (label < V)
    label_logit = tl.load(row_ptr + label, mask=in_vocabulary, other=float("nan")).to(tl.float32)
    tl.store(loss_ptr + row, lse - label_logit)
    if ENTROPY:
        row_weighted = tl.sum(rescale * (weighted + total * (maximum - row_maximum)), axis=0)
        tl.store(entropy_ptr + row, tl.log(row_total) - row_weighted / row_total)
    if CORRECT:
        tl.store(correct_ptr + row, tl.where(label_logit == row_maximum, 1.0, 0.0))
    if GRAD:
        if SCALE_ON_DEVICE:
            scale = tl.load(scale)
        # Every thread has read the label's logit before any thread overwrites it.
        tl.debug_barrier()
        steps = tl.cdiv(V, BLOCK)
        for step in range(0, steps):
            start = (steps - 1 - step) * BLOCK
            mask = start + column < V
            z = tl.load(row_ptr + start + column, mask=mask, other=float("-inf")).to(tl.float32)
            dz = tl.exp2((z - lse) * LOG2_E)
            dz = scale * tl.where(start + column == label, dz - 1.0, dz)
            tl.store(row_ptr + start + column, dz.to(logits_ptr.dtype.element_ty), mask=mask)


def cross_entropy_inplace(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor | float = 1.0,
    grad: bool = True,
    entropy_out: Tensor | None = None,
    correct_out: Tensor | None = None,
) -> Tensor:
    """Compute the loss of every row and overwrite the logits with scale times their gradient.

    Args:
        logits: (T, V), bf16, fp16 or fp32, any row stride; holds dz afterwards, unchanged with `grad=False`.
        labels: (T,), int64 or int32; rows labelled -100 get loss 0 and gradient 0.
        scale: factor of the gradient (1 / number of labelled tokens of the whole step, as a rule); a tensor of one fp32
            element is read on the device. The loss is not scaled.
        grad: whether to write the gradient.
        entropy_out: (T,) fp32 that receives the entropy of each row's distribution in nats, 0 for ignored rows.
        correct_out: (T,) fp32 that receives 1 where the label is the most likely token.
    Returns: loss (T,) fp32, in nats; NaN where a label lies outside the vocabulary (raised as an error on the CPU).
    Raises: ValueError: wrong shapes or dtypes.
    """
    tokens, vocabulary = logits.shape
    check_rows("logits", logits, (tokens, vocabulary))
    check_rows("labels", labels, (tokens,))
    for name, out in (("entropy_out", entropy_out), ("correct_out", correct_out)):
        if out is not None:
            check_rows(name, out, (tokens,), torch.float32)
    on_device = isinstance(scale, Tensor)
    if isinstance(scale, Tensor) and (scale.numel() != 1 or scale.dtype != torch.float32):
        raise ValueError(f"scale has shape {tuple(scale.shape)} and dtype {scale.dtype}, expected one fp32 element")
    if not use_kernel(logits):
        return _plain(logits, labels, scale, grad, entropy_out, correct_out)
    loss = torch.empty(tokens, dtype=torch.float32, device=logits.device)
    _cross_entropy_kernel[(tokens,)](
        logits,
        labels,
        scale,
        loss,
        entropy_out,
        correct_out,
        logits.stride(0),
        vocabulary,
        SCALE_ON_DEVICE=on_device,
        GRAD=grad,
        ENTROPY=entropy_out is not None,
        CORRECT=correct_out is not None,
        IGNORE=IGNORE_INDEX,
        BLOCK=BLOCK,
        num_warps=16,
        enable_fp_fusion=True,
    )
    return loss


def _plain(
    logits: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    grad: bool,
    entropy_out: Tensor | None,
    correct_out: Tensor | None,
) -> Tensor:
    labelled = labels != IGNORE_INDEX
    loss = cross_entropy_reference(logits, labels.long()).float()
    if entropy_out is not None:
        log_p = torch.log_softmax(logits.float(), dim=-1)
        entropy_out.copy_(-(log_p.exp() * log_p.clamp_min(-1e30)).sum(-1) * labelled)
    if correct_out is not None:
        label_logit = logits.gather(1, labels.where(labelled, 0).long()[:, None])[:, 0]
        correct_out.copy_((label_logit == logits.amax(-1)) & labelled)
    if grad:
        logits.copy_(cross_entropy_backward_reference(logits, labels, scale))
    return loss
