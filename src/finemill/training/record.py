"""The loss curve and the progress line, live."""

import math
import time
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.errors import UserError
from finemill.runtime.context import Recorder

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

    def __init__(self, recorder: Recorder, learning_rate: float) -> None:
        self._recorder = recorder
        self._learning_rate = learning_rate

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Start the clock."""
        self._started = time.monotonic()

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
        if not metrics or not state.is_world_process_zero:
            return
        for name, value in metrics.items():
            if not math.isfinite(value):
                raise UserError(
                    f"{name} is {value} at step {state.global_step}: lower learning_rate (now {self._learning_rate:g}) "
                    "or lengthen warmup_steps"
                )
        self._recorder.log_metrics(metrics, state.global_step)
        if "train/loss" in metrics:
            tokens = int((logs or {}).get("num_tokens", 0))
            seconds = time.monotonic() - self._started
            accuracy = metrics.get("train/rewards/accuracies")
            self._recorder.log_progress(
                f"step {state.global_step}/{state.max_steps}, epoch {state.epoch or 0:.2f}, {tokens} tokens, "
                f"{seconds:.0f} s, loss {metrics['train/loss']:.4f}"
                + (f", rewards/accuracies {accuracy:.2f}" if accuracy is not None else "")
            )
