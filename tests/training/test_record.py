"""What the trainer logs becomes points of curves, and ends a training whose numbers are none."""

import math
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import TrainerControl, TrainerState, TrainingArguments

from finemill.errors import UserError
from finemill.training.config import LoRATrainingConfig
from finemill.training.record import RecordCallback
from tests.recorder import ListRecorder


@pytest.fixture
def recorder() -> ListRecorder:
    return ListRecorder()


def log(recorder: ListRecorder, *, skipped: bool, **logs: float) -> None:
    batches: Any = SimpleNamespace(where=lambda: " (step 1)")
    unused: Any = SimpleNamespace()
    callback = RecordCallback(recorder, LoRATrainingConfig(), pace=unused, batches=batches, window=unused)
    state = TrainerState(global_step=1, is_world_process_zero=True)
    arguments = TrainingArguments(output_dir="unused", report_to="none")
    optimizer = SimpleNamespace(step_was_skipped=skipped)
    callback.on_log(arguments, state, TrainerControl(), logs=logs, optimizer=optimizer)


def test_a_gradient_that_overflowed_in_float16_and_was_left_out_ends_nothing(recorder: ListRecorder) -> None:
    log(recorder, skipped=True, grad_norm=math.inf, learning_rate=1e-4)
    assert recorder.points == [(1, {"train/learning_rate": 1e-4})]


def test_a_gradient_that_is_no_number_ends_the_training(recorder: ListRecorder) -> None:
    with pytest.raises(UserError, match=r"train/grad_norm is inf at step 1 \(step 1\): lower learning_rate"):
        log(recorder, skipped=False, grad_norm=math.inf)


def test_a_loss_that_is_no_number_before_anything_was_learned_is_the_base_s(recorder: ListRecorder) -> None:
    with pytest.raises(
        UserError, match=r"train/loss is nan at step 1 \(step 1\): look whether the base model's weights"
    ):
        log(recorder, skipped=False, loss=math.nan)
