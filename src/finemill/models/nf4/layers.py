"""Which linear layers of a 4-bit base stay in 16 bits: those where NF4 costs most per byte, by measured error."""

# N tokens, O output width, I input width of a layer

import re
from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from finemill.models.nf4.encode import nf4_bytes, round_trip
from finemill.models.sampled_gradients import TakeGradient, sample_gradients
from finemill.models.stored_model import StoredModel

# Servers compute these as one product, and can keep or quantize them only together.
_FUSED = {
    **dict.fromkeys(("q_proj", "k_proj", "v_proj"), "qkv_proj"),
    **dict.fromkeys(("gate_proj", "up_proj"), "gate_up_proj"),
}


@dataclass(frozen=True)
class LinearGroup:
    """Linear layers that are kept or quantized together.

    `fused` is what a server calls the product of all. `error` is the KL divergence that NF4 costs, in nats per token,
    `extra_bytes` what 16 bits take above it.
    """

    names: tuple[str, ...]
    fused: str
    error: float
    extra_bytes: int


def quantized_layers(stored: StoredModel) -> list[str]:
    """Names of the modules that bitsandbytes quantizes: every linear layer but the output layer."""
    return [
        name
        for name, module in stored.model.named_modules()
        if isinstance(module, torch.nn.Linear) and f"{name}.weight" != stored.output_name
    ]


def measure_groups(stored: StoredModel, rows: Sequence[Sequence[int]], dtype: torch.dtype) -> list[LinearGroup]:
    """What NF4 costs each group of layers: the change that its rounding makes to what leaves a layer, on `rows`.

    Args:
        rows: token ids that the model is calibrated on.
        dtype: of what stays in 16 bits.
    """
    layers = quantized_layers(stored)
    errors = dict.fromkeys(layers, 0.0)

    def watch(name: str, module: Any, inputs_NI: torch.Tensor) -> TakeGradient:
        if name not in errors:
            return lambda _gradients: None
        change_NO = inputs_NI @ (round_trip(module.weight, dtype) - module.weight).T

        def add(gradients_NO: torch.Tensor) -> None:
            errors[name] += float((gradients_NO * change_NO).sum(-1).double().square().sum()) / 2

        return add

    num_positions = sample_gradients(stored, rows, watch)
    groups: dict[str, list[str]] = {}
    for name in layers:
        prefix, _, last = name.rpartition(".")
        groups.setdefault(f"{prefix}.{_FUSED.get(last, last)}".removeprefix("."), []).append(name)
    return [
        LinearGroup(
            names=tuple(names),
            fused=fused,
            error=sum(errors[name] for name in names) / num_positions,
            extra_bytes=sum(_extra_bytes(stored.shape_of(f"{name}.weight"), dtype) for name in names),
        )
        for fused, names in groups.items()
    ]


def _extra_bytes(shape: Sequence[int], dtype: torch.dtype) -> int:
    rows, columns = shape
    return rows * columns * dtype.itemsize - nf4_bytes(rows * columns)


def choose_kept(groups: Iterable[LinearGroup], extra_bytes: int) -> list[LinearGroup]:
    """The groups that stay in 16 bits: what saves most error per byte first, as long as it fits."""
    kept, left = [], extra_bytes
    for group in sorted(groups, key=lambda group: -group.error / group.extra_bytes):
        if group.extra_bytes <= left and group.error > 0:
            kept.append(group)
            left -= group.extra_bytes
    return kept


def skip_modules(stored: StoredModel, kept: Collection[LinearGroup]) -> list[str]:
    """`llm_int8_skip_modules`: the output layer and what stays in 16 bits, by transformers' names and by servers'."""
    names = [name for group in kept for name in dict.fromkeys((*group.names, group.fused))]
    return [stored.output_name.removesuffix(".weight"), *sorted(names, key=_natural)]


def _natural(name: str) -> list[tuple[int, str]]:
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]
