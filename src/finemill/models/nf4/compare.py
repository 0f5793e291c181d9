"""Choices of layers that stay in 16 bits, each compared with the model itself on held-out rows."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from functools import partial

import torch

from finemill.artifacts.four_bit import FourBitSize
from finemill.models.divergence import divergences
from finemill.models.nf4.checkpoint import checkpoint_shapes
from finemill.models.nf4.encode import round_trip
from finemill.models.nf4.layers import LinearGroup, choose_kept, quantized_layers
from finemill.models.stored_model import StoredModel
from finemill.models.write_weights import total_bytes

# Sizes on a curve, in shares of what 16 bits in every layer add to NF4.
_SHARES = (0.02, 0.05, 0.1, 0.2, 0.4)


@dataclass(frozen=True)
class Choice:
    """Groups of layers that stay in 16 bits, `kept`, under a name; all others are in NF4."""

    name: str
    kept: Sequence[LinearGroup]

    @property
    def layers(self) -> set[str]:
        """Names of the modules in 16 bits."""
        return {name for group in self.kept for name in group.names}


def by_measured_error(groups: Sequence[LinearGroup]) -> list[Choice]:
    """Choices of growing size."""
    return [
        Choice(f"{share:.0%}", choose_kept(groups, int(share * sum(group.extra_bytes for group in groups))))
        for share in _SHARES
    ]


def in_order(groups: Sequence[LinearGroup]) -> list[Choice]:
    """Choices of the same sizes without a measurement: the layers from the first one on, as many as fit."""
    found = []
    for share in _SHARES:
        left = share * sum(group.extra_bytes for group in groups)
        kept: list[LinearGroup] = []
        for group in groups:
            left -= group.extra_bytes
            if left < 0:
                break
            kept.append(group)
        found.append(Choice(f"first {share:.0%}", kept))
    return found


def compare_choices(
    stored: StoredModel,
    choices: Sequence[Choice],
    groups: Sequence[LinearGroup],
    rows: Sequence[Sequence[int]],
    dtype: torch.dtype,
) -> list[FourBitSize]:
    """The size of each choice and its KL divergence from the model on `rows`.

    Args:
        groups: all of them, as `measure_groups` returns them.
        rows: token ids, two or more in each.
        dtype: of what stays in 16 bits.
    """
    layers = quantized_layers(stored)
    copies = {
        choice.name: StoredModel(stored.folder, partial(_rounded, set(layers) - choice.layers, dtype))
        for choice in choices
    }
    found = divergences(stored, copies, rows)
    plain = total_bytes(checkpoint_shapes(stored, layers, dtype))
    error = sum(group.error for group in groups)
    return [
        FourBitSize(
            name=choice.name,
            size_bytes=plain + sum(group.extra_bytes for group in choice.kept),
            num_kept=len(choice.layers),
            predicted_kl=error - sum(group.error for group in choice.kept),
            **asdict(found[choice.name]),
        )
        for choice in choices
    ]


def _rounded(layers: set[str], dtype: torch.dtype, name: str, values: torch.Tensor) -> torch.Tensor:
    return round_trip(values, dtype) if name.removesuffix(".weight") in layers and values.dim() == 2 else values
