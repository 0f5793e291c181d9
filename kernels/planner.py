"""Decide what fits: recompute level per layer, host or device, kept weights, loss-head chunk, micro-batch size.

All numbers are bytes. The planner predicts the peak of `torch.cuda.max_memory_allocated` from tensor shapes and takes
the fastest plan under a budget, in the order of what a byte buys (results.md): larger micro-batches first (they
amortize NF4 decode), then keeping attention tensors, then gate|up, then decoded weights. Kept tensors go to host memory
while the bus can take them during the forward, to device memory beyond that.
"""

from dataclasses import dataclass, field

from finemill.kernels.decoder_layer import Level


@dataclass(frozen=True)
class Plan:
    """How a training step runs; see the fields.

    Args:
        levels: recompute level per layer.
        on_host: per layer, whether its saved tensors wait in host memory.
        cached_layers: leading layers whose decoded 16-bit weights are kept.
        head_chunk: rows of logits at a time.
        bytes_per_token: of one layer's saved tensors, by level.
    """

    levels: tuple[Level, ...]
    on_host: tuple[bool, ...]
    cached_layers: int
    head_chunk: int
    bytes_per_token: dict[Level, int] = field(default_factory=dict, hash=False)

    def host_bytes(self, tokens: int) -> int:
        """Host memory that a micro-batch of this many tokens parks."""
        slack = 16 * 512
        return sum(
            self.bytes_per_token[level] * tokens + slack
            for level, host in zip(self.levels, self.on_host, strict=True)
            if host
        )
