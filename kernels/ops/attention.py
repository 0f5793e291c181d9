"""Causal attention over packed sequences: cuDNN or FlashAttention-4 where they are installed, else FlashAttention-2.

    p[t,s] = softmax_s(scale q[t] . k[s]),  s <= t in the same sequence;   out[t] = sum_s p[t,s] v[s]
    with delta[t] = dout[t] . out[t]:   ds[t,s] = p[t,s] (dout[t] . v[s] - delta[t])
    dq[t] = scale sum_s ds[t,s] k[s],   dk[s] = scale sum_t ds[t,s] q[t],   dv[s] = sum_t p[t,s] dout[t]

Shapes: q and out (T, N, D), k and v (T, K, D), query head a reads key head a // (N/K); token pitches are free, so out
can be the first columns of a wider matrix and v a slice of qkv. Saved: q, k, v, out and the log-sum-exp. Every backend
is run in its deterministic mode: training repeats bit for bit.

The fastest implementation depends on the card and on the length: cuDNN (attention_cudnn.py), FlashAttention-4 for long
sequences (attention_fa4.py), else torch's FlashAttention-2. The sequences of each length class run on their own.

Source: Dao, FlashAttention-2 (arXiv 2307.08691).
"""

import contextlib
import os
from collections.abc import Iterator
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finemill.errors import UserError
from finemill.kernels.ops import attention_cudnn, attention_fa4
from finemill.kernels.ops.division import CUDNN_LENGTH, FA4_HEAD_DIMS, fa4_suits, flash_key_heads
from finemill.kernels.ops.launch import capability, num_sms
from finemill.kernels.ops.packing import Sequences

# T tokens, N query heads, K key and value heads, D head width, n sequences

BACKENDS = ("fa4", "cudnn", "flash", "plain")


def attention_reference(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float) -> tuple[Tensor, Tensor]:
    """Define the op, sequence by sequence, in at least fp32. Returns: out like q, log-sum-exp (N, T)."""
    out = torch.empty_like(q, memory_format=torch.contiguous_format)
    lse = torch.empty((q.shape[1], q.shape[0]), dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
    for begin, end in _bounds(sequences):
        scores = _scores(q[begin:end], k[begin:end], scale)
        lse[:, begin:end] = scores.logsumexp(-1)
        probabilities = (scores - lse[:, begin:end, None]).exp()
        out[begin:end] = (probabilities @ _heads_first(v[begin:end], q.shape[1])).transpose(0, 1).to(q.dtype)
    return out, lse


def attention_backward_reference(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Evaluate the formulas in the header. Returns: dq, dk, dv like q, k, v."""
    dq, dk, dv = (torch.empty_like(t, memory_format=torch.contiguous_format) for t in (q, k, v))
    heads, kv_heads = q.shape[1], k.shape[1]
    for begin, end in _bounds(sequences):
        part = slice(begin, end)
        p = (_scores(q[part], k[part], scale) - lse[:, part, None]).exp()
        grad, saved = _heads_first(dout[part], heads), _heads_first(out[part], heads)
        ds = p * (grad @ _heads_first(v[part], heads).mT - (grad * saved).sum(-1, keepdim=True))
        dq[part] = (scale * ds @ _heads_first(k[part], heads)).transpose(0, 1).to(q.dtype)
        for target, full in ((dk, scale * ds.mT @ _heads_first(q[part], heads)), (dv, p.mT @ grad)):
            target[part] = full.unflatten(0, (kv_heads, -1)).sum(1).transpose(0, 1).to(q.dtype)
    return dq, dk, dv


def attention_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, out: Tensor | None = None
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Attend within each sequence, outside autograd.

    Args:
        q: (T, N, D), heads adjacent, any token pitch.
        k: (T, K, D), likewise.
        v: (T, K, D), likewise.
        sequences: boundaries.
        scale: factor of the scores, D ** -0.5 as a rule.
        out: (T, N, D) to write, any token pitch; new by default.
    Returns: out, and what `attention_backward` needs besides it.
    """
    match backend(q, sequences):
        case "fa4" | "cudnn":
            out = _like(q) if out is None else out
            return out, tuple(_part_forward(q, k, v, part, scale, out) for part in sequences.parts())
        case "flash":
            result, saved = _flash_forward(q, k, v, sequences, scale)
        case _:
            result, lse = attention_reference(q, k, v, sequences, scale)
            saved = (lse,)
    return (result if out is None else out.copy_(result)), saved


def attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    sequences: Sequences,
    scale: float,
    workspace: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Differentiate.

    Args:
        dout: gradient of out, (T, N, D), any token pitch.
        q: the forward's, as k, v, out, sequences and scale.
        k: see q.
        v: see q.
        out: see q.
        saved: what the forward left.
        sequences: see q.
        scale: see q.
        workspace: bytes that cuDNN may take, see attention_cudnn.backward, or FlashAttention-2; their default if None.
    Returns: dq (T, N, D), dk and dv (T, K, D), contiguous.
    """
    match backend(q, sequences):
        case "fa4" | "cudnn":
            grads = _like(q), _like(k), _like(v)
            for part, state in zip(sequences.parts(), saved, strict=True):
                _part_backward(dout, q, k, v, out, state, part, scale, workspace, grads)
            return grads
        case "flash":
            return _flash_backward(dout, q, k, v, out, saved, sequences, scale, workspace)
        case _:
            return attention_backward_reference(dout, q, k, v, out, saved[0], sequences, scale)


def backend(q: Tensor, sequences: Sequences) -> str:
    """Which implementation runs: "fa4", "cudnn", "flash" or "plain".

    FINEMILL_ATTENTION asks for another one than the fastest, to compare them.
    """
    return fitting_backend(q.device, q.dtype, q.shape[2], sequences.max_length)


def fitting_backend(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> str:
    """Return the fastest implementation, or the one asked for, that takes sequences of up to `length` tokens.

    Raises: UserError: FINEMILL_ATTENTION names none.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8:
        return "plain"
    asked = os.environ.get("FINEMILL_ATTENTION")
    if asked and asked not in BACKENDS:
        raise UserError(f"FINEMILL_ATTENTION is {asked!r}: allowed are {', '.join(BACKENDS)}")
    wanted = asked or "cudnn"
    # Shorter sequences of the same batch run on cuDNN.
    beside = not asked and fa4_suits(length, head_dim) and _usable("cudnn", device, head_dim, CUDNN_LENGTH)
    if beside and attention_fa4.available(device):
        wanted = "fa4"
    elif not _usable(wanted, device, head_dim, length):
        wanted = "flash"
    # FlashAttention-2 begins with Ampere and takes heads of 256, but 192 where shared memory is small (sm_86, 89, 120).
    card = capability(device)
    widest = 192 if card in ((8, 6), (8, 9)) or card >= (12, 0) else 256
    return "plain" if wanted == "flash" and (card < (8, 0) or head_dim > widest) else wanted


def _usable(name: str, device: torch.device, head_dim: int, length: int) -> bool:
    match name:
        case "fa4":
            return head_dim in FA4_HEAD_DIMS and attention_fa4.available(device)
        case "cudnn":
            return attention_cudnn.takes(length, head_dim) and attention_cudnn.available(device)
    return True


@contextlib.contextmanager
def _deterministic() -> Iterator[None]:
    """Let FlashAttention-2 pick its deterministic backward, without torch's filling of uninitialized memory."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch._C._set_deterministic_algorithms(True, warn_only=False)
    try:
        yield
    finally:
        torch._C._set_deterministic_algorithms(before[0], warn_only=before[1])
        settings.fill_uninitialized_memory = fill


def _flash_forward(
    q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    cu, longest = sequences.cu_seqlens, sequences.max_length
    out, lse, seed, offset, _ = torch.ops.aten._flash_attention_forward(
        q, k, v, cu, cu, longest, longest, 0.0, True, False, scale=scale
    )
    return out, (lse, seed, offset)


def _flash_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    saved: tuple[Tensor, ...],
    sequences: Sequences,
    scale: float,
    workspace: int | None,
) -> tuple[Tensor, Tensor, Tensor]:
    cu, longest = sequences.cu_seqlens, sequences.max_length
    lse, seed, offset = saved
    (tokens, heads, head_dim), kv_heads = q.shape, k.shape[1]
    step = flash_key_heads(workspace, tokens, heads, kv_heads, head_dim, num_sms(q.device))

    def differentiate(queries: slice, keys: slice) -> tuple[Tensor, Tensor, Tensor]:
        inputs = dout[:, queries], q[:, queries], k[:, keys], v[:, keys], out[:, queries], lse[queries]
        with _deterministic():
            return torch.ops.aten._flash_attention_backward(  # type: ignore[no-any-return]
                *inputs, cu, cu, longest, longest, 0.0, True, seed, offset, scale=scale
            )

    if step == kv_heads:
        return differentiate(slice(heads), slice(kv_heads))
    grads = _like(q), _like(k), _like(v)
    for first in range(0, kv_heads, step):
        keys = slice(first, first + step)
        queries = slice(first * heads // kv_heads, (first + step) * heads // kv_heads)
        parts = differentiate(queries, keys)
        for grad, part, columns in zip(grads, parts, (queries, keys, keys), strict=True):
            grad[:, columns].copy_(part)
    return grads


def _part_forward(q: Tensor, k: Tensor, v: Tensor, part: Sequences, scale: float, out: Tensor) -> Tensor:
    """Write `out` for sequences of one class. Returns: their log-sum-exp."""
    if backend(q, part) == "fa4":
        return attention_fa4.forward(q, k, v, part, scale, out)
    return attention_cudnn.forward(q, k, v, part, scale, out)


def _part_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    part: Sequences,
    scale: float,
    workspace: int | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients for sequences of one class."""
    if backend(q, part) == "fa4":
        attention_fa4.backward(dout, q, k, v, out, stats, part, scale, grads)
        return
    attention_cudnn.backward(dout, q, k, v, out, stats, part, scale, workspace, grads)


def _like(tensor: Tensor) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)


def _bounds(sequences: Sequences) -> Iterator[tuple[int, int]]:
    starts = sequences.cu_seqlens.tolist()
    return ((begin, end) for begin, end in pairwise(starts) if end > begin)


def _heads_first(tensor: Tensor, heads: int) -> Tensor:
    """(t, K, D) to (N, t, D) in at least fp32, key heads repeated for their query heads."""
    wide = tensor.to(torch.promote_types(tensor.dtype, torch.float32)).transpose(0, 1)
    return wide.repeat_interleave(heads // wide.shape[0], dim=0)


def _scores(q: Tensor, k: Tensor, scale: float) -> Tensor:
    tokens = q.shape[0]
    scores = scale * _heads_first(q, q.shape[1]) @ _heads_first(k, q.shape[1]).mT
    future = torch.ones((tokens, tokens), dtype=torch.bool, device=q.device).triu(1)
    return scores.masked_fill(future, float("-inf"))
