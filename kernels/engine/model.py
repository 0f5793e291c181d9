"""The whole decoder: embedding, layers, loss head and the flat adapters, as one forward and one backward.

One autograd node covers the model (`ModelLoss`), so that the engine decides itself when each layer's saved tensors are
dropped, parked in host memory or fetched back, and when each weight is decoded. The plan (planner.py) carries these
decisions; every plan gives bitwise equal gradients.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from finemill.kernels.engine.adapters import FlatAdapters, LoraPair
from finemill.kernels.engine.decoder_layer import DecoderLayer, Rope
from finemill.kernels.engine.expert_layout import EXPERT_STACKS
from finemill.kernels.engine.experts import ExpertMLP, ExpertProjection
from finemill.kernels.engine.host_memory import HostArena, gather_rows
from finemill.kernels.engine.loss_head import HeadResult, loss_head
from finemill.kernels.engine.mlp import DenseMLP
from finemill.kernels.engine.plan import LayerShape, Level, Plan, streamed_layers
from finemill.kernels.engine.projection import Projection
from finemill.kernels.engine.saved import Saved
from finemill.kernels.engine.weight_shards import WeightShards
from finemill.kernels.engine.weight_stream import WeightStream
from finemill.kernels.ops.attention import fitting_backend
from finemill.kernels.ops.lora import LoRADropout
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack
from finemill.kernels.ops.packing import PackedBatch

# T tokens, H model width, V vocabulary

GROUPS = (("q_proj", "k_proj", "v_proj"), ("o_proj",), ("gate_proj", "up_proj"), ("down_proj",))
"""The seven linear layers by the input they share, under transformers' names."""
LINEARS = tuple(name for group in GROUPS for name in group)
ATTENTION = tuple(name for group in GROUPS[:2] for name in group)


@dataclass
class LayerParts:
    """What one decoder layer is made of: frozen weights and biases by linear layer's name, norms, LoRA pairs.

    A `weights` entry of a 16-bit layer is replaced by a view of its extended copy, so that nothing is held twice. A
    mixture has a `router` (E, H), and its experts under the names of `EXPERT_STACKS` in `stacks` and `pairs`: (E, N,
    K), or NF4 matrices that lie in that order.
    """

    weights: dict[str, NF4Tensor | Tensor]
    biases: dict[str, Tensor | None]
    pairs: dict[str, LoraPair]
    input_norm: Tensor
    post_norm: Tensor
    q_norm: Tensor | None
    k_norm: Tensor | None
    router: Tensor | None = None
    stacks: dict[str, NF4Stack | Tensor] = field(default_factory=dict)

    @property
    def groups(self) -> tuple[tuple[str, ...], ...]:
        """The linear layers that every token takes, by the input they share."""
        return GROUPS if self.router is None else GROUPS[:2]


@dataclass
class ForwardState:
    """What a forward leaves for the backward."""

    batch: PackedBatch
    rope: Rope
    saved: list[Saved]
    parked: list[dict[str, Any]]
    grad: Tensor
    plan: Plan


@dataclass
class FastModel:
    """A causal language model of the Llama family on our kernels.

    Args:
        layers: decoder layers.
        embedding: (V, H), on the device or in pinned host memory.
        final_norm: (H,).
        eps: of the final norm.
        head: (V, H); the embedding itself where they are tied.
        rotary: gives cos and sin tables (1, positions, D) of the dtype of its first argument for position_ids (1, n),
            as transformers' rotary modules do.
        adapters: flat LoRA tensors.
        plan: what to keep, where; see planner.py.
        arena: host memory for what the plan parks; made when it is needed.
        weight_stream: brings NF4 weights from host memory or other GPUs; None while they are on the device.
    """

    layers: list[DecoderLayer]
    embedding: Tensor
    final_norm: Tensor
    eps: float
    head: Tensor
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    adapters: FlatAdapters
    plan: Plan
    dropout_seed: Tensor | None = None
    arena: HostArena | None = None
    weight_stream: WeightStream | None = None
    _tables: tuple[Tensor, Tensor] | None = None
    _head_mean: Tensor | None = None
    _scratch: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    _stack_scratch: Tensor | None = None

    @property
    def device(self) -> torch.device:
        """Where it computes."""
        return self.adapters.device

    @property
    def grad_pad(self) -> int:
        """Spare columns of the residual stream's gradient."""
        return max(layer.grad_pad for layer in self.layers)

    @property
    def shards(self) -> int:
        """GPUs that the NF4 weights are divided among."""
        shards = None if self.weight_stream is None else self.weight_stream.shards
        return 1 if shards is None else shards.count

    def scratch(self, group: Projection) -> Tensor:
        """Return the decode buffer of a layout, made at its first use."""
        if group.layout not in self._scratch:
            self._scratch[group.layout] = torch.zeros(group.extended_shape, dtype=group.dtype, device=group.device)
        return self._scratch[group.layout]

    def stack_scratch(self, shape: tuple[int, ...]) -> Tensor:
        """Return memory to decode experts' stacks of a shape into, the same for all of them."""
        if self._stack_scratch is None:
            largest = max(math.prod(stack_shape(name, self.layers[0].shape)) for name in EXPERT_STACKS)
            self._stack_scratch = torch.empty(largest, dtype=self.final_norm.dtype, device=self.device)
        return self._stack_scratch[: math.prod(shape)].view(shape)

    def apply_plan(self, plan: Plan) -> None:
        """Adopt a plan: keep or free decoded weights, begin to lock host memory for what is parked."""
        self.plan = plan
        for index, layer in enumerate(self.layers):
            layer.workspace = plan.workspace
            if isinstance(layer.mlp, DenseMLP):
                layer.mlp.tile = plan.mlp_tile
            groups: list[Projection | ExpertProjection] = [*layer.projections, *layer.mlp.stacks]
            for group in groups:
                if group.scratch is None or index < plan.cached_layers:
                    group.cache_weight()
                else:
                    group.drop_cache()
        if plan.cached_layers == len(self.layers):
            self._scratch.clear()
            self._stack_scratch = None
        if plan.stream_weights and self.weight_stream is None:
            self.stream_weights()
        stream = self.weight_stream
        if stream is not None and stream.place(streamed_layers(len(self.layers), plan.resident_layers)):
            for index, layer in enumerate(self.layers):
                layer.place_weights(stream.locate(index, layer.weights))  # type: ignore[arg-type]
        self.arena = begin_arena(plan, self.device, self.arena)

    def stream_weights(self, shards: WeightShards | None = None) -> None:
        """Move the NF4 weights to host memory, or divide them; their memory is free when nothing else holds it."""
        weights = [layer.weights for layer in self.layers]
        quantized = [[w for w in layer if not isinstance(w, Tensor)] for layer in weights]
        if quantized != weights:
            raise ValueError("only NF4 weights are streamed: this base is not quantized")
        self.weight_stream = WeightStream(quantized[0], len(self.layers), self.device, shards)
        for index, layer in enumerate(self.layers):
            layer.place_weights(self.weight_stream.put(index, quantized[index]))
        if shards is not None:
            shards.connect()

    def attention_backend(self, length: int) -> str:
        """Which implementation of attention runs for sequences of up to so many tokens."""
        return fitting_backend(self.device, self.final_norm.dtype, self.layers[0].shape.head_dim, length)

    def replaceable(self) -> list[Tensor]:
        """Memory that a longer batch may replace: a captured graph keeps what it was captured with."""
        return [*(self._tables or ()), *([] if self.arena is None else [self.arena.slab])]

    def score(self, batch: PackedBatch, *, adapters: bool = True, mean_logits: bool = False) -> HeadResult:
        """Compute the losses of a batch alone, without dropout.

        Args:
            batch: on this device.
            adapters: False for those of the frozen base, which is a preference's reference.
            mean_logits: as in `forward`.
        """
        groups = [group for layer in self.layers for group in layer.projections]
        stacks = [stack for layer in self.layers for stack in layer.mlp.stacks]
        dropouts = [group.dropout for group in groups]
        parts: list[Projection | ExpertProjection] = [*groups, *stacks]
        found = [part.adapter for part in parts if part.adapter is not None]
        scalings = [adapter.scaling for adapter in found]
        for group in groups:
            group.dropout = None
        for adapter in found:
            adapter.scaling *= adapters
        try:
            return self.forward(batch, 1.0, train=False, mean_logits=mean_logits)[0]
        finally:
            for group, dropout in zip(groups, dropouts, strict=True):
                group.dropout = dropout
            for adapter, scaling in zip(found, scalings, strict=True):
                adapter.scaling = scaling
            if not adapters:  # a pass that is still to be differentiated reads the kept weights again
                for group in groups:
                    group.refresh()

    def forward(
        self, batch: PackedBatch, scale: Tensor | float, *, train: bool, mean_logits: bool = False
    ) -> tuple[HeadResult, ForwardState | None]:
        """Compute the summed loss of a batch and, in training, everything its backward needs.

        Args:
            batch: on this device.
            scale: factor of the gradient.
            train: keep what the backward needs.
            mean_logits: also give the mean logit of each row.
        """
        rope = self._rope(batch)
        x, delta = gather_rows(self.embedding, batch.input_ids), None
        saved: list[Saved] = []
        parked: list[dict[str, Any]] = []
        if train and any(level is not None for level in self.plan.host_levels):
            self._arena_for(batch).reset()
        if self.weight_stream is not None:
            self.weight_stream.begin()
        for index, layer in enumerate(self.layers):
            if self.weight_stream is not None:
                self.weight_stream.visit(index)
            for group in layer.projections:  # here and not all at first: the device would wait for the launches
                group.refresh()
            level = self.plan.levels[index] if train else None
            x, delta, kept = layer.forward(x, delta, batch.sequences, rope, level)
            if kept is not None:
                saved.append(kept)
                parked.append(self._park(kept, self.plan.host_levels[index]))
        assert delta is not None
        if self.arena is not None:
            self.arena.drain()
        result = loss_head(
            x,
            delta,
            self.final_norm,
            self.eps,
            self.head,
            batch,
            scale,
            chunk=self.plan.head_chunk,
            pad=self.grad_pad if train else None,
            mean_head=self._mean_head() if mean_logits else None,
        )
        del x, delta
        if result.grad is None:
            return result, None
        state = ForwardState(batch, rope, saved, parked, result.grad, self.plan)
        result.grad = None
        return result, state

    def backward(self, state: ForwardState, factor: Tensor | None = None) -> None:
        """Add the gradient of every adapter to the flat gradient.

        Args:
            state: from `forward`; used up.
            factor: what the gradient is multiplied with, a scalar or (T, 1); None for one. The head and the norm before
                it take each token by itself, so that a loss of each has a factor of each.
        """
        grad: Tensor | None = state.grad
        state.grad = torch.empty(0)
        if factor is not None and grad is not None:
            grad.mul_(factor)
        self._prefetch(state, len(self.layers) - 1)
        for index in reversed(range(len(self.layers))):
            self._unpark(state, index)
            if self.weight_stream is not None:
                self.weight_stream.visit(index, backward=True)
            self._prefetch(state, index - 1)
            assert grad is not None
            grad = self.layers[index].backward(
                grad, state.saved.pop(), state.batch.sequences, state.rope, need_input_grad=index > 0
            )

    def loss_and_grad(self, batch: PackedBatch, scale: Tensor | float) -> HeadResult:
        """Run both passes of a micro-batch without autograd; gradients go to the flat gradient."""
        result, state = self.forward(batch, scale, train=True)
        assert state is not None
        self.backward(state)
        return result

    def abandon(self) -> None:
        """Release what a pass that failed half-way left in flight."""
        if self.arena is not None:
            self.arena.drain()

    def rehearse_attention(self, batch: PackedBatch, scale: Tensor | float) -> None:
        """Have attention's kernels and plans ready for a batch: run both passes on one layer of each kind alone.

        Args:
            batch: on this device.
            scale: factor of the gradient, zero to leave it as it is.
        """
        if self.weight_stream is not None:
            self.loss_and_grad(batch, scale)
            return
        self._rope(batch)
        kinds = {
            (level, *(group.pad for group in layer.projections)): (layer, level)
            for layer, level in zip(self.layers, self.plan.levels, strict=True)
        }
        layers, levels = zip(*kinds.values(), strict=True)
        plan = replace(self.plan, levels=levels, host_levels=(None,) * len(levels))
        replace(self, layers=list(layers), plan=plan).loss_and_grad(batch, scale)

    def _rope(self, batch: PackedBatch) -> Rope:
        needed = batch.sequences.max_length
        if self._tables is None or self._tables[0].shape[0] < needed:
            size = max(2048, 1 << (needed - 1).bit_length())
            positions = torch.arange(size, device=self.device)[None]
            like = torch.empty(1, dtype=torch.float32, device=self.device)
            with torch.no_grad(), torch.autocast(self.device.type, enabled=False):
                cos, sin = self.rotary(like, positions)
            half = cos.shape[-1] // 2
            self._tables = cos[0, :, :half].contiguous(), sin[0, :, :half].contiguous()
        return Rope(*self._tables, batch.position_ids)

    def _mean_head(self) -> Tensor:
        if self._head_mean is None:
            self._head_mean = self.head.mean(0, dtype=torch.float32).to(self.head.dtype)[:, None]
        return self._head_mean

    def _arena_for(self, batch: PackedBatch) -> HostArena:
        if self.arena is None:
            self.arena = HostArena(self.device)
        self.arena.reserve(self.plan.host_bytes(batch.num_tokens))
        return self.arena

    def _park(self, kept: Saved, level: Level | None) -> dict[str, Any]:
        if level is None:
            return {}
        assert self.arena is not None
        names = kept.large(level)
        items = self.arena.park([getattr(kept, name) for name in names], self.plan.in_flight)
        for name in names:
            setattr(kept, name, None)
        return dict(zip(names, items, strict=True))

    def _prefetch(self, state: ForwardState, index: int) -> None:
        if index >= 0 and state.parked[index]:
            assert self.arena is not None
            self.arena.prefetch(list(state.parked[index].values()))

    def _unpark(self, state: ForwardState, index: int) -> None:
        for name, item in state.parked[index].items():
            assert self.arena is not None
            setattr(state.saved[index], name, self.arena.take(item))


def begin_arena(plan: Plan, device: torch.device, arena: HostArena | None = None) -> HostArena | None:
    """Begin to lock the host memory that a plan's micro-batches park, in `arena` or a new one, if any."""
    size = plan.host_bytes(plan.micro_batch) if plan.micro_batch else 0
    if size:
        arena = arena or HostArena(device)
        arena.grow(size)
    return arena


class ModelLoss(torch.autograd.Function):
    """Autograd node of the whole model: forward gives the scaled loss, backward fills the flat gradient.

    `anchor` is any adapter parameter: it makes autograd call the backward, which writes gradients itself. The gradient
    is begun in the forward, in float16 without the scale: with it, before a `GradScaler` has multiplied the loss, most
    of it would be zero.
    """

    @staticmethod
    def forward(
        ctx: Any, anchor: Tensor, model: FastModel, batch: PackedBatch, scale: Tensor | float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return scale * loss, and the entropy and correct sums for metrics."""
        ctx.later = scale if model.final_norm.dtype == torch.float16 else None
        result, ctx.state = model.forward(batch, scale if ctx.later is None else 1.0, train=True)
        ctx.model = model
        ctx.mark_non_differentiable(result.entropy, result.correct)
        return result.loss * scale, result.entropy, result.correct

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[None, None, None, None]:
        """Run the model's backward; a second call would need a second forward."""
        if ctx.state is None:
            raise RuntimeError("this loss was differentiated already: its saved tensors are gone, run forward again")
        ctx.model.adapters.attach_grads()
        state, ctx.state = ctx.state, None
        ctx.model.backward(state, grad_loss if ctx.later is None else grad_loss * ctx.later)
        return None, None, None, None


class TokenLosses(torch.autograd.Function):
    """Autograd node of the whole model that gives each token's loss: any function of them is differentiated.

    The gradient of every row is made in the forward for a factor of one, and multiplied by the row's in the backward.
    """

    @staticmethod
    def forward(ctx: Any, anchor: Tensor, model: FastModel, batch: PackedBatch) -> tuple[Tensor, ...]:
        """Return loss, entropy, whether the label is the most likely token, and mean logit, (T,) fp32 each."""
        result, ctx.state = model.forward(batch, 1.0, train=True, mean_logits=True)
        ctx.model = model
        loss, *others = result.by_token(batch.num_tokens).unbind()
        ctx.mark_non_differentiable(*others)
        return loss, *others

    @staticmethod
    def backward(ctx: Any, grad_loss: Tensor, *_: Any) -> tuple[None, None, None]:
        """Run the model's backward; a second call would need a second forward."""
        if ctx.state is None:
            raise RuntimeError("these losses were differentiated already: run forward again")
        ctx.model.adapters.attach_grads()
        state, ctx.state = ctx.state, None
        ctx.model.backward(state, grad_loss[:, None])
        return None, None, None


def assemble_model(
    parts: list[LayerParts],
    shape: LayerShape,
    *,
    embedding: Tensor,
    final_norm: Tensor,
    head: Tensor,
    rotary: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]],
    dropout: float = 0.0,
) -> FastModel:
    """Build the engine from its parts; the LoRA parameters become slices of flat tensors.

    Raises: ValueError: adapters over one input have different scalings.
    """
    device, dtype = final_norm.device, final_norm.dtype
    adapters = FlatAdapters(device)
    tickets: list[int | None] = []
    for layer in parts:
        for names in layer.groups:
            shapes = [layer.weights[name].shape for name in names]
            widths = tuple(int(rows) for rows, _ in shapes)
            tickets.append(adapters.reserve([layer.pairs.get(name) for name in names], widths, int(shapes[0][1])))
        for name in layer.stacks:
            _, rows, width = stack_shape(name, shape)
            tickets.append(adapters.reserve([layer.pairs.get(name)], (rows,), width))
    adapters.build()
    groups_of = iter([None if ticket is None else adapters.group(ticket) for ticket in tickets])
    seed = torch.zeros(1, dtype=torch.int64, device=device) if dropout else None
    model = FastModel([], embedding, final_norm, shape.eps, head, rotary, adapters, Plan.everything(len(parts)), seed)
    stream = 0
    for layer in parts:
        groups: list[Projection] = []
        for names in layer.groups:
            weights = [layer.weights[name] for name in names]
            group = Projection(
                weights=weights,
                biases=[layer.biases.get(name) for name in names],
                adapter=next(groups_of),
                dtype=dtype,
                device=device,
                dropout=None if seed is None else LoRADropout(dropout, seed, stream),
                scratch=model.scratch if any(isinstance(weight, NF4Tensor) for weight in weights) else None,
            )
            stream += len(names)
            if group.scratch is None:
                group.cache_weight()
                group.weights = list(group.views())
                layer.weights.update(zip(names, group.views(), strict=True))
            groups.append(group)
        qkv, o, *others = groups
        if layer.router is None:
            mlp: DenseMLP | ExpertMLP = DenseMLP(shape, layer.post_norm, *others)
        else:
            assert shape.experts is not None
            gate_up, down = (
                ExpertProjection(
                    weight=weight,
                    shape=stack_shape(name, shape),
                    adapter=next(groups_of),
                    dtype=dtype,
                    device=device,
                    scratch=model.stack_scratch if isinstance(weight, NF4Stack) else None,
                )
                for name, weight in layer.stacks.items()
            )
            mlp = ExpertMLP(shape, shape.experts, layer.post_norm, layer.router, gate_up, down)
        model.layers.append(DecoderLayer(shape, layer.input_norm, layer.q_norm, layer.k_norm, qkv, o, mlp))
    return model


def stack_shape(name: str, shape: LayerShape) -> tuple[int, int, int]:
    """Return (E, N, K) of a stack of `EXPERT_STACKS`."""
    experts = shape.experts
    assert experts is not None
    if name == EXPERT_STACKS[0]:
        return experts.count, 2 * experts.intermediate, shape.hidden
    return experts.count, shape.hidden, experts.intermediate
