"""A scaling of positions is the same for transformers, in a config.json, and for a model that is loaded already."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from finemill.config import parse_config
from finemill.errors import UserError
from finemill.models.rope import RopeScaling, position_limit, scale_config, scale_json, scale_model, scaled_parameters

KINDS = [{"rope_type": kind, "factor": 4.0} for kind in ("linear", "dynamic", "yarn", "llama3")]


def config_with(folder: Path, tiny_model_dir: Path, **changes: Any) -> Any:
    """The tiny model's configuration, of 1024 positions, with changes."""
    config = json.loads((tiny_model_dir / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 2048),
        ({"max_position_embeddings": 32}, 32),
    ],
)
def test_positions_count_those_of_the_scaling(
    changes: dict[str, Any], limit: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    assert position_limit(config_with(tmp_path, tiny_model_dir, **changes)) == limit


@pytest.mark.parametrize("old_words", [False, True])
@pytest.mark.parametrize("scaling", KINDS, ids=lambda kind: kind["rope_type"])
def test_a_config_json_gives_transformers_the_model_that_was_scaled(
    scaling: dict[str, Any], old_words: bool, tmp_path: Path, tiny_model_dir: Path
) -> None:
    plain = AutoConfig.from_pretrained(tiny_model_dir)
    parameters = scaled_parameters(plain, RopeScaling(**scaling))
    model = AutoModelForCausalLM.from_config(plain)
    scale_model(model, parameters)
    values = json.loads((tiny_model_dir / "config.json").read_text())
    if old_words:
        values["rope_theta"] = values.pop("rope_parameters", values)["rope_theta"]
    scale_json(values, parameters)
    (tmp_path / "config.json").write_text(json.dumps(values))
    written = AutoConfig.from_pretrained(tmp_path)
    assert written.rope_parameters == model.config.rope_parameters
    assert position_limit(written) == position_limit(model.config) == 4096
    expected, rotary = AutoModelForCausalLM.from_config(written).model.rotary_emb, model.model.rotary_emb
    assert torch.equal(rotary.inv_freq, expected.inv_freq)
    assert rotary.attention_scaling == expected.attention_scaling
    unscaled = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(tiny_model_dir)).model.rotary_emb
    assert scaling["rope_type"] == "dynamic" or not torch.equal(rotary.inv_freq, unscaled.inv_freq)


def test_a_base_that_is_scaled_already_is_refused(tiny_model_dir: Path) -> None:
    config = AutoConfig.from_pretrained(tiny_model_dir)
    scaling = RopeScaling(rope_type="yarn", factor=2.0)
    scale_config(config, scaled_parameters(config, scaling))
    with pytest.raises(UserError, match=r"scales its positions already \(yarn, 2048 in all\)"):
        scaled_parameters(config, scaling)


@pytest.mark.parametrize(
    ("values", "problem"),
    [
        ({"rope_type": "linear", "factor": 2, "low_freq_factor": 1}, "low_freq_factor has no effect"),
        ({"rope_type": "dynamic", "factor": 2, "original_max_position_embeddings": 8}, "use yarn or llama3"),
        ({"rope_type": "llama3", "factor": 2, "low_freq_factor": 4}, "is not below high_freq_factor 4"),
        ({"rope_type": "yarn", "factor": 1}, "greater than 1"),
        ({"rope_type": "ntk", "factor": 2}, "'linear', 'dynamic', 'yarn' or 'llama3'"),
    ],
)
def test_what_has_no_effect_or_no_meaning_is_refused(values: dict[str, Any], problem: str) -> None:
    with pytest.raises(UserError, match=problem):
        parse_config(RopeScaling, values, "config")
