"""How much a rounding error in each weight would change what the model says, by the file's tensors.

Of (g' D x)^2 in `models/sampled_gradients.py` the squares are kept: for D of shape (out, in), whose elements are
independent of each other, KL = 1/2 sum_ij E[g_i^2] E[x_j^2] D_ij^2, which any type's error is put into.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.models.sampled_gradients import TakeGradient, sample_gradients
from finemill.models.stored_model import StoredModel


@dataclass(frozen=True)
class Sensitivity:
    """One use of a matrix: KL in nats per token is half of `rows` * D^2 * `columns`, summed.

    `rows` has shape (out,), `columns` (in,), both float32.
    """

    rows: Array
    columns: Array


def sensitivities(
    stored: StoredModel, source: SourceModel, rows: Sequence[Sequence[int]], inputs: Mapping[str, Array]
) -> dict[str, list[Sensitivity]]:
    """How sensitive the model is to each matrix on `rows`, by GGUF tensor name, once per use.

    Args:
        inputs: mean square of each input channel, from `channel_importance` on the same rows.
    """
    sums: dict[str, torch.Tensor] = {}

    def watch(name: str, _module: Any, _inputs: torch.Tensor) -> TakeGradient:
        def add(gradients_NO: torch.Tensor) -> None:
            sums[name] = sums.get(name, 0) + gradients_NO.double().square().sum(0)

        return add

    num_positions = sample_gradients(stored, rows, watch)
    names = source.names()
    found: dict[str, list[Sensitivity]] = {}
    for module_name, total in sums.items():
        module, key = stored.model.get_submodule(module_name), f"{module_name}.weight"
        # An output matrix may be the embedding, and is not stored then.
        name = names.get(stored.embedding_name if stored.is_tied and key == stored.output_name else key)
        if name is None:
            continue
        gradients = (total / num_positions).float().cpu().numpy()
        if isinstance(module, torch.nn.Embedding):
            # A token's row is read as it is.
            tokens = np.full(module.num_embeddings, 1 / module.num_embeddings, np.float32)
            found.setdefault(name, []).append(Sensitivity(tokens, gradients))
        elif name in inputs:
            found.setdefault(name, []).append(Sensitivity(source.reorder(key, gradients), inputs[name]))
    return found
