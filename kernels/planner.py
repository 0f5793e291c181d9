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

CUBLAS_WORKSPACE = 64 << 20
"""What torch allocates for cuBLAS on Hopper: 32 MiB each for eager work and for captured graphs."""
SMALL_TENSORS = 8 << 20
"""Code tables, rotary tables, the batch and its sums, scalars."""
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


def block_bytes(size: int) -> int:
    """What torch's allocator counts for a tensor of its own: a rest of up to 1 MiB of its 2 MiB pages is not split off.

    This is 2 MiB for each kept decoded layer of Qwen3; smaller tensors and reused memory are split to 512 bytes.
    """
    size = -(-size // 512) * 512
    rest = -size % (2 << 20)
    return size + rest if size >= 10 << 20 and rest <= 1 << 20 else size


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
    def nf4_bytes(self) -> int:
        """Of a layer's seven quantized matrices."""
        s = self.shape
        kv = s.num_kv_heads * s.head_dim
        outputs = (s.q_width, kv, kv, s.q_width, s.intermediate, s.intermediate, s.intermediate)
        codes = sum(block_bytes(n * s.hidden // 2) for n in outputs)
        return codes + int(self.layer_weights * (NF4_BYTES - 0.5))

    @property
    def extended_bytes(self) -> int:
        """Of a layer's four extended 16-bit weights."""
        s = self.shape
        p = [-(-members * self.rank // PAD) * PAD for members in (3, 1, 2, 1)]
        outputs = (s.qkv_width, s.hidden, 2 * s.intermediate, s.hidden)
        inputs = (s.hidden, s.q_width, s.hidden, s.intermediate)
        return sum(block_bytes(2 * (n + pad) * (k + pad)) for n, k, pad in zip(outputs, inputs, p, strict=True))

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
        base = layers * (self.nf4_bytes if self.quantized else self.extended_bytes)
        norms = 2 * self.num_layers * (2 * s.hidden + 2 * s.head_dim)
        adapters = int(self.adapter_elements * (8 + self.optimizer_bytes))
        return tables + base + norms + adapters + CUBLAS_WORKSPACE + SMALL_TENSORS

    def tensor_widths(self) -> dict[str, int]:
        """Bytes per token of what a layer computes, under the names of decoder_layer.py."""
        s, r = self.shape, self.rank
        qkv_pad, o_pad, gate_up_pad, down_pad = (-(-members * r // PAD) * PAD for members in (3, 1, 2, 1))
        return {
            "x": 2 * s.hidden,
            "xa": 2 * 7 * r,
            "normed_in": 2 * (s.hidden + qkv_pad),
            "qkv": 2 * (s.qkv_width + qkv_pad),
            "q": 2 * s.q_width,
            "kv": 2 * s.num_kv_heads * s.head_dim,
            "rstd": 4 * (s.num_heads + s.num_kv_heads),
            "attended": 2 * (s.q_width + o_pad),
            "state": 4 * s.num_heads,
            "normed_mid": 2 * (s.hidden + gate_up_pad),
            "gate_up": 2 * (2 * s.intermediate + gate_up_pad),
            "hidden": 2 * (s.intermediate + down_pad),
            "grad_hidden": 2 * s.intermediate,
            "grad": 2 * (s.hidden + max(o_pad, down_pad)),
        }

    def tensor_bytes(self, tokens: int) -> dict[str, int]:
        """Device memory of what a layer computes."""
        return {name: block_bytes(width * tokens) for name, width in self.tensor_widths().items()}

    def saved_bytes(self, tokens: int) -> dict[Level, int]:
        """Device memory of one layer's saved tensors."""
        t = self.tensor_bytes(tokens)
        return _by_level(
            t["x"] + t["xa"],
            t["qkv"] + t["attended"] + t["state"] + t["x"],
            t["gate_up"],
            t["q"] + t["kv"] + t["rstd"] + t["normed_in"] + t["normed_mid"] + 8 * tokens,
        )

    def parked_bytes(self, tokens: int) -> dict[Level, int]:
        """Device memory of what can be parked of them: all but the adapters' products and the attention's state."""
        t = self.tensor_bytes(tokens)
        return _by_level(*_parkable(t))

    def host_bytes_per_token(self) -> dict[Level, int]:
        """Host memory of the part that can be parked."""
        return _by_level(*_parkable(self.tensor_widths()))

    def attention_workspace(self, tokens: int) -> int:
        """Of cuDNN's deterministic backward: the scores' gradient and an fp32 dq of one group of heads."""
        s = self.shape
        one_key_head = 2 * tokens * self.row * (s.num_heads // s.num_kv_heads)
        limit = max(1, WORKSPACE_PER_ELEMENT * tokens * s.q_width // one_key_head)
        step = max(n for n in range(1, s.num_kv_heads + 1) if s.num_kv_heads % n == 0 and n <= limit)
        return step * (one_key_head + 4 * tokens * s.q_width // s.num_kv_heads)

    def forward_bytes(self, tokens: int) -> dict[Level, int]:
        """Peak of one layer's forward by the level it keeps, its inputs apart."""
        t = self.tensor_bytes(tokens)
        both = 2 * t["x"] + t["xa"]  # total and mid
        attention = t["qkv"] + t["attended"] + t["state"]
        early = t["normed_in"] + t["q"] + t["kv"] + t["rstd"]
        peaks = {}
        for level in Level:
            kept = both + (attention if level >= Level.ATTENTION else 0) + (early if level == Level.ALL else 0)
            kept_mid = t["normed_mid"] if level == Level.ALL else 0
            kept_gate_up = t["gate_up"] if level >= Level.GATE_UP else 0
            peaks[level] = max(
                both + attention + early,
                kept + t["normed_mid"] + t["gate_up"],
                kept + kept_mid + t["gate_up"] + t["hidden"],
                kept + kept_mid + kept_gate_up + t["hidden"] + t["x"],
            )
        return peaks

    def backward_bytes(self, tokens: int) -> dict[Level, int]:
        """Peak of one layer's backward by the level that was kept: its saved tensors and both gradients included."""
        s, t = self.shape, self.tensor_bytes(tokens)
        products = 4 * self.rank * max(4 * s.intermediate, 3 * s.qkv_width)
        saved = t["grad"] + t["x"] + t["xa"] + t["qkv"] + t["attended"] + t["state"]
        mlp = saved + t["x"] + t["normed_mid"] + t["gate_up"] + t["grad_hidden"] + products
        rotated = t["q"] + t["kv"] + t["rstd"]
        attention = saved + rotated + 2 * t["q"] + 2 * t["kv"] + self.attention_workspace(tokens)
        peaks = {}
        for level in Level:
            early = level in (Level.INPUT, Level.ALL)  # the attention was recomputed, or all of it kept
            peaks[level] = max(
                mlp + (t["normed_in"] + rotated if early else 0), attention + (t["normed_in"] if early else 0)
            )
        return peaks

    def head_bytes(self, tokens: int, chunk: int) -> int:
        """Peak of the loss head, its first input apart."""
        t = self.tensor_bytes(tokens)
        return 2 * t["x"] + t["grad"] + 16 * tokens + block_bytes(2 * chunk * self.vocabulary)


def _by_level(*steps: int) -> dict[Level, int]:
    """Sum up what each level adds to the one before."""
    return {level: sum(steps[: level + 1]) for level in Level}


def _parkable(sizes: dict[str, int]) -> tuple[int, ...]:
    """What each level adds to `Saved.large`."""
    s = sizes
    return (
        s["x"],
        s["qkv"] + s["attended"] + s["x"],
        s["gate_up"],
        s["q"] + s["kv"] + s["normed_in"] + s["normed_mid"],
    )


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
    layers, saved, parkable = work.num_layers, work.saved_bytes(tokens), work.host_bytes_per_token()
    chunk = head_chunk(work, tokens)
    parked = spread(layers, share)
    copied = 0 if host is None else parkable[host] * tokens
    base: Level = Level.ATTENTION if host == Level.ATTENTION else Level.INPUT
    levels: list[Level] = [base] * layers
    host_levels = [host if is_parked else None for is_parked in parked]
    left = budget - peak_bytes(work, tokens, chunk, levels, host_levels, cached=cached)
    for upper in (Level.ATTENTION, Level.GATE_UP, Level.ALL):
        for index in reversed(range(layers)):
            cost = saved[upper] - saved[levels[index]]
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
        peak=peak_bytes(work, tokens, chunk, levels, host_levels, cached=cached),
        embedding_on_host=work.embedding_on_host,
        eight_bit=work.optimizer_bytes < OPTIMIZER_BYTES[0],
        stream_weights=work.stream_weights,
    )


def spread(layers: int, share: float) -> list[bool]:
    """Choose layers to park: evenly among the others, so that the bus catches up; the last two are needed at once."""
    return [index < layers - 2 and int((index + 1) * share) > int(index * share) for index in range(layers)]


def peak_bytes(
    work: Workload,
    tokens: int,
    chunk: int,
    levels: Sequence[Level],
    host_levels: Sequence[Level | None],
    *,
    cached: bool,
) -> int:
    """Predict the peak of allocated device memory of a step with micro-batches of `tokens`; arguments as in `Plan`.

    The peak is the largest of these moments: each layer's forward, behind the layers before it; the head, with all
    saved tensors on the device that are not parked; each layer's backward, when only the layers before it hold theirs.
    """
    saved, parkable, x = work.saved_bytes(tokens), work.parked_bytes(tokens), work.tensor_bytes(tokens)["x"]
    forward, backward = work.forward_bytes(tokens), work.backward_bytes(tokens)
    kept = in_flight = fetched = inputs = peak = 0
    for level, host in zip(levels, host_levels, strict=True):
        parked = 0 if host is None else parkable[host]
        peak = max(peak, kept + in_flight + inputs + forward[level], kept + fetched + backward[level])
        kept += saved[level] - parked
        # The tensors parked last stay until the next ones are; those of the layer before are fetched in the backward.
        in_flight, fetched = parked or in_flight, parked
        # The next layer's inputs: the MLP's output, and mid unless it is counted among what is kept or in flight.
        inputs = x if level >= Level.ATTENTION else 2 * x
    head = inputs - x + work.head_bytes(tokens, chunk)
    weights = work.extended_bytes * (work.num_layers if cached else work.quantized)
    return work.static_bytes() + weights + max(peak, kept + head)


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
    own = work.saved_bytes(tokens)[Level.ATTENTION] + work.head_bytes(tokens, 0)
    free = work.backward_bytes(tokens)[Level.ATTENTION] - own
    chunk = 4096
    while chunk > 256 and 2 * chunk * work.vocabulary > max(free, HEAD_BYTES):
        chunk //= 2
    return min(chunk, tokens)


def launch_bound(plan: Plan, work: Workload) -> bool:
    """Whether kernel-by-kernel launches may take longer than the kernels: under 5 ms for a layer and pass."""
    pieces = max(1, work.tokens // (plan.micro_batch or work.tokens))
    return plan.seconds / pieces / (2 * work.num_layers) < LAUNCH_SECONDS
