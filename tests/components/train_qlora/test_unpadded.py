"""Rows end to end train what rows padded to the longest of their batch train."""

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer
from trl import SFTTrainer

from finemill.components.train_qlora import step
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.unpadded import UnpaddedTrainer, can_join_rows, join_rows
from finemill.training.inputs import TrainingInputs

SETTINGS: dict[str, Any] = {"lora_r": 4, "per_device_train_batch_size": 3, "gradient_checkpointing": False}


def test_joined_rows_know_their_positions_and_what_follows() -> None:
    rows = [
        {"input_ids": [5, 6, 7], "labels": [-100, 6, 7]},
        {"input_ids": [8, 9], "labels": [8, 9]},
        {"input_ids": [1, 2, 3], "labels": [1, 2, -100], "seq_lengths": [1, 2]},
    ]
    batch = join_rows(rows)
    assert next(iter(batch)) == "lengths"
    assert {name: values.tolist() for name, values in batch.items()} == {
        "lengths": [3, 2, 1, 2],
        "input_ids": [[5, 6, 7, 8, 9, 1, 2, 3]],
        "position_ids": [[0, 1, 2, 0, 1, 0, 0, 1]],
        "labels": [[-100, 6, 7, -100, 9, -100, -100, -100]],
        "logits_to_keep": [0, 1, 3],
        "shift_labels": [[6, 7, 9]],
    }


@pytest.mark.skipif(torch.cuda.is_available(), reason="for CPUs")
def test_loss_gradient_and_evaluation_are_those_of_padded_rows(
    base_model: Path, dataset: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    inputs = TrainingInputs(base_model, dataset, AutoTokenizer.from_pretrained(base_model), torch.device("cpu"))
    config = TrainQLoRAConfig(**SETTINGS, eval_steps=1)

    def found() -> tuple[float, dict[str, float], list[torch.Tensor]]:
        torch.manual_seed(0)
        trainer = step.build_trainer(inputs, tmp_path, config)
        for name, parameter in trainer.model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.05)
        batch = trainer.data_collator([trainer.train_dataset[index] for index in (0, 5, 7)])
        loss = trainer.compute_loss(trainer.model, batch)
        loss.backward()
        gradients = [parameter.grad for parameter in trainer.model.parameters() if parameter.grad is not None]
        metrics = {name: values[-1] for name, values in trainer._metrics["train"].items()}
        return loss.item(), metrics | {"eval_loss": trainer.evaluate()["eval_loss"]}, gradients

    joined = found()
    monkeypatch.setattr(step, "can_join_rows", lambda *_: False)
    padded = found()
    assert joined[:2] == (pytest.approx(padded[0], rel=1e-5), pytest.approx(padded[1], rel=1e-5))
    assert set(joined[1]) == {"entropy", "mean_token_accuracy", "num_tokens", "eval_loss"}
    for ours, theirs in zip(joined[2], padded[2], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-6)


def test_a_row_without_anything_to_learn_is_a_loss_of_zero(base_model: Path, dataset: Path, tmp_path: Path) -> None:
    inputs = TrainingInputs(base_model, dataset, AutoTokenizer.from_pretrained(base_model), torch.device("cpu"))
    trainer = step.build_trainer(inputs, tmp_path, TrainQLoRAConfig(**SETTINGS))
    loss = trainer.compute_loss(trainer.model, join_rows([{"input_ids": [5], "labels": [5]}]))
    loss.backward()
    assert loss.item() == 0


@pytest.mark.parametrize(
    ("settings", "trainer"),
    [
        ({}, UnpaddedTrainer),
        ({"packing": True}, UnpaddedTrainer),
        ({"method": "full"}, UnpaddedTrainer),
        ({"neftune_noise_alpha": 5.0}, SFTTrainer),
    ],
)
def test_what_counts_a_row_s_tokens_keeps_rows_apart(
    settings: dict[str, Any], trainer: type[SFTTrainer], base_model: Path, tmp_path: Path
) -> None:
    inputs = TrainingInputs(base_model, tmp_path, object(), torch.device("cpu"))
    assert step._plain_trainer(inputs, TrainQLoRAConfig(**settings)) is trainer


@pytest.mark.parametrize(
    ("text", "joins"),
    [
        ('{"model_type": "mistral", "sliding_window": 4096}', False),
        ('{"model_type": "mistral", "sliding_window": null}', True),
        ('{"model_type": "qwen2", "sliding_window": 4096, "use_sliding_window": false}', True),
        ('{"model_type": "gemma2"}', False),
    ],
)
def test_models_that_do_not_look_at_all_tokens_before_keep_rows_apart(text: str, joins: bool, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(text)
    assert can_join_rows(tmp_path, TrainQLoRAConfig()) == joins
