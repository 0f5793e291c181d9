"""What a planner decides and the engine carries out: widths of a layer, how much of its forward is kept, and where.

The planner (planning/planner.py) chooses a `Plan`; the layers (decoder_layer.py), the model (model.py) and the trainer
run it.
"""

from dataclasses import dataclass, field
from enum import IntEnum


class Level(IntEnum):
    """How much of a layer's forward is kept for its backward; the table in decoder_layer.py's header."""

    INPUT = 0
    ATTENDED = 1
    ATTENTION = 2
    GATE_UP = 3
    ALL = 4


@dataclass(frozen=True)
class ExpertShape:
    """A layer's mixture of experts.

    How many, how many per token, an expert's feed-forward width, and whether a token's routing weights add up to one.
    """

    count: int
    per_token: int
    intermediate: int
    normalize: bool


@dataclass(frozen=True)
class LayerShape:
    """Widths of a decoder layer; `intermediate` is a dense layer's, `experts` a mixture's."""

    hidden: int
    intermediate: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    eps: float
    experts: ExpertShape | None = None

    @property
    def q_width(self) -> int:
        """N D."""
        return self.num_heads * self.head_dim

    @property
    def qkv_width(self) -> int:
        """(N + 2K) D."""
        return (self.num_heads + 2 * self.num_kv_heads) * self.head_dim


HostLevels = tuple[Level | None, ...]
"""Per layer, the level whose tensors wait in host memory; None keeps all on the device."""


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
        resident_layers: layers whose NF4 weights stay on the device although those of the others wait.
        in_flight: parked layers whose device memory may wait for their copies.
        key_heads: that attention's backward takes at once; None for all.
        workspace: bytes this may take; None for attention's own limit.
        mlp_tile: tokens that a dense layer's second half takes at a time; None for all.
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
    resident_layers: int = 0
    in_flight: int = 1
    key_heads: int | None = None
    workspace: int | None = None
    mlp_tile: int | None = None

    @staticmethod
    def everything(num_layers: int, *, cached: bool = False, head_chunk: int = 1024) -> "Plan":
        """Keep every activation on the device; decoded weights as well if `cached`."""
        return Plan((Level.ALL,) * num_layers, (None,) * num_layers, num_layers if cached else 0, head_chunk)

    def host_bytes(self, tokens: int) -> int:
        """Host memory that a micro-batch of this many tokens parks."""
        slack = 16 * 512
        return sum(self.bytes_per_token[level] * tokens + slack for level in self.host_levels if level is not None)


def streamed_layers(layers: int, resident: int) -> tuple[bool, ...]:
    """Which layers' weights wait in host memory where so many stay on the device.

    Those that stay are spread evenly, so that the bus catches up in them; the first is one, because nothing runs before
    it that would hide a copy.
    """
    return tuple(-(-(index + 1) * resident // layers) == -(-index * resident // layers) for index in range(layers))
