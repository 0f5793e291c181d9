"""How many positions a model has, and their scaling to more, in words that transformers, vLLM and llama.cpp share."""

from collections.abc import Mapping
from typing import Any, Literal, Self

from pydantic import Field, model_validator

from finemill.config import StepConfig
from finemill.errors import UserError

# With these a configuration may state the positions of before; with llama3 and longrope they are the scaled ones.
_MULTIPLIED = ("linear", "dynamic", "yarn")
_FROM_ORIGINAL = ("yarn", "llama3")
_LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0}


class RopeScaling(StepConfig):
    """Positions beyond those that a model was made with, in the words of transformers."""

    rope_type: Literal["linear", "dynamic", "yarn", "llama3"]
    """`yarn` needs the least training, and is what Qwen recommends; `llama3` is Llama 3.1's. `dynamic` is not on the
    kernels, and llama.cpp does not have it."""

    factor: float = Field(gt=1)
    """How many times as many positions."""

    original_max_position_embeddings: int | None = Field(default=None, gt=0)
    """With `yarn` and `llama3`, positions that the base was made with; those of its config.json by default."""

    low_freq_factor: float | None = Field(default=None, gt=0)
    """With `llama3`, turns in the original positions below which a frequency is divided by the factor; 1 by default."""

    high_freq_factor: float | None = Field(default=None, gt=0)
    """The same for those above which it stays; 4 by default."""

    @model_validator(mode="after")
    def _check_factors(self) -> Self:
        fields = {"original_max_position_embeddings": _FROM_ORIGINAL, **dict.fromkeys(_LLAMA3, ("llama3",))}
        for name, kinds in fields.items():
            if getattr(self, name) is not None and self.rope_type not in kinds:
                raise ValueError(
                    f"{name} has no effect with rope_type '{self.rope_type}': leave it out, or use {' or '.join(kinds)}"
                )
        low, high = (getattr(self, name) or default for name, default in _LLAMA3.items())
        if low >= high:
            raise ValueError(f"low_freq_factor {low:g} is not below high_freq_factor {high:g}")
        return self


def scaled_parameters(config: Any, scaling: RopeScaling) -> dict[str, Any]:
    """The `rope_parameters` of a model with scaling.

    Args:
        config: transformers' configuration of the base.
        scaling: that is asked for.
    Raises: UserError: a model without rotary positions, or one that scales them already.
    """
    text = config.get_text_config()
    present, positions = getattr(text, "rope_parameters", None), getattr(text, "max_position_embeddings", None)
    if not present or "rope_type" not in present or positions is None:
        raise UserError(f"rope_scaling: {config.model_type} has no rotary positions of one kind: leave it out")
    if present["rope_type"] != "default":
        raise UserError(
            f"rope_scaling: the base scales its positions already ({present['rope_type']}, {position_limit(config)} "
            "in all): leave it out, or take the base from before"
        )
    parameters = {**present, "rope_type": scaling.rope_type, "factor": scaling.factor}
    if scaling.rope_type in _FROM_ORIGINAL:
        parameters["original_max_position_embeddings"] = scaling.original_max_position_embeddings or positions
    if scaling.rope_type == "llama3":
        parameters |= {name: getattr(scaling, name) or default for name, default in _LLAMA3.items()}
    return parameters


def scale_config(config: Any, parameters: Mapping[str, Any]) -> None:
    """Give transformers' configuration the `rope_parameters` that a training had."""
    text = config.get_text_config()
    text.rope_parameters = dict(parameters)
    text.max_position_embeddings = _stated_positions(text.max_position_embeddings, parameters)


def scale_json(values: dict[str, Any], parameters: Mapping[str, Any]) -> None:
    """Give it to the values of a config.json in its words, `rope_parameters`, or `rope_scaling` beside `rope_theta`."""
    if "rope_parameters" in values:
        values["rope_parameters"] = dict(parameters)
    else:
        values["rope_scaling"] = {name: value for name, value in parameters.items() if name != "rope_theta"}
        values["rope_theta"] = parameters["rope_theta"]
    values["max_position_embeddings"] = _stated_positions(values["max_position_embeddings"], parameters)


def scale_model(model: Any, parameters: Mapping[str, Any]) -> None:
    """Give a loaded model the positions that a training had."""
    scale_config(model.config, parameters)
    config = model.config.get_text_config()
    for name, module in list(model.named_modules()):
        if hasattr(module, "inv_freq") and hasattr(module, "rope_type"):
            scaled = type(module)(config=config).to(module.inv_freq.device)
            model.set_submodule(name, scaled)


def position_limit(config: Any) -> int | None:
    """Positions of transformers' configuration, those of its scaling included; None where any number goes."""
    text = config.get_text_config()
    limit: int | None = getattr(text, "max_position_embeddings", None)
    return None if limit is None else scaled_limit(limit, getattr(text, "rope_parameters", None) or {})


def scaled_limit(positions: int, parameters: Mapping[str, Any]) -> int:
    """Positions in all, of a configuration's `max_position_embeddings` and `rope_parameters`."""
    if parameters.get("rope_type") not in _MULTIPLIED:
        return positions
    return max(positions, int(parameters["factor"] * (parameters.get("original_max_position_embeddings") or positions)))


def _stated_positions(positions: int, parameters: Mapping[str, Any]) -> int:
    """The `max_position_embeddings` that readers expect beside a scaling.

    Where it names the positions of before itself, all there are; elsewhere vLLM multiplies those of before.
    """
    original = parameters.get("original_max_position_embeddings")
    return int(parameters["factor"] * original) if original else positions
