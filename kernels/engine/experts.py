"""The second half of a decoder layer that is a mixture of experts: norm, router, experts; forward and backward.

    l    = rms_norm(mid) Wr                 k experts per token and their weights w (routing.py)
    x    = rows of rms_norm(mid), one for each pair of a token and an expert, sorted by expert (expert_rows.py)
    gu   = x Wgu_e + (x A_e) B_e,   h = swiglu(gu),   y = h Wdown_e + (h A_e) B_e
    out  = sum over a token's rows of w y

Experts are two stacks of matrices with one LoRA adapter for each expert, as PEFT's `target_parameters` lays them out:
A (E r, K), an expert's rows together, and B (N, r E), expert fastest. The router is frozen, but gradients pass through
its weights. NF4 stacks are decoded just before use, into memory that all layers share: every expert once per pass, also
those without a token, which the host would have to ask the device for.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from finemill.kernels.engine.adapters import GroupAdapter
from finemill.kernels.engine.mlp import normalize
from finemill.kernels.engine.plan import ExpertShape, LayerShape, Level
from finemill.kernels.engine.projection import Projection, mm_fp32
from finemill.kernels.engine.saved import Routing, Saved
from finemill.kernels.ops.combine_experts import combine_experts
from finemill.kernels.ops.division import choose_block
from finemill.kernels.ops.expert_lora import expert_gradient, gather_project, project
from finemill.kernels.ops.expert_rows import ExpertRows, sort_by_expert
from finemill.kernels.ops.grouped_gemm import grouped_gemm
from finemill.kernels.ops.nf4_stack import NF4Stack, dequantize_nf4_stack
from finemill.kernels.ops.rms_norm import rms_norm_backward
from finemill.kernels.ops.routing import route, route_backward_reference
from finemill.kernels.ops.swiglu import swiglu_forward
from finemill.kernels.ops.swiglu_experts import swiglu_experts_backward

# T tokens, E experts, k per token, R rows, H model width, I feed-forward width of one expert, r rank


@dataclass(frozen=True)
class Factors:
    """16-bit copies of a stack's adapters: a (E, r, K), b (E, N, r) times the scaling; r a multiple of 16."""

    a: Tensor
    b: Tensor


@dataclass
class ExpertProjection:
    """One linear layer of all experts.

    Args:
        weight: frozen (E, N, K), or NF4 matrices whose decoded values lie like that.
        shape: (E, N, K).
        adapter: the stacked LoRA: a (E r, K), b (N, r E); or None.
        dtype: compute dtype.
        device: where it computes.
        scratch: returns the buffer of a shape to decode into; None keeps a decoded weight for good.
    """

    weight: NF4Stack | Tensor
    shape: tuple[int, int, int]
    adapter: GroupAdapter | None
    dtype: torch.dtype
    device: torch.device
    scratch: Callable[[tuple[int, ...]], Tensor] | None = None
    cached: Tensor | None = None
    rank: int = field(init=False)

    def __post_init__(self) -> None:
        """Take the rank of one expert from the stacked adapter."""
        self.rank = 0 if self.adapter is None else self.adapter.rank // self.shape[0]

    @property
    def columns(self) -> int:
        """Columns of the product with A: the rank, rounded up to what a matrix product takes."""
        return -(-self.rank // 16) * 16

    def cache_weight(self) -> None:
        """Decode the weight once and keep it."""
        if self.cached is None and isinstance(self.weight, NF4Stack):
            out = torch.empty(self.shape, dtype=self.dtype, device=self.device)
            self.cached = dequantize_nf4_stack(self.weight, out)

    def drop_cache(self) -> None:
        """Free a kept weight."""
        self.cached = None

    def decoded(self) -> Tensor:
        """Return the weight (E, N, K); one in scratch is valid until another stack is decoded."""
        if isinstance(self.weight, Tensor):
            return self.weight
        if self.cached is not None:
            return self.cached
        assert self.scratch is not None
        return dequantize_nf4_stack(self.weight, self.scratch(self.shape))

    def factors(self) -> Factors | None:
        """Return copies of the adapters as they are, None where there are none."""
        if self.adapter is None:
            return None
        (experts, n, k), columns = self.shape, self.columns
        make = torch.empty if columns == self.rank else torch.zeros
        a = make((experts, columns, k), dtype=self.dtype, device=self.device)
        a[:, : self.rank].copy_(self.adapter.a.view(experts, self.rank, k))
        b = make((experts, n, columns), dtype=self.dtype, device=self.device)
        b[:, :, : self.rank].copy_(self._by_expert(self.adapter.b) * self.adapter.scaling)
        return Factors(a, b)

    def empty_low(self, rows: ExpertRows) -> Tensor | None:
        """Uninitialized (R, r) for a product with A or B, None where there is no adapter."""
        if self.adapter is None:
            return None
        return torch.empty((rows.num_rows, self.columns), dtype=self.dtype, device=self.device)

    def add_grad_a(self, low: Tensor | None, x: Tensor, rows: ExpertRows) -> None:
        """Add dA from the rows' dy B (R, r) and input (R, K)."""
        if self.adapter is not None and low is not None:
            experts, _, k = self.shape
            expert_gradient(low, x, rows, self.adapter.grad_a.view(experts, self.rank, k), 1.0)

    def add_grad_b(self, low: Tensor | None, dy: Tensor, rows: ExpertRows) -> None:
        """Add dB from the rows' x A^T (R, r) and gradient (R, N)."""
        if self.adapter is not None and low is not None:
            grad = self._by_expert(self.adapter.grad_b).transpose(1, 2)
            expert_gradient(low, dy, rows, grad, self.adapter.scaling)

    def _by_expert(self, b: Tensor) -> Tensor:
        """View B's layout (N, r E) as (E, N, r)."""
        return b.view(self.shape[1], self.rank, self.shape[0]).permute(2, 0, 1)


@dataclass
class ExpertMLP:
    """Norm, router and experts."""

    shape: LayerShape
    experts: ExpertShape
    norm: Tensor
    router: Tensor
    gate_up: ExpertProjection
    down: ExpertProjection

    @property
    def projections(self) -> tuple[Projection, ...]:
        """Groups of linear layers that every token takes: none."""
        return ()

    @property
    def stacks(self) -> tuple[ExpertProjection, ...]:
        """Projections of experts, in forward order."""
        return self.gate_up, self.down

    @property
    def grad_pad(self) -> int:
        """Spare columns that the result's gradient needs: none."""
        return 0

    def is_tiled(self, tokens: int) -> bool:
        """Whether so many tokens are taken in parts: never."""
        return False

    def extended_input(self, tokens: int) -> Tensor:
        """Uninitialized (T, H) for the norm's output."""
        return torch.empty((tokens, self.shape.hidden), dtype=self.norm.dtype, device=self.norm.device)

    def forward(self, x: Tensor, delta: Tensor, saved: Saved | None) -> tuple[Tensor, Tensor]:
        """Run norm, router and experts; arguments and results as `DenseMLP.forward`'s."""
        normed = self.extended_input(x.shape[0])
        mid, rstd_mid = normalize(x, delta, self.norm, self.shape, normed, sum_out=delta)
        routing = self._route(normed)
        rows = routing.rows
        factors = self.gate_up.factors()
        gathered, low = self._gather(normed, rows, factors)
        gate_up = self._project_gate_up(gathered, low, rows, factors, self.gate_up.decoded())
        del gathered, low
        hidden = self._empty_rows(rows, self.experts.intermediate)
        swiglu_forward(gate_up, hidden)
        if saved is not None:
            saved.routing = routing
            if saved.level >= Level.ATTENTION:
                saved.mid = mid
            if saved.level >= Level.GATE_UP:
                saved.gate_up = gate_up
            if saved.level >= Level.ALL:
                saved.normed_mid, saved.rstd_mid = normed, rstd_mid
        del gate_up, normed
        factors, low = self.down.factors(), self.down.empty_low(rows)
        if factors is not None and low is not None:
            project(hidden, factors.a, rows, low)
        if saved is not None and low is not None:
            saved.xa_down = low
        result = self._empty_rows(rows, self.shape.hidden)
        grouped_gemm(hidden, self.down.decoded(), rows, result, low, None if factors is None else factors.b)
        del hidden
        return mid, combine_experts(result, rows, torch.empty_like(x), routing.weights)

    def backward(self, grad: Tensor, saved: Saved) -> Tensor:
        """Return the gradient of the sum, in the memory of `grad` (T, H + P), the layer's result's."""
        mid, routing, stream = saved.mid, saved.routing, grad[:, : self.shape.hidden]
        assert mid is not None
        assert routing is not None
        rows = routing.rows
        if saved.normed_mid is None or saved.rstd_mid is None:
            saved.normed_mid = self.extended_input(mid.shape[0])
            _, saved.rstd_mid = normalize(mid, None, self.norm, self.shape, saved.normed_mid)
        normed, saved.normed_mid = saved.normed_mid, None
        hidden, down_b, weights = self._backward_down(stream, saved, routing)
        factors = self.gate_up.factors()
        gathered, low, weight = None, None, None
        if saved.gate_up is None:
            # After down, whose weight shares its memory with this one: it is decoded once for both products.
            gathered, low = self._gather(normed, rows, factors)
            weight = self.gate_up.decoded()
            saved.gate_up = self._project_gate_up(gathered, low, rows, factors, weight)
        grad_gate_up, saved.gate_up = saved.gate_up, None
        d_weights = swiglu_experts_backward(hidden, grad_gate_up, rows, weights)
        if down_b is not None:
            self.down.add_grad_a((down_b * weights[:, None]).to(hidden.dtype), hidden, rows)
        del hidden, down_b
        if gathered is None:
            gathered, low = self._gather(normed, rows, factors)
        del normed
        dy_b = self.gate_up.empty_low(rows)
        if factors is not None and dy_b is not None:
            project(grad_gate_up, factors.b, rows, dy_b, transposed=True)
        self.gate_up.add_grad_b(low, grad_gate_up, rows)
        self.gate_up.add_grad_a(dy_b, gathered, rows)
        a = None if factors is None else factors.a
        weight = self.gate_up.decoded() if weight is None else weight
        grouped_gemm(grad_gate_up, weight, rows, gathered, dy_b, a, transposed=True)
        del grad_gate_up
        grad_normed = combine_experts(gathered, rows, torch.empty_like(mid))
        del gathered
        d_logits = route_backward_reference(
            rows.of_pairs(d_weights),
            self._logits_like(routing),
            routing.experts,
            routing.weights,
            normalize=self.experts.normalize,
        )
        grad_normed.addmm_(d_logits.to(grad_normed.dtype), self.router)
        rms_norm_backward(grad_normed, mid, self.norm, saved.rstd_mid, residual_grad=stream, out=stream)
        saved.mid = saved.routing = None
        return grad

    def _backward_down(self, grad: Tensor, saved: Saved, routing: Routing) -> tuple[Tensor, Tensor | None, Tensor]:
        """Add the gradient of down's B.

        Returns: (R, I), the gradient of h for rows whose weight is one; (R, r), dy B of the same; (R,), the weights.
        """
        rows = routing.rows
        weights = rows.of_rows(routing.weights)
        factors, dy_b = self.down.factors(), self.down.empty_low(rows)
        dy = self._empty_rows(rows, self.shape.hidden)
        gather_project(grad, None if factors is None else factors.b, rows, dy, dy_b, transposed=True)
        hidden = self._empty_rows(rows, self.experts.intermediate)
        a = None if factors is None else factors.a
        grouped_gemm(dy, self.down.decoded(), rows, hidden, dy_b, a, transposed=True)
        if dy_b is not None:
            # A row's weight multiplies its result: it is on neither dy nor h, but on one side of each product.
            self.down.add_grad_b((saved.xa_down * weights[:, None]).to(dy.dtype), dy, rows)
        return hidden, dy_b, weights

    def _route(self, normed: Tensor) -> Routing:
        shape, tokens = self.experts, normed.shape[0]
        logits = mm_fp32(normed, self.router.t())
        experts, weights = route(logits, shape.per_token, normalize=shape.normalize)
        rows = sort_by_expert(experts, shape.count, choose_block(tokens, shape.per_token, shape.count))
        return Routing(experts, weights, rows, None if shape.normalize else logits)

    def _logits_like(self, routing: Routing) -> Tensor:
        """The logits, or, where only those of chosen experts count, something of their shape."""
        if routing.logits is not None:
            return routing.logits
        weights = routing.weights
        return weights.new_empty(1).expand(weights.shape[0], self.experts.count)

    def _gather(self, normed: Tensor, rows: ExpertRows, factors: Factors | None) -> tuple[Tensor, Tensor | None]:
        """Return the rows' inputs (R, H), and their products with gate|up's A."""
        gathered, low = self._empty_rows(rows, self.shape.hidden), self.gate_up.empty_low(rows)
        gather_project(normed, None if factors is None else factors.a, rows, gathered, low)
        return gathered, low

    def _project_gate_up(
        self, gathered: Tensor, low: Tensor | None, rows: ExpertRows, factors: Factors | None, weight: Tensor
    ) -> Tensor:
        gate_up = self._empty_rows(rows, 2 * self.experts.intermediate)
        b = None if factors is None else factors.b
        return grouped_gemm(gathered, weight, rows, gate_up, low, b)

    def _empty_rows(self, rows: ExpertRows, width: int) -> Tensor:
        return torch.empty((rows.num_rows, width), dtype=self.norm.dtype, device=self.norm.device)
