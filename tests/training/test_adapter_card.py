"""What an adapter's model card says."""

import dataclasses
from pathlib import Path

from huggingface_hub import ModelCard

from finemill.artifacts.adapter import TrainingRecord
from finemill.models.base.resolve import resolve_base_model
from finemill.training.adapter_card import write_adapter_card

RECORD = TrainingRecord(
    max_steps=20, log_history=({"step": 10, "loss": 1.25}, {"step": 20, "loss": 0.5}, {"step": 20, "eval_loss": 0.75})
)


def test_a_card_names_base_library_losses_and_what_opens_the_adapter(tmp_path: Path) -> None:
    base = dataclasses.replace(resolve_base_model("builtin:tiny-qwen3"), id="hf://Qwen/Qwen3-0.6B@" + "a" * 40)
    write_adapter_card(tmp_path, base, RECORD)
    card = ModelCard.load(tmp_path / "README.md")
    data = card.data.to_dict()
    assert (data["base_model"], data["base_model_relation"]) == ("Qwen/Qwen3-0.6B", "adapter")
    assert data["library_name"] == "peft"
    assert "vllm serve Qwen/Qwen3-0.6B --enable-lora --lora-modules tuned=." in card.text
    assert "| training | 1.25 | 0.5 |\n| validation | 0.75 | 0.75 |" in card.text


def test_a_base_of_this_machine_has_no_line_for_the_hub(tmp_path: Path) -> None:
    write_adapter_card(tmp_path, resolve_base_model("builtin:tiny-qwen3"), RECORD)
    text = (tmp_path / "README.md").read_text()
    assert "finemill merge --base-model builtin:tiny-qwen3 --adapter ADAPTER" in text
    assert "vllm" not in text
