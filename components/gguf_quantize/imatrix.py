"""Importance of input channels: how much a rounding error in a weight's column would show in the output."""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import batches, streamed


@torch.inference_mode()
def channel_weights(stored: StoredModel, source: SourceModel, rows: Sequence[Sequence[int]]) -> dict[str, Array]:
    """Mean square of every input channel of every linear layer over the tokens of `rows`, by GGUF tensor name.

    The same statistic as llama.cpp's `llama-imatrix`: quantizers minimize the error weighted by it. Each array has
    shape (input width,), float32.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    names = source.names()
    sums: dict[str, torch.Tensor] = {}
    mask_BT = torch.empty(0)
    with ExitStack() as stack:
        for module_name, module in stored.model.named_modules():
            gguf_name = names.get(f"{module_name}.weight")
            if isinstance(module, torch.nn.Linear) and gguf_name:
                sums[gguf_name] = torch.zeros(module.in_features, dtype=torch.float64, device=device)

                def add(_module: Any, inputs: tuple[torch.Tensor, ...], total: torch.Tensor = sums[gguf_name]) -> None:
                    total += inputs[0][mask_BT].double().square().sum(0)

                stack.callback(module.register_forward_pre_hook(add).remove)
        stack.enter_context(streamed(stored.model, stored, device))
        for batch in batches(rows, device):
            mask_BT = batch.mask
            stored.model(input_ids=batch.input_ids, use_cache=False)
    num_tokens = sum(len(row) for row in rows)
    return {name: (total / num_tokens).cpu().numpy().astype(np.float32) for name, total in sums.items()}


def write_imatrix(path: Path, weights: Mapping[str, Array], rows: Sequence[Sequence[int]], dataset: str) -> None:
    """Write the weights of `channel_weights` as llama.cpp keeps them, for `llama-quantize --imatrix`.

    Args:
        rows: what the weights were computed on.
        dataset: a name for them.
    """
    num_tokens = sum(len(row) for row in rows)
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", len(rows))
    writer.add_uint32("imatrix.chunk_size", max(len(row) for row in rows))
    for name, mean in weights.items():
        # Sums and numbers of tokens, so that files of several data sets can be added up.
        writer.add_tensor(f"{name}.in_sum2", (mean * num_tokens).astype(np.float32)[None])
        writer.add_tensor(f"{name}.counts", np.array([[num_tokens]], dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
