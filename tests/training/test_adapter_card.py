"""What an adapter's model card says."""

import dataclasses
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from finemill.artifacts.adapter import TrainingRecord
from finemill.models.base.resolve import resolve_base_model
from finemill.training.adapter_card import write_adapter_card

RECORD = TrainingRecord(
    max_steps=20, log_history=({"step": 10, "loss": 1.25}, {"step": 20, "loss": 0.5}, {"step": 20, "eval_loss": 0.75})
)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Of an adapter, whose card is to be written."""
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}', encoding="utf-8")
    return tmp_path


def test_a_card_names_base_library_losses_and_what_opens_the_adapter(folder: Path) -> None:
    base = dataclasses.replace(resolve_base_model("builtin:tiny-qwen3"), id="hf://Qwen/Qwen3-0.6B@" + "a" * 40)
    write_adapter_card(folder, base, RECORD)
    card = ModelCard.load(folder / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "adapter")
    assert data["library_name"] == "peft"
    assert "vllm serve Qwen/Qwen3-0.6B --enable-lora --lora-modules tuned=." in card.text
    assert "| validation | 0.75 | 0.75 |" in card.text


def test_a_base_of_this_machine_has_no_line_for_the_hub(folder: Path) -> None:
    write_adapter_card(folder, resolve_base_model("builtin:tiny-qwen3"), RECORD)
    text = (folder / "README.md").read_text()
    assert "finemill merge --base-model builtin:tiny-qwen3 --adapter ADAPTER" in text
    assert "vllm" not in text


def test_an_adapter_that_is_more_than_lora_has_no_line_for_a_server(folder: Path) -> None:
    base = dataclasses.replace(resolve_base_model("builtin:tiny-qwen3"), id="hf://Qwen/Qwen3-0.6B@" + "a" * 40)
    values = '{"peft_type": "LORA", "trainable_token_indices": {"embed_tokens": [5]}}'
    (folder / "adapter_config.json").write_text(values, encoding="utf-8")
    write_adapter_card(folder, base, RECORD)
    assert "vllm" not in (folder / "README.md").read_text(encoding="utf-8")
