"""One decoder layer of the Llama family (Llama 3, Mistral, Qwen2.5, Qwen3), forward and backward, outside autograd.

    x    = residual + delta                      the residual stream; delta is the previous layer's MLP output
    qkv  = rms_norm(x) Wqkv                      q, k normalized (Qwen3) and rotated, v as it is
    mid  = x + attention(q, k, v) Wo
    gu   = rms_norm(mid) Wgu,   h = swiglu(gu),  output: (mid, h Wdown), added by the next layer's norm

The layer owns its recompute. A plan gives one level per layer, and the backward recomputes what that level dropped:

    level        kept per token (bf16, widths of Qwen3-8B)              recomputed in the backward
    INPUT        x                                        8 KiB         norms, qkv, attention, o, gate|up
    ATTENDED     + attention output                      16 KiB         norms, qkv, o, gate|up
    ATTENTION    + qkv, mid                              36 KiB         norms, q/k rotation, gate|up
    GATE_UP      + gate|up                               84 KiB         norms, q/k rotation
    ALL          + q, k, both norm outputs              110 KiB         nothing but h, which its backward makes anyway

down_proj is never recomputed: nothing in the backward reads its output. All levels run the same kernels on the same
values, so they give bitwise equal gradients. The adapters' skinny products x A^T (R columns) are always kept.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.kernels.engine.experts import ExpertMLP
from finemill.kernels.engine.mlp import DenseMLP, normalize
from finemill.kernels.engine.plan import LayerShape, Level
from finemill.kernels.engine.projection import Projection
from finemill.kernels.engine.saved import Saved
from finemill.kernels.ops.attention import attention_backward, attention_forward
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack
from finemill.kernels.ops.packing import Sequences
from finemill.kernels.ops.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from finemill.kernels.ops.rms_norm import rms_norm_backward

# T tokens, H model width, I feed-forward width, N query heads, K key and value heads, D head width


@dataclass(frozen=True)
class Rope:
    """Tables (positions, D/2 or D) and the positions (T,) to read."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor


@dataclass
class DecoderLayer:
    """Weights of one layer and its two passes."""

    shape: LayerShape
    input_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Projection
    o: Projection
    mlp: DenseMLP | ExpertMLP
    workspace: int | None = field(default=None, init=False)
    """Bytes that attention's backward may take; None for its default."""

    @property
    def projections(self) -> tuple[Projection, ...]:
        """The groups of linear layers in forward order."""
        return self.qkv, self.o, *self.mlp.projections

    @property
    def weights(self) -> list[NF4Tensor | NF4Stack | Tensor]:
        """All frozen matrices, in forward order."""
        dense = [weight for group in self.projections for weight in group.weights]
        return [*dense, *(stack.weight for stack in self.mlp.stacks)]

    def place_weights(self, weights: Sequence[NF4Tensor | NF4Stack]) -> None:
        """Take the same NF4 matrices in other memory, in the order of `weights`."""
        views = iter(weights)
        for group in self.projections:
            group.weights = [next(views) for _ in group.weights]  # type: ignore[misc]
        for stack in self.mlp.stacks:
            stack.weight = next(views)  # type: ignore[assignment]

    @property
    def grad_pad(self) -> int:
        """Spare columns that a (T, H) gradient needs so that o and down can extend it in place."""
        return max(self.o.pad, self.mlp.grad_pad)

    def forward(
        self, x: Tensor, delta: Tensor | None, sequences: Sequences, rope: Rope, level: Level | None
    ) -> tuple[Tensor, Tensor, Saved | None]:
        """Run the layer.

        Args:
            x: (T, H), residual stream without `delta`.
            delta: (T, H) still to be added, or None.
            sequences: boundaries of the packed sequences.
            rope: tables and positions.
            level: what to keep for the backward; None keeps nothing (evaluation).
        Returns: mid (T, H) and the MLP's output (T, H), whose sum is the layer's result; and the saved tensors.
        """
        normed_in = self.qkv.extended_input(x.shape[0])
        total, rstd_in = normalize(x, delta, self.input_norm, self.shape, normed_in)
        qkv, q, k, rstd_qk = self._project_qkv(normed_in, rope, None)
        attended, state = self._attend(q, k, qkv, sequences)
        attention_out = torch.empty_like(total)
        self.o.forward(attended, attention_out, self.o.extended_weight())
        saved = None
        if level is not None:
            saved = Saved(level, total, self.qkv.xa(normed_in), self.o.xa(attended))
            if level >= Level.ATTENDED:
                saved.attended, saved.attention_state = attended, state
            if level >= Level.ATTENTION:
                saved.qkv = qkv
            if level >= Level.ALL:
                saved.normed_in, saved.rstd_in, saved.q, saved.k, saved.rstd_qk = normed_in, rstd_in, q, k, rstd_qk
        del normed_in, qkv, q, k, rstd_qk, attended, state  # the MLP takes the memory of what is not saved

        mid, output = self.mlp.forward(total, attention_out, saved)
        return mid, output, saved

    def backward(
        self, grad: Tensor, saved: Saved, sequences: Sequences, rope: Rope, *, need_input_grad: bool = True
    ) -> Tensor | None:
        """Differentiate: adds the adapters' gradients to the flat gradient.

        Args:
            grad: (T, H + grad_pad), gradient of the layer's result in the first H columns; overwritten.
            saved: from the forward; its tensors are released or overwritten on the way.
            sequences: as in the forward.
            rope: as in the forward.
            need_input_grad: False for the first layer, whose input comes from a frozen embedding.
        Returns: (T, H + grad_pad) gradient of x and of delta alike; None if not needed.
        """
        self._recompute_attention(saved, sequences, rope)
        grad_mid = self.mlp.backward(grad, saved)
        return self._backward_attention(grad_mid, saved, sequences, rope, need_input_grad=need_input_grad)

    def _project_qkv(self, normed: Tensor, rope: Rope, xa: Tensor | None) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return qkv (T, (N + 2K) D + P), q, k and their rstd."""
        qkv = self.qkv.extended_output(normed.shape[0])
        self.qkv.forward(normed, qkv[:, : self.shape.qkv_width], self.qkv.extended_weight(), xa)
        return (qkv, *self._rotate(qkv, rope))

    def _rotate(self, qkv: Tensor, rope: Rope) -> tuple[Tensor, Tensor, Tensor]:
        shape = self.shape
        return qk_norm_rope_forward(
            qkv[:, : shape.qkv_width],
            self.q_norm,
            self.k_norm,
            rope.cos,
            rope.sin,
            rope.position_ids,
            shape.eps,
            shape.num_heads,
            shape.num_kv_heads,
        )

    def _attend(self, q: Tensor, k: Tensor, qkv: Tensor, sequences: Sequences) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Return the attention's output as an extended input of o (T, N D + P), and the attention's state."""
        attended = self.o.extended_input(q.shape[0])
        _, state = attention_forward(q, k, self._values(qkv), sequences, self._scale, self._output_heads(attended))
        return attended, state

    def _recompute_attention(self, saved: Saved, sequences: Sequences, rope: Rope) -> None:
        """Make what the second half's backward begins with: `mid`, and its norm where all tokens are taken at once."""
        if saved.mid is not None:
            return
        if saved.attended is None:
            self._recompute_qkv(saved, rope)
            assert saved.q is not None
            assert saved.k is not None
            assert saved.qkv is not None
            saved.attended, saved.attention_state = self._attend(saved.q, saved.k, saved.qkv, sequences)
        attention_out = torch.empty_like(saved.x)
        self.o.forward(saved.attended, attention_out, self.o.extended_weight(), saved.xa_o)
        if self.mlp.is_tiled(saved.x.shape[0]):
            saved.mid = attention_out.add_(saved.x)
            return
        saved.normed_mid = self.mlp.extended_input(saved.x.shape[0])
        saved.mid, saved.rstd_mid = normalize(
            saved.x, attention_out, self.mlp.norm, self.shape, saved.normed_mid, sum_out=attention_out
        )

    def _recompute_qkv(self, saved: Saved, rope: Rope) -> None:
        saved.normed_in = self.qkv.extended_input(saved.x.shape[0])
        _, saved.rstd_in = normalize(saved.x, None, self.input_norm, self.shape, saved.normed_in)
        saved.qkv, saved.q, saved.k, saved.rstd_qk = self._project_qkv(saved.normed_in, rope, saved.xa_qkv)

    def _backward_attention(
        self, grad: Tensor, saved: Saved, sequences: Sequences, rope: Rope, *, need_input_grad: bool
    ) -> Tensor | None:
        """Return the gradient of x (T, H + grad_pad), in the memory of `grad`."""
        shape, width = self.shape, self.shape.hidden
        assert saved.attended is not None
        grad_o = grad[:, : width + self.o.pad]
        o_weight = self.o.extended_weight()
        self.o.backward_output(grad_o, saved.xa_o, o_weight)
        self.o.backward_weight(grad_o, saved.attended[:, : shape.q_width])
        grad_attended = torch.empty((grad.shape[0], shape.q_width), dtype=grad.dtype, device=grad.device)
        self.o.backward_input(grad_o, o_weight, grad_attended)
        if saved.qkv is None:
            self._recompute_qkv(saved, rope)
        assert saved.qkv is not None
        if saved.q is None or saved.k is None or saved.rstd_qk is None:
            saved.q, saved.k, saved.rstd_qk = self._rotate(saved.qkv, rope)
        dq, dk, dv = attention_backward(
            grad_attended.unflatten(1, (shape.num_heads, shape.head_dim)),
            saved.q,
            saved.k,
            self._values(saved.qkv),
            self._output_heads(saved.attended),
            saved.attention_state,
            sequences,
            self._scale,
            self.workspace,
        )
        saved.q = saved.k = saved.attended = None
        saved.attention_state = ()
        qkv = saved.qkv[:, : shape.qkv_width]
        tables = (self.q_norm, self.k_norm, rope.cos, rope.sin, rope.position_ids, saved.rstd_qk)
        qk_norm_rope_backward(dq, dk, dv, qkv, *tables, shape.num_heads, shape.num_kv_heads, out=qkv)
        del dq, dk, dv
        if saved.normed_in is None or saved.rstd_in is None:
            saved.normed_in = self.qkv.extended_input(grad.shape[0])
            _, saved.rstd_in = normalize(saved.x, None, self.input_norm, self.shape, saved.normed_in)
        qkv_weight = self.qkv.extended_weight()
        self.qkv.backward_output(saved.qkv, saved.xa_qkv, qkv_weight)
        self.qkv.backward_weight(saved.qkv, saved.normed_in[:, :width])
        if not need_input_grad:
            return None
        grad_normed = grad_attended if shape.q_width == width else torch.empty_like(saved.x)
        self.qkv.backward_input(saved.qkv, qkv_weight, grad_normed)
        stream = grad[:, :width]
        rms_norm_backward(grad_normed, saved.x, self.input_norm, saved.rstd_in, residual_grad=stream, out=stream)
        return grad

    @property
    def _scale(self) -> float:
        return float(self.shape.head_dim**-0.5)

    def _values(self, qkv: Tensor) -> Tensor:
        """View of the v columns as (T, K, D)."""
        shape = self.shape
        start = (shape.num_heads + shape.num_kv_heads) * shape.head_dim
        values: Tensor = qkv[:, start : shape.qkv_width].unflatten(1, (shape.num_kv_heads, shape.head_dim))
        return values

    def _output_heads(self, attended: Tensor) -> Tensor:
        heads: Tensor = attended[:, : self.shape.q_width].unflatten(1, (self.shape.num_heads, self.shape.head_dim))
        return heads
