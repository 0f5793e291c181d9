"""A training that goes on from a checkpoint logs what one without a stop would."""

from collections import defaultdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from transformers import TrainerControl, TrainerState, TrainingArguments

from finemill.training.log_window import LogWindow


def a_trainer(**sums: Any) -> Any:
    begun = {"_tr_loss": torch.tensor(0.0), "_globalstep_last_logged": 7, "_initial_global_step": 7}
    begun |= {"_total_loss_scalar": 0.0, "_total_train_tokens": 0, "_metrics": {"train": defaultdict(list)}}
    return SimpleNamespace(**begun | sums)


def arguments(folder: Path, process: int = 0, processes: int = 1) -> Any:
    kept = {"output_dir": str(folder), "device": torch.device("cpu")}
    return SimpleNamespace(**kept, process_index=process, world_size=processes)


def saved(folder: Path, trainer: Any, processes: int = 1) -> Path:
    """A checkpoint at step 7."""
    checkpoint = folder / "checkpoint-7"
    checkpoint.mkdir()
    for process in range(processes):
        state = TrainerState(global_step=7)
        LogWindow(trainer, None).on_save(arguments(folder, process, processes), state, TrainerControl())
    return checkpoint


def gone_on(checkpoint: Path, args: TrainingArguments) -> tuple[Any, LogWindow]:
    trainer = a_trainer()
    window = LogWindow(trainer, checkpoint)
    window.on_train_begin(args, TrainerState(global_step=7), TrainerControl())
    return trainer, window


def test_sums_since_the_last_point_are_part_of_a_checkpoint(tmp_path: Path) -> None:
    sums = {"_tr_loss": torch.tensor(1.1), "_globalstep_last_logged": 5, "_total_loss_scalar": 4.5}
    sums |= {"_total_train_tokens": 300, "_sums": torch.tensor([0.1, 40.0], dtype=torch.float64)}
    before = a_trainer(**sums, _metrics={"train": defaultdict(list, {"entropy": [0.3, 0.1]})})
    trainer, window = gone_on(saved(tmp_path, before), arguments(tmp_path))
    assert trainer._metrics["train"] == {"entropy": [0.3, 0.1]}
    assert trainer._metrics["train"]["another"] == []
    assert torch.equal(trainer._sums, before._sums)
    for name in ("_tr_loss", "_globalstep_last_logged", "_total_loss_scalar", "_total_train_tokens"):
        assert getattr(trainer, name) == getattr(before, name), name
    assert trainer._initial_global_step == 0
    assert window.num_tokens == 340


def test_another_number_of_processes_takes_over_what_was_counted(tmp_path: Path) -> None:
    before = a_trainer(_tr_loss=torch.tensor(1.1), _globalstep_last_logged=5, _total_train_tokens=300)
    trainer, window = gone_on(saved(tmp_path, before, processes=2), arguments(tmp_path))
    assert (trainer._tr_loss, trainer._globalstep_last_logged) == (0, 7)
    assert trainer._total_train_tokens == window.num_tokens == 300


def test_a_training_from_its_first_step_begins_with_nothing(tmp_path: Path) -> None:
    trainer = a_trainer()
    window = LogWindow(trainer, None)
    window.on_train_begin(arguments(tmp_path), TrainerState(), TrainerControl())
    assert (trainer._total_train_tokens, window.num_tokens) == (0, 0)
