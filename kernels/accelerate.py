"""Turn a transformers + PEFT model into the fast one, and back.

`accelerate_model` changes the one model object it is given: its LoRA parameters become slices of flat tensors and its
`forward` computes the training loss on our kernels. Parameters, their names, PEFT's saving and loading, and evaluation
stay what they were; nothing is patched at import. `restore_model` undoes it.
"""

import logging
import math
from dataclasses import dataclass
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from finemill.errors import UserError
from finemill.kernels.engine.adapters import LoraPair
from finemill.kernels.engine.expert_layout import EXPERT_FAMILIES, EXPERT_STACKS, expert_shape, has_dense_layers
from finemill.kernels.engine.host_memory import gather_rows, pin
from finemill.kernels.engine.model import FastModel, LayerParts, ModelLoss, assemble_model
from finemill.kernels.engine.plan import LayerShape, Plan
from finemill.kernels.engine.quantized_experts import quantized_stacks
from finemill.kernels.ops.division import CUDNN_LENGTH
from finemill.kernels.ops.nf4 import NF4Tensor
from finemill.kernels.ops.nf4_stack import NF4Stack
from finemill.kernels.ops.packing import length_classes, pack_rows, splittable
from finemill.kernels.planning.mixture import MixtureWorkload
from finemill.kernels.planning.workload import FAMILIES, Workload
from finemill.kernels.streamed import attach_stream, detach_stream, point_model_at, weight_stream_of
from finemill.kernels.token_scores import TokenScorer

logger = logging.getLogger(__name__)

_COVERED = {"input_ids", "labels", "attention_mask", "position_ids", "num_items_in_batch", "use_cache", "return_dict"}
"""Arguments of a forward that the fast path understands; with any other the model's own forward runs."""
_SCORED = {"input_ids", "labels", "attention_mask", "use_cache", "fused_lm_head"}
"""Those of a forward that is asked for each token's log probability."""
_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
"""Frequencies that do not depend on the length of the sequences at hand: one table serves all of them."""


class UnsupportedModelError(UserError):
    """The fast path does not cover this model; the message says why."""


@dataclass
class Acceleration:
    """Outcome of `accelerate_model`: the engine, or the reason why the model runs unchanged."""

    model: nn.Module
    engine: FastModel | None
    reason: str | None = None

    @property
    def active(self) -> bool:
        """Whether the fast path is in place."""
        return self.engine is not None


def accelerate_model(model: nn.Module, *, plan: Plan | None = None) -> Acceleration:
    """Put a LoRA or QLoRA model on the fast path.

    Args:
        model: a PEFT model over a causal language model of one of `FAMILIES` or `EXPERT_FAMILIES`, NF4 or 16-bit, on
            one device, with LoRA on any of the seven linear layers, of experts by `target_parameters`.
        plan: how to spend memory; by default everything is kept.
    Returns: the engine, and the reason if the model was left unchanged (also logged as a warning).
    """
    causal = _causal_model(model)
    if (present := getattr(causal, "_finemill_engine", None)) is not None:
        if plan is not None:
            adopt_plan(model, plan)
        return Acceleration(model, present)
    try:
        engine = _build(model)
    except UnsupportedModelError as error:
        return leave_unchanged(model, str(error))
    causal._finemill_engine = engine
    causal._finemill_scorer = TokenScorer(engine)
    adopt_plan(model, plan or Plan.everything(len(engine.layers)))
    # What libraries put in place of the class's forward (TRL's fused head), to come back to.
    causal._finemill_original = causal.__dict__.get("forward")
    # Bound to the model, so that a deep copy computes with its own engine.
    causal.forward = MethodType(_forward, causal)
    logger.info("training runs on finemill's kernels: %d layers, plan %s", len(engine.layers), engine.plan)
    return Acceleration(model, engine)


def leave_unchanged(model: nn.Module, reason: str) -> Acceleration:
    """Say once why a model is not accelerated."""
    logger.warning("model runs unchanged, without finemill's kernels: %s", reason)
    return Acceleration(model, None, reason)


def _forward(causal: Any, *args: Any, **kwargs: Any) -> Any:
    """The accelerated model's forward: a training loss comes from the engine, everything else from the model's own."""
    trains = causal.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
    # PeftModelForCausalLM names every argument it knows, most of them None.
    given = {name: value for name, value in kwargs.items() if value is not None}
    if given.get("fused_lm_head") and not args and _scores(causal, given):
        with torch.autocast(causal._finemill_engine.device.type, enabled=False):
            scorer: TokenScorer = causal._finemill_scorer
            off = _first_lora(causal).disable_adapters
            return scorer.score(
                given["input_ids"],
                given["labels"],
                given.get("attention_mask"),
                adapters=not off,
                train=causal.training and torch.is_grad_enabled() and not off,
            )
    if (
        not trains
        or args
        or not _COVERED.issuperset(given)
        or not _as_built(causal)
        or not _is_covered(causal, **given)
    ):
        if weight_stream_of(causal) is not None and causal.training and torch.is_grad_enabled():
            raise UnsupportedModelError(
                "the base's layers visit the device two at a time, where only the engine trains them: give labels, "
                "plain or packed rows and nothing else, or load the base on the device"
            )
        original = causal._finemill_original
        return type(causal).forward(causal, *args, **kwargs) if original is None else original(*args, **kwargs)
    with torch.autocast(causal._finemill_engine.device.type, enabled=False):
        return _training_loss(causal._finemill_engine, **given)


def _scores(causal: Any, given: dict[str, Any]) -> bool:
    """Whether the engine answers a forward that asks for log probabilities, of the adapter or of the base alone."""
    asked = _SCORED.issuperset(given) and splittable(given.get("attention_mask"), None)
    return asked and (_as_built(causal) or bool(_first_lora(causal).disable_adapters))


def _as_built(causal: Any) -> bool:
    """Whether PEFT would use, and train, the adapter that the engine was built with."""
    first = _first_lora(causal)
    active = list(first.active_adapters)
    if first.disable_adapters or first.merged or len(active) != 1 or active[0] not in first.lora_A:
        return False
    weight, ours = first.lora_A[active[0]].weight, causal._finemill_engine.adapters.parameters
    return bool(weight.requires_grad) and any(weight is parameter for parameter in ours)


def _first_lora(causal: Any) -> Any:
    """A layer with adapters: what PEFT does with one, it does with all."""
    holders = (h for layer in causal.model.layers for h in (_linears(layer) | _expert_stacks(layer)).values())
    return next(holder for holder in holders if _is_lora(holder))


def _is_lora(linear: Any) -> bool:
    return hasattr(linear, "lora_A")


def _is_covered(
    causal: Any,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
    **_: Any,
) -> bool:
    """Whether the engine gives these arguments the meaning that transformers does."""
    # Beside a cache, transformers takes positions that start again for one sequence.
    cached = causal.config.use_cache if use_cache is None else use_cache
    packed = position_ids is not None and cached
    return return_dict is not False and not packed and splittable(attention_mask, position_ids)


def adopt_plan(model: nn.Module, plan: Plan) -> None:
    """Change how an accelerated model spends memory, its embedding's and its NF4 weights' place included."""
    causal = _causal_model(model)
    engine: FastModel = causal._finemill_engine
    engine.apply_plan(plan)
    if engine.weight_stream is not None:
        layers: list[list[Any]] = [layer.weights for layer in engine.layers]
        if weight_stream_of(causal) is None:
            attach_stream(causal, engine.weight_stream, layers)
        else:
            point_model_at(causal, layers)
    embedding = causal.model.embed_tokens
    on_host = embedding.weight.device != engine.device
    if plan.embedding_on_host == on_host or engine.head.data_ptr() == engine.embedding.data_ptr():
        return
    if plan.embedding_on_host:
        embedding.weight = nn.Parameter(pin(embedding.weight.detach()), requires_grad=False)
        embedding.forward = lambda ids: gather_rows(embedding.weight.detach(), ids.reshape(-1)).unflatten(0, ids.shape)
    else:
        embedding.weight = nn.Parameter(embedding.weight.detach().to(engine.device), requires_grad=False)
        del embedding.forward
    engine.embedding = embedding.weight.detach()


def workload_of(
    engine: FastModel, *, tokens: int, row: int, typical: int | None = None, whole: bool = False
) -> Workload:
    """Describe an engine and a trainer's step, of sequences of many lengths, to the planner.

    Args:
        engine: what `accelerate_model` built.
        tokens: per optimizer step.
        row: longest sequence.
        typical: length of the sequence that a token is in, on average, if it is known.
        whole: whether the step is one micro-batch.
    """
    layer = engine.layers[0]
    attention = engine.attention_backend(length_classes([row])[0][2])
    groups = [group for layer in engine.layers for group in layer.projections]
    stacks = [stack for layer in engine.layers for stack in layer.mlp.stacks]
    quantized = any(group.scratch is not None for group in groups)
    kept = [math.prod(group.extended_shape) for group in groups if group.scratch is None and quantized]
    settings: dict[str, Any] = {
        "shape": layer.shape,
        "num_layers": len(engine.layers),
        "vocabulary": engine.head.shape[0],
        "tied": engine.head.data_ptr() == engine.embedding.data_ptr(),
        "rank": max(group.rank // len(group.weights) for group in groups),
        "quantized": quantized,
        "kept_bytes": sum(kept) * engine.final_norm.dtype.itemsize,
        "tokens": tokens,
        "row": row,
        "ragged": True,
        "typical": typical,
        "whole": whole,
        "fa4": attention == "fa4",
        "flash": attention == "flash" and row > CUDNN_LENGTH,
        "cudnn": engine.attention_backend(CUDNN_LENGTH) == "cudnn",
        "shards": engine.shards,
    }
    if stacks:
        return MixtureWorkload(**settings, expert_rank=max(stack.rank for stack in stacks))
    return Workload(**settings)


def has_unequal_layers(model: nn.Module) -> bool:
    """Whether some layers of a model have experts and others have none, so that no plan of equal layers fits."""
    return has_dense_layers(_causal_model(model).config.to_dict())


def restore_model(model: nn.Module) -> None:
    """Undo `accelerate_model`: the model's own forward and parameter memory, with the trained values."""
    causal = _causal_model(model)
    engine: FastModel | None = getattr(causal, "_finemill_engine", None)
    if engine is None:
        return
    adopt_plan(model, Plan.everything(len(engine.layers)))
    original = causal._finemill_original
    del causal.forward, causal._finemill_engine, causal._finemill_scorer, causal._finemill_original
    if original is not None:
        causal.forward = original
    engine.adapters.restore()
    detach_stream(causal)
    for layer in causal.model.layers:
        for linear in _linears(layer).values():
            weight = _base(linear).weight
            if not hasattr(weight, "quant_state"):
                weight.data = weight.data.contiguous()


def _training_loss(
    engine: FastModel,
    input_ids: Tensor,
    labels: Tensor,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: Tensor | int | None = None,
    use_cache: bool | None = None,
    return_dict: bool | None = None,
) -> CausalLMOutputWithPast:
    batch = pack_rows(input_ids, labels, attention_mask, position_ids).to(engine.device)
    if num_items_in_batch is None:
        count = batch.num_tokens if batch.loss_rows is None else batch.loss_rows.numel()
        scale: Tensor | float = 1.0 / max(1, count)
    elif isinstance(num_items_in_batch, Tensor):
        scale = num_items_in_batch.to(engine.device, torch.float32).reciprocal()
    else:
        scale = 1.0 / num_items_in_batch
    if engine.dropout_seed is not None:
        engine.dropout_seed += 1
    loss, _entropy, _correct = ModelLoss.apply(engine.adapters.parameters[0], engine, batch, scale)
    return CausalLMOutputWithPast(loss=loss, logits=None)


def _build(model: nn.Module) -> FastModel:
    causal = _causal_model(model)
    _check_architecture(causal)
    config, decoder = causal.config, causal.model
    dtype = decoder.norm.weight.dtype
    parts = [_layer_parts(layer, dtype) for layer in decoder.layers]
    _check_trainable(model, parts)
    _check_tensors(causal, parts)
    try:
        engine = assemble_model(
            parts,
            _layer_shape(config),
            embedding=decoder.embed_tokens.weight.detach(),
            final_norm=decoder.norm.weight.detach(),
            head=causal.lm_head.weight.detach(),
            rotary=decoder.rotary_emb,
            dropout=_dropout(model),
        )
    except ValueError as error:
        raise UnsupportedModelError(str(error)) from error
    engine.weight_stream = weight_stream_of(causal)
    for layer, part in zip(decoder.layers, parts, strict=True):
        for name, linear in _linears(layer).items():
            weight = part.weights[name]
            if isinstance(weight, Tensor):
                _base(linear).weight.data = weight
    return engine


def _check_architecture(causal: Any) -> None:
    """Refuse what would compute something else than the engine does: other families, or settings of these."""
    config = causal.config
    covered = (*FAMILIES, *EXPERT_FAMILIES)
    if config.model_type not in covered:
        raise UnsupportedModelError(f"model_type is {config.model_type!r}, the fast path covers {', '.join(covered)}")
    kind = type(causal)
    if not kind.__module__.startswith("transformers.models.") or not kind.__name__.endswith("ForCausalLM"):
        raise UnsupportedModelError(f"{kind.__name__} is not one of transformers' own causal language models")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act is {config.hidden_act!r}, expected 'silu'")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(f"sliding_window is {config.sliding_window}: attention windows are not covered")
    if getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(f"attention_dropout is {config.attention_dropout}, expected 0")
    if getattr(config, "output_router_logits", False):
        raise UnsupportedModelError("output_router_logits is true: the router's auxiliary loss is not covered")
    if getattr(config, "router_jitter_noise", 0.0):
        raise UnsupportedModelError(f"router_jitter_noise is {config.router_jitter_noise}, expected 0")
    if getattr(causal.model.embed_tokens, "neftune_noise_alpha", None):
        raise UnsupportedModelError("NEFTune noise is on the embedding")
    shape, rotary = _layer_shape(config), causal.model.rotary_emb
    if rotary.rope_type not in _ROPE_TYPES:
        raise UnsupportedModelError(f"rope_type is {rotary.rope_type!r}: covered are {', '.join(_ROPE_TYPES)}")
    if 2 * rotary.inv_freq.numel() != shape.head_dim or shape.head_dim % 2:
        raise UnsupportedModelError(f"RoPE turns {2 * rotary.inv_freq.numel()} of {shape.head_dim} channels of a head")
    for layer in causal.model.layers:
        scaling = getattr(layer.self_attn, "scaling", None)
        if scaling is not None and abs(scaling * shape.head_dim**0.5 - 1) > 1e-6:
            raise UnsupportedModelError(f"attention scores are scaled by {scaling}, not by head_dim ** -0.5")


def _check_tensors(causal: Any, parts: list[LayerParts]) -> None:
    """Refuse tensors on several devices or of several dtypes."""
    decoder = causal.model
    dtype, device = decoder.norm.weight.dtype, decoder.norm.weight.device
    if dtype not in (torch.bfloat16, torch.float16, torch.float32):
        raise UnsupportedModelError(f"the model computes in {_name(dtype)}: bfloat16, float16 and float32 are covered")
    found = {"embedding": decoder.embed_tokens.weight, "output layer": causal.lm_head.weight}
    if getattr(causal.lm_head, "bias", None) is not None:
        raise UnsupportedModelError("the output layer has a bias")
    for index, part in enumerate(parts):
        norms = {"input_norm": part.input_norm, "post_norm": part.post_norm, "q_norm": part.q_norm}
        named = part.weights | part.biases | norms | part.stacks | {"k_norm": part.k_norm, "router": part.router}
        found |= {f"{name} of layer {index}": tensor for name, tensor in named.items() if tensor is not None}
    for name, tensor in found.items():
        quantized = isinstance(tensor, NF4Tensor | NF4Stack)
        place = tensor.packed.device if quantized else tensor.device
        if place != device:
            raise UnsupportedModelError(f"{name} is on {place}, the final norm on {device}: one device is covered")
        if not quantized and tensor.dtype != dtype:
            raise UnsupportedModelError(
                f"{name} is {_name(tensor.dtype)}, the final norm {_name(dtype)}: one dtype is covered "
                "(peft.prepare_model_for_kbit_training makes two of one)"
            )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _causal_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def _linears(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = {name: getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    if not hasattr(mlp, "experts"):
        modules |= {name: getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")}
    missing = [name for name, module in modules.items() if module is None]
    if missing:
        raise UnsupportedModelError(f"layer has no {', '.join(missing)}")
    return modules


def _expert_stacks(layer: Any) -> dict[str, Any]:
    """What holds each of a layer's stacks of experts: PEFT's wrapper of the parameter, or the experts' own module."""
    module = getattr(layer.mlp, "experts", None)
    if module is None:
        return {}
    found = {}
    while hasattr(module, "parameter_name"):
        found[f"experts.{module.parameter_name}"] = module
        module = module.base_layer
    stacks = {name: found.pop(name, module) for name in EXPERT_STACKS}
    if found or not all(hasattr(module, name.removeprefix("experts.")) for name in EXPERT_STACKS):
        raise UnsupportedModelError(f"experts have {', '.join(found) or 'other parameters'}, not {EXPERT_STACKS}")
    return stacks


def _stack_weight(name: str, holder: Any) -> NF4Stack | Tensor:
    module, parameter = holder.get_base_layer() if _is_lora(holder) else holder, name.removeprefix("experts.")
    weight: Tensor = getattr(module, parameter).detach()
    return quantized_stacks(module).get(parameter, weight)


def _base(linear: Any) -> Any:
    return getattr(linear, "base_layer", linear)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _frozen_weight(name: str, linear: Any, dtype: torch.dtype) -> NF4Tensor | Tensor:
    base = _base(linear)
    weight = getattr(base, "weight", None)
    state = getattr(weight, "quant_state", None)
    if state is not None:
        computes = getattr(base, "compute_dtype", None) or dtype
        # In float32 bitsandbytes multiplies the same 16-bit values: only sums differ, and not under autocast.
        if computes not in (dtype, torch.float32) or state.dtype not in (dtype, torch.float32):
            raise UnsupportedModelError(
                f"{name} was quantized from {_name(state.dtype)} and computes in {_name(computes)}, "
                f"the norms are {_name(dtype)}: one dtype is covered"
            )
        try:
            return NF4Tensor.from_bitsandbytes(weight)
        except ValueError as error:
            raise UnsupportedModelError(f"{name}: {error}") from error
    if type(base) is not nn.Linear or not isinstance(weight, nn.Parameter) or type(weight.data) is not Tensor:
        raise UnsupportedModelError(f"{name} is a {type(base).__name__}: NF4 and plain 16-bit layers are covered")
    return weight.detach()


def _layer_parts(layer: Any, dtype: torch.dtype) -> LayerParts:
    attention = layer.self_attn
    linears, stacks = _linears(layer), _expert_stacks(layer)
    return LayerParts(
        weights={name: _frozen_weight(name, linear, dtype) for name, linear in linears.items()},
        biases={name: _detached(_base(linear).bias) for name, linear in linears.items()},
        pairs=_layer_pairs(linears | stacks),
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
        router=layer.mlp.gate.weight.detach() if stacks else None,
        stacks={name: _stack_weight(name, holder) for name, holder in stacks.items()},
    )


def _layer_pairs(linears: dict[str, Any]) -> dict[str, LoraPair]:
    pairs = {}
    for name, linear in linears.items():
        if not _is_lora(linear):
            continue
        active = list(linear.active_adapters)
        if len(active) != 1 or active[0] not in linear.lora_A or linear.merged:
            raise UnsupportedModelError(f"{name} has active adapters {active}: exactly one unmerged LoRA is covered")
        adapter = active[0]
        variants = (getattr(linear, field, {}).get(adapter) for field in ("use_dora", "lora_variant", "lora_bias"))
        if any(variants) or not isinstance(linear.lora_A[adapter], nn.Linear):
            raise UnsupportedModelError(f"{name} is not plain LoRA (DoRA and other variants, LoRA biases)")
        if linear.disable_adapters:
            raise UnsupportedModelError(f"{name} has its adapter switched off")
        a, b = linear.lora_A[adapter].weight, linear.lora_B[adapter].weight
        if not (a.requires_grad and b.requires_grad):
            raise UnsupportedModelError(f"{name} has a frozen adapter: the engine trains A and B of every one")
        pairs[name] = LoraPair(a, b, float(linear.scaling[adapter]))
    return pairs


def _check_trainable(model: nn.Module, parts: list[LayerParts]) -> None:
    known = {id(tensor) for layer in parts for pair in layer.pairs.values() for tensor in (pair.a, pair.b)}
    if not known:
        raise UnsupportedModelError("the model has no LoRA adapter on its decoder layers")
    others = [name for name, p in model.named_parameters() if p.requires_grad and id(p) not in known]
    if others:
        raise UnsupportedModelError(f"{len(others)} other parameters are trainable, for instance {others[0]}")


def _dropout(model: nn.Module) -> float:
    probabilities = {
        float(getattr(module, "p", 0.0)) for name, module in model.named_modules() if ".lora_dropout." in name
    }
    if len(probabilities) > 1:
        raise UnsupportedModelError(f"lora_dropout differs between layers: {sorted(probabilities)}")
    return probabilities.pop() if probabilities else 0.0


def _layer_shape(config: Any) -> LayerShape:
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return LayerShape(
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        num_heads=config.num_attention_heads,
        num_kv_heads=config.num_key_value_heads,
        head_dim=head_dim,
        eps=config.rms_norm_eps,
        experts=expert_shape(config.to_dict()),
    )
