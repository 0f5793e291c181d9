"""How mixtures of experts are named: in configurations, in transformers' modules, in the hub's checkpoints."""

from collections.abc import Mapping
from typing import Any

from finemill.kernels.engine.plan import ExpertShape

EXPERT_FAMILIES = ("mixtral", "qwen3_moe")
"""Values of `model_type` whose experts the engine trains."""
EXPERT_STACKS = ("experts.gate_up_proj", "experts.down_proj")
"""The two parameters of a layer's experts within its `mlp`, (E, 2I, H) and (E, H, I), as transformers has them."""


def expert_shape(config: Mapping[str, Any]) -> ExpertShape | None:
    """Read a configuration's mixture, None where it describes a dense model.

    Raises: KeyError: a field is missing.
    """
    family = config.get("model_type")
    if family == "mixtral":
        return ExpertShape(
            config["num_local_experts"], config["num_experts_per_tok"], config["intermediate_size"], normalize=True
        )
    if family == "qwen3_moe":
        count = config["num_experts"] if "num_experts" in config else config["num_local_experts"]
        normalize = bool(config.get("norm_topk_prob", False))
        return ExpertShape(count, config["num_experts_per_tok"], config["moe_intermediate_size"], normalize)
    return None


def has_dense_layers(config: Mapping[str, Any]) -> bool:
    """Whether a mixture has layers without experts between the others."""
    return bool(config.get("mlp_only_layers")) or config.get("decoder_sparse_step", 1) > 1
