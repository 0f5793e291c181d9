"""Causal attention over packed sequences: cuDNN or FlashAttention-4 where they are installed, else FlashAttention-2.

    p[t,s] = softmax_s(scale q[t] . k[s]),  s <= t in the same sequence;   out[t] = sum_s p[t,s] v[s]
    with delta[t] = dout[t] . out[t]:   ds[t,s] = p[t,s] (dout[t] . v[s] - delta[t])
    dq[t] = scale sum_s ds[t,s] k[s],   dk[s] = scale sum_t ds[t,s] q[t],   dv[s] = sum_t p[t,s] dout[t]

Shapes: q and out (T, N, D), k and v (T, K, D), query head a reads key head a // (N/K); token pitches are free, so out
can be the first columns of a wider matrix and v a slice of qkv. Saved: q, k, v, out and the log-sum-exp. Every backend
is run in its deterministic mode: training repeats bit for bit.

cuDNN's backward is 1.7 to 2.4 times as fast as FlashAttention-2's on a Hopper card (results.md), and its frontend takes
ragged sequences, free strides and a deterministic flag, which `scaled_dot_product_attention` does not offer. Plans are
built once per shape (about 0.1 s) and cached. Long sequences run on FlashAttention-4 (attention_fa4.py).

Source: Dao, FlashAttention-2 (arXiv 2307.08691); cuDNN frontend documentation, operations/Attention.
"""

import contextlib
import functools
import importlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from finemill.kernels.ops import attention_fa4
from finemill.kernels.ops.launch import HOPPER, capability
from finemill.kernels.ops.packing import LENGTH_STEP, Sequences, round_count

# T tokens, N query heads, K key and value heads, D head width, n sequences

WORKSPACE_PER_ELEMENT = 24
"""Bytes per element of q that cuDNN's backward may take where no plan says otherwise."""
BACKENDS = ("fa4", "cudnn", "flash", "plain")
TOTAL_STEP = 1024
"""Token counts of ragged batches are rounded up to this in plans, which take an upper bound."""


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
        workspace: bytes that cuDNN may take; heads, then sequences are done in groups to stay below, one at least.
            WORKSPACE_PER_ELEMENT decides by default.
    Returns: dq (T, N, D), dk and dv (T, K, D), contiguous.
    """
    match backend(q, sequences):
        case "fa4" | "cudnn":
            workspace = WORKSPACE_PER_ELEMENT * q.numel() if workspace is None else workspace
            grads = _like(q), _like(k), _like(v)
            for part, state in zip(sequences.parts(), saved, strict=True):
                _part_backward(dout, q, k, v, out, state, part, scale, workspace, grads)
            return grads
        case "flash":
            return _flash_backward(dout, q, k, v, out, saved, sequences, scale)
        case _:
            return attention_backward_reference(dout, q, k, v, out, saved[0], sequences, scale)


def backend(q: Tensor, sequences: Sequences) -> str:
    """Which implementation runs: "fa4", "cudnn", "flash" or "plain".

    FINEMILL_ATTENTION asks for another one than the fastest, to compare them.
    """
    return fitting_backend(q.device, q.dtype, q.shape[2], sequences.max_length)


def fitting_backend(device: torch.device, dtype: torch.dtype, head_dim: int, length: int) -> str:
    """Return the fastest implementation, or the one asked for, that takes sequences of up to `length` tokens.

    Raises: ValueError: FINEMILL_ATTENTION names none.
    """
    if device.type != "cuda" or dtype not in (torch.bfloat16, torch.float16) or head_dim % 8:
        return "plain"
    asked = os.environ.get("FINEMILL_ATTENTION")
    if asked and asked not in BACKENDS:
        raise ValueError(f"FINEMILL_ATTENTION is {asked!r}: allowed are {', '.join(BACKENDS)}")
    wanted = asked or "cudnn"
    if not _usable(wanted, device, head_dim, length):
        wanted = "flash"
    elif not asked and attention_fa4.suits(length, head_dim) and attention_fa4.available(device):
        wanted = "fa4"  # shorter sequences of the same batch run on cuDNN
    # FlashAttention-2 begins with Ampere and takes heads of 256, but 192 where shared memory is small (sm_86, 89, 120).
    card = capability(device)
    widest = 192 if card in ((8, 6), (8, 9)) or card >= (12, 0) else 256
    return "plain" if wanted == "flash" and (card < (8, 0) or head_dim > widest) else wanted


def _usable(name: str, device: torch.device, head_dim: int, length: int) -> bool:
    match name:
        case "fa4":
            return head_dim in attention_fa4.HEAD_DIMS and attention_fa4.available(device)
        case "cudnn":  # it differentiates heads of up to 128, and has no plan for sequences of one token
            return length > 1 and head_dim <= 128 and _cudnn_module(device) is not None
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
) -> tuple[Tensor, Tensor, Tensor]:
    cu, longest = sequences.cu_seqlens, sequences.max_length
    lse, seed, offset = saved
    with _deterministic():
        dq, dk, dv = torch.ops.aten._flash_attention_backward(
            dout, q, k, v, out, lse, cu, cu, longest, longest, 0.0, True, seed, offset, scale=scale
        )
    return dq, dk, dv


@functools.cache
def _cudnn_module(device: torch.device) -> Any:
    """Return cuDNN's frontend module, or None where it is missing, too old, or not faster (before Hopper)."""
    if capability(device) < HOPPER:
        return None
    try:
        module = importlib.import_module("cudnn")
        return module if module.backend_version() >= 91100 else None
    except (ImportError, OSError, RuntimeError):
        return None


@functools.cache
def _cudnn_handle(device: torch.device) -> Any:
    return _cudnn_module(device).create_handle()


@dataclass(frozen=True)
class _PlanKey:
    """Everything a compiled attention plan depends on.

    Token pitches are in elements: q, k, v, out, and in a backward dout, dq, dk, dv. `stats_heads` counts the heads of
    the whole log-sum-exp tensor, `total` bounds T of a ragged batch.
    """

    backward: bool
    count: int
    length: int
    heads: int
    kv_heads: int
    head_dim: int
    dtype: torch.dtype
    pitches: tuple[int, ...]
    stats_heads: int
    scale: float
    total: int | None
    device: torch.device


@functools.cache  # without a bound: captured graphs hold a plan's kernels
def _cudnn_plan(key: _PlanKey) -> tuple[Any, dict[str, Any], int]:
    """Build a forward or backward plan. Returns: graph, its tensors by name, workspace bytes."""
    cudnn = _cudnn_module(key.device)
    io = cudnn.data_type.BFLOAT16 if key.dtype == torch.bfloat16 else cudnn.data_type.HALF
    fp32, int32 = cudnn.data_type.FLOAT, cudnn.data_type.INT32
    graph = cudnn.pygraph(
        io_data_type=io, intermediate_data_type=fp32, compute_data_type=fp32, handle=_cudnn_handle(key.device)
    )
    tensors: dict[str, Any] = {}

    def geometry(heads: int, pitch: int) -> tuple[list[int], list[int]]:
        stride = [key.length * pitch, key.head_dim, pitch, 1]
        return [key.count, heads, key.length, key.head_dim], stride

    def integers(name: str, size: int) -> Any:
        tensors[name] = graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=int32)
        return tensors[name]

    def offsets(pitch: int) -> Any:
        name = f"offset{pitch}"
        return tensors[name] if name in tensors else integers(name, key.count + 1)

    def ragged(tensor: Any, pitch: int) -> Any:
        if key.total is not None:
            tensor.set_ragged_offset(offsets(pitch))
        return tensor

    def matrix(name: str, heads: int, pitch: int) -> Any:
        dim, stride = geometry(heads, pitch)
        tensors[name] = ragged(graph.tensor(name=name, dim=dim, stride=stride, data_type=io), pitch)
        return tensors[name]

    def result(name: str, tensor: Any, heads: int, pitch: int) -> None:
        dim, stride = geometry(heads, pitch)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_data_type(io)
        tensors[name] = ragged(tensor, pitch)

    heads, kv_heads, pitches = key.heads, key.kv_heads, key.pitches
    options: dict[str, Any] = {
        "attn_scale": key.scale,
        "diagonal_alignment": cudnn.diagonal_alignment.TOP_LEFT,
        "diagonal_band_right_bound": 0,
    }
    q, k, v = matrix("q", heads, pitches[0]), matrix("k", kv_heads, pitches[1]), matrix("v", kv_heads, pitches[2])
    stats_dim = [key.count, heads, key.length, 1]
    stats_stride = [key.stats_heads * key.length, key.length, 1, 1]
    if key.total is not None:
        lengths = integers("lengths", key.count)
        options |= {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}
    if not key.backward:
        out, stats = graph.sdpa(q=q, k=k, v=v, generate_stats=True, **options)
        result("out", out, heads, pitches[3])
        stats.set_output(True).set_dim(stats_dim).set_stride(stats_stride).set_data_type(fp32)
        tensors["stats"] = stats
    else:
        tensors["stats"] = graph.tensor(name="stats", dim=stats_dim, stride=stats_stride, data_type=fp32)
        if key.total is not None:
            options |= {"max_total_seq_len_q": key.total, "max_total_seq_len_kv": key.total}
        grads = graph.sdpa_backward(
            q=q,
            k=k,
            v=v,
            o=matrix("out", heads, pitches[3]),
            dO=matrix("dout", heads, pitches[4]),
            stats=tensors["stats"],
            use_deterministic_algorithm=True,
            **options,
        )
        counts = (heads, kv_heads, kv_heads)
        for name, tensor, count, pitch in zip(("dq", "dk", "dv"), grads, counts, pitches[5:], strict=True):
            result(name, tensor, count, pitch)
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    return graph, tensors, graph.get_workspace_size()


def _cudnn_run(key: _PlanKey, sequences: Sequences, buffers: dict[str, Tensor]) -> None:
    graph, tensors, workspace_bytes = _cudnn_plan(key)
    if key.total is not None:
        padded = _pad_count(sequences, key.count)
        buffers["lengths"] = padded.lengths()
        for name in tensors:
            if name.startswith("offset"):
                buffers[name] = padded.offsets(int(name.removeprefix("offset")))
    cudnn, handle = _cudnn_module(key.device), _cudnn_handle(key.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(key.device).cuda_stream)
    workspace = torch.empty(max(1, workspace_bytes), dtype=torch.uint8, device=key.device)
    graph.execute({tensors[name]: buffer for name, buffer in buffers.items()}, workspace, handle=handle)


def _plan_key(tensors: dict[str, Tensor], stats: Tensor | None, sequences: Sequences, scale: float) -> _PlanKey:
    q, k = tensors["q"], tensors["k"]
    if sequences.uniform is not None:
        (count, length), total = sequences.uniform, None
    else:
        count, length = _padded_shape(sequences)
        total = -(-q.shape[0] // TOTAL_STEP) * TOTAL_STEP
    return _PlanKey(
        backward="dout" in tensors,
        count=count,
        length=length,
        heads=q.shape[1],
        kv_heads=k.shape[1],
        head_dim=q.shape[2],
        dtype=q.dtype,
        pitches=tuple(tensor.stride(0) for tensor in tensors.values()),
        stats_heads=q.shape[1] if stats is None else stats.stride(0) // length,
        scale=scale,
        total=total,
        device=q.device,
    )


def _part_forward(q: Tensor, k: Tensor, v: Tensor, part: Sequences, scale: float, out: Tensor) -> Tensor:
    """Write `out` for sequences of one class. Returns: their log-sum-exp."""
    if backend(q, part) == "fa4":
        return attention_fa4.forward(q, k, v, part, scale, out)
    tensors = {"q": q, "k": k, "v": v, "out": out}
    key = _plan_key(tensors, None, part, scale)
    stats = torch.empty((key.count, key.heads, key.length, 1), dtype=torch.float32, device=q.device)
    _cudnn_run(key, part, tensors | {"stats": stats})
    return stats


def _part_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    part: Sequences,
    scale: float,
    workspace: int,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write the gradients for sequences of one class."""
    if backend(q, part) == "fa4":
        attention_fa4.backward(dout, q, k, v, out, stats, part, scale, grads)
        return
    dq, dk, dv = grads
    kv_heads, ragged = k.shape[1], part.uniform is None
    group = q.shape[1] // kv_heads
    count, length = stats.shape[0], stats.shape[2]
    step = key_heads_at_once(workspace, count * length**2, q.shape, kv_heads, ragged=ragged)
    if ragged and count > 1 and not step:
        padded = _pad_count(part, count)
        for first, end in ((0, count // 2), (count // 2, count)):
            half = Sequences(padded.cu_seqlens[first : end + 1], part.max_length)
            _part_backward(dout, q, k, v, out, stats[first:end], half, scale, workspace, grads)
        return
    step = max(1, step)
    for first in range(0, kv_heads, step):
        keys, queries = slice(first, first + step), slice(first * group, (first + step) * group)
        tensors = {
            "q": q[:, queries],
            "k": k[:, keys],
            "v": v[:, keys],
            "out": out[:, queries],
            "dout": dout[:, queries],
        }
        tensors |= {"dq": dq[:, queries], "dk": dk[:, keys], "dv": dv[:, keys]}
        rows = stats[:, queries]
        _cudnn_run(_plan_key(tensors, rows, part, scale), part, tensors | {"stats": rows})


def key_heads_at_once(workspace: int, scores: int, shape: Sequence[int], kv_heads: int, *, ragged: bool) -> int:
    """How many key heads, with their query heads, cuDNN's backward takes in one call: a divisor of all, 0 if none fits.

    Args:
        workspace: bytes this may take.
        scores: of a query head: sequences x length^2.
        shape: of q, (T, N, D).
        kv_heads: key and value heads.
        ragged: whether the sequences differ in length.
    """
    group = shape[1] // kv_heads
    fitting = (n for n in divisors(kv_heads) if workspace_bytes(n * group, scores, shape, ragged=ragged) <= workspace)
    return max(fitting, default=0)


def workspace_bytes(heads: int, scores: int, shape: Sequence[int], *, ragged: bool) -> int:
    """What cuDNN's deterministic backward takes for so many query heads at once; other arguments as above.

    It keeps the gradient of the scores in 16 bits and dq in fp32; of ragged sequences dq of all heads, and dk and dv of
    every query head.
    """
    tokens, all_heads, head_dim = shape
    sums = 8 * tokens * all_heads * head_dim if ragged else 4 * tokens * heads * head_dim
    return 2 * scores * heads + sums


def divisors(number: int) -> list[int]:
    """All divisors, smallest first."""
    return [divisor for divisor in range(1, number + 1) if number % divisor == 0]


def _padded_shape(sequences: Sequences) -> tuple[int, int]:
    """Number and length of the sequences that a ragged plan is built for."""
    return round_count(sequences.count), -(-sequences.max_length // LENGTH_STEP) * LENGTH_STEP


def _pad_count(sequences: Sequences, count: int) -> Sequences:
    """Append empty sequences up to `count`."""
    missing = count - sequences.count
    if not missing:
        return sequences
    if sequences.padded is None or sequences.padded.count != count:
        cu_seqlens = torch.cat([sequences.cu_seqlens, sequences.cu_seqlens[-1:].expand(missing)])
        sequences.padded = Sequences(cu_seqlens, sequences.max_length)
    return sequences.padded


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
