"""Which rows a loss came from: every optimizer step's tokens are kept until the next point of the curve."""

import logging
import math
import statistics
from collections import deque
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.artifacts.dataset import find_rows
from finemill.kernels.ops.packing import split_rows
from finemill.runtime.processes import num_processes

logger = logging.getLogger(__name__)

KEPT_STEPS = 64
"""Steps whose tokens are kept at most: of longer stretches between two points the last."""
USUAL_STEPS = 50
"""Steps that say what a usual loss is; the fewest are two fifths of them."""
SPIKE = 2.0
"""How many times the usual loss a spike is, and at least six deviations above it."""
MOST_WARNINGS = 5


class BatchWatch(TrainerCallback):  # type: ignore[misc]
    """Names the rows of a step whose loss is a spike, or no number; reads the device where the trainer does anyway.

    Args:
        dataset: whose rows they are.
        processes_per_row: processes that share a row; of what is cut nothing is named.
    """

    def __init__(self, dataset: Path, processes_per_row: int = 1) -> None:
        self._dataset = dataset
        self._in_parts = processes_per_row > 1
        self._steps: deque[tuple[int, list[tuple[dict[str, Any], Tensor]]]] = deque(maxlen=KEPT_STEPS)
        self._usual: deque[float] = deque(maxlen=USUAL_STEPS)
        self._suspect: tuple[int, list[dict[str, Any]]] | None = None
        self._warnings = 0

    def attach(self, trainer: Trainer) -> None:
        """Keep what every forward and backward pass of `trainer` is given, and its loss."""
        compute = trainer.training_step

        def training_step(model: Any, inputs: dict[str, Any], *rest: Any, **more: Any) -> Tensor:
            loss: Tensor = compute(model, inputs, *rest, **more)
            if self._steps:
                self._steps[-1][1].append((inputs, loss.detach()))
            return loss

        trainer.training_step = training_step
        trainer.add_callback(self)

    def on_step_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Open a step."""
        self._steps.append((state.global_step + 1, []))

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Look at the steps since the last point of the curve."""
        if "loss" not in (logs or {}):
            return
        for step, passes in self._steps:
            if not passes:
                continue
            loss = float(torch.stack([loss.float().reshape(()) for _, loss in passes]).sum())
            batches = [inputs for inputs, _ in passes]
            self._suspect = step, batches
            if not math.isfinite(loss):
                break
            self._look_at(step, loss, batches)
        self._steps.clear()

    def _look_at(self, step: int, loss: float, batches: list[dict[str, Any]]) -> None:
        if len(self._usual) >= 2 * USUAL_STEPS // 5 and self._warnings < MOST_WARNINGS:
            usual = statistics.median(self._usual)
            deviation = 1.4826 * statistics.median(abs(value - usual) for value in self._usual)
            if loss > max(SPIKE * usual, usual + 6 * deviation):
                self._warnings += 1
                logger.warning("loss %.3f at step %d, usually %.3f:%s", loss, step, usual, self._names(batches))
        self._usual.append(loss)

    def where(self) -> str:
        """The step and rows that a loss without a number began with; nothing where other processes have rows, too."""
        if self._suspect is None or num_processes() > 1:
            return ""
        step, batches = self._suspect
        return f" (step {step},{self._names(batches)})"

    def _names(self, batches: list[dict[str, Any]]) -> str:
        if self._in_parts:
            return " rows that processes share, which are not looked for"
        sequences = [ids.tolist() for inputs in batches for ids in _sequences(inputs)]
        names = find_rows(self._dataset, "train", sequences)
        more = f" and {len(names) - 8} more" if len(names) > 8 else ""
        return f" rows {', '.join(names[:8])}{more} of train"


def _sequences(inputs: dict[str, Any]) -> list[Tensor]:
    ids = inputs["input_ids"]
    pairs = split_rows(ids, ids, inputs.get("attention_mask"), inputs.get("position_ids"))
    return [tokens for tokens, _ in pairs]
