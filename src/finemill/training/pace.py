"""How fast a training goes, how much of the card it uses, and when it will end."""

import math
import time
from dataclasses import dataclass
from typing import Any

import torch
from transformers import TrainerState

from finemill.training.decoder import EXPERT_COUNTS, PER_TOKEN, first_of
from finemill.training.mixture import EXPERTS

GIB = 2.0**30
PEAK_FLOPS = {
    "B200": 2250e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100": 989e12,
    "A100": 312e12,
    "L40S": 362e12,
    "L40": 181e12,
    "A10": 125e12,
    "RTX 4090": 165e12,
    "L4": 121e12,
    "V100": 125e12,
    "T4": 65e12,
}
"""Dense 16-bit operations per second by a part of the card's name, as its maker states them; the first that fits."""


@dataclass(frozen=True)
class Card:
    """One GPU, and what of it was taken before training: bytes, by this process and others."""

    name: str
    total: int
    before: int

    @classmethod
    def of(cls, device: torch.device) -> "Card | None":
        """The card that `device` is; None for a CPU."""
        if device.type != "cuda":
            return None
        free, total = torch.cuda.mem_get_info(device)
        return cls(torch.cuda.get_device_name(device), total, total - free)

    @property
    def peak_flops(self) -> float | None:
        """Operations per second that its maker states; None for an unknown card."""
        return next((flops for name, flops in PEAK_FLOPS.items() if name in self.name), None)


class Pace:
    """Measures from one logged point to the next.

    Args:
        model: what is trained.
        card: where, None on a CPU.
        world_size: processes, whose tokens are counted together.
    """

    def __init__(self, model: Any, card: Card | None, world_size: int = 1) -> None:
        self._card, self._world_size = card, world_size
        self._flops_per_token = flops_per_token(model)
        self._first = self._last = (time.monotonic(), 0, 0.0)

    def start(self, state: TrainerState, num_tokens: float) -> None:
        """Begin to count, at the step that a checkpoint was written at, after so many tokens."""
        self._first = self._last = (time.monotonic(), state.global_step, num_tokens)

    def measure(self, state: TrainerState, num_tokens: float) -> dict[str, float]:
        """What goes into the metrics of a point: tokens per second, MFU, bytes on the card, seconds left."""
        now = time.monotonic()
        since, _, tokens = self._last
        began, first_step, _ = self._first
        self._last = (now, state.global_step, num_tokens)
        rate = max(0.0, num_tokens - tokens) / max(now - since, 1e-9)
        steps = state.global_step - first_step
        found = {"train/tokens_per_second": rate}
        if steps:
            found["train/seconds_left"] = (now - began) / steps * (state.max_steps - state.global_step)
        if self._card is None:
            return found
        found["train/memory_bytes"] = float(torch.cuda.memory_allocated())
        found["train/peak_memory_bytes"] = float(torch.cuda.max_memory_allocated())
        if self._card.peak_flops:
            found["train/mfu"] = rate * self._flops_per_token / (self._card.peak_flops * self._world_size)
        return found


def flops_per_token(model: Any) -> float:
    """Operations of a step per token that no method can leave out: neither attention's scores nor any recomputation.

    Two per weight forward, two for the gradient of what goes in, and two for that of a weight that is trained; of a
    mixture, of the experts that a token is sent to.
    """
    head = model.get_output_embeddings()
    outside = 0 if head is None else math.prod(head.weight.shape)
    tied = head is not None and head.weight is model.get_input_embeddings().weight
    weights: int = model.num_parameters(exclude_embeddings=True) + (outside if tied else 0)
    trained = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    config = model.config.get_text_config().to_dict()
    number, per_token = (first_of(config, names) for names in (EXPERT_COUNTS, PER_TOKEN))
    if number and per_token:
        experts = [parameter for name, parameter in model.named_parameters() if f".{EXPERTS}." in name]
        idle = 1 - per_token / number
        weights -= int(idle * sum(parameter.numel() for parameter in experts))
        trained -= int(idle * sum(parameter.numel() for parameter in experts if parameter.requires_grad))
    return float(4 * weights + 2 * min(trained, weights))


def describe(measured: dict[str, float]) -> str:
    """The measured values for a progress line."""
    parts = [f"{measured['train/tokens_per_second']:,.0f} tok/s"]
    if "train/mfu" in measured:
        parts.append(f"{measured['train/mfu']:.0%} MFU")
    if "train/memory_bytes" in measured:
        now, peak = measured["train/memory_bytes"] / GIB, measured["train/peak_memory_bytes"] / GIB
        parts.append(f"{now:.2f} GiB, {peak:.2f} at peak")
    if "train/seconds_left" in measured:
        parts.append(f"{duration(measured['train/seconds_left'])} left")
    return ", ".join(parts)


def summary(card: Card | None, *, peak: float, seconds: float, num_tokens: float) -> str:
    """What a finished training took, in a line.

    Args:
        card: None on a CPU.
        peak: bytes at the peak.
        seconds: of training.
        num_tokens: that it saw.
    """
    place = f"CPU, {peak / GIB:.2f} GiB at peak"
    if card is not None:
        share = peak / card.total
        before, at_peak = card.before / GIB, peak / GIB
        place = f"{card.name}, {before:.2f} GiB taken before, {at_peak:.2f} GiB at peak ({share:.0%} of the card)"
    return f"{place}, {duration(seconds)}, {num_tokens:,.0f} tokens, {num_tokens / seconds:,.0f} tok/s"


def duration(seconds: float) -> str:
    """Seconds, minutes or hours, as people say them."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
