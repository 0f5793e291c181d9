from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, Glm4MoeConfig, TrainerState

from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.training.pace import Card, Pace, describe, duration, flops_per_token, summary

GIB = 2**30
H200 = Card("NVIDIA H200", 140 * GIB, GIB)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    loaded: torch.nn.Module = AutoModelForCausalLM.from_pretrained(BUILTIN_MODELS["builtin:tiny-qwen3"])
    return loaded


def test_operations_are_six_per_weight_and_four_where_it_is_frozen(model: torch.nn.Module) -> None:
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert flops_per_token(model) == 6 * weights
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    assert flops_per_token(model) == 4 * weights


def test_of_a_mixture_the_experts_of_a_token_count(tiny_mixture_dir: Path) -> None:
    mixture = AutoModelForCausalLM.from_pretrained(tiny_mixture_dir)
    layers = {name: parameter.numel() for name, parameter in mixture.named_parameters() if "embed" not in name}
    experts = sum(number for name, number in layers.items() if ".experts." in name)
    assert experts == 2 * 4 * 3 * 64 * 64
    assert flops_per_token(mixture) == 6 * (sum(layers.values()) - experts // 2)


def test_experts_are_known_by_any_familys_word_for_them() -> None:
    config = Glm4MoeConfig(
        hidden_size=64, intermediate_size=64, moe_intermediate_size=32, num_hidden_layers=2, first_k_dense_replace=1,
        num_attention_heads=2, num_key_value_heads=2, head_dim=32, n_routed_experts=8, num_experts_per_tok=2,
        n_group=1, topk_group=1, vocab_size=128,
    )  # fmt: skip
    with torch.device("meta"):
        mixture = AutoModelForCausalLM.from_config(config)
    layers = {name: parameter.numel() for name, parameter in mixture.named_parameters() if "embed" not in name}
    experts = sum(number for name, number in layers.items() if ".experts." in name)
    assert experts == 8 * 3 * 64 * 32
    assert flops_per_token(mixture) == 6 * (sum(layers.values()) - experts * 3 // 4)


def test_pace_counts_from_the_step_that_training_goes_on_from(
    model: torch.nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    now = [100.0]
    monkeypatch.setattr("finemill.training.pace.time.monotonic", lambda: now[0])
    pace = Pace(model, None)
    state = TrainerState(global_step=10, max_steps=30)
    pace.start(state, 1000.0)
    now[0], state.global_step = 104.0, 12
    assert pace.measure(state, 3000.0) == {"train/tokens_per_second": 500.0, "train/seconds_left": 36.0}
    now[0], state.global_step = 105.0, 13
    assert pace.measure(state, 4000.0)["train/tokens_per_second"] == 1000.0


def test_what_is_shown() -> None:
    measured = {
        "train/tokens_per_second": 12345.6,
        "train/mfu": 0.413,
        "train/memory_bytes": 6.9 * GIB,
        "train/peak_memory_bytes": 7.1 * GIB,
        "train/seconds_left": 130.0,
    }
    assert describe(measured) == "12,346 tok/s, 41% MFU, 6.90 GiB, 7.10 at peak, 2 min left"
    assert describe({"train/tokens_per_second": 10.0}) == "10 tok/s"
    line = summary(H200, peak=7 * GIB, seconds=200.0, num_tokens=1e6)
    assert line == (
        "NVIDIA H200, 1.00 GiB taken before, 7.00 GiB at peak (5% of the card), 3 min, 1,000,000 tokens, 5,000 tok/s"
    )
    assert summary(None, peak=GIB, seconds=20.0, num_tokens=100) == "CPU, 1.00 GiB at peak, 20 s, 100 tokens, 5 tok/s"


@pytest.mark.parametrize(("seconds", "text"), [(7.4, "7 s"), (150, "2 min"), (5940, "99 min"), (7500, "2 h 5 min")])
def test_durations(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize(
    ("name", "flops"), [("NVIDIA H200", 989e12), ("NVIDIA H100 PCIe", 756e12), ("NVIDIA L40S", 362e12), ("Other", None)]
)
def test_a_card_is_known_by_its_name(name: str, flops: float | None) -> None:
    assert Card(name, 1, 0).peak_flops == flops
