"""How the next token is chosen, and what makers of models recommend."""

import json
import logging
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sampling:
    """The most likely token, or one drawn by `temperature` with `seed`."""

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    seed: int = 0


GREEDY = Sampling()

# By thinking and not; from the model cards of the Qwen3 family.
_QWEN3 = {True: Sampling(0.6, 0.95, 20), False: Sampling(0.7, 0.8, 20)}


def recommended_sampling(model_type: str | None, defaults: Mapping[str, Any], *, thinking: bool) -> Sampling:
    """What suits a model, by its family and its own generation config.

    A file that says `do_sample: false` wins; the values of Qwen3's depend on whether the model thinks, which its file
    cannot say.

    Args:
        model_type: as in `config.json`, or `general.architecture` of a GGUF file.
        defaults: the values of `generation_config.json`, empty where there is none.
    """
    if defaults.get("do_sample") is False:
        return GREEDY
    if (model_type or "").startswith("qwen3"):
        return _QWEN3[thinking]
    if not defaults.get("do_sample"):
        return GREEDY
    return Sampling(
        temperature=_or(number_of(defaults, "temperature"), 1.0),
        top_p=_or(number_of(defaults, "top_p"), 1.0),
        top_k=int(_or(number_of(defaults, "top_k"), 50)),
        min_p=_or(number_of(defaults, "min_p"), 0.0),
    )


def _or(value: float | None, otherwise: float) -> float:
    return otherwise if value is None else value


def read_generation_defaults(folder: Path) -> dict[str, Any]:
    """The values of a model's `generation_config.json`; none where there is no such file.

    Models work without it, so that a damaged one is a warning.
    """
    path = folder / "generation_config.json"
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        logger.warning("%s is not read: %s", path, error)
        return {}


def number_of(defaults: Mapping[str, Any], name: str) -> float | None:
    """A value of a generation config; None where there is none, or it is no number that a sampler could use."""
    value = defaults.get(name)
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return float(value) if math.isfinite(value) and value >= 0 else None


def read_model_type(folder: Path) -> str | None:
    """The family that `config.json` names."""
    path = folder / "config.json"
    return json.loads(path.read_text(encoding="utf-8")).get("model_type") if path.is_file() else None
