"""The weights with the least validation loss: when to stop looking for better ones, and how they are brought back."""

import json
import math
import shutil
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.training.config import LoRATrainingConfig
from finemill.training.whole_state import set_trained_weights, trained_weights

WEIGHTS = "finemill_best.safetensors"
PROGRESS = "finemill_best.json"


class EarlyStopping(TrainerCallback):  # type: ignore[misc]
    """Keeps the trained weights of the best evaluation, in a checkpoint too, and stops after too many worse ones.

    Args:
        config: how patient to be.
        scratch: folder for the best weights.
        checkpoint: where the training goes on from, None from the start.
    """

    def __init__(self, config: LoRATrainingConfig, scratch: Path, checkpoint: Path | None) -> None:
        self._patience = config.early_stopping_patience or math.inf
        self._threshold = config.early_stopping_threshold
        self._scratch = scratch
        self.best_loss, self.best_step, self.worse = math.inf, 0, 0
        if checkpoint is not None and (checkpoint / PROGRESS).is_file():
            self.best_loss, self.best_step, self.worse = json.loads((checkpoint / PROGRESS).read_text())
            shutil.copy(checkpoint / WEIGHTS, scratch / WEIGHTS)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Evaluate the last weights too: they may be the best."""
        if state.global_step >= state.max_steps:
            control.should_evaluate = True
        return control

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float],
        model: nn.Module,
        **kwargs: Any,
    ) -> TrainerControl:
        """Keep the weights if they are better, or count."""
        loss = metrics["eval_loss"]
        if loss < self.best_loss - self._threshold:
            self.best_loss, self.best_step, self.worse = loss, state.global_step, 0
            weights = trained_weights(model)
            if state.is_world_process_zero:
                save_file(weights, self._scratch / WEIGHTS)
        else:
            self.worse += 1
        if self.has_stopped:
            control.should_training_stop = True
            # The adapter itself comes next: whoever went on from here would train further.
            control.should_save = False
        return control

    @property
    def has_stopped(self) -> bool:
        """Whether too many evaluations were no better."""
        return self.worse >= self._patience

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Put the best weights into the checkpoint that was just written."""
        if state.is_world_process_zero and self.best_step:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            shutil.copy(self._scratch / WEIGHTS, folder / WEIGHTS)
            (folder / PROGRESS).write_text(json.dumps([self.best_loss, self.best_step, self.worse]))

    def restore(self, model: nn.Module) -> None:
        """Give the model its best weights back, in the memory that its parameters have."""
        if not self.best_step:
            return
        set_trained_weights(model, load_file(self._scratch / WEIGHTS))
