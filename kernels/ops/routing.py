"""Top-k routing of tokens to experts, and its gradient; the router's own matrix product stays with cuBLAS.

    p[t,e] = softmax(l[t,:])[e],  the k largest are chosen:  w[t,j] = p[t,e_j]   or, normalized,  p[t,e_j] / sum_j' p
    dl[t,e_j] = w[t,j] (dw[t,j] - s[t]),   s[t] = sum_j w[t,j] dw[t,j]              normalized: 0 for experts not chosen
    dl[t,e]   = p[t,e] (dw[t,e] - s[t]),   dw[t,e] = 0 for experts not chosen       not normalized

Shapes: logits and d_logits (T, E), experts (T, k) int32, weights (T, k) fp32. No expert has a capacity: no token is
dropped. Equal logits: the expert of the lowest number is taken, so that runs repeat. Saved: logits, experts, weights.

Source: Shazeer et al., Outrageously Large Neural Networks (arXiv 1701.06538), section 2.1; Qwen3 (arXiv 2505.09388).
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from finemill.kernels.ops.launch import check_rows, use_kernel

# T tokens, E experts, k chosen per token

ROWS = 8


def route_reference(logits: Tensor, count: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Define the op in plain PyTorch, (T, E) -> experts (T, k) int32, weights (T, k) in fp32 (fp64 stays)."""
    compute = torch.promote_types(logits.dtype, torch.float32)
    probabilities = torch.softmax(logits.to(compute), dim=-1)
    weights, experts = torch.sort(probabilities, dim=-1, descending=True, stable=True)
    weights, experts = weights[:, :count], experts[:, :count]
    if normalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return experts.int().contiguous(), weights.contiguous()


def route_backward_reference(
    d_weights: Tensor, logits: Tensor, experts: Tensor, weights: Tensor, *, normalize: bool
) -> Tensor:
    """Evaluate the gradient in the header. Returns: d_logits (T, E) in the dtype of d_weights."""
    inner = (weights * d_weights).sum(dim=-1, keepdim=True)
    if normalize:
        chosen = weights * (d_weights - inner)
        return torch.zeros_like(logits, dtype=d_weights.dtype).scatter_(1, experts.long(), chosen)
    probabilities = torch.softmax(logits.to(d_weights.dtype), dim=-1)
    spread = torch.zeros_like(probabilities).scatter_(1, experts.long(), d_weights)
    return probabilities * (spread - inner)


@triton.jit
def _route_kernel(
    logits_ptr,
    experts_ptr,
    weights_ptr,
    logits_stride,
    T,
    E,
    K: tl.constexpr,
    NORMALIZE: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_K: tl.constexpr,
    ROWS: tl.constexpr,
):
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    expert = tl.arange(0, BLOCK_E)
    slot = tl.arange(0, BLOCK_K)
    in_range = (row < T)[:, None]
    pointers = logits_ptr + row.to(tl.int64)[:, None] * logits_stride + expert[None, :]
    logits = tl.load(pointers, mask=in_range & (expert < E)[None, :], other=float("-inf")).to(tl.float32)
    logits = tl.where(in_range, logits, 0.0)  # rows that are not there divide by no zero
    largest = tl.max(logits, axis=1)
    total = tl.sum(tl.exp(logits - largest[:, None]), axis=1)
    left = tl.where((expert < E)[None, :], logits, float("-inf"))
    chosen = tl.zeros((ROWS, BLOCK_K), tl.int32)
    value = tl.full((ROWS, BLOCK_K), float("-inf"), tl.float32)
    for j in tl.static_range(K):
        best = tl.max(left, axis=1)
        found = tl.min(tl.where(left == best[:, None], expert[None, :], BLOCK_E), axis=1)
        chosen = tl.where((slot == j)[None, :], found[:, None], chosen)
        value = tl.where((slot == j)[None, :], best[:, None], value)
        left = tl.where(expert[None, :] == found[:, None], float("-inf"), left)
    weights = tl.exp(value - largest[:, None])
    if NORMALIZE:
        total = tl.sum(weights, axis=1)
    weights = weights / total[:, None]
    target = row[:, None] * K + slot[None, :]
    mask = in_range & (slot < K)[None, :]
    tl.store(experts_ptr + target, chosen, mask=mask)
    tl.store(weights_ptr + target, weights, mask=mask)


def route(logits: Tensor, count: int, *, normalize: bool) -> tuple[Tensor, Tensor]:
    """Choose each token's experts.

    Args:
        logits: (T, E), any row stride.
        count: experts per token.
        normalize: whether a token's weights add up to one.
    Returns: experts (T, k) int32, largest weight first, and their weights (T, k) fp32.
    Raises: ValueError: more experts asked for than there are, or wrong strides.
    """
    tokens, num_experts = logits.shape
    if not 0 < count <= num_experts:
        raise ValueError(f"{count} experts per token of {num_experts}: at least one, at most all")
    check_rows("logits", logits, (tokens, num_experts))
    if not use_kernel(logits):
        return route_reference(logits, count, normalize=normalize)
    experts = torch.empty((tokens, count), dtype=torch.int32, device=logits.device)
    weights = torch.empty((tokens, count), dtype=torch.float32, device=logits.device)
    _route_kernel[(triton.cdiv(tokens, ROWS),)](
        logits,
        experts,
        weights,
        logits.stride(0),
        tokens,
        num_experts,
        K=count,
        NORMALIZE=normalize,
        BLOCK_E=triton.next_power_of_2(num_experts),
        BLOCK_K=triton.next_power_of_2(count),
        ROWS=ROWS,
        num_warps=4,
        enable_fp_fusion=True,
    )
    return experts, weights
