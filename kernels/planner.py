"""Decide what fits: recompute level per layer, host or device, kept weights, loss-head chunk, micro-batch size.

All sizes are bytes. The planner predicts the peak of `torch.cuda.max_memory_allocated` from tensor shapes and picks the
plan with the least predicted time under a budget. What can be bought with memory, per layer: keeping more of the
forward (decoder_layer.Level) instead of recomputing it, and keeping decoded weights instead of decoding NF4 again.
Kept tensors go to host memory as far as the bus can take them during the forward, to device memory beyond that; larger
micro-batches decode less often. Predictions follow results.md and are checked against measurements there.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

from finemill.kernels.attention import WORKSPACE_PER_ELEMENT
from finemill.kernels.decoder_layer import LayerShape, Level
from finemill.kernels.projection import PAD

CUBLAS_WORKSPACE = 136 << 20
"""What torch allocates for cuBLAS and cuBLASLt on Hopper: 32 MiB each for eager work and for captured graphs."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: code, double-quantized scale, nested scale."""

HEAD_BYTES = 160 << 20
"""Logits of 512 rows of Qwen3's vocabulary: below that the head's products lose more than the memory is worth."""
MARGIN = 0.975
"""Share of the budget to plan for: predictions are not exact (tests/kernels/test_planner.py)."""
PARKED_SHARES = (0.5, 0.75, 1.0)
"""Shares of the layers whose tensors may be parked."""
KERNELS_PER_LAYER = 50
KERNEL_SECONDS = 4e-6
"""What a kernel costs beside its bytes and operations: start, tail, and too few programs to fill the card."""
LAUNCH_SECONDS = 5e-3
"""A layer's forward or backward takes the host about 2 ms to launch on a slow machine (results.md)."""
OPTIMIZER_BYTES = (8.0, 2.0 + 8 / 256)
"""Both moments of an adapter element in fp32, and in 8 bits with an fp32 scale per 256."""


@dataclass(frozen=True)
class Plan:
    """How a training step runs.

    Args:
        levels: recompute level per layer.
        host_levels: per layer, the level whose tensors wait in host memory; None keeps all on the device.
        cached_layers: leading layers whose decoded 16-bit weights are kept.
        head_chunk: rows of logits at a time.
        bytes_per_token: of one layer's saved tensors, by level.
        micro_batch: tokens per micro-batch, None for whatever comes.
        seconds: predicted time of one optimizer step.
        peak: predicted peak of allocated device memory.
        embedding_on_host: an untied embedding waits in pinned host memory.
        eight_bit: 8-bit instead of fp32 optimizer states.
        stream_weights: NF4 weights wait in pinned host memory.
    """

    levels: tuple[Level, ...]
    host_levels: tuple[Level | None, ...]
    cached_layers: int
    head_chunk: int
    bytes_per_token: dict[Level, int] = field(default_factory=dict, hash=False)
    micro_batch: int | None = None
    seconds: float = 0.0
    peak: int = 0
    embedding_on_host: bool = False
    eight_bit: bool = False
    stream_weights: bool = False

    @staticmethod
    def everything(num_layers: int, *, cached: bool = False, head_chunk: int = 1024) -> "Plan":
        """Keep every activation on the device; decoded weights as well if `cached`."""
        return Plan((Level.ALL,) * num_layers, (None,) * num_layers, num_layers if cached else 0, head_chunk)

    def host_bytes(self, tokens: int) -> int:
        """Host memory that a micro-batch of this many tokens parks."""
        slack = 16 * 512
        return sum(self.bytes_per_token[level] * tokens + slack for level in self.host_levels if level is not None)


@dataclass(frozen=True)
class Rates:
    """What the device does per second, sustained; the defaults are an H200's (results.md)."""

    flops: float = 640e12
    attention_flops: float = 400e12
    bytes: float = 3.6e12
    bus_bytes: float = 44e9


@dataclass(frozen=True)
class Workload:
    """A model and a step, as far as memory and time depend on them.

    Args:
        shape: widths of a layer.
        num_layers: how many.
        vocabulary: rows of the head.
        tied: head and embedding are one tensor.
        rank: LoRA rank of each of the seven linear layers.
        quantized: NF4 base, else 16-bit.
        tokens: per optimizer step.
        row: tokens per row; micro-batches are whole rows.
        optimizer_bytes: per adapter parameter, states only.
        embedding_on_host: whether the embedding lives in host memory.
        stream_weights: whether NF4 weights visit the device two layers at a time.
    """

    shape: LayerShape
    num_layers: int
    vocabulary: int
    tied: bool
    rank: int
    quantized: bool
    tokens: int
    row: int
    optimizer_bytes: float = 8.0
    embedding_on_host: bool = False
    stream_weights: bool = False

    @property
    def layer_weights(self) -> int:
        """Elements of a layer's seven matrices."""
        s = self.shape
        return s.hidden * (s.qkv_width + s.q_width + 3 * s.intermediate)

    @property
    def extended_bytes(self) -> int:
        """Of a layer's four extended 16-bit weights."""
        s = self.shape
        p = [-(-members * self.rank // PAD) * PAD for members in (3, 1, 2, 1)]
        outputs = (s.qkv_width, s.hidden, 2 * s.intermediate, s.hidden)
        inputs = (s.hidden, s.q_width, s.hidden, s.intermediate)
        return 2 * sum((n + pad) * (k + pad) for n, k, pad in zip(outputs, inputs, p, strict=True))

    @property
    def adapter_elements(self) -> int:
        """Of all LoRA matrices."""
        s = self.shape
        outputs = s.qkv_width + s.hidden + 2 * s.intermediate + s.hidden
        inputs = 3 * s.hidden + s.q_width + 2 * s.hidden + s.intermediate
        return self.rank * (outputs + inputs) * self.num_layers

    def static_bytes(self) -> int:
        """Weights, adapters, gradient and optimizer states."""
        s = self.shape
        table = 2 * self.vocabulary * s.hidden
        tables = table * (1 if self.tied or self.embedding_on_host else 2)
        layers = 2 if self.stream_weights else self.num_layers
        base = layers * (self.layer_weights * NF4_BYTES if self.quantized else self.extended_bytes)
        norms = 2 * self.num_layers * (2 * s.hidden + 2 * s.head_dim)
        return int(tables + base + norms + self.adapter_elements * (8 + self.optimizer_bytes)) + CUBLAS_WORKSPACE

    def saved_bytes(self) -> dict[Level, int]:
        """Of one layer's saved tensors per token."""
        s, r = self.shape, self.rank
        pads = [-(-members * r // PAD) * PAD for members in (3, 1, 2, 1)]
        small = 2 * 7 * r
        attention = 2 * (s.qkv_width + pads[0] + s.q_width + pads[1] + s.hidden) + 4 * s.num_heads
        gate_up = 2 * (2 * s.intermediate + pads[2])
        rotated = 2 * (s.num_heads + s.num_kv_heads) * s.head_dim + 4 * (s.num_heads + s.num_kv_heads)
        normed = 2 * (2 * s.hidden + pads[0] + pads[2])
        steps = (2 * s.hidden + small, attention, gate_up, rotated + normed)
        return {level: sum(steps[: level + 1]) for level in Level}

    def host_bytes_per_token(self) -> dict[Level, int]:
        """The part of `saved_bytes` that can be parked (skinny products and the attention's state stay)."""
        s = self.shape
        fixed = 2 * 7 * self.rank
        state = 4 * s.num_heads
        saved = self.saved_bytes()
        return {level: saved[level] - fixed - (state if level >= Level.ATTENTION else 0) for level in Level}

    def attention_workspace(self, tokens: int) -> int:
        """Of cuDNN's deterministic backward: the scores' gradient of one group of heads, and small change."""
        s = self.shape
        one_key_head = 2 * tokens * self.row * (s.num_heads // s.num_kv_heads)
        limit = max(one_key_head, WORKSPACE_PER_ELEMENT * tokens * s.q_width)
        return min(one_key_head * s.num_kv_heads, limit) + 4 * tokens * s.q_width

    def working_bytes(self, tokens: int, head_chunk: int, level: Level) -> int:
        """Peak of what a micro-batch needs beside static, saved and decoded tensors, if its lowest level is `level`."""
        s = self.shape
        kv = s.num_kv_heads * s.head_dim
        adapter = 4 * 3 * self.rank * max(2 * s.intermediate, s.qkv_width)
        again = s.qkv_width + s.q_width + s.hidden + 2 * PAD if level == Level.INPUT else 0
        forward = 2 * tokens * (4 * s.hidden + 3 * s.intermediate + 2 * PAD)
        mlp = 2 * tokens * (2 * s.hidden + 3 * s.intermediate + 2 * PAD + again) + adapter
        if level == Level.INPUT:
            mlp += 2 * tokens * (s.q_width + kv + s.hidden)
        attention = 2 * tokens * (2 * s.hidden + 3 * s.q_width + 3 * kv + again) + self.attention_workspace(tokens)
        head = 2 * tokens * (5 * s.hidden + PAD) + 2 * head_chunk * self.vocabulary
        return max(forward, mlp, attention, head)


def forward_seconds(work: Workload, rates: Rates, tokens: int) -> dict[str, float]:
    """Predict one layer's forward by part: what a level saves when it is kept."""
    s = work.shape
    matmul = 2 * tokens * s.hidden / rates.flops
    width = 2 * tokens / rates.bytes
    attention = 2 * tokens * work.row * s.q_width / rates.attention_flops
    return {
        "attention": matmul * (s.qkv_width + s.q_width) + attention + width * (7 * s.hidden + 4 * s.qkv_width),
        "gate_up": matmul * 2 * s.intermediate + width * 2 * s.hidden,
        "down": matmul * s.intermediate + width * (4 * s.intermediate + 2 * s.hidden),
        "elementwise": width * (4 * s.hidden + 2 * s.qkv_width),
        "decode": work.layer_weights * 2.6 / rates.bytes if work.quantized else 0.0,
    }


def plan_step(
    work: Workload,
    budget: int,
    *,
    rates: Rates | None = None,
    allow_host: bool = True,
    allow_stream: bool = False,
) -> Plan:
    """Choose micro-batch size, levels, host share and kept weights for one optimizer step.

    Args:
        work: model and step.
        budget: bytes of device memory the step may allocate at its peak.
        rates: of the device.
        allow_host: whether activations may be parked in host memory.
        allow_stream: whether the NF4 weights may be, too (the loader must own them: load.py).
    Returns: the plan with the least predicted time.
    Raises: ValueError: not even the leanest plan fits; the message gives its size.
    """
    rates, budget = rates or Rates(), int(budget * MARGIN)
    rows = max(1, work.tokens // work.row)
    candidates = [
        candidate
        for variant in _variants(work, allow_host=allow_host, allow_stream=allow_stream)
        for pieces in range(1, rows + 1)
        if rows % pieces == 0
        for candidate in _candidates(variant, budget, rates, rows // pieces * work.row, pieces, allow_host=allow_host)
    ]
    fitting = [candidate for candidate in candidates if candidate.peak <= budget]
    if not fitting:
        least = min(candidate.peak for candidate in candidates)
        raise ValueError(
            f"no plan fits {budget / 2**30:.2f} GiB: the leanest needs {least / 2**30:.2f} GiB; "
            "allow more memory, shorter rows or a smaller rank"
        )
    return min(fitting, key=lambda candidate: candidate.seconds)


def _variants(work: Workload, *, allow_host: bool, allow_stream: bool) -> list[Workload]:
    """The workload with fp32 or 8-bit moments, embedding and base on the device or the host; simplest first."""
    places = (False, True) if allow_host and not work.tied else (False,)
    streams = (False, True) if allow_stream and work.quantized else (False,)
    return [
        replace(work, optimizer_bytes=size, embedding_on_host=place, stream_weights=stream)
        for stream in streams
        for size in OPTIMIZER_BYTES
        for place in places
    ]


def _candidates(work: Workload, budget: int, rates: Rates, tokens: int, pieces: int, *, allow_host: bool) -> list[Plan]:
    """Plans of one micro-batch size: what is parked, in how many layers, and whether decoded weights are kept."""
    parking: list[tuple[Level | None, float]] = [(None, 0.0)]
    if allow_host:
        parking += [(level, share) for level in (Level.INPUT, Level.ATTENTION) for share in PARKED_SHARES]
    caching = (False, True) if work.quantized and not work.stream_weights else (False,)
    return [
        _candidate(work, budget, rates, tokens, pieces, host, share, cached=cached)
        for cached in caching
        for host, share in parking
    ]


def _candidate(
    work: Workload,
    budget: int,
    rates: Rates,
    tokens: int,
    pieces: int,
    host: Level | None,
    share: float,
    *,
    cached: bool,
) -> Plan:
    """Fill what the budget leaves with kept tensors, last layers first."""
    layers, saved, parkable = work.num_layers, work.saved_bytes(), work.host_bytes_per_token()
    chunk = head_chunk(work, tokens)
    # Parked layers lie evenly among the others, so that the bus catches up; the last two are needed at once.
    parked = [index < layers - 2 and int((index + 1) * share) > int(index * share) for index in range(layers)]
    copied = 0 if host is None else parkable[host] * tokens
    base: Level = Level.ATTENTION if host == Level.ATTENTION else Level.INPUT
    levels: list[Level] = [base] * layers
    host_levels = [host if is_parked else None for is_parked in parked]
    left = budget - peak_bytes(work, tokens, chunk, levels, host_levels, cached=cached)
    for upper in (Level.ATTENTION, Level.GATE_UP, Level.ALL):
        for index in reversed(range(layers)):
            cost = (saved[upper] - saved[levels[index]]) * tokens
            if levels[index] == upper - 1 and cost <= left:
                levels[index], left = upper, left - cost
    seconds = _step_seconds(work, rates, tokens, levels, cached=cached) + _stall_seconds(
        work, rates, tokens, copied * sum(parked)
    )
    return Plan(
        levels=tuple(levels),
        host_levels=tuple(host_levels),
        cached_layers=layers if cached else 0,
        head_chunk=chunk,
        bytes_per_token=parkable,
        micro_batch=tokens,
        seconds=seconds * pieces,
        peak=int(budget - left),
        embedding_on_host=work.embedding_on_host,
        eight_bit=work.optimizer_bytes < OPTIMIZER_BYTES[0],
        stream_weights=work.stream_weights,
    )


def peak_bytes(
    work: Workload,
    tokens: int,
    chunk: int,
    levels: Sequence[Level],
    host_levels: Sequence[Level | None],
    *,
    cached: bool,
) -> int:
    """Predict the peak of allocated device memory of a step with micro-batches of `tokens`; arguments as in `Plan`."""
    saved, parkable = work.saved_bytes(), work.host_bytes_per_token()
    parked = [parkable[level] for level in host_levels if level is not None]
    kept = sum(saved[level] for level in levels) - sum(parked)
    # One parked layer's tensors are still on their way while the next layer runs.
    in_flight = max(parked, default=0)
    weights = work.extended_bytes * (work.num_layers if cached else work.quantized)
    working = work.working_bytes(tokens, chunk, min(levels))
    return work.static_bytes() + weights + working + (kept + in_flight) * tokens


def _stall_seconds(work: Workload, rates: Rates, tokens: int, parked_bytes: int) -> float:
    """Predict how long a micro-batch waits for the bus: parked tensors out, parked tensors and weights back in."""
    times = forward_seconds(work, rates, tokens)
    # Fitted to steps measured at 3.5 and 7.2 GB: layers finish sooner than the cautious rates say.
    forward = 0.88 * work.num_layers * (times["attention"] + times["gate_up"] + times["down"] + times["decode"])
    weights = work.num_layers * work.layer_weights * NF4_BYTES if work.stream_weights else 0.0
    stall = max(0.0, max(parked_bytes, weights) / rates.bus_bytes - forward)
    stall += max(0.0, (parked_bytes + weights) / rates.bus_bytes - 2 * forward)
    if work.embedding_on_host:
        stall += 2 * tokens * work.shape.hidden / rates.bus_bytes
    return stall


def _step_seconds(work: Workload, rates: Rates, tokens: int, levels: Sequence[Level], *, cached: bool) -> float:
    """Predict a micro-batch's time, if it never waits for the bus."""
    s, times = work.shape, forward_seconds(work, rates, tokens)
    forward = times["attention"] + times["gate_up"] + times["down"]
    seconds = 2.1 * work.num_layers * forward + work.num_layers * KERNELS_PER_LAYER * KERNEL_SECONDS
    seconds += sum(
        (times["attention"] if level < Level.ATTENTION else 0.0)
        + (times["gate_up"] if level < Level.GATE_UP else 0.0)
        + (times["elementwise"] if level < Level.ALL else 0.0)
        for level in levels
    )
    if not cached:
        seconds += 2 * work.num_layers * times["decode"]
    head = 4 * tokens * s.hidden * work.vocabulary / rates.flops + 10 * tokens * work.vocabulary / rates.bytes
    return seconds + head


def head_chunk(work: Workload, tokens: int) -> int:
    """Rows of logits at a time: as many as fit into what the layers need anyway, from 256 to 4096."""
    free = work.working_bytes(tokens, 0, Level.ATTENTION) - 2 * tokens * 5 * work.shape.hidden
    chunk = 4096
    while chunk > 256 and 2 * chunk * work.vocabulary > max(free, HEAD_BYTES):
        chunk //= 2
    return min(chunk, tokens)


def launch_bound(plan: Plan, work: Workload) -> bool:
    """Whether kernel-by-kernel launches may take longer than the kernels: under 5 ms for a layer and pass."""
    pieces = max(1, work.tokens // (plan.micro_batch or work.tokens))
    return plan.seconds / pieces / (2 * work.num_layers) < LAUNCH_SECONDS
