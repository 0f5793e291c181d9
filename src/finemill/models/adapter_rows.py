"""One load of a model, with the adapter on some rows of a batch and not on others."""

# B rows

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch

from finemill.models.adapter import AdapterConfig


class AdapterRows:
    """Which rows of the next forward passes have the adapter."""

    def __init__(self, device: torch.device) -> None:
        self._weights_B = torch.ones(1, device=device)
        self._by_size = {1: self._weights_B}

    def set(self, on: Sequence[bool]) -> None:
        """One value per row of the batch, in the same memory for as many rows: a graph reads it there."""
        values_B = torch.tensor(list(on), dtype=torch.float32, device=self._weights_B.device)
        self._weights_B = self._by_size.setdefault(len(on), values_B)
        self._weights_B.copy_(values_B)

    def gate(self, module: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        """The output of an adapter's last factor, nothing for rows without the adapter."""
        weights = self._weights_B.to(output.dtype)
        return output * weights.view(-1, *[1] * (output.ndim - 1))


def can_switch_rows(config: AdapterConfig) -> bool:
    """Whether the adapter is a sum that can be left out row by row: plain LoRA on linear layers."""
    others = (
        "modules_to_save", "use_dora", "trainable_token_indices", "alora_invocation_tokens", "use_qalora",
        "target_parameters",
    )  # fmt: skip
    # Biases that are trained stand in the place of the base's own.
    has_biases = getattr(config, "bias", "none") != "none"
    return not has_biases and not any(getattr(config, name, None) for name in others)


@contextmanager
def adapter_by_row(model: Any) -> Iterator[AdapterRows]:
    """Inside the block the adapter of `model`, a PEFT model, is only on the rows that are set.

    The others get exactly what the base gives: zero is added.
    Raises: ValueError: a factor of the adapter is no module, as on embeddings.
    """
    rows = AdapterRows(model.device)
    handles = []
    try:
        for module in model.modules():
            if len(getattr(module, "lora_embedding_B", ())):
                raise ValueError("an adapter on embeddings cannot be switched row by row")
            for factor in getattr(module, "lora_B", {}).values():
                handles.append(factor.register_forward_hook(rows.gate))
        yield rows
    finally:
        for handle in handles:
            handle.remove()
