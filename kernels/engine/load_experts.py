"""Put the experts of a hub checkpoint, one tensor for each matrix, into a stack for each layer and projection."""

import re
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.errors import UserError
from finemill.kernels.engine.nf4_quantize import quantize_nf4_stack
from finemill.kernels.engine.plan import ExpertShape
from finemill.kernels.ops.nf4_stack import NF4Stack

_EXPERT = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.experts\.(\d+)\.(\w+)\.weight$")
_ROUTER = re.compile(r"^model\.layers\.(\d+)\.(?:mlp|block_sparse_moe)\.gate\.weight$")
_PLACES = {"gate_proj": 0, "up_proj": 1, "down_proj": 2, "w1": 0, "w3": 1, "w2": 2}
"""Gate, up and down under the names that Qwen and Mixtral give them."""


@dataclass
class Mixture:
    """A layer's router (E, H) and experts: gate|up (E, 2I, H) and down (E, H, I), or as many NF4 matrices."""

    router: Tensor
    gate_up: NF4Stack | Tensor
    down: NF4Stack | Tensor

    @property
    def stacks(self) -> tuple[NF4Stack | Tensor, NF4Stack | Tensor]:
        """Both, in the order of `EXPERT_STACKS`."""
        return self.gate_up, self.down


@dataclass
class _Layer:
    router: Tensor | None = None
    gate_up: Tensor | None = None
    down: Tensor | None = None
    seen: set[tuple[int, int]] = field(default_factory=set)
    quantized: tuple[NF4Stack, NF4Stack] | None = None


@dataclass
class ExpertReader:
    """Collects experts as they arrive, in any order.

    Args:
        shape: the mixture that config.json describes.
        hidden: H.
        device: where they go.
        dtype: 16-bit dtype.
        quantize: to NF4, a layer as soon as it is complete.
        double_quant: quantize the scales too.
    """

    shape: ExpertShape
    hidden: int
    device: torch.device
    dtype: torch.dtype
    quantize: bool
    double_quant: bool = True
    _layers: dict[int, _Layer] = field(default_factory=dict)

    def take(self, name: str, tensor: Tensor) -> bool:
        """Keep a tensor if it is an expert's or a router's.

        Raises: UserError: an expert that config.json has not, or of another shape.
        """
        if router := _ROUTER.match(name):
            self._check(name, tensor, (self.shape.count, self.hidden))
            self._layers.setdefault(int(router[1]), _Layer()).router = tensor.to(self.dtype)
            return True
        if (match := _EXPERT.match(name)) is None or match[3] not in _PLACES:
            return False
        number, expert, place = int(match[1]), int(match[2]), _PLACES[match[3]]
        width, (count, hidden) = self.shape.intermediate, (self.shape.count, self.hidden)
        if expert >= count:
            raise UserError(f"{name} is in the checkpoint, but config.json has {count} experts")
        self._check(name, tensor, (hidden, width) if place == 2 else (width, hidden))
        layer = self._layers.setdefault(number, _Layer())
        if layer.gate_up is None or layer.down is None:
            layer.gate_up = torch.empty((count, 2 * width, hidden), dtype=self.dtype, device=self.device)
            layer.down = torch.empty((count, hidden, width), dtype=self.dtype, device=self.device)
        target = layer.down[expert] if place == 2 else layer.gate_up[expert, place * width : (place + 1) * width]
        target.copy_(tensor)
        layer.seen.add((expert, place))
        if self.quantize and len(layer.seen) == 3 * count:
            matrices = layer.gate_up.view(2 * count, width, hidden)
            layer.quantized = self._quantize(matrices), self._quantize(layer.down)
            layer.gate_up = layer.down = None
        return True

    def is_complete(self, number: int) -> bool:
        """Whether all of a layer's experts and its router are there."""
        layer = self._layers[number]
        return layer.router is not None and len(layer.seen) == 3 * self.shape.count

    def check_complete(self) -> None:
        """Raises: UserError: a layer that was not handed over lacks something."""
        for number in sorted(self._layers):
            self.layer(number)

    def layer(self, number: int) -> Mixture | None:
        """Hand over a layer's mixture, None of a layer that has no experts.

        Raises: UserError: experts or the router are missing.
        """
        layer = self._layers.pop(number, None)
        if layer is None:
            return None
        whole = {(expert, place) for expert in range(self.shape.count) for place in range(3)}
        if missing := sorted(whole - layer.seen):
            raise UserError(
                f"layer {number} of the checkpoint lacks {len(missing)} of its {len(whole)} expert matrices, first of "
                f"expert {missing[0][0]}: config.json has {self.shape.count} experts; are all shards there?"
            )
        if layer.router is None:
            raise UserError(f"layer {number} of the checkpoint has experts and no router (mlp.gate.weight)")
        gate_up, down = layer.quantized or (layer.gate_up, layer.down)
        assert gate_up is not None
        assert down is not None
        return Mixture(layer.router, gate_up, down)

    def _quantize(self, matrices: Tensor) -> NF4Stack:
        return quantize_nf4_stack(matrices, double_quant=self.double_quant)

    def _check(self, name: str, tensor: Tensor, shape: tuple[int, int]) -> None:
        if tuple(tensor.shape) != shape:
            raise UserError(f"{name} has shape {tuple(tensor.shape)}, config.json says {shape}")
