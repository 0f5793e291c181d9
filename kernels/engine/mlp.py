"""The second half of a dense decoder layer: norm, gate|up, SwiGLU, down; forward and backward, outside autograd.

No token needs another one's here. Of long rows a plan takes some thousands at a time (`tile`): gate|up of 131072 tokens
of an 8B model are 6 GiB, of 8192 tokens 0.4.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from finemill.kernels.engine.plan import LayerShape, Level
from finemill.kernels.engine.projection import Projection
from finemill.kernels.engine.saved import Saved
from finemill.kernels.ops.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from finemill.kernels.ops.swiglu import swiglu_backward, swiglu_forward
from finemill.kernels.ops.swiglu_lora import runs_fused, swiglu_lora_backward

# T tokens, H model width, I feed-forward width, P spare columns


TILE_STREAMS = 1 << 16
"""Distance between the dropout streams of two tiles: more than a model has linear layers."""


def normalize(
    x: Tensor, delta: Tensor | None, weight: Tensor, shape: LayerShape, out: Tensor, sum_out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Normalize x + delta into the first H columns of `out`. Returns: the sum, rstd."""
    target = out[:, : shape.hidden]
    if delta is None:
        return x, rms_norm_forward(x, weight, shape.eps, target)[1]
    total, _, rstd = add_rms_norm_forward(x, delta, weight, shape.eps, target, sum_out)
    return total, rstd


@dataclass
class DenseMLP:
    """Norm and feed-forward network that every token takes."""

    shape: LayerShape
    norm: Tensor
    gate_up: Projection
    down: Projection
    tile: int | None = field(default=None, init=False)
    """Tokens at a time; None for all."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The groups of linear layers in forward order."""
        return self.gate_up, self.down

    @property
    def stacks(self) -> tuple[()]:
        """Projections of experts: none."""
        return ()

    @property
    def grad_pad(self) -> int:
        """Spare columns that the result's gradient needs."""
        return self.down.pad

    def extended_input(self, tokens: int) -> Tensor:
        """Uninitialized (T, H + P) for the norm's output."""
        return self.gate_up.extended_input(tokens)

    def is_tiled(self, tokens: int) -> bool:
        """Whether so many tokens are taken in parts; no more than `Level.ATTENTION` is kept of them then."""
        return self.tile is not None and tokens > self.tile

    def _tiles(self, tokens: int) -> Iterator[slice]:
        """Yield the parts; each has dropout masks of its own."""
        assert self.tile is not None
        dropouts = [(group, group.dropout) for group in self.projections]
        try:
            for number, begin in enumerate(range(0, tokens, self.tile)):
                for group, dropout in dropouts:
                    if dropout is not None:
                        group.dropout = replace(dropout, stream=dropout.stream + number * TILE_STREAMS)
                yield slice(begin, min(begin + self.tile, tokens))
        finally:
            for group, dropout in dropouts:
                group.dropout = dropout

    def forward(self, x: Tensor, delta: Tensor, saved: Saved | None) -> tuple[Tensor, Tensor]:
        """Run norm and network.

        Args:
            x: (T, H), residual stream without `delta`.
            delta: (T, H), the attention's output; overwritten with the sum.
            saved: takes what the backward needs; None in evaluation.
        Returns: the sum (T, H) and the network's output (T, H).
        """
        if not self.is_tiled(x.shape[0]):
            return self._forward_rows(x, delta, saved)
        output = torch.empty_like(x)
        if saved is not None:
            ranks = (self.gate_up.rank, self.down.rank)
            saved.xa_gate_up, saved.xa_down = (x.new_empty((x.shape[0], rank)) for rank in ranks)
            if saved.level >= Level.ATTENTION:
                saved.mid = delta
        for rows in self._tiles(x.shape[0]):
            part = None if saved is None else saved.of_rows(rows)
            self._forward_rows(x[rows], delta[rows], part, output[rows])
            if saved is not None and part is not None:
                saved.xa_gate_up[rows], saved.xa_down[rows] = part.xa_gate_up, part.xa_down
        return delta, output

    def _forward_rows(
        self, x: Tensor, delta: Tensor, saved: Saved | None, output: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Run on some or all tokens (t, H). Returns: the sum, and the network's output, that is `output` if given."""
        normed_mid = self.extended_input(x.shape[0])
        mid, rstd_mid = normalize(x, delta, self.norm, self.shape, normed_mid, sum_out=delta)
        gate_up = self.gate_up.extended_output(x.shape[0])
        self.gate_up.forward(normed_mid, gate_up[:, : self.gate_up.out_features], self.gate_up.extended_weight())
        if saved is not None:
            saved.xa_gate_up = self.gate_up.xa(normed_mid)
            if saved.level >= Level.ATTENTION:
                saved.mid = mid
            if saved.level >= Level.GATE_UP:
                saved.gate_up = gate_up
            if saved.level >= Level.ALL:
                saved.normed_mid, saved.rstd_mid = normed_mid, rstd_mid
        del normed_mid
        hidden = self.down.extended_input(x.shape[0])
        swiglu_forward(gate_up[:, : self.gate_up.out_features], hidden[:, : self.down.in_features])
        del gate_up
        output = torch.empty_like(x) if output is None else output
        self.down.forward(hidden, output, self.down.extended_weight())
        if saved is not None:
            saved.xa_down = self.down.xa(hidden)
        return mid, output

    def backward(self, grad: Tensor, saved: Saved) -> Tensor:
        """Return the gradient of the sum (T, H + grad_pad), in the memory of `grad`, the layer's result's."""
        if not self.is_tiled(grad.shape[0]):
            return self._backward_rows(grad, saved)
        for rows in self._tiles(grad.shape[0]):
            self._backward_rows(grad[rows], saved.of_rows(rows))
        saved.mid = None
        return grad

    def _backward_rows(self, grad: Tensor, saved: Saved) -> Tensor:
        width, mid = self.shape.hidden, saved.mid
        assert mid is not None
        if saved.normed_mid is None or saved.rstd_mid is None:
            saved.normed_mid = self.extended_input(mid.shape[0])
            _, saved.rstd_mid = normalize(mid, None, self.norm, self.shape, saved.normed_mid)
        gate_up_weight = self.gate_up.extended_weight()
        if saved.gate_up is None:
            saved.gate_up = self.gate_up.extended_output(mid.shape[0])
            target = saved.gate_up[:, : self.gate_up.out_features]
            self.gate_up.forward(saved.normed_mid, target, gate_up_weight, saved.xa_gate_up)
        grad_down = grad[:, : width + self.down.pad]
        down_weight = self.down.extended_weight()
        grad_hidden = torch.empty((mid.shape[0], self.shape.intermediate), dtype=mid.dtype, device=mid.device)
        self.down.backward_output(grad_down, saved.xa_down, down_weight)
        self.down.backward_input(grad_down, down_weight, grad_hidden)
        self._backward_swiglu(grad_hidden, grad_down, saved.gate_up, saved.xa_gate_up, gate_up_weight)
        del grad_hidden
        self.gate_up.backward_weight(saved.gate_up, saved.normed_mid[:, :width])
        saved.normed_mid = None
        grad_normed = torch.empty_like(mid)
        self.gate_up.backward_input(saved.gate_up, gate_up_weight, grad_normed)
        saved.gate_up = None
        stream = grad[:, :width]
        rms_norm_backward(grad_normed, mid, self.norm, saved.rstd_mid, residual_grad=stream, out=stream)
        saved.mid = None
        return grad

    def _backward_swiglu(
        self, grad_hidden: Tensor, grad_down: Tensor, gate_up: Tensor, xa: Tensor, gate_up_weight: Tensor
    ) -> None:
        """Make gate|up (T, 2I + P) its gradient with its extension, and add dA of down and dB of gate|up."""
        first, second = self.gate_up.adapter, self.down.adapter
        n, k, rank, ranks = self.gate_up.out_features, self.gate_up.in_features, self.down.rank, self.gate_up.rank
        gates, width = gate_up[:, :n], self.shape.hidden
        fits = ranks == 2 * rank and self.down.dropout is None and runs_fused(gates, rank)
        if first is None or second is None or not fits:
            swiglu_backward(grad_hidden, gates, out=gates, h_out=grad_hidden)
            self.down.backward_weight(grad_down, grad_hidden)
            # At the peak of the backward: no plan has room for partial sums over so many columns.
            self.gate_up.backward_output(gate_up, xa, gate_up_weight, one_pass=False)
            return
        swiglu_lora_backward(
            grad_hidden,
            gates,
            xa,
            gate_up_weight[:n, k : k + ranks],
            grad_down[:, width : width + rank],
            gate_up[:, n : n + ranks],
            second.grad_a,
            first.grad_b,
            first.scaling,
        )
