"""A model and a step for the planner, from a Hugging Face configuration."""

from collections.abc import Mapping
from typing import Any

from finemill.kernels.engine.expert_layout import EXPERT_FAMILIES, expert_shape, has_dense_layers
from finemill.kernels.engine.plan import LayerShape
from finemill.kernels.ops.division import fa4_suits
from finemill.kernels.planning.mixture import MixtureWorkload
from finemill.kernels.planning.workload import FAMILIES, Workload


def is_planned(config: Mapping[str, Any]) -> bool:
    """Whether there are plans for a configuration's model."""
    family = config.get("model_type")
    return family in FAMILIES or (family in EXPERT_FAMILIES and not has_dense_layers(config))


def workload_of_config(
    config: Mapping[str, Any],
    *,
    rank: int,
    quantized: bool,
    tokens: int,
    row: int,
    ragged: bool = False,
    whole: bool = False,
    expert_rank: int | None = None,
) -> Workload:
    """Describe a model and a step to the planner, from a Hugging Face configuration.

    Args:
        config: config.json of a decoder of the Llama family, dense or a mixture of experts.
        rank: LoRA rank of all seven linear layers, of attention and of every expert.
        quantized: NF4 base.
        tokens: per optimizer step.
        row: tokens per row.
        ragged: as in `Workload`.
        whole: as in `Workload`.
        expert_rank: of experts' adapters, 0 where they have none; `rank` by default.
    Raises: KeyError: the configuration lacks a field.
    """
    heads = config["num_attention_heads"]
    shape = LayerShape(
        hidden=config["hidden_size"],
        intermediate=config["intermediate_size"],
        num_heads=heads,
        num_kv_heads=config.get("num_key_value_heads", heads),
        head_dim=config.get("head_dim") or config["hidden_size"] // heads,
        eps=config["rms_norm_eps"],
        experts=expert_shape(config),
    )
    settings: dict[str, Any] = {
        "shape": shape,
        "num_layers": config["num_hidden_layers"],
        "vocabulary": config["vocab_size"],
        "tied": config.get("tie_word_embeddings", False),
        "rank": rank,
        "quantized": quantized,
        "tokens": tokens,
        "row": row,
        "ragged": ragged,
        "whole": whole,
        "fa4": fa4_suits(row, shape.head_dim),
    }
    if shape.experts is None:
        return Workload(**settings)
    return MixtureWorkload(**settings, expert_rank=rank if expert_rank is None else expert_rank)
