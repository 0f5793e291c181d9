"""Turn a transformers + PEFT model into the fast one, and back.

`accelerate_model` changes the one model object it is given: its LoRA parameters become slices of flat tensors and its
`forward` computes the training loss on our kernels. Parameters, their names, PEFT's saving and loading, and evaluation
stay what they were; nothing is patched at import. `restore_model` undoes it.
"""

import logging
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_outputs import CausalLMOutputWithPast

from finemill.kernels.adapters import LoraPair
from finemill.kernels.decoder_layer import LayerShape
from finemill.kernels.host_memory import gather_rows, pin
from finemill.kernels.model import FastModel, LayerParts, ModelLoss, assemble_model
from finemill.kernels.nf4 import NF4Tensor
from finemill.kernels.packing import pack_rows
from finemill.kernels.planner import Plan, Workload

logger = logging.getLogger(__name__)

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""`model_type`s of transformers configurations that run on the fast path."""


_COVERED = {"input_ids", "labels", "attention_mask", "position_ids", "num_items_in_batch", "use_cache", "return_dict"}
"""Arguments of a forward that the fast path understands; with any other the model's own forward runs."""


class UnsupportedModelError(ValueError):
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
        model: a PEFT model over a causal language model of one of `FAMILIES`, NF4 or 16-bit, on one device, with LoRA
            on any of the seven linear layers.
        plan: how to spend memory; by default everything is kept.
    Returns: the engine, and the reason if the model was left unchanged (also logged as a warning).
    """
    try:
        engine = _build(model)
    except UnsupportedModelError as error:
        logger.warning("model runs unchanged, without finemill's kernels: %s", error)
        return Acceleration(model, None, str(error))
    causal = _causal_model(model)
    causal._finemill_engine = engine
    adopt_plan(model, plan or Plan.everything(len(engine.layers)))
    original = causal.forward

    def forward(*args: Any, **kwargs: Any) -> Any:
        trains = causal.training and torch.is_grad_enabled() and kwargs.get("labels") is not None
        if args or not trains or not _COVERED.issuperset(kwargs):
            return original(*args, **kwargs)
        return _training_loss(engine, **kwargs)

    causal.forward = forward
    logger.info("training runs on finemill's kernels: %d layers, plan %s", len(engine.layers), engine.plan)
    return Acceleration(model, engine)


def adopt_plan(model: nn.Module, plan: Plan) -> None:
    """Change how an accelerated model spends memory, its embedding's place included."""
    causal = _causal_model(model)
    engine: FastModel = causal._finemill_engine
    engine.apply_plan(plan)
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


def workload_of(engine: FastModel, *, tokens: int, row: int) -> Workload:
    """Describe an engine and a step to the planner.

    Args:
        engine: what `accelerate_model` built.
        tokens: per optimizer step.
        row: longest sequence.
    """
    layer = engine.layers[0]
    return Workload(
        shape=layer.shape,
        num_layers=len(engine.layers),
        vocabulary=engine.head.shape[0],
        tied=engine.head.data_ptr() == engine.embedding.data_ptr(),
        rank=max((group.rank // len(group.weights) for group in layer.projections), default=0),
        quantized=layer.qkv.scratch is not None,
        tokens=tokens,
        row=row,
    )


def restore_model(model: nn.Module) -> None:
    """Undo `accelerate_model`: the model's own forward and parameter memory, with the trained values."""
    causal = _causal_model(model)
    engine: FastModel | None = getattr(causal, "_finemill_engine", None)
    if engine is None:
        return
    adopt_plan(model, Plan.everything(len(engine.layers)))
    del causal.forward
    del causal._finemill_engine
    engine.adapters.restore()
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
    config = causal.config
    if config.model_type not in FAMILIES:
        raise UnsupportedModelError(f"model_type is {config.model_type!r}, the fast path covers {', '.join(FAMILIES)}")
    if config.hidden_act != "silu":
        raise UnsupportedModelError(f"hidden_act is {config.hidden_act!r}, expected 'silu'")
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        raise UnsupportedModelError(f"sliding_window is {config.sliding_window}: attention windows are not covered")
    if getattr(config, "attention_dropout", 0.0):
        raise UnsupportedModelError(f"attention_dropout is {config.attention_dropout}, expected 0")
    decoder = causal.model
    parts = [_layer_parts(layer) for layer in decoder.layers]
    _check_trainable(model, parts)
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
    for layer, part in zip(decoder.layers, parts, strict=True):
        for name, linear in _linears(layer).items():
            weight = part.weights[name]
            if isinstance(weight, Tensor):
                _base(linear).weight.data = weight
    return engine


def _causal_model(model: nn.Module) -> Any:
    """The transformers model inside a PEFT model, or the model itself."""
    inner: Any = getattr(model, "get_base_model", None)
    return model if inner is None else inner()


def _linears(layer: Any) -> dict[str, Any]:
    attention, mlp = layer.self_attn, layer.mlp
    modules = {name: getattr(attention, name, None) for name in ("q_proj", "k_proj", "v_proj", "o_proj")}
    modules |= {name: getattr(mlp, name, None) for name in ("gate_proj", "up_proj", "down_proj")}
    missing = [name for name, module in modules.items() if module is None]
    if missing:
        raise UnsupportedModelError(f"layer has no {', '.join(missing)}")
    return modules


def _base(linear: Any) -> Any:
    return getattr(linear, "base_layer", linear)


def _detached(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.detach()


def _frozen_weight(linear: Any) -> NF4Tensor | Tensor:
    weight = _base(linear).weight
    if getattr(weight, "quant_state", None) is not None:
        return NF4Tensor.from_bitsandbytes(weight)
    if not weight.is_floating_point():
        raise UnsupportedModelError(f"base weights are {weight.dtype}: NF4 and 16-bit floating point are covered")
    return weight.detach()  # type: ignore[no-any-return]


def _layer_parts(layer: Any) -> LayerParts:
    attention = layer.self_attn
    linears = _linears(layer)
    return LayerParts(
        weights={name: _frozen_weight(linear) for name, linear in linears.items()},
        biases={name: _detached(_base(linear).bias) for name, linear in linears.items()},
        pairs=_layer_pairs(linears),
        input_norm=layer.input_layernorm.weight.detach(),
        post_norm=layer.post_attention_layernorm.weight.detach(),
        q_norm=attention.q_norm.weight.detach() if hasattr(attention, "q_norm") else None,
        k_norm=attention.k_norm.weight.detach() if hasattr(attention, "k_norm") else None,
    )


def _layer_pairs(linears: dict[str, Any]) -> dict[str, LoraPair]:
    pairs = {}
    for name, linear in linears.items():
        if not hasattr(linear, "lora_A"):
            continue
        active = list(linear.active_adapters)
        if len(active) != 1 or active[0] not in linear.lora_A or linear.merged:
            raise UnsupportedModelError(f"{name} has active adapters {active}: exactly one unmerged LoRA is covered")
        adapter = active[0]
        if getattr(linear, "use_dora", {}).get(adapter) or getattr(linear, "lora_bias", {}).get(adapter):
            raise UnsupportedModelError(f"{name} uses DoRA or LoRA biases")
        a, b = linear.lora_A[adapter].weight, linear.lora_B[adapter].weight
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
    )
