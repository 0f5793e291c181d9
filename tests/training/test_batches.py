import logging
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from finemill.artifacts.dataset import LabelledRow, PreferenceRow, find_rows
from finemill.artifacts.splits import split_path
from finemill.artifacts.tables import write_rows
from finemill.training.batches import BatchWatch

ROWS = [PreferenceRow(input_ids=[row, 1, 2, 3], labels=[-100, 1, 2, 3]) for row in range(10, 40)]
WORSE = PreferenceRow(input_ids=[7, 8], labels=[-100, 8], rejected_input_ids=[7, 9], rejected_labels=[-100, 9])


@pytest.fixture
def dataset(tmp_path: Path) -> Path:
    write_rows(split_path(tmp_path, "train"), PreferenceRow, [*ROWS, WORSE])
    return tmp_path


def watched(dataset: Path, losses: list[float]) -> BatchWatch:
    """A watch over steps of one row each, a row after another; the curve has a point at the end."""
    trainer: Any = SimpleNamespace(training_step=lambda _, inputs: inputs["loss"], add_callback=lambda _: None)
    watch = BatchWatch(dataset)
    watch.attach(trainer)
    arguments: Any = SimpleNamespace()
    for step, loss in enumerate(losses):
        state: Any = SimpleNamespace(global_step=step)
        watch.on_step_begin(arguments, state, arguments)
        ids = torch.tensor([[*ROWS[step].input_ids, 0]])
        inputs = {"input_ids": ids, "attention_mask": (ids > 0).long(), "loss": torch.tensor(loss)}
        trainer.training_step(None, inputs)
    watch.on_log(arguments, arguments, arguments, logs={"loss": 1.0})
    return watch


def test_a_loss_without_a_number_names_the_first_step_and_its_rows(dataset: Path) -> None:
    assert watched(dataset, [1.0, 1.1, math.nan, math.nan]).where() == " (step 3, rows 3 of train)"


def test_a_spike_names_its_rows_and_usual_losses_do_not(dataset: Path, caplog: pytest.LogCaptureFixture) -> None:
    usual = [2.0 + 0.1 * (step % 5) for step in range(25)]
    with caplog.at_level(logging.WARNING):
        watched(dataset, usual)
        assert caplog.messages == []
        watched(dataset, [*usual, 9.0, 2.1])
    assert caplog.messages == ["loss 9.000 at step 26, usually 2.200: rows 26 of train"]


def test_rows_are_found_by_what_was_cut_of_them_and_by_either_answer(dataset: Path, tmp_path: Path) -> None:
    assert find_rows(dataset, "train", [[12, 1, 2], [7, 9]]) == ["3", "31"]
    write_rows(split_path(tmp_path, "validation"), LabelledRow, [LabelledRow(input_ids=[4, 5], labels=[4, 5])])
    assert find_rows(tmp_path, "validation", [[4, 5]]) == ["1"]
