"""Attention through cuDNN's frontend: on a Hopper card its backward takes 0.4 to 0.6 of FlashAttention-2's time.

The frontend takes ragged sequences, free strides and a deterministic flag, none of which torch's own attention offers.
Formulas and shapes are attention.py's. A plan (graph of operations, kernels and workspace) is built once per shape, in
about 0.1 s, and cached; ragged sequences are padded to few shapes. The deterministic backward keeps the gradient of all
scores, so where its workspace is short it takes heads, then sequences in groups.

Source: cuDNN frontend documentation, operations/Attention.
"""

import functools
import importlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from finemill.kernels.ops.division import CUDNN_LENGTH, cudnn_bytes, divisors
from finemill.kernels.ops.launch import HOPPER, capability
from finemill.kernels.ops.packing import LENGTH_STEP, Sequences, round_count

# T tokens, N query heads, K key and value heads, D head width, n sequences

WORKSPACE_PER_ELEMENT = 24
"""Bytes per element of q that the backward may take where no plan says otherwise."""
TOTAL_STEP = 1024
"""Token counts of ragged batches are rounded up to this in plans, which take an upper bound."""
OLDEST = 91100
"""Version of cuDNN that is needed, as `backend_version` counts: 9.11."""


def takes(length: int, head_dim: int) -> bool:
    """Whether cuDNN differentiates heads of this width and has plans for sequences of up to so many tokens."""
    return 1 < length <= CUDNN_LENGTH and head_dim <= 128


def available(device: torch.device) -> bool:
    """Whether cuDNN and its frontend are installed, new enough, and the fastest on this card: Hopper and later."""
    return _module(device) is not None


@functools.cache
def _module(device: torch.device) -> Any:
    if capability(device) < HOPPER:
        return None
    try:
        module = importlib.import_module("cudnn")
        return module if module.backend_version() >= OLDEST else None
    except (ImportError, OSError, RuntimeError):
        return None


@functools.cache
def _handle(device: torch.device) -> Any:
    return _module(device).create_handle()


def forward(q: Tensor, k: Tensor, v: Tensor, sequences: Sequences, scale: float, out: Tensor) -> Tensor:
    """Write `out` for these sequences; shapes as in attention.py. Returns: log-sum-exp (n, N, S, 1)."""
    tensors = {"q": q, "k": k, "v": v, "out": out}
    key = _plan_key(tensors, None, sequences, scale)
    stats = torch.empty((key.count, key.heads, key.length, 1), dtype=torch.float32, device=q.device)
    _run(key, sequences, tensors | {"stats": stats})
    return stats


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    stats: Tensor,
    sequences: Sequences,
    scale: float,
    workspace: int | None,
    grads: tuple[Tensor, Tensor, Tensor],
) -> None:
    """Write dq, dk and dv for these sequences.

    Args:
        dout: gradient of out, (T, N, D), any token pitch.
        q: the forward's, as k, v, out, sequences and scale.
        k: see q.
        v: see q.
        out: see q.
        stats: what the forward returned.
        sequences: see q.
        scale: see q.
        workspace: bytes to take at most, or as few as one key head of one sequence needs; WORKSPACE_PER_ELEMENT decides
            by default.
        grads: dq, dk and dv to write.
    """
    dq, dk, dv = grads
    kv_heads, ragged = k.shape[1], sequences.uniform is None
    group = q.shape[1] // kv_heads
    count, length = stats.shape[0], stats.shape[2]
    if workspace is None:
        workspace = WORKSPACE_PER_ELEMENT * q.numel()
    step = key_heads_at_once(workspace, count * length**2, q.shape, kv_heads, ragged=ragged)
    if ragged and count > 1 and not step:
        padded = _pad_count(sequences, count)
        for first, end in ((0, count // 2), (count // 2, count)):
            half = Sequences(padded.cu_seqlens[first : end + 1], sequences.max_length)
            backward(dout, q, k, v, out, stats[first:end], half, scale, workspace, grads)
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
            "dq": dq[:, queries],
            "dk": dk[:, keys],
            "dv": dv[:, keys],
        }
        rows = stats[:, queries]
        _run(_plan_key(tensors, rows, sequences, scale), sequences, tensors | {"stats": rows})


def key_heads_at_once(workspace: int, scores: int, shape: Sequence[int], kv_heads: int, *, ragged: bool) -> int:
    """How many key heads, with their query heads, the backward takes in one call: a divisor of all, 0 if none fits.

    Args:
        workspace: bytes this may take.
        scores: of a query head: sequences x length^2.
        shape: of q, (T, N, D).
        kv_heads: key and value heads.
        ragged: whether the sequences differ in length.
    """
    group = shape[1] // kv_heads
    fitting = (n for n in divisors(kv_heads) if cudnn_bytes(n * group, scores, shape, ragged=ragged) <= workspace)
    return max(fitting, default=0)


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


class _Graph:
    """A graph of cuDNN's under construction, and its tensors by name."""

    def __init__(self, key: _PlanKey) -> None:
        self.key = key
        self.cudnn = cudnn = _module(key.device)
        self.io = cudnn.data_type.BFLOAT16 if key.dtype == torch.bfloat16 else cudnn.data_type.HALF
        self.fp32 = cudnn.data_type.FLOAT
        self.graph = cudnn.pygraph(
            io_data_type=self.io,
            intermediate_data_type=self.fp32,
            compute_data_type=self.fp32,
            handle=_handle(key.device),
        )
        self.tensors: dict[str, Any] = {}

    def matrix(self, name: str, heads: int, pitch: int) -> Any:
        """Declare an input of T x heads x D."""
        dim, stride = self._geometry(heads, pitch)
        tensor = self.graph.tensor(name=name, dim=dim, stride=stride, data_type=self.io)
        self.tensors[name] = self._ragged(tensor, pitch)
        return self.tensors[name]

    def result(self, name: str, tensor: Any, heads: int, pitch: int) -> None:
        """Declare an output of T x heads x D."""
        dim, stride = self._geometry(heads, pitch)
        tensor.set_output(True).set_dim(dim).set_stride(stride).set_data_type(self.io)
        self.tensors[name] = self._ragged(tensor, pitch)

    def options(self) -> dict[str, Any]:
        """Scale, mask and lengths: what both passes say."""
        causal = {"diagonal_alignment": self.cudnn.diagonal_alignment.TOP_LEFT, "diagonal_band_right_bound": 0}
        options = {"attn_scale": self.key.scale} | causal
        if self.key.total is None:
            return options
        lengths = self._integers("lengths", self.key.count)
        return options | {"use_padding_mask": True, "seq_len_q": lengths, "seq_len_kv": lengths}

    def stats_layout(self) -> tuple[list[int], list[int]]:
        """Dimensions and strides of the log-sum-exp."""
        key = self.key
        return [key.count, key.heads, key.length, 1], [key.stats_heads * key.length, key.length, 1, 1]

    def build(self) -> tuple[Any, dict[str, Any], int]:
        """Let cuDNN choose kernels and compile them. Returns: graph, its tensors by name, workspace bytes."""
        graph, modes = self.graph, self.cudnn.heur_mode
        graph.validate()
        graph.build_operation_graph()
        graph.create_execution_plans([modes.A, modes.FALLBACK])
        graph.check_support()
        graph.build_plans()
        return graph, self.tensors, graph.get_workspace_size()

    def _geometry(self, heads: int, pitch: int) -> tuple[list[int], list[int]]:
        key = self.key
        stride = [key.length * pitch, key.head_dim, pitch, 1]
        return [key.count, heads, key.length, key.head_dim], stride

    def _ragged(self, tensor: Any, pitch: int) -> Any:
        if self.key.total is not None:
            name = f"offset{pitch}"
            known = name in self.tensors
            tensor.set_ragged_offset(self.tensors[name] if known else self._integers(name, self.key.count + 1))
        return tensor

    def _integers(self, name: str, size: int) -> Any:
        int32 = self.cudnn.data_type.INT32
        self.tensors[name] = self.graph.tensor(name=name, dim=[size, 1, 1, 1], stride=[1, 1, 1, 1], data_type=int32)
        return self.tensors[name]


@functools.cache  # without a bound: captured graphs hold a plan's kernels
def _plan(key: _PlanKey) -> tuple[Any, dict[str, Any], int]:
    """Build a forward or backward plan. Returns: graph, its tensors by name, workspace bytes."""
    build = _Graph(key)
    heads, kv_heads, pitches = key.heads, key.kv_heads, key.pitches
    inputs = {
        "q": build.matrix("q", heads, pitches[0]),
        "k": build.matrix("k", kv_heads, pitches[1]),
        "v": build.matrix("v", kv_heads, pitches[2]),
    }
    options = build.options()
    dim, stride = build.stats_layout()
    if not key.backward:
        out, stats = build.graph.sdpa(**inputs, generate_stats=True, **options)
        build.result("out", out, heads, pitches[3])
        stats.set_output(True).set_dim(dim).set_stride(stride).set_data_type(build.fp32)
        build.tensors["stats"] = stats
        return build.build()
    build.tensors["stats"] = build.graph.tensor(name="stats", dim=dim, stride=stride, data_type=build.fp32)
    if key.total is not None:
        options |= {"max_total_seq_len_q": key.total, "max_total_seq_len_kv": key.total}
    grads = build.graph.sdpa_backward(
        **inputs,
        o=build.matrix("out", heads, pitches[3]),
        dO=build.matrix("dout", heads, pitches[4]),
        stats=build.tensors["stats"],
        use_deterministic_algorithm=True,
        **options,
    )
    counts = (heads, kv_heads, kv_heads)
    for name, tensor, count, pitch in zip(("dq", "dk", "dv"), grads, counts, pitches[5:], strict=True):
        build.result(name, tensor, count, pitch)
    return build.build()


def _run(key: _PlanKey, sequences: Sequences, buffers: dict[str, Tensor]) -> None:
    graph, tensors, workspace_bytes = _plan(key)
    if key.total is not None:
        padded = _pad_count(sequences, key.count)
        buffers["lengths"] = padded.lengths()
        for name in tensors:
            if name.startswith("offset"):
                buffers[name] = padded.offsets(int(name.removeprefix("offset")))
    cudnn, handle = _module(key.device), _handle(key.device)
    cudnn.set_stream(handle=handle, stream=torch.cuda.current_stream(key.device).cuda_stream)
    workspace = torch.empty(max(1, workspace_bytes), dtype=torch.uint8, device=key.device)
    graph.execute({tensors[name]: buffer for name, buffer in buffers.items()}, workspace, handle=handle)


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
