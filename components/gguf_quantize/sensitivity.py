"""What the model minds in each matrix of a file: inputs and gradients at some tokens, and what an error D costs there.

KL is half the mean of (g' D x)^2 over tokens (`models/sampled_gradients.py`), which is computed as it stands: errors in
one row of D are as little independent of each other as the inputs that they are multiplied by.
"""

# N tokens, O output width, I input width

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from finemill.components.gguf_quantize.convert import Array, SourceModel, text_name
from finemill.models.sampled_gradients import TakeGradient, sample_gradients
from finemill.models.stored_model import StoredModel

# Inputs and gradients of all matrices together, in 16 bits; of a model that has more, fewer tokens are kept.
_MAX_BYTES = 1 << 31


@dataclass(frozen=True)
class Use:
    """One place where the model reads a matrix.

    `inputs` has shape (N, I), or (N,) with token ids where rows are looked up; `gradients` has shape (N, O), (N, I)
    there, rows in the file's order. Both are bfloat16. Each token stands for `weight` of them, per drawn position.
    """

    inputs: torch.Tensor
    gradients: torch.Tensor
    weight: float

    @property
    def is_lookup(self) -> bool:
        """Whether rows are looked up."""
        return self.inputs.dim() == 1

    def importance(self, num_rows: int) -> Array:
        """How much an error in each row of the matrix would matter, in no unit, shape (rows,)."""
        squares = self.gradients.float().square()
        if self.is_lookup:
            found = torch.zeros(num_rows).index_add_(0, self.inputs, squares.sum(1))
        else:
            found = (squares * self.inputs.float().square().sum(1, keepdim=True)).sum(0)
        values: Array = found.numpy()
        return values

    def divergence(self, error: Array, rows: NDArray[np.int64], counts: Array) -> float:
        """KL divergence, in nats per token, that an error costs.

        Args:
            error: of the rows `rows` of the matrix, shape (rows, I).
            counts: how many rows each one stands for; where it is 1 for all, rows' errors are added up before they are
                squared, else they are taken to be independent of each other.
        """
        values = torch.from_numpy(error)
        if self.is_lookup:
            place = torch.full((int(self.inputs.max()) + 1,), -1)
            own = torch.from_numpy(rows)
            known = own < len(place)
            place[own[known]] = torch.arange(len(own))[known]
            at = place[self.inputs]
            kept = at >= 0
            changes_N = (self.gradients[kept].float() * values[at[kept]]).sum(1)
            weights_N = torch.from_numpy(counts)[at[kept]]
            return self.weight * float((weights_N * changes_N.square()).double().sum()) / 2
        changes_NO = self.gradients[:, torch.from_numpy(rows)].float() * (self.inputs.float() @ values.T)
        if (counts == 1).all():
            return self.weight * float(changes_NO.sum(1).double().square().sum()) / 2
        return self.weight * float((changes_NO.square() @ torch.from_numpy(counts)).double().sum()) / 2


def uses(stored: StoredModel, source: SourceModel, rows: Sequence[Sequence[int]]) -> dict[str, list[Use]]:
    """Every place where the model reads a matrix, at tokens of `rows`, by GGUF tensor name."""
    stride = _stride(stored, rows)
    kept: dict[str, list[tuple[torch.Tensor, torch.Tensor]]] = {}

    def watch(name: str, module: Any, inputs: torch.Tensor) -> TakeGradient:
        own = inputs[::stride]
        # What Gemma multiplies its embeddings by.
        scale = getattr(module, "scalar_embed_scale", 1.0)

        def add(gradients_NO: torch.Tensor) -> None:
            values = own.bfloat16() if own.is_floating_point() else own
            kept.setdefault(name, []).append((values.cpu(), (scale * gradients_NO[::stride]).bfloat16().cpu()))

        return add

    num_positions = sample_gradients(stored, rows, watch)
    names = source.names()
    found: dict[str, list[Use]] = {}
    for module_name, parts in kept.items():
        key = f"{module_name}.weight"
        # An output matrix may be the embedding, and is not stored then.
        own = stored.embedding_name if stored.is_tied and key == stored.output_name else key
        name = names.get(text_name(own))
        if name is None:
            continue
        inputs, gradients = (torch.cat(of) for of in zip(*parts, strict=True))
        if inputs.is_floating_point():
            gradients = _reordered(source, key, gradients)
        found.setdefault(name, []).append(Use(inputs, gradients, stride / num_positions))
    return found


def _reordered(source: SourceModel, key: str, gradients_NO: torch.Tensor) -> torch.Tensor:
    order = source.reorder(key, np.arange(gradients_NO.shape[1], dtype=np.float32))
    return gradients_NO[:, torch.from_numpy(order).long()]


def _stride(stored: StoredModel, rows: Sequence[Sequence[int]]) -> int:
    """Every how many tokens one is kept."""
    shapes = [
        module.weight.shape
        for module in stored.model.modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    ]
    num_bytes = 2 * sum(map(len, rows)) * sum(shape[0] + shape[1] for shape in shapes)
    return max(1, -(-num_bytes // _MAX_BYTES))
