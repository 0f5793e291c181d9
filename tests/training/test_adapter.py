from pathlib import Path

import pytest

from finemill.errors import UserError
from finemill.training.adapter import lora_config
from finemill.training.config import LoRATrainingConfig


@pytest.mark.parametrize(
    "targets", ["all-linear", ("q_proj", "down_proj"), ("embed_tokens",), ("model.layers.0.self_attn.q_proj",)]
)
def test_layers_that_there_are_may_be_named(targets: str | tuple[str, ...], tiny_model_dir: Path) -> None:
    lora_config(tiny_model_dir, LoRATrainingConfig.model_validate({"target_modules": targets}))


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (
            ("q_prooj",),
            r"'q_prooj' fits no layer of the base model; there are embed_tokens, q_proj, k_proj, .*down_proj$",
        ),
        (("q_proj", "prooj"), "'prooj' fits no layer"),
        (("roj",), "'roj' fits no layer"),
        (("self_attn",), "'self_attn' is no layer that takes an adapter"),
        (("input_layernorm",), "'input_layernorm' is no layer that takes an adapter"),
    ],
)
def test_a_name_that_fits_no_layer_is_refused_with_those_there_are(
    targets: tuple[str, ...], message: str, tiny_model_dir: Path
) -> None:
    with pytest.raises(UserError, match=message):
        lora_config(tiny_model_dir, LoRATrainingConfig(target_modules=targets))
