"""Decide what fits: recompute level per layer, host or device, kept weights, loss-head chunk, micro-batch size.

The planner predicts the peak of allocated device memory (workload.py) and the time (rates.py) of many plans, and picks
the one with the least time under a budget. What can be bought with memory, per layer: keeping more of the forward
(decoder_layer.Level) instead of recomputing it, and keeping decoded weights instead of decoding NF4 again. Kept tensors
go to host memory as far as the bus can take them during the forward, to device memory beyond that; larger micro-batches
decode less often.
"""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import lru_cache, partial
from itertools import pairwise, product

from finemill.errors import UserError
from finemill.kernels.engine.plan import HostLevels, Level, Plan, streamed_layers
from finemill.kernels.ops.division import divisors
from finemill.kernels.planning.rates import Rates, layer_seconds
from finemill.kernels.planning.workload import NF4_BYTES, OPTIMIZER_BYTES, LayerBytes, Workload, layer_bytes

HEAD_BYTES = 160 << 20
"""Logits of 512 rows of Qwen3's vocabulary: below that the head's products lose more than the memory is worth."""
MARGIN = 0.985
"""Share of the budget to plan for: predictions are not exact (tests/kernels/planning/test_planner.py)."""
PARKED_SHARES = (0.5, 0.75, 1.0)
"""Shares of the layers whose tensors may be parked."""
IN_FLIGHT = (1, 2)
"""Numbers of parked layers that may be on their way to the host at once. Two take the memory of one layer more; then a
copy may last longer than a layer's forward if the next one is shorter."""
LAUNCH_SECONDS = 5e-3
"""Seconds of a layer's forward or backward below which its launches may take longer: up to 100, 17 to 20 us each on a
slow host, and a margin."""
PATIENCE = 8
"""Passes of a shape before it is captured where launches do not bind: a graph gains 1 %, its capture takes half a
step."""
Parking = tuple[HostLevels, int]
"""Parked level per layer, layers in flight."""


class NoPlanError(UserError):
    """Not even the leanest plan fits; `budget`, what it needs (`least`) and the limit of `host` memory are bytes.

    Of both a share is kept back (`MARGIN`); `allowance` is what a limit must be for the leanest plan.
    """

    def __init__(self, budget: int, least: int, host: int | None = None) -> None:
        self.budget, self.least = budget, least
        self.allowance = int(least / MARGIN) + 2
        beside = "" if host is None else f" beside {host / 2**30:.1f} GiB of host memory"
        super().__init__(
            f"no plan fits {budget / 2**30:.2f} GiB{beside}: the leanest needs {least / 2**30:.2f} GiB; "
            "allow more memory, shorter rows or a smaller rank"
        )


def workload_under(work: Workload, plan: Plan) -> Workload:
    """The workload with weights, embedding and moments where a plan has them."""
    return replace(
        work,
        optimizer_bytes=OPTIMIZER_BYTES[plan.eight_bit],
        embedding_on_host=plan.embedding_on_host,
        stream_weights=plan.stream_weights,
        resident_layers=plan.resident_layers,
        key_heads=plan.key_heads,
        mlp_tile=plan.mlp_tile,
    )


def host_bytes(work: Workload, plan: Plan) -> int:
    """Host memory that a step takes: activations, and weights and the embedding where they wait there."""
    parked = plan.host_bytes(plan.micro_batch or work.tokens)
    waiting = work.num_layers - plan.resident_layers if plan.stream_weights and work.shards == 1 else 0
    table = 2 * work.vocabulary * work.shape.hidden if plan.embedding_on_host else 0
    return parked + int(waiting * work.layer_weights * NF4_BYTES) + table


def peak_bytes(work: Workload, plan: Plan) -> int:
    """Predict the peak of allocated device memory of a step; `work` is what `workload_under` made of it for the plan.

    The peak is the largest of these moments: each layer's forward, behind the layers before it; the head, with all
    saved tensors on the device that are not parked; each layer's backward, when only the layers before it hold theirs.
    """
    tokens = plan.micro_batch or work.tokens
    sizes = layer_bytes(work, tokens)
    *layers, (kept, _) = _beside(sizes, plan, plan.levels)
    peak = kept + work.head_bytes(tokens, plan.head_chunk)
    peak = max(peak, *(sizes.peak(level, *beside) for level, beside in zip(plan.levels, layers, strict=True)))
    return _lasting_bytes(work, cached=plan.cached_layers > 0) + peak


@lru_cache
def _lasting_bytes(work: Workload, *, cached: bool) -> int:
    """What is there all the time: decoded weights, kept or of the layer at hand, beside the static tensors."""
    decoded = work.extended_bytes * work.num_layers if cached else work.scratch_bytes * work.quantized
    return work.static_bytes() + decoded


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


def step_seconds(work: Workload, rates: Rates, plan: Plan) -> float:
    """Predict an optimizer step's time layer by layer, with the bus beside it; `work` as in `peak_bytes`."""
    s, tokens = work.shape, plan.micro_batch or work.tokens
    times = layer_seconds(work, rates, tokens, cached=plan.cached_layers > 0)
    weights, gather = work.layer_weights * NF4_BYTES, 0.0
    if work.stream_weights and work.shards > 1:  # the host's bus has no part in it
        gather = weights * (1 - 1 / work.shards) / rates.link_bytes
    waits = work.stream_weights and work.shards == 1
    streamed = streamed_layers(work.num_layers, work.resident_layers) if waits else ()
    order = [layer for layer, visits in enumerate(streamed) if visits]
    rate = rates.shared_bus_bytes if order else rates.bus_bytes
    parked = [0 if level is None else tokens * plan.bytes_per_token[level] for level in plan.host_levels]
    now = bus = arriving = 0.0
    visits = _Visits(order, weights / rate)
    leaving = [0.0] * plan.in_flight
    for layer, size in enumerate(parked):
        arriving = visits.begin(arriving)
        now = max(now, visits.ready.get(layer, 0.0)) + max(times.forward, gather)
        visits.release(layer, now)
        if size:
            bus = max(now, bus) + size / rate
            now = max(now, leaving[0])
            leaving = [*leaving[1:], bus]
    now = max(now, *leaving)
    now += 4 * tokens * s.hidden * work.vocabulary / rates.flops + 6 * tokens * work.vocabulary / rates.bytes
    # A layer's tensors and weights are fetched while the layer behind it runs backward.
    visits = _Visits(order[::-1], weights / rates.bus_bytes, present=2)
    bus = fetched = now
    for layer in reversed(range(work.num_layers)):
        now = max(now, fetched, visits.ready.get(layer, 0.0))
        bus = visits.begin(max(now, bus))
        if size := parked[layer - 1] if layer else 0:
            bus = fetched = bus + size / rates.bus_bytes
        now += max(times.backward[plan.levels[layer]], gather)
        visits.release(layer, now)
    embedding = 2 * tokens * s.hidden / rates.bus_bytes if work.embedding_on_host else 0.0
    return (now + embedding) * max(1, work.tokens // tokens)


class _Visits:
    """When layers' weights are in the two slots that they visit (engine/weight_stream.py).

    Args:
        order: the layers that visit.
        seconds: of a copy.
        present: leading ones that are there already.
    """

    def __init__(self, order: Sequence[int], seconds: float, present: int = 0) -> None:
        self._seconds, self._waiting = seconds, list(order[present:])
        self._free = [0.0] * (2 - min(present, len(order)))
        self.ready = dict.fromkeys(order[:present], 0.0)

    def begin(self, bus: float) -> float:
        """Begin the copies that have a slot. Returns: when the bus is free again."""
        while self._free and self._waiting:
            bus = max(bus, self._free.pop(0)) + self._seconds
            self.ready[self._waiting.pop(0)] = bus
        return bus

    def release(self, layer: int, now: float) -> None:
        """Give a layer's slot to another one, if it had any."""
        if layer in self.ready:
            self._free.append(now)


def plan_step(
    work: Workload,
    budget: int,
    *,
    rates: Rates | None = None,
    allow_host: bool = True,
    allow_stream: bool = False,
    streamed: bool = False,
    eight_bit: bool | None = None,
    host: int | None = None,
) -> Plan:
    """Choose micro-batch size, levels, host share and kept weights for one optimizer step.

    Args:
        work: model and step.
        budget: bytes of device memory the step may allocate at its peak.
        rates: of the device.
        allow_host: whether activations may be parked in host memory.
        allow_stream: whether the NF4 weights may wait there, too.
        streamed: whether they do already, or are cut into `shards`.
        eight_bit: whether the optimizer's moments have 8 bits; None where memory decides.
        host: bytes of host memory the step may take, weights that wait there already included; None for any.
    Returns: the plan with the least predicted time.
    Raises: NoPlanError: not even the leanest plan fits.
    """
    rates, budget = rates or Rates(), int(budget * MARGIN)
    # Layers that visit the device share their places there, and are alike.
    may_stream = allow_stream and work.quantized and not work.kept_bytes
    streams = (True,) if streamed else (False, True) if may_stream else (False,)
    moments = OPTIMIZER_BYTES if eight_bit is None else OPTIMIZER_BYTES[eight_bit : eight_bit + 1]
    rows = max(1, work.tokens // work.row)

    def candidates(variants: Sequence[Workload], micro_batches: Sequence[int]) -> list[Plan]:
        return [
            candidate
            for variant in variants
            for tokens in micro_batches
            for candidate in _candidates(variant, budget, rates, tokens, allow_host=allow_host)
            if host is None or host_bytes(variant, candidate) <= host
        ]

    heads = divisors(work.shape.num_kv_heads)
    if work.fa4 and not work.ragged:  # takes all heads in little memory
        heads = heads[-1:]
    micro_batches = [pieces * work.row for pieces in reversed(divisors(rows))]
    if work.whole:
        micro_batches = micro_batches[:1]
    variants = partial(_variants, work, streams=streams, moments=moments, allow_host=allow_host)
    leanest_and_fastest = candidates(variants(sorted({heads[0], heads[-1]}, reverse=True)), micro_batches)
    fitting = [candidate for candidate in leanest_and_fastest if candidate.peak <= budget]
    if not fitting:
        least = min((candidate.peak for candidate in leanest_and_fastest), default=budget)
        raise NoPlanError(budget, least, host)
    best = min(fitting, key=lambda candidate: candidate.seconds)
    assert best.micro_batch is not None
    finer = variants(heads[1:-1])
    if True in streams and work.shape.experts and work.shards == 1 and not best.cached_layers:
        finer += _partly_streamed(variants([best.key_heads or heads[-1]]))
    fitting = [candidate for candidate in candidates(finer, [best.micro_batch]) if candidate.peak <= budget]
    return min([best, *fitting], key=lambda candidate: candidate.seconds)


def prefers_shards(
    work: Workload, budget: int, shards: int, *, rates: Rates | None = None, eight_bit: bool | None = None
) -> bool:
    """Whether NF4 weights that do not stay on a card visit it faster from parts on several than from the host.

    Args:
        work: model and step of one card.
        budget: bytes of device memory the step may allocate at its peak, on each card.
        shards: cards of the host.
        rates: of the device.
        eight_bit: as in `plan_step`.
    """
    if shards == 1 or not work.quantized:
        return False
    choose = partial(plan_step, budget=budget, rates=rates, allow_stream=True, eight_bit=eight_bit)
    try:
        whole = choose(work)
        if not whole.stream_weights and work.loading_bytes() <= budget:
            return False
        return choose(replace(work, shards=shards), streamed=True).seconds < whole.seconds
    except NoPlanError:
        return False


def least_bytes(work: Workload, *, allow_stream: bool, eight_bit: bool | None = None, host: int | None = None) -> int:
    """The least limit that `plan_step` finds a plan for, whose arguments these are: what a card must have."""
    try:
        plan_step(work, 0, allow_stream=allow_stream, eight_bit=eight_bit, host=host)
    except NoPlanError as error:
        return error.allowance
    raise AssertionError("a plan of no memory")


def plan_graphed_step(
    work: Workload,
    budget: int,
    card: int,
    *,
    rates: Rates | None = None,
    use_graphs: bool | None = None,
    allow_stream: bool = False,
    streamed: bool = False,
    eight_bit: bool | None = None,
    host: int | None = None,
) -> tuple[Plan, int | None]:
    """Choose a plan for batches of many shapes, and whether they run as CUDA graphs.

    The memory of captured graphs stays on the card while an eager pass of another shape runs beside it.

    Args:
        work: model and step.
        budget: bytes of device memory a step may allocate at its peak.
        card: bytes the whole process may take on the card.
        rates: of the device.
        use_graphs: None where launches would dominate at once, and elsewhere for shapes that come often.
        allow_stream: whether the NF4 weights may wait in host memory.
        streamed: whether they do already.
        eight_bit: as in `plan_step`.
        host: likewise.
    Returns: the plan, and how often a shape runs before it is captured; None without graphs.
    Raises: NoPlanError: as `plan_step`.
    """
    choose = partial(
        plan_step, work, rates=rates, allow_stream=allow_stream, streamed=streamed, eight_bit=eight_bit, host=host
    )
    plan = choose(budget)
    if use_graphs is False:
        return plan, None
    patience = 0 if use_graphs or launch_bound(plan, work) else PATIENCE
    resting = workload_under(work, plan).static_bytes()
    if 2 * plan.peak - resting > card:
        if patience:
            return plan, None
        try:
            plan = choose(min(budget, (resting + card) // 2))
        except NoPlanError:
            return plan, None
    return plan, patience


def _partly_streamed(variants: Sequence[Workload]) -> list[Workload]:
    """Streamed workloads with some of the layers on the device: one, and a twelfth more each time.

    Of mixtures: the weights of a dense layer are copied in less time than it computes.
    """
    streamed = [work for work in variants if work.stream_weights]
    return [
        replace(work, resident_layers=resident)
        for work in streamed
        for resident in range(1, work.num_layers - 2, -(-work.num_layers // 12))
    ]


def _variants(
    work: Workload, heads: Sequence[int], streams: Sequence[bool], moments: Sequence[float], *, allow_host: bool
) -> list[Workload]:
    """The workload with such moments, embedding and base on the device or the host, so many key heads at once.

    Simplest first.
    """
    places = (False, True) if allow_host and not work.tied else (False,)
    return [
        replace(
            work, optimizer_bytes=size, embedding_on_host=place, stream_weights=stream, key_heads=number, mlp_tile=tile
        )
        for tile in work.mlp_tiles
        for stream in streams
        for size in moments
        for place in places
        for number in heads
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
                resident_layers=work.resident_layers,
                in_flight=in_flight,
                key_heads=work.key_heads,
                workspace=work.attention_workspace(tokens),
                mlp_tile=work.mlp_tile,
            )
            peak = peak_bytes(work, plan)
            if peak <= budget:
                plan = replace(plan, levels=_fill_device(work, budget, plan))
                yield replace(plan, seconds=step_seconds(work, rates, plan), peak=peak_bytes(work, plan))
            else:  # keeping more makes it no smaller
                yield replace(plan, peak=peak)


def _parkings(work: Workload, rates: Rates, tokens: int, forward: float) -> Iterator[Parking]:
    """What may be parked: one level in a share of the layers, or more than that wherever the bus has time."""
    rate = rates.shared_bus_bytes if work.stream_weights and work.shards == 1 else rates.bus_bytes
    copies = {level: size * tokens / rate for level, size in work.host_bytes_per_token().items()}
    bases = [level for level in work.levels if level <= work.most_parked]
    for share, base, in_flight in product(PARKED_SHARES, bases, IN_FLIGHT):
        parked = spread(work.num_layers, share)
        yield tuple(base if is_parked else None for is_parked in parked), in_flight
        higher = [level for level in bases if level > base]
        yield _fill_bus(copies, base, higher, parked, forward, in_flight), in_flight


def spread(layers: int, share: float) -> list[bool]:
    """Choose layers to park: evenly among the others, so that the bus catches up; the last two are needed at once."""
    return [index < layers - 2 and int((index + 1) * share) > int(index * share) for index in range(layers)]


def _fill_bus(
    copies: dict[Level, float],
    base: Level,
    higher: Sequence[Level],
    parked: Sequence[bool],
    forward: float,
    in_flight: int,
) -> HostLevels:
    """Park more than `base` where its copy, and a copy of `base` next, end before the device waits for them.

    Args:
        copies: seconds to the host by level.
        base: the least to park.
        higher: what may be parked instead.
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
        fitting = [level for level in higher if begin + copies[level] <= min(first, second - copies[base])]
        level = max(fitting, default=base)
        bus, chosen[index] = begin + copies[level], level
    return tuple(chosen)


def _fill_device(work: Workload, budget: int, plan: Plan) -> tuple[Level, ...]:
    """Raise levels while all moments stay within the budget, last layers first: theirs are kept for the least time."""
    sizes = layer_bytes(work, plan.micro_batch or work.tokens)
    limit = budget - _lasting_bytes(work, cached=plan.cached_layers > 0)
    head = work.head_bytes(plan.micro_batch or work.tokens, plan.head_chunk)
    levels = list(plan.levels)
    for lower, upper in pairwise(work.levels):
        *beside, (kept, _) = _beside(sizes, plan, levels)
        # What all moments behind a layer leave for its saved tensors.
        room = limit - kept - head
        for index in reversed(range(work.num_layers)):
            more = sizes.saved[upper] - sizes.saved[levels[index]]
            if levels[index] == lower and more <= room and sizes.peak(upper, *beside[index]) <= limit:
                levels[index], room = upper, room - more
            room = min(room, limit - sizes.peak(levels[index], *beside[index]))
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
