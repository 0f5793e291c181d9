"""Whatever settings meet, they are run or refused in one line, before anything is loaded."""

from pathlib import Path
from random import Random
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
import torch

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.training.adapter import lora_config
from finemill.training.config import LoRATrainingConfig
from finemill.training.memory import needed_gib
from finemill.training.trainer import shared_arguments

NAMES = ("q_proj", "down_proj", "embed_tokens", "lm_head", "norm", "mlp", "q_prooj", "model.layers.0.mlp.up_proj", "")
SHAPES = {
    "model_type": "qwen3",
    "hidden_size": 256,
    "num_hidden_layers": 2,
    "vocab_size": 1536,
    "intermediate_size": 512,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": True,
}


def draw(kind: Any, rng: Random) -> Any:
    """A value of an annotation, now and then one that its bounds do not allow."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return draw(arguments[0], rng)
    if origin is Literal:
        return rng.choice(arguments)
    if origin in (Union, UnionType):
        return draw(rng.choice(arguments), rng)
    if origin is tuple:
        if arguments[0] is str:
            return [rng.choice(NAMES) for _ in range(rng.randrange(4))]
        return [draw(arguments[0], rng) for _ in range(rng.randrange(4))]
    if kind is bool:
        return rng.random() < 0.5
    if kind is int:
        return rng.choice((-1, 0, 1, 2, 8, 64, 4096))
    if kind is float:
        return rng.choice((-1.0, 0.0, 1e-6, 0.03, 0.5, 1.0, 16.0, 1e6))
    return None


def read(model: type[LoRATrainingConfig], values: dict[str, Any], base: Path) -> tuple[LoRATrainingConfig | None, str]:
    """The configuration, or None and why it is refused, for the modules of the base, too."""
    try:
        config = parse_config(model, values, "random")
        if {"target_modules", "modules_to_save"} & set(values):
            lora_config(base, config)
    except UserError as error:
        return None, str(error)
    return config, ""


@pytest.mark.parametrize("model", [TrainQLoRAConfig, TrainDPOConfig])
def test_a_thousand_random_configurations_are_run_or_refused(model: type[LoRATrainingConfig], tmp_path: Path) -> None:
    rng, accepted, refused = Random(0), 0, 0
    base = BUILTIN_MODELS["builtin:tiny-qwen3"]
    for _ in range(1000):
        names = rng.sample(sorted(model.model_fields), rng.randrange(5))
        values = {name: draw(model.model_fields[name].annotation, rng) for name in names}
        config, problem = read(model, values, base)
        if config is None:
            assert 0 < len(problem) < 2000, values
            assert "\n" not in problem, values
            refused += 1
            continue
        accepted += 1
        assert needed_gib(SHAPES, config) > 0, values
        arguments = shared_arguments(config, tmp_path, torch.device("cpu"))
        assert arguments["learning_rate"] == config.learning_rate
        assert parse_config(model, config.model_dump(mode="json"), "again") == config, values
    assert accepted > 200
    assert refused > 200
