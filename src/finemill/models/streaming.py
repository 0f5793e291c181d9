"""Run a model with the weights of one layer in memory at a time."""

# B rows, T tokens, V vocabulary

import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from finemill.models.stored_model import StoredModel
from finemill.models.widened import Widened

# Tokens in one pass: weights are read once for all of them, and their activations are in memory together.
_TOKENS_AT_ONCE = 4096


@dataclass(frozen=True)
class Batch:
    """Rows that are run together, filled up on the right: tokens look back only, so that this changes nothing.

    `input_ids` and `mask` have shape (B, T); the mask is true where a row's own tokens are. `indices` say which rows
    they are.
    """

    indices: list[int]
    input_ids: torch.Tensor
    mask: torch.Tensor


def batches(rows: Sequence[Sequence[int]], device: torch.device) -> Iterator[Batch]:
    """All rows, those of similar length together."""
    order = sorted(range(len(rows)), key=lambda index: len(rows[index]))
    while order:
        count = 1
        while count < len(order) and (count + 1) * len(rows[order[count]]) <= _TOKENS_AT_ONCE:
            count += 1
        indices, order = order[:count], order[count:]
        longest = len(rows[indices[-1]])
        filled = [[*rows[index], *[rows[index][-1]] * (longest - len(rows[index]))] for index in indices]
        lengths = torch.tensor([len(rows[index]) for index in indices], device=device)
        mask_BT = torch.arange(longest, device=device) < lengths[:, None]
        yield Batch(indices, torch.tensor(filled, device=device), mask_BT)


@torch.inference_mode()
def log_probabilities(
    stored: StoredModel, rows: Sequence[Sequence[int]], lengths: Sequence[Sequence[int]]
) -> list[torch.Tensor]:
    """What the model expects after the beginnings of `rows`, computed in float32 with one layer in memory at a time.

    Args:
        rows: token ids.
        lengths: for each row, how many of its tokens each beginning has.
    Returns: log-probabilities of the next token, shape (beginnings, V), float64, on the CPU, for each row.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found: dict[int, torch.Tensor] = {}
    kept: tuple[list[int], list[int]] = ([], [])

    def keep(_module: Any, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        """Logits of all positions would be larger than the model."""
        return inputs[0][kept], *inputs[1:]

    with ExitStack() as stack:
        stack.callback(stored.model.get_output_embeddings().register_forward_pre_hook(keep).remove)
        stack.enter_context(streamed(stored.model, stored, device))
        for batch in batches(rows, device):
            counts = [len(lengths[index]) for index in batch.indices]
            row_N = [row for row, count in enumerate(counts) for _ in range(count)]
            kept = row_N, [length - 1 for index in batch.indices for length in lengths[index]]
            logits_NV = stored.model(input_ids=batch.input_ids, use_cache=False).logits
            parts = logits_NV.double().log_softmax(-1).cpu().split(counts)
            found.update(zip(batch.indices, parts, strict=True))
    return [found[index] for index in range(len(rows))]


@contextmanager
def streamed(model: Any, stored: StoredModel, device: torch.device, *, backward: bool = False) -> Iterator[None]:
    """Let `model` compute on `device` inside the block: each layer's weights are read before it and dropped after it.

    Args:
        model: `stored.model`, or that with adapters of PEFT on it.
        backward: gradients pass back through it, too: a layer's weights are read and its activations computed again.
    """
    layers = {id(layer) for module in model.modules() if isinstance(module, torch.nn.ModuleList) for layer in module}
    with ExitStack() as stack:
        for unit in loaded_together(model):
            loaded = _Unit(unit, stored, device, backward=backward)
            if backward and id(unit) in layers:
                unit.forward = loaded.checkpointed(unit.forward)
                stack.callback(delattr, unit, "forward")
                continue
            for hook in (
                unit.register_forward_pre_hook(loaded.load),
                unit.register_forward_hook(loaded.drop, always_call=True),
            ):
                stack.callback(hook.remove)
        for module in model.modules():
            for name, buffer in module._buffers.items():
                if buffer is not None:
                    module._buffers[name] = buffer.to(device)
        yield


def loaded_together(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is loaded together: a decoder layer, and elsewhere a module with parameters, with its adapter if it has one.

    An adapter may read its module's weight outside that module's own call, as DoRA does.
    """
    whole = _adapter_classes()
    units: list[torch.nn.Module] = []

    def visit(module: torch.nn.Module, *, in_list: bool) -> None:
        if in_list or isinstance(module, whole) or any(True for _ in module.parameters(recurse=False)):
            units.append(module)
            return
        for child in module.children():
            visit(child, in_list=isinstance(module, torch.nn.ModuleList))

    visit(model, in_list=False)
    return units


def _adapter_classes() -> tuple[type, ...]:
    """PEFT's classes of adapters; none where PEFT is not loaded, and its import would take two seconds."""
    if "peft" not in sys.modules:
        return ()
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    return BaseTunerLayer, AuxiliaryTrainingWrapper


class _Unit:
    """The places of one unit's parameters, filled during its call."""

    def __init__(self, unit: torch.nn.Module, stored: StoredModel, device: torch.device, *, backward: bool) -> None:
        self._places = [
            (module, name, parameter)
            for module in unit.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._stored = stored
        self._device = device
        self._backward = backward

    def checkpointed(self, forward: Callable[..., Any]) -> Callable[..., Any]:
        """`forward` with the weights in their places, computed again when gradients pass back."""

        def compute(*args: Any, **kwargs: Any) -> Any:
            self.load()
            try:
                return forward(*args, **kwargs)
            finally:
                self.drop()

        def call(*args: Any, **kwargs: Any) -> Any:
            return checkpoint(compute, *args, use_reentrant=False, **kwargs)

        return call

    def load(self, *_hooked: Any) -> None:
        """Before the call."""
        values: dict[int, Any] = {}
        for module, name, parameter in self._places:
            if id(parameter) not in values:
                values[id(parameter)] = self._read(parameter)
            module._parameters[name] = values[id(parameter)]

    def _read(self, parameter: torch.nn.Parameter) -> Any:
        stored_name = self._stored.name_of(parameter)
        if stored_name is None:
            return torch.nn.Parameter(parameter.to(self._device), requires_grad=False)
        values = self._stored.read_as_stored(stored_name)
        if values is None:
            return torch.nn.Parameter(self._stored.read(stored_name).to(self._device), requires_grad=False)
        # A matrix stays in its file, row by row, where no gradient is wanted.
        if values.dim() == 2 and self._device.type == "cpu" and not self._backward:
            return values.as_subclass(Widened)
        return torch.nn.Parameter(values.to(self._device).to(torch.float32, copy=True), requires_grad=False)

    def drop(self, *_hooked: Any) -> None:
        """After the call, also one that failed."""
        for module, name, parameter in self._places:
            module._parameters[name] = parameter
