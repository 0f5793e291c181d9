"""What a card does per second, and how long a layer takes at that: matrix products, attention, memory traffic, the bus.

Calibrated to measured steps (bench/results.md); tests/kernels/planning/test_planner.py holds predictions against them.
"""

import math
from dataclasses import dataclass
from functools import lru_cache

from finemill.kernels.engine.plan import Level
from finemill.kernels.planning.mixture import MixtureWorkload
from finemill.kernels.planning.workload import Workload

DIAGONAL, DIAGONAL_BACKWARD = 256, 500
"""Overhead of the tiles on the diagonal of the scores, expressed as extra keys per query."""
FA4_DIAGONAL, FA4_DIAGONAL_BACKWARD = 1070, 1520
"""Overhead of FlashAttention-4's tiles on the diagonal, likewise."""
FA4_LONG, FA4_LONGEST, FA4_LONG_FACTOR = 32768, 65536, 1.43
"""Row length up to which FlashAttention-4 has its full rates, that from which on it takes longer, and how many times as
long, as measured at 131,072 tokens."""
SPLIT_SECONDS = 2e-6
"""Seconds that attention's backward loses per further group of heads, times the root of the length, because the card
runs empty between groups; a quarter of the backward at most."""
FORWARD_KERNELS, BACKWARD_KERNELS = 20, 30
"""Kernels per layer and pass."""
MIXTURE_KERNELS = 55, 80
"""The same of a mixture of experts, whose routing is many small ones."""
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
        flash_forward: of FlashAttention-2.
        flash_backward: likewise, in the deterministic mode.
        bytes: of elementwise kernels and skinny products, 7/8 of what a copy reads and writes.
        bus_bytes: to or from the host.
        shared_bus_bytes: each way, both at once.
        link_bytes: from other GPUs of the host, by their copy engines.
    """

    flops: float = 710e12
    attention_forward: float = 560e12
    attention_backward: float = 434e12
    fa4_forward: float = 768e12
    fa4_backward: float = 612e12
    flash_forward: float = 400e12
    flash_backward: float = 290e12
    bytes: float = 3.65e12
    bus_bytes: float = 54e9
    shared_bus_bytes: float = 47e9
    link_bytes: float = 300e9


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
    attention, attention_back = _attention_seconds(work, rates, tokens)
    decode = 0.0 if cached or not work.quantized else work.layer_weights * 2.6 / rates.bytes
    rotate = 2 * (w["q"] + w["kv"])
    # Attention's part of a layer, norms and residual stream included; adapters read an input forward and for dA, and
    # a gradient for dB and dy B.
    products = matmul * (s.qkv_width + s.q_width)
    forward = moving(8 * w["x"] + rotate + 2 * w["x"] + w["q"])
    backward = moving(8 * w["x"] + 3 * w["qkv"] + 2 * w["x"] + w["q"] + w["qkv"] + 2 * w["x"])
    again = {
        Level.INPUT: attention,
        Level.ATTENDED: products + moving(3 * w["x"]) + decode / 3,
        Level.GATE_UP: moving(4 * w["x"] + rotate),
    }
    kernels = FORWARD_KERNELS, BACKWARD_KERNELS
    if isinstance(work, MixtureWorkload):
        e = work.experts
        matmul *= e.per_token * work.rows(tokens) / (work.rows(tokens) + tokens * e.per_token) * 2
        width, rows, gates, hidden = e.intermediate, w["rows"], w["gate_up"], w["hidden"]
        again[Level.ATTENTION] = moving(rows)
        forward += moving(2 * rows + gates + 2 * hidden + w["logits"])
        backward += moving(6 * rows + 3 * gates + 4 * hidden + 4 * w["logits"])
        kernels = MIXTURE_KERNELS
    else:
        width, hidden = s.intermediate, w["grad_hidden"]
        forward += moving(4 * hidden)
        backward += moving(7 * hidden + w["gate_up"])
    products += matmul * 3 * width
    again[Level.ATTENTION] = again.get(Level.ATTENTION, 0.0) + matmul * 2 * width
    backward += products + attention_back + decode + kernels[1] * KERNEL_SECONDS
    return LayerSeconds(
        products + attention + forward + decode + kernels[0] * KERNEL_SECONDS,
        {level: backward + sum(cost for step, cost in again.items() if step >= level) for level in Level},
    )


def _attention_seconds(work: Workload, rates: Rates, tokens: int) -> tuple[float, float]:
    """Predict both passes of attention itself."""
    width = work.shape.q_width
    length = work.row if work.typical is None else min(work.typical, work.row)
    if work.fa4 and not work.ragged:  # a trainer's sequences are shorter, most of them
        longer = math.log2(min(max(length, FA4_LONG), FA4_LONGEST) / FA4_LONG) / math.log2(FA4_LONGEST / FA4_LONG)
        factor = 1 + longer * (FA4_LONG_FACTOR - 1)
        return (
            factor * 2 * tokens * (length + FA4_DIAGONAL) * width / rates.fa4_forward,
            factor * 5 * tokens * (length + FA4_DIAGONAL_BACKWARD) * width / rates.fa4_backward,
        )
    if work.flash:
        return (
            2 * tokens * (length + DIAGONAL) * width / rates.flash_forward,
            5 * tokens * (length + DIAGONAL_BACKWARD) * width / rates.flash_backward,
        )
    backward = 5 * tokens * (length + DIAGONAL_BACKWARD) * width / rates.attention_backward
    if work.key_heads is not None:
        groups = work.shape.num_kv_heads // work.key_heads
        backward += (groups - 1) * min(backward / 4, SPLIT_SECONDS * math.sqrt(length))
    return 2 * tokens * (length + DIAGONAL) * width / rates.attention_forward, backward
