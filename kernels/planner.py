"""Decide what fits: recompute level per layer, host or device, kept weights, loss-head chunk, micro-batch size.

All sizes are bytes. The planner predicts the peak of `torch.cuda.max_memory_allocated` from tensor shapes and picks the
plan with the least predicted time under a budget. What can be bought with memory, per layer: keeping more of the
forward (decoder_layer.Level) instead of recomputing it, and keeping decoded weights instead of decoding NF4 again.
Kept tensors go to host memory as far as the bus can take them during the forward, to device memory beyond that; larger
micro-batches decode less often. Predictions follow results.md and are checked against measurements there.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from itertools import product

from finemill.kernels.attention import WORKSPACE_PER_ELEMENT
from finemill.kernels.decoder_layer import LayerShape, Level
from finemill.kernels.projection import PAD
from finemill.kernels.swiglu_lora import partial_bytes

CUBLAS_WORKSPACE = 64 << 20
"""What torch allocates for cuBLAS on Hopper: 32 MiB each for eager work and for captured graphs."""
SMALL_TENSORS = 8 << 20
"""Code tables, rotary tables, the batch and its sums, scalars."""
NF4_BYTES = 0.5 + 1 / 64 + 4 / (64 * 256)
"""Per weight: code, double-quantized scale, nested scale."""

HEAD_BYTES = 160 << 20
"""Logits of 512 rows of Qwen3's vocabulary: below that the head's products lose more than the memory is worth."""
MARGIN = 0.985
"""Share of the budget to plan for: predictions are not exact (tests/kernels/test_planner.py)."""
PARKED_SHARES = (0.5, 0.75, 1.0)
"""Shares of the layers whose tensors may be parked."""
IN_FLIGHT = (1, 2)
"""Parked layers that may still be on their way out. With two, a copy longer than a layer's forward may be followed by a
shorter one, for the memory of one more."""
DIAGONAL = 256
"""Keys a query that attention computes in vain, in the tiles on the diagonal of the scores."""
FORWARD_KERNELS, BACKWARD_KERNELS = 20, 30
"""Of a layer."""
KERNEL_SECONDS = 6e-6
"""What a kernel costs beside its bytes and operations: start, tail, and too few programs to fill the card."""
LAUNCH_SECONDS = 5e-3
"""A layer's forward or backward takes the host about 2 ms to launch on a slow machine (results.md)."""
OPTIMIZER_BYTES = (8.0, 2.0 + 8 / 256)
"""Both moments of an adapter element in fp32, and in 8 bits with an fp32 scale per 256."""


HostLevels = tuple[Level | None, ...]
Parking = tuple[HostLevels, int]
"""Parked level per layer, layers in flight."""


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
        in_flight: parked layers whose device memory may wait for their copies.
    """

    levels: tuple[Level, ...]
    host_levels: HostLevels
    cached_layers: int
    head_chunk: int
    bytes_per_token: dict[Level, int] = field(default_factory=dict, hash=False)
    micro_batch: int | None = None
    seconds: float = 0.0
    peak: int = 0
    embedding_on_host: bool = False
    eight_bit: bool = False
    stream_weights: bool = False
    in_flight: int = 1

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
    """What a card does per second, sustained; the defaults are an H200's (results.md).

    Args:
        flops: of matrix products, at the card's power limit.
        attention_forward: operations of attention, of long rows.
        attention_backward: likewise, in the deterministic mode.
        bytes: of elementwise kernels and skinny products, 7/8 of what a copy reads and writes.
        bus_bytes: to or from the host.
        shared_bus_bytes: each way, both at once.
    """

    flops: float = 710e12
    attention_forward: float = 560e12
    attention_backward: float = 370e12
    bytes: float = 3.65e12
    bus_bytes: float = 54e9
    shared_bus_bytes: float = 47e9


RATES = {"h100": Rates(bytes=2.6e12), "h200": Rates()}


def rates_of(gpu: str) -> Rates:
    """Find the rates of a card by the name CUDA gives it; an H200's for an unknown one."""
    return next((rates for name, rates in RATES.items() if name in gpu.lower()), Rates())


@dataclass(frozen=True)
class LayerBytes:
    """Device memory of one layer in a micro-batch, by the level it keeps.

    Args:
        x: one tensor of the residual stream.
        saved: what waits for the backward.
        parkable: the part of `saved` that can be parked.
        forward: peak of the forward, inputs apart.
        backward: peak of the backward, its own saved tensors and both gradients included.
    """

    x: int
    saved: dict[Level, int]
    parkable: dict[Level, int]
    forward: dict[Level, int]
    backward: dict[Level, int]


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
        masked: whether an eighth of the tokens or more may have no label, so that the head gathers the others.
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
    masked: bool = False
    optimizer_bytes: float = 8.0
    embedding_on_host: bool = False
    stream_weights: bool = False

    def under(self, plan: Plan) -> "Workload":
        """The workload with weights, embedding and moments where a plan has them."""
        return replace(
            self,
            optimizer_bytes=OPTIMIZER_BYTES[plan.eight_bit],
            embedding_on_host=plan.embedding_on_host,
            stream_weights=plan.stream_weights,
        )

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
    def pads(self) -> tuple[int, ...]:
        """Spare columns of qkv, o, gate-up and down."""
        return tuple(-(-members * self.rank // PAD) * PAD for members in (3, 1, 2, 1))

    @property
    def extended_bytes(self) -> int:
        """Of a layer's four extended 16-bit weights."""
        s = self.shape
        outputs = (s.qkv_width, s.hidden, 2 * s.intermediate, s.hidden)
        inputs = (s.hidden, s.q_width, s.hidden, s.intermediate)
        return sum(block_bytes(2 * (n + pad) * (k + pad)) for n, k, pad in zip(outputs, inputs, self.pads, strict=True))

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

    @property
    def widths(self) -> dict[str, int]:
        """Bytes per token of what a layer computes, under the names of decoder_layer.py."""
        s, (qkv_pad, o_pad, gate_up_pad, down_pad) = self.shape, self.pads
        return {
            "x": 2 * s.hidden,
            "xa": 2 * 7 * self.rank,
            "normed_in": 2 * (s.hidden + qkv_pad),
            "qkv": 2 * (s.qkv_width + qkv_pad),
            "q": 2 * s.q_width,
            "kv": 2 * s.num_kv_heads * s.head_dim,
            "rstd_qk": 4 * (s.num_heads + s.num_kv_heads),
            "attended": 2 * (s.q_width + o_pad),
            "state": 4 * s.num_heads,
            "normed_mid": 2 * (s.hidden + gate_up_pad),
            "gate_up": 2 * (2 * s.intermediate + gate_up_pad),
            "hidden": 2 * (s.intermediate + down_pad),
            "grad_hidden": 2 * s.intermediate,
            "grad": 2 * (s.hidden + max(o_pad, down_pad)),
            "rstd": 4,
        }

    def tensor_bytes(self, tokens: int) -> dict[str, int]:
        """Device memory of what a layer computes."""
        return {name: block_bytes(width * tokens) for name, width in self.widths.items()}

    def host_bytes_per_token(self) -> dict[Level, int]:
        """Host memory that a parked layer takes."""
        return _parkable(self.widths)

    def attention_workspace(self, tokens: int) -> int:
        """Of cuDNN's deterministic backward: the scores' gradient and an fp32 dq of one group of heads."""
        s = self.shape
        one_key_head = 2 * tokens * self.row * (s.num_heads // s.num_kv_heads)
        limit = max(1, WORKSPACE_PER_ELEMENT * tokens * s.q_width // one_key_head)
        step = max(n for n in range(1, s.num_kv_heads + 1) if s.num_kv_heads % n == 0 and n <= limit)
        return step * (one_key_head + 4 * tokens * s.q_width // s.num_kv_heads)

    def head_bytes(self, tokens: int, chunk: int) -> int:
        """Peak of the loss head, its first input apart."""
        t = self.tensor_bytes(tokens)
        # Two inputs and a gradient of 7/8 of the rows, at most, in place of one normed tensor of all.
        gathered = 5 * t["x"] // 2 if self.masked else 0
        return 2 * t["x"] + gathered + 16 * tokens + max(t["grad"], block_bytes(2 * chunk * self.vocabulary))


@lru_cache
def layer_bytes(work: Workload, tokens: int) -> LayerBytes:
    """Device memory of one layer in a micro-batch."""
    t = work.tensor_bytes(tokens)
    rest = {Level.INPUT: t["xa"], Level.ATTENTION: t["state"], Level.ALL: t["rstd_qk"] + 2 * t["rstd"]}
    parkable, kept = _parkable(t), _by_level(rest)
    saved = {level: parkable[level] + kept[level] for level in Level}
    return LayerBytes(t["x"], saved, parkable, _forward_bytes(t), _backward_bytes(work, t, tokens))


def _by_level(steps: dict[Level, int]) -> dict[Level, int]:
    """Sum up what each level adds to the one before."""
    return {level: sum(size for step, size in steps.items() if step <= level) for level in Level}


def _parkable(t: dict[str, int]) -> dict[Level, int]:
    """What `Saved.large` names, without the adapters' products and the attention's state."""
    return _by_level(
        {
            Level.INPUT: t["x"],
            Level.ATTENTION: t["qkv"] + t["attended"] + t["x"],
            Level.GATE_UP: t["gate_up"],
            Level.ALL: t["q"] + t["kv"] + t["normed_in"] + t["normed_mid"],
        }
    )


def _forward_bytes(t: dict[str, int]) -> dict[Level, int]:
    stream = 2 * t["x"] + t["xa"]  # total and mid
    attention = t["qkv"] + t["attended"] + t["state"]
    early = t["normed_in"] + t["q"] + t["kv"] + t["rstd_qk"]
    peaks = {}
    for level in Level:
        kept = stream + (attention if level >= Level.ATTENTION else 0) + (early if level == Level.ALL else 0)
        normed_mid = t["normed_mid"] if level == Level.ALL else 0
        gate_up = t["gate_up"] if level >= Level.GATE_UP else 0
        peaks[level] = max(
            stream + attention + early,
            kept + t["normed_mid"] + t["gate_up"],
            kept + normed_mid + t["gate_up"] + t["hidden"],
            kept + normed_mid + gate_up + t["hidden"] + t["x"],
        )
    return peaks


def _backward_bytes(work: Workload, t: dict[str, int], tokens: int) -> dict[Level, int]:
    width = work.shape.intermediate
    products = max(4 * work.rank * max(4 * width, 3 * work.shape.qkv_width), partial_bytes(tokens, width, work.rank))
    rotated = t["q"] + t["kv"] + t["rstd_qk"]
    saved = t["grad"] + t["x"] + t["xa"] + t["qkv"] + t["attended"] + t["state"]
    mlp = saved + t["x"] + t["normed_mid"] + t["gate_up"] + t["grad_hidden"] + products
    attention = saved + rotated + 2 * (t["q"] + t["kv"]) + work.attention_workspace(tokens)
    # An attention that was recomputed leaves as much as one of which all was kept.
    early = {Level.INPUT: t["normed_in"], Level.ALL: t["normed_in"]}
    return {level: max(mlp + (rotated if level in early else 0), attention) + early.get(level, 0) for level in Level}


def peak_bytes(work: Workload, plan: Plan) -> int:
    """Predict the peak of allocated device memory of a step; `work` is what `under` made of it for the plan.

    The peak is the largest of these moments: each layer's forward, behind the layers before it; the head, with all
    saved tensors on the device that are not parked; each layer's backward, when only the layers before it hold theirs.
    """
    tokens = plan.micro_batch or work.tokens
    sizes = layer_bytes(work, tokens)
    *layers, (kept, _) = _beside(sizes, plan, plan.levels)
    peak = kept + work.head_bytes(tokens, plan.head_chunk)
    for level, (in_forward, in_backward) in zip(plan.levels, layers, strict=True):
        peak = max(peak, in_forward + sizes.forward[level], in_backward + sizes.backward[level])
    return _lasting_bytes(work, cached=plan.cached_layers > 0) + peak


@lru_cache
def _lasting_bytes(work: Workload, *, cached: bool) -> int:
    """What is there all the time: decoded weights, kept or of the layer at hand, beside the static tensors."""
    return work.static_bytes() + work.extended_bytes * (work.num_layers if cached else work.quantized)


def _beside(sizes: LayerBytes, plan: Plan, levels: Sequence[Level]) -> Iterator[tuple[int, int]]:
    """Yield what is allocated beside a layer's own, in its forward and in its backward; at last beside the head.

    Args:
        sizes: of a layer.
        plan: what is parked, how many layers are in flight.
        levels: in place of the plan's.
    """
    kept = inputs = fetched = 0
    leaving = [0] * plan.in_flight
    for level, host in zip(levels, plan.host_levels, strict=True):
        yield kept + sum(leaving) + inputs, kept + fetched
        fetched = 0 if host is None else sizes.parkable[host]
        kept += sizes.saved[level] - fetched
        if fetched:
            leaving = [*leaving[1:], fetched]
        # The next layer's inputs: the MLP's output, and mid unless it is counted among what is kept or leaving.
        inputs = sizes.x if level >= Level.ATTENTION else 2 * sizes.x
    yield kept + inputs - sizes.x, 0


@dataclass(frozen=True)
class LayerSeconds:
    """Predicted times of one layer: its forward, and its backward, recompute included, by the level it kept."""

    forward: float
    backward: dict[Level, float]


@lru_cache
def layer_seconds(work: Workload, rates: Rates, tokens: int, *, cached: bool) -> LayerSeconds:
    """Predict one layer's passes: matrix products, attention, what the elementwise kernels move, NF4 decode."""
    s, w = work.shape, work.widths

    def moving(width: int) -> float:
        return tokens * width / rates.bytes

    matmul = 2 * tokens * s.hidden / rates.flops
    scores = 2 * tokens * (work.row + DIAGONAL) * s.q_width
    attention, attention_back = scores / rates.attention_forward, 2.5 * scores / rates.attention_backward
    decode = 0.0 if cached or not work.quantized else work.layer_weights * 2.6 / rates.bytes
    products = matmul * (s.qkv_width + s.q_width + 3 * s.intermediate)
    rotate = 2 * (w["q"] + w["kv"])
    inputs = 2 * w["x"] + w["q"] + w["grad_hidden"]  # of the adapters: read once forward, once for dA
    outputs = w["qkv"] + 2 * w["x"] + w["gate_up"]  # their gradients: read for dB and for dy B
    forward = moving(8 * w["x"] + rotate + 3 * w["grad_hidden"] + inputs)
    backward = moving(8 * w["x"] + 3 * w["qkv"] + 6 * w["grad_hidden"] + inputs + 2 * outputs)
    again = {
        Level.INPUT: matmul * (s.qkv_width + s.q_width) + attention + moving(3 * w["x"]) + decode / 3,
        Level.ATTENTION: matmul * 2 * s.intermediate,
        Level.GATE_UP: moving(4 * w["x"] + rotate),
    }
    backward += products + attention_back + decode + BACKWARD_KERNELS * KERNEL_SECONDS
    return LayerSeconds(
        products + attention + forward + decode + FORWARD_KERNELS * KERNEL_SECONDS,
        {level: backward + sum(cost for step, cost in again.items() if step >= level) for level in Level},
    )


def step_seconds(work: Workload, rates: Rates, plan: Plan) -> float:
    """Predict an optimizer step's time layer by layer, with the bus beside it; `work` as in `peak_bytes`."""
    s, tokens = work.shape, plan.micro_batch or work.tokens
    times = layer_seconds(work, rates, tokens, cached=plan.cached_layers > 0)
    weights = work.layer_weights * NF4_BYTES if work.stream_weights else 0.0
    rate = rates.shared_bus_bytes if weights else rates.bus_bytes
    parked = [0 if level is None else tokens * plan.bytes_per_token[level] for level in plan.host_levels]
    now = bus = 0.0
    leaving = [0.0] * plan.in_flight
    for size in parked:
        now += max(times.forward, weights / rate)
        if size:
            bus = max(now, bus) + size / rate
            now = max(now, leaving[0])
            leaving = [*leaving[1:], bus]
    now = max(now, *leaving)
    now += 4 * tokens * s.hidden * work.vocabulary / rates.flops + 6 * tokens * work.vocabulary / rates.bytes
    # A layer's tensors and weights are fetched while the layer behind it runs backward.
    bus = fetched = now
    for level, size in zip(reversed(plan.levels), reversed([0, *parked[:-1]]), strict=True):
        now = max(now, fetched)
        bus = fetched = max(now, bus) + (weights + size) / rates.bus_bytes
        now += times.backward[level]
    embedding = 2 * tokens * s.hidden / rates.bus_bytes if work.embedding_on_host else 0.0
    return (now + embedding) * max(1, work.tokens // tokens)


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
        for candidate in _candidates(variant, budget, rates, rows // pieces * work.row, allow_host=allow_host)
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


def _candidates(work: Workload, budget: int, rates: Rates, tokens: int, *, allow_host: bool) -> Iterator[Plan]:
    """Plans of one micro-batch size: what is parked, in how many layers, and whether decoded weights are kept."""
    per_token = work.host_bytes_per_token()
    for cached in (False, True) if work.quantized and not work.stream_weights else (False,):
        forward = layer_seconds(work, rates, tokens, cached=cached).forward
        nothing: Parking = (None,) * work.num_layers, 1
        parkings = _parkings(work, rates, tokens, forward) if allow_host else ()
        for host_levels, in_flight in dict.fromkeys([nothing, *parkings]):
            plan = Plan(
                levels=tuple(Level.INPUT if host is None else host for host in host_levels),
                host_levels=host_levels,
                cached_layers=work.num_layers if cached else 0,
                head_chunk=head_chunk(work, tokens),
                bytes_per_token=per_token,
                micro_batch=tokens,
                embedding_on_host=work.embedding_on_host,
                eight_bit=work.optimizer_bytes < OPTIMIZER_BYTES[0],
                stream_weights=work.stream_weights,
                in_flight=in_flight,
            )
            plan = replace(plan, levels=_fill_device(work, budget, plan))
            yield replace(plan, seconds=step_seconds(work, rates, plan), peak=peak_bytes(work, plan))


def _parkings(work: Workload, rates: Rates, tokens: int, forward: float) -> Iterator[Parking]:
    """What may be parked: one level in a share of the layers, or more than that wherever the bus has time."""
    rate = rates.shared_bus_bytes if work.stream_weights else rates.bus_bytes
    copies = {level: size * tokens / rate for level, size in work.host_bytes_per_token().items()}
    bases = (Level.INPUT, Level.ATTENTION, Level.GATE_UP)
    for share, base, in_flight in product(PARKED_SHARES, bases, IN_FLIGHT):
        parked = spread(work.num_layers, share)
        yield tuple(base if is_parked else None for is_parked in parked), in_flight
        yield _fill_bus(copies, base, parked, forward, in_flight), in_flight


def spread(layers: int, share: float) -> list[bool]:
    """Choose layers to park: evenly among the others, so that the bus catches up; the last two are needed at once."""
    return [index < layers - 2 and int((index + 1) * share) > int(index * share) for index in range(layers)]


def _fill_bus(
    copies: dict[Level, float], base: Level, parked: Sequence[bool], forward: float, in_flight: int
) -> HostLevels:
    """Park more than `base` where its copy, and a copy of `base` next, end before the device waits for them.

    Args:
        copies: seconds to the host by level.
        base: the least to park.
        parked: layers that are.
        forward: seconds of a layer.
        in_flight: as in `Plan`.
    """
    indices = [index for index, is_parked in enumerate(parked) if is_parked]
    ends = [(index + 1) * forward for index in indices] + [len(parked) * forward] * (in_flight + 1)
    chosen: list[Level | None] = [None] * len(parked)
    bus = 0.0
    for number, index in enumerate(indices):
        begin, (first, second) = max(ends[number], bus), ends[number + in_flight : number + in_flight + 2]
        fitting = [
            level
            for level in Level
            if base < level < Level.ALL and begin + copies[level] <= min(first, second - copies[base])
        ]
        level = max(fitting, default=base)
        bus, chosen[index] = begin + copies[level], level
    return tuple(chosen)


def _fill_device(work: Workload, budget: int, plan: Plan) -> tuple[Level, ...]:
    """Raise levels while all moments stay within the budget, last layers first: theirs are kept for the least time."""
    sizes = layer_bytes(work, plan.micro_batch or work.tokens)
    limit = budget - _lasting_bytes(work, cached=plan.cached_layers > 0)
    head = work.head_bytes(plan.micro_batch or work.tokens, plan.head_chunk)
    levels = list(plan.levels)
    for upper in (Level.ATTENTION, Level.GATE_UP, Level.ALL):
        *beside, (kept, _) = _beside(sizes, plan, levels)
        # What all moments behind a layer leave for its saved tensors.
        room = limit - kept - head
        for index in reversed(range(work.num_layers)):
            in_forward, in_backward = beside[index]
            more = sizes.saved[upper] - sizes.saved[levels[index]]
            own = max(in_forward + sizes.forward[upper], in_backward + sizes.backward[upper])
            if levels[index] == upper - 1 and more <= room and own <= limit:
                levels[index], room = upper, room - more
            level = levels[index]
            own = max(in_forward + sizes.forward[level], in_backward + sizes.backward[level])
            room = min(room, limit - own)
    return tuple(levels)


@lru_cache
def head_chunk(work: Workload, tokens: int) -> int:
    """Rows of logits at a time: as many as fit into what the layers need anyway, from 256 to 4096."""
    sizes = layer_bytes(work, tokens)
    free = sizes.backward[Level.ATTENTION] - sizes.saved[Level.ATTENTION] - work.head_bytes(tokens, 0)
    chunk = 4096
    while chunk > 256 and 2 * chunk * work.vocabulary > max(free, HEAD_BYTES):
        chunk //= 2
    return min(chunk, tokens)


def launch_bound(plan: Plan, work: Workload) -> bool:
    """Whether kernel-by-kernel launches may take longer than the kernels: under 5 ms for a layer and pass."""
    pieces = max(1, work.tokens // (plan.micro_batch or work.tokens))
    return plan.seconds / pieces / (2 * work.num_layers) < LAUNCH_SECONDS
