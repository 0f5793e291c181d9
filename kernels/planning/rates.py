"""What a card does per second, and how long a layer takes at that: matrix products, attention, memory traffic, the bus.

Calibrated to measured steps (bench/results.md); tests/kernels/planning/test_planner.py holds predictions against them.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from finemill.kernels.engine.plan import Level
from finemill.kernels.planning.workload import Workload

DIAGONAL, DIAGONAL_BACKWARD = 256, 500
"""Overhead of the tiles on the diagonal of the scores, expressed as extra keys per query."""
FA4_DIAGONAL, FA4_DIAGONAL_BACKWARD = 1070, 1520
"""Overhead of FlashAttention-4's tiles on the diagonal, likewise."""
SPLIT_SECONDS = 2e-6
"""Seconds that attention's backward loses per further group of heads, times the root of the length, because the card
runs empty between groups; a quarter of the backward at most."""
FORWARD_KERNELS, BACKWARD_KERNELS = 20, 30
"""Kernels per layer and pass."""
KERNEL_SECONDS = 4.5e-6
"""Seconds per kernel beside its bytes and operations: start, tail, and too few programs to fill the card."""


@dataclass(frozen=True)
class Rates:
    """What a card does per second, sustained; the defaults are an H200's (bench/results.md).

    Args:
        flops: of matrix products, at the card's power limit.
        attention_forward: operations of attention, of long rows.
        attention_backward: likewise, in the deterministic mode.
        fa4_forward: of FlashAttention-4.
        fa4_backward: likewise, in the deterministic mode.
        bytes: of elementwise kernels and skinny products, 7/8 of what a copy reads and writes.
        bus_bytes: to or from the host.
        shared_bus_bytes: each way, both at once.
    """

    flops: float = 710e12
    attention_forward: float = 560e12
    attention_backward: float = 434e12
    fa4_forward: float = 768e12
    fa4_backward: float = 612e12
    bytes: float = 3.65e12
    bus_bytes: float = 54e9
    shared_bus_bytes: float = 47e9


RATES = {"h100": Rates(bytes=2.6e12), "h200": Rates()}


def rates_of(gpu: str) -> Rates:
    """Find the rates of a card by the name CUDA gives it; an H200's for an unknown one."""
    return next((rates for name, rates in RATES.items() if name in gpu.lower()), Rates())


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
    length = work.row if work.typical is None else min(work.typical, work.row)
    attention = 2 * tokens * (length + DIAGONAL) * s.q_width / rates.attention_forward
    attention_back = 5 * tokens * (length + DIAGONAL_BACKWARD) * s.q_width / rates.attention_backward
    if work.fa4 and not work.ragged:  # a trainer's sequences are shorter, most of them
        attention = 2 * tokens * (length + FA4_DIAGONAL) * s.q_width / rates.fa4_forward
        attention_back = 5 * tokens * (length + FA4_DIAGONAL_BACKWARD) * s.q_width / rates.fa4_backward
    elif work.key_heads is not None:
        groups = s.num_kv_heads // work.key_heads
        attention_back += (groups - 1) * min(attention_back / 4, SPLIT_SECONDS * math.sqrt(length))
    decode = 0.0 if cached or not work.quantized else work.layer_weights * 2.6 / rates.bytes
    products = matmul * (s.qkv_width + s.q_width + 3 * s.intermediate)
    rotate = 2 * (w["q"] + w["kv"])
    inputs = 2 * w["x"] + w["q"] + w["grad_hidden"]  # of the adapters: read once forward, once for dA
    outputs = w["qkv"] + 2 * w["x"] + w["gate_up"]  # their gradients: read once for dB and dy B
    forward = moving(8 * w["x"] + rotate + 3 * w["grad_hidden"] + inputs)
    backward = moving(8 * w["x"] + 3 * w["qkv"] + 6 * w["grad_hidden"] + inputs + outputs)
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
