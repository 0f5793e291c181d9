"""How much a rounding error in each weight would change what the model says.

To second order, KL(model || model with errors D) is half the mean of (g' D x)^2 over tokens: x is the input of a
layer, g the gradient of log p(y) by its output, y drawn from the model itself (the Fisher information; Martens, "New
Insights and Perspectives on the Natural Gradient Method", 2020). Errors of rounding are independent of each other, so
that only squares count: for D of shape (out, in), KL = 1/2 sum_ij E[g_i^2] E[x_j^2] D_ij^2.
"""

# B rows, T tokens, N kept positions, V vocabulary

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch

from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import batches, streamed

# Positions of one batch that are asked for: logits of all would be larger than the model.
_MAX_POSITIONS = 512


@dataclass(frozen=True)
class Sensitivity:
    """One use of a matrix: KL in nats per token is half of `rows` * D^2 * `columns`, summed.

    `rows` has shape (out,), `columns` (in,), both float32.
    """

    rows: Array
    columns: Array


class _Squares:
    """Sums of squared gradients by channel, by module."""

    def __init__(self) -> None:
        self.mask_BT = torch.empty(0)
        self.sums: dict[str, torch.Tensor] = {}

    def watch(self, name: str, is_embedding: bool, _module: Any, _inputs: Any, output: torch.Tensor) -> None:
        """A forward hook: what is needed of the output's gradient."""
        if is_embedding:
            output.requires_grad_()
        if output.requires_grad:
            output.register_hook(partial(self._add, name))  # type: ignore[no-untyped-call]

    def _add(self, name: str, gradient: torch.Tensor) -> None:
        kept = gradient[self.mask_BT] if gradient.shape[:2] == self.mask_BT.shape else gradient
        squares = kept.double().square().flatten(0, -2).sum(0)
        self.sums[name] = self.sums.get(name, 0) + squares


def sensitivities(
    stored: StoredModel, source: SourceModel, rows: Sequence[Sequence[int]], inputs: Mapping[str, Array]
) -> dict[str, list[Sensitivity]]:
    """How sensitive the model is to each matrix on `rows`, by GGUF tensor name, once per use.

    One pass forward and one back, with one layer in memory at a time.

    Args:
        inputs: mean square of each input channel, from `channel_importance` on the same rows.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    squares = _Squares()
    modules = {
        name: module
        for name, module in stored.model.named_modules()
        if isinstance(module, torch.nn.Linear | torch.nn.Embedding)
    }
    generator = torch.Generator(device).manual_seed(0)
    num_positions = 0
    with ExitStack() as stack:
        for name, module in modules.items():
            watch = partial(squares.watch, name, isinstance(module, torch.nn.Embedding))
            stack.callback(module.register_forward_hook(watch).remove)
        stack.enter_context(streamed(stored.model, stored, device, backward=True))
        for batch in batches(rows, device):
            squares.mask_BT = batch.mask
            num_positions += _backward(stored.model, batch.input_ids, batch.mask, generator)
    means = {name: (total / num_positions).float().cpu().numpy() for name, total in squares.sums.items()}
    return _by_tensor(stored, source, means, inputs)


def _backward(model: Any, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, generator: torch.Generator) -> int:
    """Pass the gradient of log p of drawn tokens back. Returns: the number of positions they were drawn at."""
    kept_N2 = mask_BT.nonzero()
    kept_N2 = kept_N2[:: -(-len(kept_N2) // _MAX_POSITIONS)]

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0][kept_N2[:, 0], kept_N2[:, 1]], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits_NV = model(input_ids=input_ids_BT, use_cache=False).logits
    finally:
        hook.remove()
    log_p_NV = logits_NV.float().log_softmax(-1)
    drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
    log_p_NV.gather(-1, drawn_N1).sum().backward()
    return len(kept_N2)


def _by_tensor(
    stored: StoredModel, source: SourceModel, means: Mapping[str, Array], inputs: Mapping[str, Array]
) -> dict[str, list[Sensitivity]]:
    names = source.names()
    found: dict[str, list[Sensitivity]] = {}
    for module_name, mean in means.items():
        module, key = stored.model.get_submodule(module_name), f"{module_name}.weight"
        # An output matrix may be the embedding, and is not stored then.
        name = names.get(stored.embedding_name if stored.is_tied and key == stored.output_name else key)
        if name is None:
            continue
        if isinstance(module, torch.nn.Embedding):
            # A token's row is read as it is.
            rows = np.full(module.num_embeddings, 1 / module.num_embeddings, np.float32)
            found.setdefault(name, []).append(Sensitivity(rows, mean))
        elif name in inputs:
            found.setdefault(name, []).append(Sensitivity(source.reorder(key, mean), inputs[name]))
    return found
