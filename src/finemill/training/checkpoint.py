"""Resumable training states: written to the store whole or not at all, and only resumed by the same training."""

import json
import logging
import math
import signal
import threading
import time
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from finemill.artifacts.ports import BASE_MODEL
from finemill.errors import UserError
from finemill.models.base.resolve import resolve_base_model
from finemill.runtime.context import StepContext
from finemill.runtime.processes import num_processes
from finemill.training.config import ConfigT, LoRATrainingConfig

logger = logging.getLogger(__name__)

IDENTITY_NAME = "training_identity.json"
BATCH_NAME = "global_batch.json"


def training_identity(config: LoRATrainingConfig, context: StepContext) -> dict[str, Any]:
    """Everything that must be the same for a checkpoint to be continued, by however many processes."""
    return {
        "config": config.model_dump(mode="json", exclude=set(config.not_in_key)),
        "inputs": {port: manifest.digest for port, manifest in context.manifests.items()},
        "base_model": resolve_base_model(context.references[BASE_MODEL]).digest,
    }


def global_batch(config: LoRATrainingConfig) -> int:
    """Rows of an optimizer step in all processes together."""
    return config.per_device_train_batch_size * config.gradient_accumulation_steps * _sharers(config)


def _sharers(config: LoRATrainingConfig) -> int:
    """Processes, or groups of them, that have rows of their own."""
    return num_processes() // config.processes_per_row


def keep_global_batch(config: ConfigT, checkpoint: Path) -> ConfigT:
    """The configuration whose steps have as many rows as those before the checkpoint, in the processes there are.

    Raises: UserError: they cannot be shared evenly.
    """
    rows: int = json.loads((checkpoint / BATCH_NAME).read_text(encoding="utf-8"))
    if rows == global_batch(config):
        return config
    processes = _sharers(config)
    asked = config.per_device_train_batch_size
    sizes = (asked,) if config.compares_rows else range(asked, 0, -1)
    size = next((size for size in sizes if rows % (size * processes) == 0), None)
    if size is None:
        raise UserError(
            f"the checkpoint's training has {rows} rows per step, which {processes} processes cannot share evenly"
            + (f" in passes of {asked}, whose rows the loss compares" if config.compares_rows else "")
            + ": continue with a number that divides it, or start over with resume: never"
        )
    passes = rows // (size * processes)
    return config.model_copy(update={"per_device_train_batch_size": size, "gradient_accumulation_steps": passes})


def find_checkpoint(config: LoRATrainingConfig, context: StepContext) -> Path | None:
    """The checkpoint to continue from, as `config.resume` asks.

    Raises: UserError: none where one must be, or it belongs to another training.
    """
    folder = None if config.resume == "never" else context.checkpoints.latest()
    if folder is None:
        if config.resume == "must":
            raise UserError(f"resume: must, but there is no checkpoint in {context.checkpoints.uri}: use resume: auto")
        return None
    written = json.loads((folder / IDENTITY_NAME).read_text(encoding="utf-8"))
    expected = training_identity(config, context)
    before, now = _flat(written), _flat(expected)
    changed = [name for name in sorted(before | now) if before.get(name) != now.get(name)]
    if changed:
        values = ", ".join(f"{name} (then {before.get(name, 'none')}, now {now.get(name, 'none')})" for name in changed)
        raise UserError(
            f"checkpoint {folder.name} was written by another training, different in {values}: "
            "restore what was then, or start over with resume: never"
        )
    return folder


def check_optimizer(checkpoint: Path, *, flat: bool) -> bool | None:
    """Refuse a checkpoint whose optimizer counts otherwise than the one that would go on.

    Args:
        checkpoint: of this training.
        flat: whether the one that would go on is that of finemill's kernels.
    Returns: whether moments of the kernels have 8 bits; None for any other optimizer's.
    Raises: UserError: one is of the kernels, and the other is not.
    """
    saved = torch.load(checkpoint / "optimizer.pt", map_location="cpu", mmap=True, weights_only=True)
    if flat != ("moments" in saved):
        then, now = "finemill's kernels", "transformers' layers"
        then, now = (now, then) if flat else (then, now)
        raise UserError(
            f"checkpoint {checkpoint.name} was written on {then}, and this training would go on on {now}, whose "
            "optimizer counts otherwise: set strategy and kernels, and take a GPU or none, as then, or start over with "
            "resume: never"
        )
    return saved["moments"]["exp_avg"].dtype == torch.uint8 if flat else None


def _flat(values: dict[str, Any], prefix: str = "") -> dict[str, str]:
    flat: dict[str, str] = {}
    for key, value in values.items():
        if isinstance(value, dict):
            flat |= _flat(value, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = json.dumps(value)
    return flat


FIRST_SAVE_S = 30.0
"""With `save_steps: auto`, seconds of training before the first checkpoint."""
SAVE_SHARE = 0.01
"""With `save_steps: auto`, for how much of the time training may stand still for checkpoints."""


class CheckpointCallback(TrainerCallback):  # type: ignore[misc]
    """Publishes each checkpoint, and turns SIGTERM into one last checkpoint and the end of training.

    Training stands still while the trainer writes its state to the scratch folder, not while a thread hashes, copies or
    uploads it from there: the next state waits for that, and so does the end.

    Used as a context manager around `Trainer.train`; the previous signal handler is put back afterwards.

    Args:
        config: what was asked for.
        context: of the step, with the store.
        rows: of an optimizer step in all processes.
    """

    def __init__(self, config: LoRATrainingConfig, context: StepContext, rows: int) -> None:
        self._config = config
        self._rows = rows
        self._context = context
        self.stop_requested = False
        self._told_to_stop = False
        self._save_due_s = math.inf
        self._save_began_s = 0.0
        self.stalled_s = 0.0
        """How long training stood still for checkpoints."""
        self._publisher = ThreadPoolExecutor(1, "checkpoint")
        self._publishing: Future[None] | None = None

    def __enter__(self) -> "CheckpointCallback":
        # Only the main thread may set handlers; elsewhere the host program decides about signals.
        self._in_main_thread = threading.current_thread() is threading.main_thread()
        if self._in_main_thread:
            self._previous = signal.signal(signal.SIGTERM, self._request_stop)
        if self._config.save_steps == "auto":
            self._save_due_s = time.monotonic() + FIRST_SAVE_S
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._finish_publishing()
        finally:
            self._publisher.shutdown()
            if self._in_main_thread:
                signal.signal(signal.SIGTERM, self._previous)

    def _finish_publishing(self) -> None:
        """Wait for the checkpoint that is on its way. Raises: what its publishing raised."""
        publishing, self._publishing = self._publishing, None
        if publishing is not None:
            publishing.result()

    def _request_stop(self, signum: int, frame: FrameType | None) -> None:
        self._told_to_stop = True

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """After SIGTERM: save and stop at the end of the running step. No checkpoint of the last step."""
        self._save_began_s = time.monotonic()
        self.stop_requested, is_due = self._agree(self._told_to_stop, self._save_began_s >= self._save_due_s, args)
        if self.stop_requested or is_due:
            control.should_save = True
        if self.stop_requested:
            control.should_training_stop = True
        if state.global_step >= state.max_steps:
            # The adapter itself comes next; nobody would continue from here.
            control.should_save = False
        if control.should_save:
            # The trainer deletes the state before when it has written the next one.
            self._finish_publishing()
        return control

    def _agree(self, stop: bool, save: bool, args: TrainingArguments) -> tuple[bool, bool]:
        """What any process was told or finds due, all do: they leave the loop after the same step."""
        if num_processes() == 1:
            return stop, save
        flags = torch.tensor([stop, save], dtype=torch.int32, device=args.device)
        torch.distributed.all_reduce(flags, torch.distributed.ReduceOp.MAX)
        return bool(flags[0]), bool(flags[1])

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Begin to publish the checkpoint that the trainer has just written."""
        if num_processes() > 1:
            # Each process writes the state of its own random generators.
            torch.distributed.barrier()
        if state.is_world_process_zero:
            folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
            self._publishing = self._publisher.submit(self._publish, folder, state.global_step)
        now = time.monotonic()
        self.stalled_s += now - self._save_began_s
        if self._config.save_steps == "auto":
            self._save_due_s = now + max(FIRST_SAVE_S, (now - self._save_began_s) / SAVE_SHARE)

    def _publish(self, folder: Path, training_step: int) -> None:
        identity = training_identity(self._config, self._context)
        (folder / IDENTITY_NAME).write_text(json.dumps(identity, indent=2), encoding="utf-8")
        (folder / BATCH_NAME).write_text(json.dumps(self._rows), encoding="utf-8")
        self._context.checkpoints.save(folder, training_step)
        self._context.checkpoints.keep_only(self._config.save_total_limit)
        self._context.recorder.log_progress(f"checkpoint at step {training_step}")
