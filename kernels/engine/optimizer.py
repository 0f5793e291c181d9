"""AdamW over the flat adapters, behind torch's optimizer interface: five launches, whatever the number of tensors.

The update and the clipping norm are adamw.py's. Learning rate and step count live on the device, so a step reads
nothing back; a scheduler sets `param_groups[0]["lr"]` as usual, which is copied when it changed.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from finemill.kernels.engine.adapters import FlatAdapters
from finemill.kernels.ops.adamw import AdamWState, adamw_step, grad_norm


class FlatAdamW(torch.optim.Optimizer):
    """Decoupled weight decay Adam on `FlatAdapters`, with gradient clipping inside.

    Args:
        adapters: flat parameters and gradient.
        lr: learning rate.
        betas: decay of the moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled, times lr.
        max_norm: clip the gradient's norm to this in `step`; None where the caller clips.
        bits: 32 or 8 per moment.
    """

    def __init__(
        self,
        adapters: FlatAdapters,
        *,
        lr: float,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        max_norm: float | None = 1.0,
        bits: int = 32,
    ) -> None:
        self.adapters, self.max_norm = adapters, max_norm
        device = adapters.device
        self.moments = AdamWState.zeros(adapters.master.numel(), device, bits)
        self.count = torch.zeros(1, dtype=torch.float32, device=device)
        self.norm = torch.zeros(1, dtype=torch.float32, device=device)
        self._lr = torch.full((1,), lr, dtype=torch.float32, device=device)
        self._lr_value = lr
        self._measured = False
        super().__init__(adapters.parameters, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    def set_lr(self) -> None:
        """Send the group's learning rate to the device if it changed."""
        value = float(self.param_groups[0]["lr"])
        if value != self._lr_value:
            self._lr.fill_(value)
            self._lr_value = value

    def measure_norm(self) -> Tensor:
        """Compute the gradient's norm now. Returns: one element on the device; `step` does not compute it again."""
        grad_norm(self.adapters.grad, self.norm)
        self._measured = True
        return self.norm

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> Tensor:  # type: ignore[override]
        """Clip, update and clear the flat gradient. Returns: the norm before clipping, one element on the device."""
        if closure is not None:
            raise ValueError("FlatAdamW.step takes no closure: the gradient is in the flat tensor already")
        self.set_lr()
        group = self.param_groups[0]
        if not self._measured:
            self.measure_norm()
        self._measured = False
        self.count.add_(1)
        adamw_step(
            self.adapters.master,
            self.adapters.grad,
            self.moments,
            step=self.count,
            lr=self._lr,
            betas=group["betas"],
            eps=group["eps"],
            weight_decay=group["weight_decay"],
            grad_norm=None if self.max_norm is None else self.norm,
            max_norm=self.max_norm,
        )
        self.adapters.grad.zero_()
        return self.norm

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clear the flat gradient; the parameters' gradients stay views of it."""
        self.adapters.grad.zero_()

    def state_dict(self) -> dict[str, Any]:
        """The moments, the step count and the groups' settings."""
        groups = [{name: value for name, value in group.items() if name != "params"} for group in self.param_groups]
        return {"moments": self.moments.tensors(), "count": self.count, "param_groups": groups}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises: ValueError: moments of another size or precision.
        """
        mine = self.moments.tensors()
        given = state_dict["moments"]
        if {name: t.shape for name, t in mine.items()} != {name: t.shape for name, t in given.items()}:
            raise ValueError("optimizer state does not fit: other adapters, or another precision of the moments")
        for name, tensor in mine.items():
            tensor.copy_(given[name])
        self.count.copy_(state_dict["count"])
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update(saved)
