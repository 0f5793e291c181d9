"""What a mixture of experts has that a dense model has not: experts in one parameter each, and routers."""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

EXPERTS = "experts"
"""What transformers calls the module that holds all experts of a layer."""
_HALVES, _GATE_UP = {"gate_proj", "up_proj"}, "gate_up_proj"


@dataclass(frozen=True)
class Mixture:
    """Parts of a model, each named once for all layers; nothing where the model is dense.

    Args:
        experts: parameters (E, N, K) that hold a matrix of every expert, as `mlp.experts.down_proj`: what PEFT takes as
            `target_parameters`.
        routers: modules that choose or weigh experts, as `mlp.gate`.
    """

    experts: tuple[str, ...] = ()
    routers: tuple[str, ...] = ()

    @classmethod
    def of(cls, model: nn.Module) -> "Mixture":
        """Find experts and routers."""
        experts: dict[str, None] = {}
        routers: dict[str, None] = {}
        for name, module in model.named_modules():
            held = getattr(module, EXPERTS, None)
            stacks = () if held is None else held.named_parameters(recurse=False)
            own = name.rpartition(".")[2]
            stacked = [f"{own}.{EXPERTS}.{parameter}" for parameter, weight in stacks if weight.dim() == 3]
            if stacked:
                experts |= dict.fromkeys(stacked)
                routers |= {f"{own}.{child}": None for child, _ in module.named_children() if _is_router(child)}
        return cls(tuple(experts), tuple(routers))

    def is_router(self, name: str) -> bool:
        """Whether a module's name, or the end of one, is a router's."""
        return any(
            name == router or name.endswith(f".{router}") or router.endswith(f".{name}") for router in self.routers
        )

    def named(self, targets: Sequence[str]) -> list[str]:
        """Parameters of experts that targets name, also as the hub's checkpoints name gate and up."""
        names = {*targets, _GATE_UP} if set(targets) >= _HALVES else set(targets)
        return [stack for stack in self.experts if any(stack == name or stack.endswith(f".{name}") for name in names)]

    def holds(self, target: str, targets: Sequence[str]) -> bool:
        """Whether one of the targets names a parameter of experts, as gate and up do together."""
        return bool(
            self.named((target,)) or (target in _HALVES and self.named((_GATE_UP,)) and set(targets) >= _HALVES)
        )


def _is_router(child: str) -> bool:
    return child.endswith("gate") or child == "router"
