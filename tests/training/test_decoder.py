"""The memory of a training is that of the model that transformers makes, whatever its family calls its widths."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.training.decoder import Decoder, UnknownDecoderError, complete, read_decoder
from finemill.training.memory import GIB, covered_workload, estimate_memory, needed_gib
from finemill.training.strategy import settle_strategy

WIDTHS = {
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
EXPERTS = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
FAMILIES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 128, "n_layer": 4, "n_head": 4, "vocab_size": 512, "n_positions": 8},
    "falcon": {key: WIDTHS[key] for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")},
    "gpt_neox": {**WIDTHS, "num_key_value_heads": 4},
    # Tied by default, as files of the hub leave it.
    "gemma2": {**WIDTHS, "head_dim": 32},
    "gemma3_text": {**WIDTHS, "head_dim": 32},
    "mixtral": {**WIDTHS, "num_local_experts": 8},
    "gpt_oss": {**WIDTHS, "num_local_experts": 8, "head_dim": 32},
    "olmoe": {**WIDTHS, "num_experts": 8},
    "qwen2_moe": {**WIDTHS, **EXPERTS, "shared_expert_intermediate_size": 192},
    "qwen3_moe": {**WIDTHS, **EXPERTS, "head_dim": 32, "mlp_only_layers": [0, 3]},
    "glm4_moe": {
        **WIDTHS,
        "n_routed_experts": 8,
        "moe_intermediate_size": 64,
        "n_shared_experts": 2,
        "first_k_dense_replace": 1,
        "head_dim": 32,
        "pad_token_id": 0,
    },
}


def write(family: str, settings: dict[str, Any], folder: Path) -> Any:
    config = CONFIG_MAPPING[family](**settings)
    config.save_pretrained(folder)
    return config


@pytest.mark.parametrize("family", FAMILIES)
def test_full_fine_tuning_counts_every_weight(family: str, tmp_path: Path) -> None:
    config = write(family, FAMILIES[family], tmp_path)
    with torch.device("meta"):
        weights = sum(parameter.numel() for parameter in AutoModelForCausalLM.from_config(config).parameters())
    estimate = estimate_memory(read_decoder(tmp_path), TrainQLoRAConfig(method="full"))
    assert estimate.adapters * GIB / 16 == pytest.approx(weights, rel=0.03)


def test_a_decoder_beneath_text_config_counts_and_the_kernels_leave_it_out(tmp_path: Path) -> None:
    vision = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = WIDTHS | {"head_dim": 32}
    write("gemma3", {"text_config": text, "vision_config": vision}, tmp_path)
    write("gemma3_text", text, tmp_path / "text")
    both, alone = read_decoder(tmp_path), read_decoder(tmp_path / "text")
    assert Decoder.of(both) == Decoder.of(alone)
    assert both["model_type"] == "gemma3"
    assert covered_workload(both, TrainQLoRAConfig()) is None


def test_a_family_that_cannot_be_estimated_is_trained_all_the_same(tmp_path: Path) -> None:
    write("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 256}, tmp_path)
    with pytest.raises(UnknownDecoderError, match=r"config\.json has no 'num_attention_heads'"):
        estimate_memory(read_decoder(tmp_path), TrainQLoRAConfig())
    assert settle_strategy(TrainQLoRAConfig(kernels="off"), tmp_path, GIB).strategy == "ddp"
    assert settle_strategy(TrainQLoRAConfig(), tmp_path, None).gradient_checkpointing is True


def test_what_the_hub_leaves_out_is_what_transformers_takes() -> None:
    assert complete({"model_type": "gemma", **WIDTHS})["tie_word_embeddings"]
    unknown = {"model_type": "of tomorrow", **WIDTHS}
    assert complete(unknown) is unknown
    with pytest.raises(UnknownDecoderError, match="has no 'rms_norm_eps'"):
        needed_gib({"model_type": "qwen3", **WIDTHS}, TrainQLoRAConfig())


@pytest.mark.parametrize(("names", "expected"), [(("q_proj", "v_proj"), 0), (("q_proj", "down_proj"), 16)])
def test_experts_that_no_name_reaches_have_no_adapters(names: tuple[str, ...], expected: int, tmp_path: Path) -> None:
    write("qwen3_moe", {**WIDTHS, **EXPERTS}, tmp_path)
    work = covered_workload(read_decoder(tmp_path), TrainQLoRAConfig(target_modules=names))
    assert work is not None
    assert getattr(work, "expert_rank") == expected  # noqa: B009


def test_experts_stay_in_16_bits_where_only_linear_layers_are_quantized(tmp_path: Path) -> None:
    write("qwen3_moe", {**WIDTHS, **EXPERTS}, tmp_path)
    model = read_decoder(tmp_path)
    nf4, fp4, eight, half = (
        estimate_memory(model, TrainQLoRAConfig(**settings)).weights
        for settings in ({}, {"bnb_4bit_quant_type": "fp4"}, {"load_in_8bit": True}, {"load_in_4bit": False})
    )
    assert nf4 < 0.5 * fp4 < fp4 < eight < half < 1.5 * fp4


def test_a_reference_of_a_whole_model_is_a_second_one(tmp_path: Path) -> None:
    write("qwen3", WIDTHS, tmp_path)
    model = read_decoder(tmp_path)
    kept, scored, none = (
        estimate_memory(model, TrainDPOConfig(method="full", **settings))
        for settings in ({}, {"precompute_ref_log_probs": True}, {"loss_type": "orpo"})
    )
    assert kept.weights == pytest.approx(kept.adapters / 4)
    assert scored.weights == none.weights == 0
