"""The widths of a base model's decoder, whatever its family calls them: what memory is estimated from.

Files of the hub leave out what transformers has as a default, name widths in their own words, and those of models that
also see or hear have a decoder's beneath `text_config`. Without torch: preflight reads them, too.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from finemill.errors import UserError
from finemill.kernels.engine.expert_layout import expert_shape
from finemill.kernels.planning.from_config import is_planned

_WIDTHS = ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")
_ALL = (*_WIDTHS, "num_key_value_heads", "head_dim", "intermediate_size", "rms_norm_eps", "tie_word_embeddings")
_INNER = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
PER_TOKEN = ("num_experts_per_tok", "moe_k", "moe_topk")
"""What families call the number of a layer's experts, and of those that a token is sent to."""
_UNGATED = {"bloom", "codegen", "falcon", "gpt2", "gpt_bigcode", "gpt_neo", "gpt_neox", "gptj", "mpt", "opt", "phi"}
_UNGATED |= {"nemotron", "persimmon", "starcoder2"}
"""Families whose MLP has two matrices in place of three."""


class UnknownDecoderError(UserError):
    """A model whose memory cannot be estimated; the message says what its config.json lacks."""


@dataclass(frozen=True)
class Experts:
    """A mixture: experts of a layer, those of a token, an expert's width, that of what all tokens pass beside them."""

    count: int
    per_token: int
    width: int
    shared: int


@dataclass(frozen=True)
class Decoder:
    """Widths of a decoder's layers.

    Args:
        hidden: of the residual stream.
        layers: all of them.
        vocabulary: rows of the embedding.
        tied: whether the output matrix is the embedding.
        queries: of all heads.
        keys: of all heads, and of values.
        inner: of a dense MLP.
        matrices: of a dense MLP.
        dense_layers: that have no experts.
        experts: of the other layers.
    """

    hidden: int
    layers: int
    vocabulary: int
    tied: bool
    queries: int
    keys: int
    inner: int
    matrices: int
    dense_layers: int
    experts: Experts | None

    @classmethod
    def of(cls, model: Mapping[str, Any]) -> "Decoder":
        """Read a configuration. Raises: UnknownDecoderError: it lacks a width."""
        missing = next((name for name in _WIDTHS if not model.get(name)), None)
        if missing:
            raise UnknownDecoderError(
                f"the base model's config.json has no '{missing}': not a decoder that can be estimated"
            )
        hidden, heads, layers = model["hidden_size"], model["num_attention_heads"], model["num_hidden_layers"]
        head_dim = model.get("head_dim") or hidden // heads
        one_key = model.get("multi_query") and not model.get("new_decoder_architecture")
        key_heads = 1 if one_key else first_of(model, ("num_key_value_heads", "num_kv_heads")) or heads
        experts = _experts(model)
        return cls(
            hidden=hidden,
            layers=layers,
            vocabulary=model["vocab_size"],
            tied=bool(model.get("tie_word_embeddings")),
            queries=heads * head_dim,
            keys=key_heads * head_dim,
            inner=model.get("intermediate_size_mlp") or first_of(model, _INNER) or 4 * hidden,
            matrices=2 if model.get("model_type") in _UNGATED else 3,
            dense_layers=layers if experts is None else min(layers, _dense_layers(model, layers)),
            experts=experts,
        )


def read_decoder(folder: Path) -> Mapping[str, Any]:
    """What `complete` makes of the config.json in a folder."""
    return complete(json.loads((folder / "config.json").read_text(encoding="utf-8")))


def complete(model: Mapping[str, Any]) -> Mapping[str, Any]:
    """A config.json with the widths of its decoder under the names that most families use.

    What it leaves out is transformers' default. One of a family that the kernels plan, or that transformers does not
    know, stays as it is.
    """
    if is_planned(model):
        return model
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    try:
        config = AutoConfig.for_model(**model)
        text = config.get_text_config(decoder=True)
    except (AttributeError, KeyError, TypeError, ValueError, StrictDataclassError):
        return model  # whoever loads it says what is wrong with it
    found = {name: value for name in _ALL if (value := getattr(text, name, None)) is not None}
    return {**model, **text.to_dict(), **found, "model_type": model["model_type"]}


def first_of(model: Mapping[str, Any], names: Iterable[str]) -> int:
    """The first of such numbers that a configuration has; 0 without any, the largest of one that has it by layer."""
    value = next((value for name in names if (value := model.get(name))), 0)
    return max(value) if isinstance(value, list) else value


def _experts(model: Mapping[str, Any]) -> Experts | None:
    """A configuration's mixture. Raises: UnknownDecoderError: it lacks a field."""
    try:
        planned = expert_shape(model)
    except KeyError as error:
        raise UnknownDecoderError(
            f"the base model's config.json has no {error}: not a mixture that can be estimated"
        ) from None
    if planned is not None:
        return Experts(planned.count, planned.per_token, planned.intermediate, shared=0)
    count = first_of(model, EXPERT_COUNTS)
    if count < 2:
        return None
    width = first_of(model, ("moe_intermediate_size", "intermediate_size"))
    shared = first_of(model, ("shared_expert_intermediate_size", "shared_intermediate_size"))
    shared = shared or width * first_of(model, ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts"))
    return Experts(count, first_of(model, PER_TOKEN) or 1, width, shared)


def _dense_layers(model: Mapping[str, Any], layers: int) -> int:
    """Layers of a mixture that have no experts."""
    if isinstance(moe_layers := model.get("moe_layers"), list):
        return layers - len(moe_layers)
    named = len(model.get("mlp_only_layers") or ())
    step = first_of(model, ("decoder_sparse_step", "expert_layer_period")) or 1
    return max(first_of(model, ("first_k_dense_replace",)), named, layers - layers // step)
