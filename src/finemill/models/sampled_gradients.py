"""What a model minds in its layers' outputs: gradients of log p(y) of tokens y that are drawn from the model itself.

To second order, KL(model || model whose layer W has the error D) is half the mean of (g' D x)^2 over tokens: x is the
layer's input, g the gradient of log p(y) by its output (the Fisher information; Martens, "New Insights and Perspectives
on the Natural Gradient Method", 2020). Errors of rounding in different layers are independent, and add up.
"""

# B rows, T tokens, N kept positions or tokens, V vocabulary

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch

from finemill.errors import UserError
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import batches, streamed

# Positions of one batch that are asked for: logits of all would be larger than the model.
_MAX_POSITIONS = 512

TakeGradient = Callable[[torch.Tensor], None]
Watch = Callable[[str, Any, torch.Tensor], TakeGradient]
"""Called with a module's name, the module with its weights in place, and its input at the rows' own tokens, shape
(N, in); what it returns is called with the gradient by its output, (N, out)."""


def sample_gradients(stored: StoredModel, rows: Sequence[Sequence[int]], watch: Watch) -> int:
    """Pass gradients back to every linear layer and embedding, with one layer in memory at a time.

    Args:
        watch: called once for each batch of `rows` and each of those modules; of an embedding the input is token ids.
    Returns: the number of positions that tokens were drawn at; a gradient is the sum of all of them.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    hooks = _Hooks(watch)
    generator = torch.Generator(device).manual_seed(0)
    num_positions = 0
    with ExitStack() as stack:
        for name, module in stored.model.named_modules():
            if isinstance(module, torch.nn.Linear | torch.nn.Embedding):
                stack.callback(module.register_forward_hook(partial(hooks.forward, name)).remove)
        stack.enter_context(streamed(stored.model, stored, device, backward=True))
        for batch in batches(rows, device):
            hooks.mask_BT = batch.mask
            num_positions += _backward(stored.model, batch.input_ids, batch.mask, generator)
    return num_positions


class _Hooks:
    def __init__(self, watch: Watch) -> None:
        self._watch = watch
        self.mask_BT = torch.empty(0)

    def forward(self, name: str, module: Any, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
        if isinstance(module, torch.nn.Embedding):
            output.requires_grad_()
        # The first of two passes, whose activations are computed again, has no gradients.
        if output.requires_grad:
            take = self._watch(name, module, self._kept(inputs[0].detach()))
            output.register_hook(partial(self._pass_on, take))  # type: ignore[no-untyped-call]

    def _pass_on(self, take: TakeGradient, gradient: torch.Tensor) -> None:
        take(self._kept(gradient))

    def _kept(self, values: torch.Tensor) -> torch.Tensor:
        """The rows' own tokens; the output layer's positions are chosen already."""
        is_chosen = values.is_floating_point() and values.dim() == 2
        return values if is_chosen else values[self.mask_BT]


def _backward(model: Any, input_ids_BT: torch.Tensor, mask_BT: torch.Tensor, generator: torch.Generator) -> int:
    """Pass the gradient of log p of drawn tokens back.

    Returns: the number of positions they were drawn at.
    Raises: UserError: the model computes no numbers.
    """
    kept_N2 = mask_BT.nonzero()
    kept_N2 = kept_N2[:: -(-len(kept_N2) // _MAX_POSITIONS)]

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0][kept_N2[:, 0], kept_N2[:, 1]], *inputs[1:]

    hook = model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits_NV = model(input_ids=input_ids_BT, use_cache=False).logits
    finally:
        hook.remove()
    if not torch.isfinite(logits_NV).all():
        raise UserError(
            "the model computes NaN or infinity: its weights are damaged, or overflow; download or train it again"
        )
    log_p_NV = logits_NV.float().log_softmax(-1)
    drawn_N1 = torch.multinomial(log_p_NV.detach().exp(), 1, generator=generator)
    log_p_NV.gather(-1, drawn_N1).sum().backward()
    return len(kept_N2)
