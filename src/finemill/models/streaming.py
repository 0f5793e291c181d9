"""Run a model with the weights of one layer in memory at a time."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch

from finemill.models.stored_model import StoredModel


@contextmanager
def streamed(model: Any, stored: StoredModel, device: torch.device) -> Iterator[None]:
    """Let `model` compute on `device` inside the block: each layer's weights are read before it and dropped after it.

    Args:
        model: `stored.model`, or that with adapters of PEFT on it.
    """
    with ExitStack() as stack:
        for unit in _units(model):
            loaded = _Unit(unit, stored, device)
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


def _units(model: torch.nn.Module) -> list[torch.nn.Module]:
    """What is loaded together: a decoder layer, and elsewhere a module with parameters, with its adapter if it has one.

    An adapter may read its module's weight outside that module's own call, as DoRA does.
    """
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    whole = (BaseTunerLayer, AuxiliaryTrainingWrapper)
    units: list[torch.nn.Module] = []

    def visit(module: torch.nn.Module, *, in_list: bool) -> None:
        if in_list or isinstance(module, whole) or any(True for _ in module.parameters(recurse=False)):
            units.append(module)
            return
        for child in module.children():
            visit(child, in_list=isinstance(module, torch.nn.ModuleList))

    visit(model, in_list=False)
    return units


class _Unit:
    """The places of one unit's parameters, filled during its call."""

    def __init__(self, unit: torch.nn.Module, stored: StoredModel, device: torch.device) -> None:
        self._places = [
            (module, name, parameter)
            for module in unit.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None
        ]
        self._stored = stored
        self._device = device

    def load(self, unit: torch.nn.Module, inputs: Any) -> None:
        """Before the call."""
        del unit, inputs
        values: dict[int, torch.nn.Parameter] = {}
        for module, name, parameter in self._places:
            if id(parameter) not in values:
                stored_name = self._stored.name_of(parameter)
                value = self._stored.read(stored_name) if stored_name else parameter
                values[id(parameter)] = torch.nn.Parameter(value.to(self._device), requires_grad=False)
            module._parameters[name] = values[id(parameter)]

    def drop(self, unit: torch.nn.Module, inputs: Any, output: Any) -> None:
        """After the call, also one that failed."""
        del unit, inputs, output
        for module, name, parameter in self._places:
            module._parameters[name] = parameter
