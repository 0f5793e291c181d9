"""What the trainers of all steps share: their arguments, and the run from checkpoint to saved adapter."""

import logging
import os
import resource
import shutil
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

import torch
from transformers import PrinterCallback, Trainer, TrainerCallback, TrainingArguments

from finemill.artifacts.ports import BASE_MODEL
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import read_again, resolve_base_model
from finemill.runtime.context import StepContext
from finemill.runtime.processes import is_main_process, num_processes
from finemill.training.adapter import save_adapter, start_from_quantization_error, subtract_initial
from finemill.training.advice import warn_of_fit
from finemill.training.batches import BatchWatch
from finemill.training.checkpoint import (
    CheckpointCallback,
    check_optimizer,
    find_checkpoint,
    global_batch,
    keep_global_batch,
)
from finemill.training.config import SHARDED, ConfigT, LoRATrainingConfig
from finemill.training.early_stopping import EarlyStopping
from finemill.training.inputs import TrainingInputs
from finemill.training.log_window import LogWindow
from finemill.training.optimizer import set_learning_rates
from finemill.training.pace import Card, Pace, summary
from finemill.training.peers import together
from finemill.training.quantized_base import compute_dtype, memory_limit
from finemill.training.record import METRIC_NAMES, RecordCallback
from finemill.training.report_to import reporting
from finemill.training.strategy import (
    prepare_shards,
    settle_strategy,
    strategy_arguments,
    write_strategy,
)
from finemill.training.whole_state import WholeState

logger = logging.getLogger(__name__)

# transformers 5.18 renamed the argument and warns about the old name.
_CHECKPOINTING_FIELD = next(
    name
    for name in ("activation_checkpointing", "gradient_checkpointing")
    if name in TrainingArguments.__dataclass_fields__
)
# What a training returns of the last point of its curve, by the trainer's names.
_RESULTS = ("loss", "rewards/accuracies", "rewards/margins")


def settle(config: ConfigT, base_model: Path, device: torch.device) -> ConfigT:
    """The configuration with what `auto` stands for here, the same in all processes: the fullest card decides."""
    if device.type != "cuda":
        return settle_strategy(config, base_model, None)
    limit = torch.tensor(memory_limit(config, device), dtype=torch.float64, device=device)
    if num_processes() > 1:
        torch.distributed.all_reduce(limit, torch.distributed.ReduceOp.MIN)
    return settle_strategy(config, base_model, float(limit))


def cap_memory(config: LoRATrainingConfig, device: torch.device) -> None:
    """Let PyTorch refuse what would pass `memory_gb`, on a path that no planner fits into it."""
    if config.memory_gb is None:
        return
    if device.type != "cuda":
        logger.warning("memory_gb %g has no effect without a GPU", config.memory_gb)
    else:
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, config.memory_gb * 2**30 / total), device)


def shared_arguments(config: LoRATrainingConfig, scratch: Path, device: torch.device) -> dict[str, Any]:
    """The arguments that TRL's configurations have in common."""
    dtype = compute_dtype(config, device)
    return {
        "output_dir": str(scratch),
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "fp16": dtype == torch.float16,
        "max_length": config.max_length,
        "per_device_train_batch_size": config.per_device_train_batch_size,
        "per_device_eval_batch_size": config.per_device_train_batch_size,
        "gradient_accumulation_steps": config.gradient_accumulation_steps,
        "num_train_epochs": config.num_train_epochs,
        "max_steps": config.max_steps or -1,
        "learning_rate": config.learning_rate,
        "lr_scheduler_type": config.lr_scheduler_type,
        "lr_scheduler_kwargs": {"num_cycles": config.lr_num_cycles} if config.lr_num_cycles else {},
        "warmup_steps": config.warmup_steps,
        "weight_decay": config.weight_decay,
        "max_grad_norm": config.max_grad_norm,
        "optim": _optimizer(config, device),
        "neftune_noise_alpha": config.neftune_noise_alpha,
        # TRL would add a mixture's auxiliary loss by itself, which moves adapters only where routers are frozen.
        "router_aux_loss_coef": config.router_aux_loss_coef if config.train_router else 0.0,
        "seed": config.seed,
        "logging_steps": config.logging_steps,
        "logging_first_step": True,
        # The filter would replace a loss of NaN by an average of older ones.
        "logging_nan_inf_filter": False,
        "eval_strategy": "steps" if config.eval_steps else "no",
        "eval_steps": config.eval_steps,
        "save_strategy": "steps" if isinstance(config.save_steps, int) else "no",
        "save_steps": config.save_steps if isinstance(config.save_steps, int) else 500,
        "save_total_limit": 1,
        # Kubeflow Trainer shows progress in a TrainJob's status.
        "report_to": "kubeflow" if "KUBEFLOW_TRAINER_SERVER_URL" in os.environ else "none",
        "disable_tqdm": True,
        "log_level": "error",
        "dataloader_pin_memory": device.type == "cuda",
        # Every adapter takes part in every step.
        "ddp_find_unused_parameters": False,
        # FSDP2 has its own, among the strategy's arguments.
        _CHECKPOINTING_FIELD: bool(config.gradient_checkpointing) and config.strategy != "fsdp2",
        **strategy_arguments(config),
    }


def _optimizer(config: LoRATrainingConfig, device: torch.device) -> str:
    if config.optim != "auto":
        return config.optim
    # Of shards every operation of its own is dispatched tensor by tensor.
    return "adamw_torch_fused" if config.strategy in SHARDED and device.type == "cuda" else "adamw_torch"


@contextmanager
def _scratch_folder() -> Iterator[Path]:
    """A folder for the trainer's own checkpoints, one for all processes of this machine: each adds its part."""
    if num_processes() == 1:
        with TemporaryDirectory(prefix="finemill-train-") as folder:
            yield Path(folder)
        return
    shared = Path(gettempdir(), f"finemill-train-{os.environ.get('TORCHELASTIC_RUN_ID')}-{os.environ['MASTER_PORT']}")
    shared.mkdir(mode=0o700, exist_ok=True)
    try:
        yield shared
    finally:
        if os.environ.get("LOCAL_RANK") == "0":
            shutil.rmtree(shared, ignore_errors=True)


@contextmanager
def _without_renaming_warnings() -> Iterator[None]:
    """PEFT 0.21 and TRL 1.16 read attributes that transformers 5.18 renamed."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        yield


def run_training(
    build_trainer: Callable[[Path, ConfigT], Trainer],
    inputs: TrainingInputs,
    output_dir: Path,
    config: ConfigT,
    context: StepContext,
) -> dict[str, float]:
    """Train from the newest checkpoint to the end, and write the adapter to `output_dir`.

    Where the plain path runs out of GPU memory, it begins again from there with half the sequences per forward pass and
    the same global batch. Several processes end with the line that says which: TRL's losses gather counts in the
    middle of a forward pass, where the others would wait for the one that failed.

    Args:
        build_trainer: makes the trainer, given the folder that its own checkpoints go to, and the configuration.
        inputs: of the training; rows of its data set are named where a loss is no number, or a spike.
    Returns: the last logged loss (and rewards), tokens and steps, seconds, tokens per second, peak memory in bytes.
    Raises: UserError: a loss that is not finite, a checkpoint of another training, or processes that differ.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it. Or another
            process was lost. Or the base model is not what was remembered of it, and the same call takes it as it is.
    """
    with together(config, context, inputs.device) as watch:
        config = settle(config, inputs.base_model, inputs.device)
        smaller: ConfigT | None = config
        while smaller is not None:
            try:
                return _train(build_trainer, inputs, output_dir, smaller, config, context, watch)
            except torch.OutOfMemoryError as error:
                line = " ".join(str(error).split())
                halved = None if _is_ours(error) else _with_smaller_batches(smaller)
                advice, smaller = _advice(smaller, halved), halved if num_processes() == 1 else None
            if smaller is not None:
                torch.cuda.empty_cache()
                logger.warning(
                    "out of GPU memory: %d sequences per forward pass from here on, and %d passes per step",
                    smaller.per_device_train_batch_size,
                    smaller.gradient_accumulation_steps,
                )
    raise UserError(f"out of GPU memory ({line:.160}): {advice}, free memory on the card, or take a larger one")


def _advice(config: LoRATrainingConfig, halved: LoRATrainingConfig | None) -> str:
    """What makes a pass smaller: `halved`, where several processes cannot go on with it by themselves."""
    if halved is not None:
        return (
            f"set per_device_train_batch_size {halved.per_device_train_batch_size} and gradient_accumulation_steps "
            f"{halved.gradient_accumulation_steps}, the same global batch; or lower max_length ({config.max_length})"
        )
    compared = f"per_device_train_batch_size ({config.per_device_train_batch_size}), " if config.compares_rows else ""
    return f"lower {compared}max_length ({config.max_length}) or lora_r ({config.lora_r})"


def _is_ours(error: torch.OutOfMemoryError) -> bool:
    """Whether the kernels' trainer raised it, which has halved its micro-batches as far as they go."""
    return str(error).startswith("out of memory with micro-batches")


def _with_smaller_batches(config: ConfigT) -> ConfigT | None:
    """The configuration with at most half the sequences per forward pass and the same global batch.

    Returns: None where a pass is one row already, or the loss compares the rows of a pass.
    """
    if config.compares_rows:
        return None
    size = config.per_device_train_batch_size
    total = size * config.gradient_accumulation_steps
    fewer = next((count for count in range(size // 2, 0, -1) if total % count == 0), None)
    if fewer is None:
        return None
    return config.model_copy(
        update={"per_device_train_batch_size": fewer, "gradient_accumulation_steps": total // fewer}
    )


def _train(
    build_trainer: Callable[[Path, ConfigT], Trainer],
    inputs: TrainingInputs,
    output_dir: Path,
    config: ConfigT,
    asked: ConfigT,
    context: StepContext,
    watch: TrainerCallback | None,
) -> dict[str, float]:
    """Train once; checkpoints are those of what was asked, whatever the size of a forward pass."""
    checkpoint = find_checkpoint(asked, context)
    config = keep_global_batch(config, checkpoint) if checkpoint else config
    base = resolve_base_model(context.references[BASE_MODEL])
    card = Card.of(inputs.device)
    with _scratch_folder() as scratch, _without_renaming_warnings(), reporting(config, context) as recorder:
        with read_again(base) if is_main_process() else nullcontext():
            trainer = build_trainer(scratch, config)
        if checkpoint:
            eight_bit = check_optimizer(checkpoint, flat=getattr(trainer, "steps_flat", False))
            if eight_bit is not None:
                trainer.keep_moments(eight_bit)
        checkpoints = CheckpointCallback(asked, context, global_batch(config))
        # It prints every log entry as a dictionary; RecordCallback says the same in a line.
        trainer.remove_callback(PrinterCallback)
        batches = BatchWatch(inputs.dataset, config.processes_per_row)
        batches.attach(trainer)
        window = LogWindow(trainer, checkpoint)
        trainer.add_callback(window)
        pace = Pace(trainer.model, card, trainer.args.world_size)
        trainer.add_callback(RecordCallback(recorder, config, pace, batches, window))
        best = EarlyStopping(config, scratch, checkpoint) if config.early_stopping_patience else None
        if best:
            trainer.add_callback(best)  # before what publishes checkpoints
        trainer.add_callback(checkpoints)
        if watch:
            trainer.add_callback(watch)
        set_learning_rates(trainer, config)
        prepare_shards(trainer)
        if config.strategy in SHARDED:
            WholeState(trainer)
        loftq = config.init_lora_weights == "loftq"
        initial = start_from_quantization_error(trainer.model, base.path) if loftq else {}
        with checkpoints:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
        has_ended = trainer.state.global_step >= trainer.state.max_steps or (best is not None and best.has_stopped)
        is_told_to_stop = checkpoints.stop_requested and not has_ended
        if best and not is_told_to_stop:
            best.restore(trainer.model)
        if config.strategy == "shard":
            from finemill.kernels.streamed import release_shards

            release_shards(trainer.model)
    if is_told_to_stop:
        raise TemporaryError(f"stopped at step {trainer.state.global_step}; run again to continue from there")
    save_adapter(trainer, inputs.tokenizer, output_dir, base, rope_scaling=config.rope_scaling)
    if num_processes() > 1:
        write_strategy(output_dir, config, trainer)
    if initial:
        subtract_initial(output_dir, initial)
    _warn_of_fit(trainer)
    metrics = _metrics(trainer, result.metrics["train_runtime"], window.num_tokens)
    peak, seconds, tokens = (metrics[f"train/{name}"] for name in ("peak_memory_bytes", "seconds", "num_tokens"))
    context.recorder.log_progress(summary(card, peak=peak, seconds=seconds, num_tokens=tokens - window.num_tokens))
    if card is not None:
        metrics |= {"train/memory_before_bytes": float(card.before), "train/memory_share": peak / card.total}
    metrics["train/checkpoint_seconds"] = checkpoints.stalled_s
    if best:
        metrics |= {"validation/best_loss": best.best_loss, "train/best_step": float(best.best_step)}
    return metrics


def _warn_of_fit(trainer: Trainer) -> None:
    """Advise by the loss curve of demonstrations: a preference's begins at 0.69 and means something else."""
    history = trainer.state.log_history
    if is_main_process() and not any("rewards/margins" in entry for entry in history):
        warn_of_fit(*([entry[name] for entry in history if name in entry] for name in ("loss", "eval_loss")))


def _metrics(trainer: Trainer, seconds: float, before: float) -> dict[str, float]:
    """What a training returns: `before` are the tokens that it did not see in these seconds."""
    history: list[dict[str, Any]] = trainer.state.log_history
    last = {name: entry[name] for entry in history for name in _RESULTS if name in entry}
    num_tokens = max((entry.get("num_tokens", 0.0) for entry in history), default=0.0)
    if trainer.args.device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated(trainer.args.device)
    else:
        # Linux counts kilobytes, macOS bytes.
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        **{METRIC_NAMES[name]: value for name, value in last.items()},
        "train/num_tokens": num_tokens,
        "train/num_steps": trainer.state.global_step,
        "train/seconds": seconds,
        "train/tokens_per_second": (num_tokens - before) / seconds,
        "train/peak_memory_bytes": peak_memory,
    }
