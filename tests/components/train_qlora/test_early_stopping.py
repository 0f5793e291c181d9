"""A training that gets worse stops, and what it writes are the best weights it had."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from finemill.artifacts.adapter import read_training
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.step import run as train_qlora
from finemill.runtime.context import StepContext
from tests.recorder import recorded

CONFIG = TrainQLoRAConfig(
    lora_r=4,
    load_in_4bit=False,
    max_steps=30,
    per_device_train_batch_size=4,
    gradient_accumulation_steps=1,
    learning_rate=0.1,
    lr_scheduler_type="constant",
    eval_steps=1,
    logging_steps=1,
    gradient_checkpointing=False,
    save_steps=None,
    early_stopping_patience=3,
)


@pytest.mark.parametrize("method", ["lora", "full"])
def test_the_best_weights_are_written_and_training_stops_after_patience(
    method: str, make_context: Callable[[], StepContext], base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    values = CONFIG.model_dump(exclude_unset=True)
    if method == "full":
        values = {name: value for name, value in values.items() if not name.startswith("lo")} | {"logging_steps": 1}
    config = TrainQLoRAConfig(**values | {"method": method})
    stopped, best = tmp_path / "stopped", tmp_path / "best"
    metrics = train_qlora(
        base_model=base_model, dataset=dataset, output_dir=stopped, config=config, context=make_context()
    )
    training = read_training(stopped)
    assert training is not None
    curve = training.validation_losses
    best_step, best_loss = min(curve, key=lambda point: point[1])
    assert (metrics["train/best_step"], metrics["validation/best_loss"]) == (best_step, best_loss)
    assert metrics["train/num_steps"] == best_step + 3 < 30
    alone = TrainQLoRAConfig(**values | {"method": method, "max_steps": best_step, "resume": "never"})
    train_qlora(base_model=base_model, dataset=dataset, output_dir=best, config=alone, context=make_context())
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (stopped, best))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())


def test_a_resumed_training_knows_its_best_weights(
    make_context: Callable[[], StepContext], base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    """Every step writes a checkpoint; what goes on from the last one ends as the training that wrote it."""
    config = CONFIG.model_copy(update={"save_steps": 1})
    runs = [
        train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / name, config=config, context=make_context()
        )
        for name in ("first", "resumed")
    ]
    assert runs[0]["train/best_step"] == runs[1]["train/best_step"]
    assert_alike(tmp_path / "resumed", tmp_path / "first")


def test_a_sigterm_in_the_last_step_leaves_the_best_weights(
    make_context: Callable[[], StepContext], base_model: Path, dataset: Path, tmp_path: Path
) -> None:
    config = CONFIG.model_copy(update={"max_steps": 2, "resume": "never"})
    for name in ("alone", "told"):
        context = make_context()
        if name == "told":
            recorded(context).on_progress = lambda text: (
                os.kill(os.getpid(), signal.SIGTERM) if text.startswith("step 1/2") else None
            )
        metrics = train_qlora(
            base_model=base_model, dataset=dataset, output_dir=tmp_path / name, config=config, context=context
        )
        assert metrics["train/best_step"] == 1
    assert_alike(tmp_path / "told", tmp_path / "alone")


def assert_alike(one: Path, other: Path) -> None:
    found, expected = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    assert all(torch.equal(found[name], weight) for name, weight in expected.items())
    assert read_training(one) == read_training(other)


def test_patience_needs_evaluations() -> None:
    with pytest.raises(ValueError, match="early_stopping_patience 3 has no effect without eval_steps"):
        TrainQLoRAConfig(early_stopping_patience=3)
    with pytest.raises(ValueError, match=r"early_stopping_threshold 0\.1 has no effect"):
        TrainQLoRAConfig(eval_steps=1, early_stopping_threshold=0.1)
