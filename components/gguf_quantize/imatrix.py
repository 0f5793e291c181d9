"""Importance of input channels: how much a rounding error in a weight's column would show in the output."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from finemill.artifacts.dataset import HeldOutRow
from finemill.components.gguf_quantize.convert import Array, SourceModel


@torch.inference_mode()
def channel_weights(model: Any, source: SourceModel, rows: Sequence[HeldOutRow]) -> dict[str, Array]:
    """Mean square of every input channel of every linear layer over the tokens of `rows`, by GGUF tensor name.

    The same statistic as llama.cpp's `llama-imatrix`: quantizers minimize the error weighted by it. Each array has
    shape (input width,), float32.
    """
    names = source.names()
    sums: dict[str, torch.Tensor] = {}
    handles = []
    for module_name, module in model.named_modules():
        gguf_name = names.get(f"{module_name}.weight")
        if isinstance(module, torch.nn.Linear) and gguf_name:
            sums[gguf_name] = torch.zeros(module.in_features, dtype=torch.float64, device=module.weight.device)

            def add(_module: Any, inputs: tuple[torch.Tensor, ...], total: torch.Tensor = sums[gguf_name]) -> None:
                total += inputs[0].double().square().flatten(0, -2).sum(0)

            handles.append(module.register_forward_pre_hook(add))
    try:
        for row in rows:
            model(torch.tensor([row.input_ids], device=model.device))
    finally:
        for handle in handles:
            handle.remove()
    num_tokens = sum(len(row.input_ids) for row in rows)
    return {name: (total / num_tokens).cpu().numpy().astype(np.float32) for name, total in sums.items()}
