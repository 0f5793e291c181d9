"""One decoder layer of the Llama family (Llama 3, Mistral, Qwen2.5, Qwen3), forward and backward, outside autograd.

    x    = residual + delta                      the residual stream; delta is the previous layer's MLP output
    qkv  = rms_norm(x) Wqkv                      q, k normalized (Qwen3) and rotated, v as it is
    mid  = x + attention(q, k, v) Wo
    gu   = rms_norm(mid) Wgu,   h = swiglu(gu),  output: (mid, h Wdown), added by the next layer's norm

The layer owns its recompute. A plan gives one level per layer, and the backward recomputes what that level dropped:

    level        kept per token (bf16, widths of Qwen3-8B)              recomputed in the backward
    INPUT        x                                        8 KiB         norms, qkv, attention, o, gate|up
    ATTENTION    + qkv, attention output, mid            36 KiB         norms, q/k rotation, gate|up
    GATE_UP      + gate|up                               84 KiB         norms, q/k rotation
    ALL          + q, k, both norm outputs              110 KiB         nothing but h, which its backward makes anyway

down_proj is never recomputed: nothing in the backward reads its output. All levels run the same kernels on the same
values, so they give bitwise equal gradients. The adapters' skinny products x A^T (R columns) are always kept.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.kernels.engine.plan import LayerShape, Level
from finemill.kernels.engine.projection import Projection
from finemill.kernels.ops.attention import attention_backward, attention_forward
from finemill.kernels.ops.packing import Sequences
from finemill.kernels.ops.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from finemill.kernels.ops.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward
from finemill.kernels.ops.swiglu import swiglu_backward, swiglu_forward
from finemill.kernels.ops.swiglu_lora import runs_fused, swiglu_lora_backward

# T tokens, H model width, I feed-forward width, N query heads, K key and value heads, D head width


@dataclass(frozen=True)
class Rope:
    """Tables (positions, D/2 or D) and the positions (T,) to read."""

    cos: Tensor
    sin: Tensor
    position_ids: Tensor


@dataclass
class Saved:
    """What a layer's forward leaves for its backward; fields a level drops are None until recomputed.

    `normed_in` and `normed_mid` are extended inputs (T, H + P); `attended` (T, N D + P) and `gate_up` (T, 2I + P)
    carry the extension columns that the backward fills.
    """

    level: Level
    x: Tensor
    xa_qkv: Tensor
    xa_o: Tensor
    xa_gate_up: Tensor = field(init=False)
    xa_down: Tensor = field(init=False)
    qkv: Tensor | None = None
    attended: Tensor | None = None
    attention_state: tuple[Tensor, ...] = ()
    mid: Tensor | None = None
    gate_up: Tensor | None = None
    q: Tensor | None = None
    k: Tensor | None = None
    rstd_qk: Tensor | None = None
    normed_in: Tensor | None = None
    rstd_in: Tensor | None = None
    normed_mid: Tensor | None = None
    rstd_mid: Tensor | None = None

    def large(self, level: Level) -> list[str]:
        """Names of the kept tensors up to a level that are worth moving to host memory."""
        names = {
            Level.INPUT: ("x",),
            Level.ATTENTION: ("qkv", "attended", "mid"),
            Level.GATE_UP: ("gate_up",),
            Level.ALL: ("q", "k", "normed_in", "normed_mid"),
        }
        wanted = (name for step, group in names.items() if step <= level for name in group)
        return [name for name in wanted if getattr(self, name) is not None]


@dataclass
class DecoderLayer:
    """Weights of one layer and its two passes."""

    shape: LayerShape
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    qkv: Projection
    o: Projection
    gate_up: Projection
    down: Projection
    workspace: int | None = field(default=None, init=False)
    """Bytes that attention's backward may take; None for its default."""

    @property
    def projections(self) -> tuple[Projection, Projection, Projection, Projection]:
        """The four groups in forward order."""
        return self.qkv, self.o, self.gate_up, self.down

    @property
    def grad_pad(self) -> int:
        """Spare columns that a (T, H) gradient needs so that o and down can extend it in place."""
        return max(self.o.pad, self.down.pad)

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
        tokens = x.shape[0]
        normed_in = self.qkv.extended_input(tokens)
        total, rstd_in = self._norm(x, delta, self.input_norm, normed_in)
        qkv, q, k, rstd_qk = self._project_qkv(normed_in, rope, None)
        attended, state = self._attend(q, k, qkv, sequences)
        attention_out = torch.empty_like(total)
        self.o.forward(attended, attention_out, self.o.extended_weight())
        saved = None
        if level is not None:
            saved = Saved(level, total, self.qkv.xa(normed_in), self.o.xa(attended))
            if level >= Level.ATTENTION:
                saved.qkv, saved.attended, saved.attention_state = qkv, attended, state
            if level >= Level.ALL:
                saved.normed_in, saved.rstd_in, saved.q, saved.k, saved.rstd_qk = normed_in, rstd_in, q, k, rstd_qk
        del normed_in, qkv, q, k, rstd_qk, attended, state  # the MLP takes the memory of what is not saved

        normed_mid = self.gate_up.extended_input(tokens)
        mid, rstd_mid = self._norm(total, attention_out, self.post_norm, normed_mid, sum_out=attention_out)
        gate_up = self._project_gate_up(normed_mid, None)
        if saved is not None:
            saved.xa_gate_up = self.gate_up.xa(normed_mid)
            if saved.level >= Level.ATTENTION:
                saved.mid = mid
            if saved.level >= Level.GATE_UP:
                saved.gate_up = gate_up
            if saved.level >= Level.ALL:
                saved.normed_mid, saved.rstd_mid = normed_mid, rstd_mid
        del normed_mid
        hidden = self.down.extended_input(tokens)
        swiglu_forward(gate_up[:, : self.gate_up.out_features], hidden[:, : self.down.in_features])
        del gate_up
        output = torch.empty_like(total)
        self.down.forward(hidden, output, self.down.extended_weight())
        if saved is not None:
            saved.xa_down = self.down.xa(hidden)
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
        grad_mid = self._backward_mlp(grad, saved)
        return self._backward_attention(grad_mid, saved, sequences, rope, need_input_grad=need_input_grad)

    def _norm(
        self, x: Tensor, delta: Tensor | None, weight: Tensor, out: Tensor, sum_out: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Normalize x + delta into the first H columns of `out`. Returns: the sum, rstd."""
        target = out[:, : self.shape.hidden]
        if delta is None:
            return x, rms_norm_forward(x, weight, self.shape.eps, target)[1]
        total, _, rstd = add_rms_norm_forward(x, delta, weight, self.shape.eps, target, sum_out)
        return total, rstd

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

    def _project_gate_up(self, normed: Tensor, xa: Tensor | None) -> Tensor:
        gate_up = self.gate_up.extended_output(normed.shape[0])
        self.gate_up.forward(normed, gate_up[:, : self.gate_up.out_features], self.gate_up.extended_weight(), xa)
        return gate_up

    def _recompute_attention(self, saved: Saved, sequences: Sequences, rope: Rope) -> None:
        if saved.attended is not None:
            return
        saved.normed_in = self.qkv.extended_input(saved.x.shape[0])
        _, saved.rstd_in = self._norm(saved.x, None, self.input_norm, saved.normed_in)
        saved.qkv, saved.q, saved.k, saved.rstd_qk = self._project_qkv(saved.normed_in, rope, saved.xa_qkv)
        saved.attended, saved.attention_state = self._attend(saved.q, saved.k, saved.qkv, sequences)
        attention_out = torch.empty_like(saved.x)
        self.o.forward(saved.attended, attention_out, self.o.extended_weight(), saved.xa_o)
        saved.normed_mid = self.gate_up.extended_input(saved.x.shape[0])
        saved.mid, saved.rstd_mid = self._norm(
            saved.x, attention_out, self.post_norm, saved.normed_mid, sum_out=attention_out
        )

    def _backward_mlp(self, grad: Tensor, saved: Saved) -> Tensor:
        """Return the gradient of mid (T, H + grad_pad), in the memory of `grad`."""
        width, mid = self.shape.hidden, saved.mid
        assert mid is not None
        if saved.normed_mid is None or saved.rstd_mid is None:
            saved.normed_mid = self.gate_up.extended_input(mid.shape[0])
            _, saved.rstd_mid = self._norm(mid, None, self.post_norm, saved.normed_mid)
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
        rms_norm_backward(grad_normed, mid, self.post_norm, saved.rstd_mid, residual_grad=stream, out=stream)
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

    def _backward_attention(
        self, grad: Tensor, saved: Saved, sequences: Sequences, rope: Rope, *, need_input_grad: bool
    ) -> Tensor | None:
        """Return the gradient of x (T, H + grad_pad), in the memory of `grad`."""
        shape, width = self.shape, self.shape.hidden
        assert saved.attended is not None
        assert saved.qkv is not None
        grad_o = grad[:, : width + self.o.pad]
        o_weight = self.o.extended_weight()
        self.o.backward_output(grad_o, saved.xa_o, o_weight)
        self.o.backward_weight(grad_o, saved.attended[:, : shape.q_width])
        grad_attended = torch.empty((grad.shape[0], shape.q_width), dtype=grad.dtype, device=grad.device)
        self.o.backward_input(grad_o, o_weight, grad_attended)
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
            _, saved.rstd_in = self._norm(saved.x, None, self.input_norm, saved.normed_in)
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
