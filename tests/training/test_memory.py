"""What a training needs is known before anything is loaded."""

from typing import Any

import pytest

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.errors import UserError
from finemill.kernels.planning.model_shapes import MIXTURES
from finemill.training.memory import GIB, estimate_memory, must_stream, needed_gib

QWEN3_8B = {
    "model_type": "qwen3",
    "rms_norm_eps": 1e-6,
    "hidden_size": 4096,
    "num_hidden_layers": 36,
    "vocab_size": 151936,
    "intermediate_size": 12288,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 128,
}
QWEN3_06B = {
    **QWEN3_8B,
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "tie_word_embeddings": True,
}


@pytest.mark.parametrize(("model", "measured_gb"), [(QWEN3_8B, 16.7), (QWEN3_06B, 10.2)])
def test_the_estimate_is_near_what_was_measured(model: dict[str, Any], measured_gb: float) -> None:
    """Hugging Face, PEFT and bitsandbytes on an H100, 2 sequences of 2048 tokens, rank 16, 8-bit AdamW."""
    config = TrainQLoRAConfig(optim="adamw_8bit", per_device_train_batch_size=2, max_length=2048)
    estimated_gb = estimate_memory(model, config).total * 2**30 / 1e9
    assert estimated_gb == pytest.approx(measured_gb, rel=0.1)


def test_a_pair_counts_as_two_sequences() -> None:
    shared = {"per_device_train_batch_size": 2, "max_length": 1024}
    one, two = (estimate_memory(QWEN3_06B, model(**shared)) for model in (TrainQLoRAConfig, TrainDPOConfig))
    assert (two.logits, two.activations) == pytest.approx((2 * one.logits, 2 * one.activations))
    assert (two.weights, two.adapters) == (one.weights, one.adapters)


def test_a_mixture_on_the_plain_path_is_near_what_was_measured() -> None:
    """12 of 48 layers, 8 rows of 2048 in two passes on an H200: transformers' grouped products and PEFT took 34.2."""
    model = MIXTURES["qwen3-30b-a3b"] | {"num_hidden_layers": 12}
    config = TrainQLoRAConfig(load_in_4bit=False, per_device_train_batch_size=4, max_length=2048)
    assert estimate_memory(model, config).total == pytest.approx(34.2, rel=0.15)
    experts = estimate_memory(model, config.model_copy(update={"target_modules": "attention"}))
    assert experts.adapters < 0.1 * estimate_memory(model, config).adapters
    with pytest.raises(UserError, match=r"config\.json has no 'moe_intermediate_size': not a mixture"):
        estimate_memory({name: value for name, value in model.items() if "moe" not in name}, config)


def test_a_model_that_cannot_be_estimated_says_what_is_missing() -> None:
    with pytest.raises(UserError, match=r"config\.json has no 'num_hidden_layers'"):
        estimate_memory({"hidden_size": 8}, TrainQLoRAConfig())


def test_the_kernels_need_what_their_leanest_plan_does() -> None:
    """8B was trained in 3.4 GiB; Hugging Face's trainer takes five times that."""
    assert needed_gib(QWEN3_8B, TrainQLoRAConfig()) < 3.4
    assert needed_gib(QWEN3_8B, TrainQLoRAConfig(kernels="off")) > 15
    assert needed_gib(QWEN3_8B, TrainDPOConfig()) < 3.4
    assert needed_gib(QWEN3_8B, TrainDPOConfig(kernels="off")) > 10
    assert needed_gib({**QWEN3_8B, "model_type": "gpt_neox"}, TrainQLoRAConfig()) > 15


@pytest.mark.parametrize("model", [QWEN3_8B, MIXTURES["qwen3-30b-a3b"]])
def test_what_is_said_to_be_needed_is_enough_and_less_is_not(model: dict[str, Any]) -> None:
    config = TrainQLoRAConfig()
    needed = needed_gib(model, config) * GIB
    assert must_stream(model, config, needed)
    with pytest.raises(UserError, match=f"training needs {needed / GIB:.2f} GiB of GPU memory"):
        must_stream(model, config, 0.998 * needed)


def test_a_base_that_is_stored_in_4_bits_comes_to_the_card_whole() -> None:
    stored = QWEN3_8B | {"quantization_config": {"load_in_4bit": True}}
    assert needed_gib(QWEN3_8B, TrainQLoRAConfig()) < 3.4
    assert 5.5 < needed_gib(stored, TrainQLoRAConfig()) < 6.5


def test_what_may_not_wait_on_the_host_is_on_the_card() -> None:
    """8B in 4 bits is 3.9 GB, which a container of 32 GiB holds beside the process, and one of 5 does not."""
    needed = [needed_gib(QWEN3_8B, TrainQLoRAConfig(), host_gib=gib) for gib in (None, 32.0, 5.0, 1.0)]
    assert needed[0] == needed[1] < 3.4
    assert 5 < needed[2] <= needed[3] < 8
    with pytest.raises(UserError, match=r"GiB of GPU memory beside 1\.0 of host memory"):
        must_stream(QWEN3_8B, TrainQLoRAConfig(), 4 * GIB, host=int(GIB))


@pytest.mark.parametrize(("limit_gib", "streamed"), [(80.0, False), (7.2, False), (5.0, True), (3.5, True)])
def test_a_base_that_does_not_fit_waits_in_host_memory(limit_gib: float, streamed: bool) -> None:
    assert must_stream(QWEN3_8B, TrainQLoRAConfig(), limit_gib * GIB) is streamed


def test_a_pass_of_preferences_is_planned_as_a_whole() -> None:
    """Its loss compares the rows of a pass, which therefore cannot be cut as memory asks."""
    needed = [needed_gib(QWEN3_8B, TrainDPOConfig(per_device_train_batch_size=size)) for size in (1, 4)]
    unpaired = TrainDPOConfig(loss_type="kto", per_device_train_batch_size=8)
    assert needed[0] < needed[1] == needed_gib(QWEN3_8B, unpaired)


def test_too_little_memory_is_one_line() -> None:
    message = r"needs 2\.\d+ GiB of GPU memory \(16\.2 without .*\), there are 2\.00: lower max_length \(2048\)"
    with pytest.raises(UserError, match=message):
        must_stream(QWEN3_8B, TrainQLoRAConfig(), 2 * GIB)


@pytest.mark.parametrize("model", [QWEN3_8B, QWEN3_06B])
@pytest.mark.parametrize("settings", [{}, {"load_in_4bit": False}, {"load_in_4bit": False, "max_length": 64}])
def test_what_the_plain_path_fits_into_the_kernels_do(model: dict[str, Any], settings: dict[str, Any]) -> None:
    """So there is nothing to fall back to where no plan fits."""
    config = TrainQLoRAConfig(per_device_train_batch_size=1, **settings)
    assert needed_gib(model, config) < estimate_memory(model, config).total
