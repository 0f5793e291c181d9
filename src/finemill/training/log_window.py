"""What the trainer has summed up since the last point of the curve: part of a checkpoint, as the weights are.

Without it the means of a training that goes on would begin anew, and training.json would say how often it was stopped.
"""

from pathlib import Path
from typing import Any

import torch
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments


class LogWindow(TrainerCallback):  # type: ignore[misc]
    """Saves the sums of a trainer of TRL's in its checkpoints, and begins with those of one.

    Each process saves its own. Where another number of processes goes on, only the counts are taken over.

    Args:
        trainer: whose sums they are.
        checkpoint: where the training goes on from, None from the start.
    """

    def __init__(self, trainer: Trainer, checkpoint: Path | None) -> None:
        self._trainer, self._checkpoint = trainer, checkpoint
        self.num_tokens = 0.0
        """Tokens that were seen before this call."""

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the sums of the checkpoint up."""
        parts = sorted(self._checkpoint.glob(_name("*"))) if self._checkpoint else []
        if not parts:
            return
        own = len(parts) == args.world_size
        part = parts[0].with_name(_name(args.process_index)) if own else parts[0]
        # torch restores nothing to "cpu:0", the device of a process among several without GPUs.
        saved = torch.load(part, map_location="cpu", weights_only=True)
        trainer: Any = self._trainer
        trainer._total_train_tokens = saved["num_tokens"]
        # The mean loss of all steps ends the log.
        trainer._initial_global_step, trainer._total_loss_scalar = 0, saved["total_loss"]
        self.num_tokens = float(saved["num_tokens"])
        if not own:
            return
        trainer._tr_loss, trainer._globalstep_last_logged = saved["loss"].to(args.device), saved["last_logged"]
        trainer._metrics["train"].update(saved["metrics"])
        if saved["sums"] is not None:
            trainer._sums = saved["sums"].to(args.device)
            self.num_tokens += float(saved["sums"][-1])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put this process's sums into the checkpoint that was just written."""
        trainer: Any = self._trainer
        sums = {
            "loss": trainer._tr_loss,
            "last_logged": trainer._globalstep_last_logged,
            "total_loss": trainer._total_loss_scalar,
            "num_tokens": trainer._total_train_tokens,
            "metrics": dict(trainer._metrics["train"]),
            # What finemill's own trainers keep on the device, tokens last.
            "sums": getattr(trainer, "_sums", None),
        }
        torch.save(sums, Path(args.output_dir) / f"checkpoint-{state.global_step}" / _name(args.process_index))


def _name(process: int | str) -> str:
    return f"finemill_log_{process}.pt"
