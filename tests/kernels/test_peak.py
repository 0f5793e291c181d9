"""The planner's peaks against a count of what the engine allocates, tensor by tensor, without a GPU.

Both passes run on meta tensors with launches left out; a dispatch mode adds up the storages that are alive. Attention,
the host arena and streamed weights are stood in for by what they allocate on the device.

What is checked is which tensors are alive when. What one tensor takes (`block_bytes`), and what attention's backward
does (`workspace_bytes`, `key_heads_at_once`), are the planner's own formulas on both sides, so an error in them cannot
show: test_cuda.py holds the first to the allocator's statistics, test_planner.py the whole to peaks measured on cards.
"""

import random
import weakref
from collections import deque
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter
from triton.runtime.jit import JITFunction

from finemill.commands.estimate import workload
from finemill.kernels.engine import decoder_layer, experts, model, projection
from finemill.kernels.engine.adapters import LoraPair
from finemill.kernels.engine.decoder_layer import Rope
from finemill.kernels.engine.expert_layout import EXPERT_STACKS
from finemill.kernels.engine.plan import Level, Plan, streamed_layers
from finemill.kernels.ops import expert_lora, grouped_gemm, lora_b, swiglu_lora
from finemill.kernels.ops.adamw import AdamWState
from finemill.kernels.ops.attention_cudnn import key_heads_at_once, takes
from finemill.kernels.ops.division import CUDNN_LENGTH, FA4_LENGTH, cudnn_bytes, fa4_suits, flash_key_heads
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack
from finemill.kernels.ops.packing import LengthClass, PackedBatch, Sequences
from finemill.kernels.planning.mixture import MixtureWorkload
from finemill.kernels.planning.planner import peak_bytes, plan_step, workload_under
from finemill.kernels.planning.workload import CUBLAS_WORKSPACE, MLP_TILE, PADDED_ROWS, Workload, block_bytes

GIB = 1 << 30
META = torch.device("meta")
LINEARS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class Allocations(TorchDispatchMode):
    """Bytes of live meta storages, each rounded up as torch's allocator does, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.now: int = 0
        self.peak: int = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = function(*args, **(kwargs or {}))
        for tensor in tree_iter(out):
            if isinstance(tensor, torch.Tensor) and tensor.is_meta and id(tensor.untyped_storage()) not in self.live:
                storage = tensor.untyped_storage()
                size = block_bytes(storage.nbytes())
                self.live[id(storage)] = size
                self.now += size
                self.peak = max(self.peak, self.now)
                weakref.finalize(storage, self._free, id(storage))
        return out

    def _free(self, key: int) -> None:
        self.now -= self.live.pop(key)


class Arena:
    """HostArena without the host: what is on its way stays as long, what comes back is allocated."""

    def __init__(self, device: torch.device) -> None:
        self.in_flight: deque[list[torch.Tensor]] = deque()

    def grow(self, size: int) -> None: ...

    def reserve(self, size: int) -> None: ...

    def reset(self) -> None: ...

    def park(self, tensors: list[torch.Tensor], keep_layers: int) -> list[SimpleNamespace]:
        items = [
            SimpleNamespace(nbytes=t.untyped_storage().nbytes(), view=(t.shape, t.stride()), dtype=t.dtype)
            for t in tensors
        ]
        self.in_flight.append(tensors)
        while len(self.in_flight) > keep_layers:
            self.in_flight.popleft().clear()
        return items

    def drain(self) -> None:
        while self.in_flight:
            self.in_flight.popleft().clear()

    def prefetch(self, items: list[SimpleNamespace]) -> None:
        for item in items:
            item.copy = torch.empty(item.nbytes, dtype=torch.uint8, device=META)

    def take(self, item: SimpleNamespace) -> torch.Tensor:
        storage = item.copy.untyped_storage()
        del item.copy
        return torch.empty(0, dtype=item.dtype, device=META).set_(storage, 0, *item.view)


def attention_forward(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences, scale: float, out: torch.Tensor
) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    assert sequences.uniform is not None
    count, length = sequences.uniform
    count = sequences.classes[0].end if sequences.classes else count
    return out, (torch.empty((count, q.shape[1], length, 1), dtype=torch.float32, device=META),)


def attention_backward(
    dout: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    saved: tuple[torch.Tensor, ...],
    sequences: Sequences,
    scale: float,
    workspace: int | None,
) -> tuple[torch.Tensor, ...]:
    assert sequences.uniform is not None
    grads = tuple(torch.empty(tensor.shape, dtype=tensor.dtype, device=META) for tensor in (q, k, v))
    if fa4_suits(sequences.max_length, q.shape[2]):
        torch.empty(4 * (q.numel() + k.numel() + v.numel()), dtype=torch.uint8, device=META)
        return grads
    (count, length), heads, kv_heads = sequences.uniform, q.shape[1], k.shape[1]
    scores, ragged = count * length**2, bool(sequences.classes)
    step = kv_heads
    if workspace is not None:
        step = max(1, key_heads_at_once(workspace, scores, q.shape, kv_heads, ragged=ragged))
    taken = cudnn_bytes(step * heads // kv_heads, scores, q.shape, ragged=ragged)
    torch.empty(taken, dtype=torch.uint8, device=META)
    return grads


@pytest.fixture(autouse=True)
def stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(JITFunction, "run", lambda *args, **kwargs: None)
    monkeypatch.setattr(decoder_layer, "attention_forward", attention_forward)
    for op in (lora_b, swiglu_lora, grouped_gemm):
        monkeypatch.setattr(op, "num_sms", lambda device: 132)
        monkeypatch.setattr(op, "is_hopper", lambda tensor: True)
    for op in (grouped_gemm, expert_lora):
        monkeypatch.setattr(op, "use_mma_kernel", lambda tensor: True)
    monkeypatch.setattr(decoder_layer, "attention_backward", attention_backward)
    monkeypatch.setattr(model, "HostArena", Arena)
    cos, sin = torch.empty(2, 1, 128, device=META)
    monkeypatch.setattr(model.FastModel, "_rope", lambda self, batch: Rope(cos, sin, batch.position_ids))
    for module in (projection, experts):
        monkeypatch.setattr(
            module, "mm_fp32", lambda a, b: torch.empty((a.shape[0], b.shape[1]), dtype=torch.float32, device=META)
        )


def nf4(n: int, k: int) -> NF4Tensor:
    packed, absmax = (torch.empty(size, dtype=torch.uint8, device=META) for size in (n * k // 2, n * k // 64))
    codebook, code = (torch.empty(size, dtype=torch.float32, device=META) for size in (16, 256))
    nested, offset = (torch.empty(size, dtype=torch.float32, device=META) for size in (n * k // 64 // 256, 1))
    return NF4Tensor(packed, absmax, codebook, code, nested, offset, (n, k), torch.bfloat16)


def stack(parts: int, count: int, n: int, k: int) -> NF4Stack:
    """`count` experts whose parameter holds `parts` matrices of each."""
    one = nf4(n // parts, k)
    count *= parts
    tensors = (one.packed, one.absmax, one.nested_absmax, one.offset)
    packed, absmax, nested, offset = (torch.empty((count, *t.shape), dtype=t.dtype, device=META) for t in tensors)  # type: ignore[union-attr]
    code = torch.empty(256, device=META)
    shape = (count, n // parts, k)
    return NF4Stack(packed, absmax, one.codebook, code, nested, offset.view(-1), shape, torch.bfloat16)


def pair(rank: int, n: int, k: int, count: int = 1) -> LoraPair:
    a, b = (nn.Parameter(torch.empty(size, device=META)) for size in ((count * rank, k), (n, rank * count)))
    return LoraPair(a, b, 1.0)


def simulated_peak(work: Workload, plan: Plan) -> int:
    """Run a micro-batch of a plan. Returns: bytes."""
    s = work.shape
    kv = s.num_kv_heads * s.head_dim
    inputs = (s.hidden, s.hidden, s.hidden, s.q_width, s.hidden, s.hidden, s.intermediate)
    outputs = (s.q_width, kv, kv, s.hidden, s.intermediate, s.intermediate, s.hidden)
    linears = LINEARS if s.experts is None else LINEARS[:4]

    def table(*size: int) -> torch.Tensor:
        return torch.empty(size, dtype=torch.bfloat16, device=META)

    allocations = Allocations()
    with allocations:
        head = table(work.vocabulary, s.hidden)
        embedding = head if work.tied else table(work.vocabulary, s.hidden)
        parts: list[model.LayerParts] = []
        bases: list[dict[str, NF4Tensor | torch.Tensor]] = []
        stacks: list[dict[str, NF4Stack | torch.Tensor]] = []
        visits: list[int] = []
        for visiting in streamed_layers(work.num_layers, plan.resident_layers):
            # Streamed weights visit two slots in turn.
            streamed = plan.stream_weights and visiting
            visits += [len(bases)] * streamed
            streamed = streamed and len(visits) > 2
            made_before = visits[-3] if streamed else 0
            bases.append(
                dict(bases[made_before]) if streamed else dict(zip(linears, map(nf4, outputs, inputs), strict=False))
            )
            pairs = {name: pair(work.rank, n, k) for name, n, k in zip(linears, outputs, inputs, strict=False)}
            norms = (table(s.hidden), table(s.hidden), table(s.head_dim), table(s.head_dim))
            router = None
            if isinstance(work, MixtureWorkload):
                router = table(work.experts.count, s.hidden)
                shapes = {name: model.stack_shape(name, s) for name in EXPERT_STACKS}
                made = {name: stack(2 - index, *shapes[name]) for index, name in enumerate(EXPERT_STACKS)}
                stacks.append(dict(stacks[made_before]) if streamed else dict(made))
                del made
                if work.expert_rank:
                    pairs |= {name: pair(work.expert_rank, n, k, count) for name, (count, n, k) in shapes.items()}
            layer_stacks = stacks[-1] if stacks else {}
            parts.append(model.LayerParts(bases[-1], {}, pairs, *norms, router, layer_stacks))
        engine = model.assemble_model(
            parts,
            s,
            embedding=embedding,
            final_norm=table(s.hidden),
            head=head,
            rotary=lambda *tables: (tables[0], tables[0]),
        )
        del parts, pairs, bases, stacks, layer_stacks
        state = AdamWState.zeros(engine.adapters.master.numel(), META, 8 if plan.eight_bit else 32)
        engine.apply_plan(replace(plan, stream_weights=False))
        if plan.embedding_on_host:
            allocations.now -= embedding.nbytes
        allocations.peak = allocations.now
        tokens = plan.micro_batch or work.tokens
        uniform = (tokens // work.row, work.row)
        ids, positions, labels = torch.empty((3, tokens), dtype=torch.int64, device=META)
        # As many rows of scores as a ragged batch may be padded to.
        padded = (LengthClass(0, PADDED_ROWS * uniform[0], work.row),) if work.ragged else ()
        sequences = Sequences(torch.empty(uniform[0] + 1, dtype=torch.int32, device=META), work.row, uniform, padded)
        rows = torch.empty(tokens * 7 // 8 - 1, dtype=torch.int64, device=META) if work.ragged else None
        engine.loss_and_grad(PackedBatch(ids, positions, labels, sequences, rows), 1.0)
        del state
    return allocations.peak + CUBLAS_WORKSPACE


def test_attention_of_long_rows_takes_scores_for_the_shorter_ones_beside_them_alone() -> None:
    work = workload("qwen3-8b", rank=16, quantized=True, rows=1, row=16384)
    sums = 4 * 16384 * (4096 + 2 * 1024)
    assert work.attention_workspace(16384) == sums
    ragged = replace(work, ragged=True)
    assert ragged.attention_workspace(16384) == 2 * 16384 * FA4_LENGTH * 32 + 8 * 16384 * 4096
    assert replace(ragged, key_heads=1).attention_workspace(16384) == 2 * 16384 * FA4_LENGTH * 4 + 8 * 16384 * 4096
    assert replace(work, fa4=False, key_heads=1).attention_workspace(16384) == 2 * 16384**2 * 4 + 4 * 16384 * 512


def test_rows_too_long_for_cudnn_take_what_flash_attention_2_sums() -> None:
    assert takes(CUDNN_LENGTH, 128)
    assert not takes(CUDNN_LENGTH + 1, 128)
    work = replace(workload("qwen3-8b", rank=16, quantized=True, rows=1, row=65536), fa4=False, flash=True)
    rows = 65536 + 128
    all_heads, one = (replace(work, key_heads=number).attention_workspace(65536) for number in (None, 1))
    assert all_heads == (5 + 1) * 4 * rows * 4096 + 4 * rows * 32
    assert one == (33 + 1) * 4 * rows * 512 + 2 * 65536 * 768 + 4 * rows * 4
    assert [flash_key_heads(size, 65536, 32, 8, 128, 132) for size in (None, all_heads, one, 0)] == [8, 8, 1, 1]
    shorter = 2 * 4 * CUDNN_LENGTH**2 + 8 * 65536 * 4096
    assert replace(work, ragged=True).attention_workspace(65536) == shorter
    assert replace(work, ragged=True, cudnn=False).attention_workspace(65536) == all_heads


def check(work: Workload, plan: Plan) -> None:
    work = workload_under(work, plan)
    predicted, allocated = peak_bytes(work, plan), simulated_peak(work, plan)
    assert allocated <= predicted <= 1.01 * allocated


@pytest.mark.parametrize(
    ("shape", "row", "rows", "gib", "stream"),
    [
        ("qwen3-8b", 2048, 8, 130, False),
        ("qwen3-8b", 2048, 8, 24, False),
        ("qwen3-8b", 2048, 8, 7.2, True),
        ("qwen3-8b", 2048, 8, 7.2, False),
        ("qwen3-8b", 256, 8, 7.2, False),
        ("qwen3-8b", 2048, 8, 3.5, True),
        ("qwen3-8b", 16384, 1, 10.2, True),
        ("qwen3-4b", 2048, 8, 3.7, True),
        ("qwen3-4b", 2048, 8, 3.7, False),
        ("qwen3-0.6b", 2048, 8, 1.1, False),
        ("qwen3-0.6b", 2048, 8, 130, False),
        ("llama3-1b", 1024, 4, 4, False),
        ("qwen3-14b", 2048, 8, 12, False),
        ("qwen3-30b-a3b", 2048, 8, 17.5, True),
        ("qwen3-30b-a3b", 2048, 8, 20, True),
        ("mixtral-8x7b", 2048, 2, 24, True),
    ],
)
def test_predicted_peaks_of_chosen_plans_cover_what_is_allocated(
    shape: str, row: int, rows: int, gib: float, stream: bool
) -> None:
    work = workload(shape, rank=16, quantized=True, rows=rows, row=row)
    check(work, plan_step(work, int(gib * GIB), allow_stream=stream))


@pytest.mark.parametrize("level", [Level.INPUT, Level.ATTENDED, Level.ATTENTION])
def test_predicted_peaks_of_long_rows_cover_what_is_allocated(level: Level) -> None:
    work = workload("qwen3-8b", rank=16, quantized=True, rows=1, row=32768)
    work = replace(work, num_layers=3, mlp_tile=MLP_TILE)
    plan = Plan(
        (level,) * 3,
        (Level.INPUT, None, None),
        0,
        512,
        work.host_bytes_per_token(),
        micro_batch=work.row,
        mlp_tile=MLP_TILE,
    )
    check(work, plan)


@pytest.mark.parametrize("shape", ["qwen3-4b", "llama3-1b", "qwen3-30b-a3b"])
@pytest.mark.parametrize("seed", range(6))
def test_predicted_peaks_of_any_plan_cover_what_is_allocated(shape: str, seed: int) -> None:
    work = replace(workload(shape, rank=16, quantized=True, rows=8, row=512), ragged=seed >= 3)
    work = replace(work, num_layers=min(work.num_layers, 12 if work.shape.experts else 36))
    draw, top = random.Random(seed), Level.ALL if work.shape.experts is None else work.most_parked
    levels = [draw.choice(list(Level)) for _ in range(work.num_layers)]
    parked, streamed = seed % 2 == 1, seed % 3 == 1
    hosts = [draw.choice([None, *list(Level)[: min(level, top) + 1]]) if parked else None for level in levels[:-2]]
    plan = Plan(
        levels=tuple(levels if parked else sorted(levels)),
        host_levels=(*hosts, None, None),
        cached_layers=work.num_layers if seed % 3 == 0 else 0,
        head_chunk=draw.choice([256, 1024]),
        bytes_per_token=work.host_bytes_per_token(),
        micro_batch=draw.choice([2048, 4096]),
        eight_bit=streamed,
        stream_weights=streamed,
        resident_layers=work.num_layers // 3 if streamed else 0,
        in_flight=draw.choice([1, 2]),
    )
    check(work, plan)
