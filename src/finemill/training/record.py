"""The loss curve and the progress line, live."""

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.errors import UserError
from finemill.runtime.context import Recorder
from finemill.training.advice import warn_of_length
from finemill.training.batches import BatchWatch
from finemill.training.checkpoint import global_batch
from finemill.training.config import LoRATrainingConfig
from finemill.training.log_window import LogWindow
from finemill.training.pace import Pace, describe, duration

_REWARDS = ("rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins")
# The trainer's names and ours.
METRIC_NAMES = {
    "loss": "train/loss",
    "learning_rate": "train/learning_rate",
    "grad_norm": "train/grad_norm",
    "mean_token_accuracy": "train/mean_token_accuracy",
    "eval_loss": "validation/loss",
    **{name: f"train/{name}" for name in _REWARDS},
    **{f"eval_{name}": f"validation/{name}" for name in _REWARDS},
}


class RecordCallback(TrainerCallback):  # type: ignore[misc]
    """Sends what the trainer logs to the recorder, and stops a training whose loss is no number any more."""

    def __init__(
        self, recorder: Recorder, config: LoRATrainingConfig, pace: Pace, batches: BatchWatch, window: LogWindow
    ) -> None:
        self._recorder = recorder
        self._batches = batches
        self._config = config
        self._pace, self._window = pace, window

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock, and say what of the settings this training is too short for."""
        if state.is_world_process_zero:
            rows = len(kwargs["train_dataloader"].dataset)
            warn_of_length(
                self._config, num_steps=state.max_steps, num_rows=rows, rows_per_step=global_batch(self._config)
            )
        self._started = time.monotonic()
        self._pace.start(state, self._window.num_tokens)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Record one point of the curve. Raises: UserError: the loss or the gradient is not finite."""
        metrics = {METRIC_NAMES[name]: float(value) for name, value in (logs or {}).items() if name in METRIC_NAMES}
        if getattr(kwargs.get("optimizer"), "step_was_skipped", False):
            # In float16 a gradient that overflows is not applied, and the next loss is multiplied with less.
            metrics.pop("train/grad_norm", None)
        if not metrics or not state.is_world_process_zero:
            return
        for name, value in metrics.items():
            if not math.isfinite(value):
                advice = f"lower learning_rate (now {self._config.learning_rate:g}), lengthen warmup_steps"
                if name == "train/loss" and state.global_step == 1:
                    # Nothing was learned before it.
                    advice = "look whether the base model's weights are whole, set compute_dtype to float32"
                step = f"step {state.global_step}{self._batches.where()}"
                raise UserError(f"{name} is {value} at {step}: {advice}, or look at these rows")
        if "train/loss" not in metrics:
            self._recorder.log_metrics(metrics, state.global_step)
            return
        tokens = (logs or {}).get("num_tokens", 0)
        measured = self._pace.measure(state, tokens)
        self._recorder.log_metrics(metrics | measured, state.global_step)
        accuracy = metrics.get("train/rewards/accuracies")
        self._recorder.log_progress(
            f"step {state.global_step}/{state.max_steps}, epoch {state.epoch or 0:.2f}, {tokens:,.0f} tokens, "
            f"{duration(time.monotonic() - self._started)}, loss {metrics['train/loss']:.4f}"
            + (f", rewards/accuracies {accuracy:.2f}, " if accuracy is not None else ", ")
            + describe(measured)
        )
