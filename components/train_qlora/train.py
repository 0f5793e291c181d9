"""Train LoRA adapters on the 4-bit base with TRL and PEFT."""

import json
import logging
import resource
import sys
import warnings
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PrinterCallback
from trl import SFTConfig, SFTTrainer

from finemill.components.base_model.resolve import resolve_base_model
from finemill.components.context import StepContext
from finemill.components.errors import TemporaryError, UserError
from finemill.components.train_qlora.checkpoint import CheckpointCallback, find_checkpoint
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.model import compute_dtype, keep_adapters_in_float32, load_base, lora_config
from finemill.components.train_qlora.record import RecordCallback
from finemill.components.train_qlora.rows import load_rows

logger = logging.getLogger(__name__)

# transformers 5.18 renamed the argument and warns about the old name.
_CHECKPOINTING_FIELD = next(
    name for name in ("activation_checkpointing", "gradient_checkpointing") if name in SFTConfig.__dataclass_fields__
)


def train_qlora(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainQLoRAConfig, context: StepContext
) -> dict[str, float]:
    """Train on the dataset's train split and write the adapter, its tokenizer and `training.json` to `output_dir`.

    Returns: the last logged loss, tokens and steps, seconds, tokens per second, peak memory in bytes.
    Raises: UserError: unusable rows, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    device = choose_device()
    checkpoint = find_checkpoint(config, context)
    tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
    with TemporaryDirectory(prefix="finemill-train-") as scratch:
        recording = RecordCallback(context.recorder, config.learning_rate)
        checkpoints = CheckpointCallback(config, context)
        trainer = build_trainer(base_model, dataset, tokenizer, Path(scratch), config, device)
        trainer.add_callback(recording)
        trainer.add_callback(checkpoints)
        with checkpoints:
            result = trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
    if checkpoints.stop_requested and trainer.state.global_step < trainer.state.max_steps:
        raise TemporaryError(f"stopped at step {trainer.state.global_step}; run again to continue from there")
    save_adapter(trainer, tokenizer, output_dir, context.references["base_model"])
    return _metrics(trainer, result.metrics["train_runtime"], device)


def choose_device() -> torch.device:
    """The one visible GPU, or the CPU. Raises: UserError: several GPUs and a single process."""
    if not torch.cuda.is_available():
        return torch.device("cpu")
    if torch.cuda.device_count() > 1 and not torch.distributed.is_torchelastic_launched():
        raise UserError(
            f"{torch.cuda.device_count()} GPUs are visible to one process: start it with torchrun, "
            "or choose one with CUDA_VISIBLE_DEVICES=0"
        )
    return torch.device("cuda", torch.cuda.current_device())


def build_trainer(
    base_model: Path,
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    config: TrainQLoRAConfig,
    device: torch.device,
) -> SFTTrainer:
    """TRL's trainer on rows that are tokenized and labelled already."""
    with warnings.catch_warnings():
        # PEFT 0.21 and TRL 1.16 read attributes that transformers 5.18 renamed.
        warnings.filterwarnings("ignore", message=".*gradient_checkpointing", category=FutureWarning)
        trainer = _trainer_class(config, device)(
            model=load_base(base_model, config, device),
            args=_arguments(config, scratch, device),
            train_dataset=load_rows(dataset, "train", config.max_length),
            eval_dataset=load_rows(dataset, "validation", config.max_length) if config.eval_steps else None,
            processing_class=tokenizer,
            peft_config=lora_config(config),
        )
    # It prints every log entry as a dictionary; RecordCallback says the same in a line.
    trainer.remove_callback(PrinterCallback)
    acceleration = getattr(trainer, "acceleration", None)
    if acceleration is None or not acceleration.active:
        if config.kernels == "on":
            reason = acceleration.reason if acceleration else "there is no GPU"
            raise UserError(f"kernels: on, but they cannot run here ({reason}): use kernels: auto or off")
        keep_adapters_in_float32(trainer.model)
    return trainer


def _trainer_class(config: TrainQLoRAConfig, device: torch.device) -> Any:
    """TRL's trainer, or the one of the same interface that runs its steps on finemill's kernels."""
    if config.kernels == "off" or device.type != "cuda":
        return SFTTrainer
    from finemill.kernels.trainer import FastSFTTrainer

    return FastSFTTrainer


def _arguments(config: TrainQLoRAConfig, scratch: Path, device: torch.device) -> SFTConfig:
    dtype = compute_dtype(config, device)
    return SFTConfig(
        output_dir=str(scratch),
        use_cpu=device.type == "cpu",
        bf16=dtype == torch.bfloat16,
        fp16=dtype == torch.float16,
        # load_rows has cut the rows; only packing is left to the trainer.
        max_length=config.max_length,
        packing=config.packing,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        train_sampling_strategy=config.train_sampling_strategy,
        per_device_train_batch_size=config.per_device_train_batch_size,
        per_device_eval_batch_size=config.per_device_train_batch_size,
        gradient_accumulation_steps=config.gradient_accumulation_steps,
        num_train_epochs=config.num_train_epochs,
        max_steps=config.max_steps or -1,
        learning_rate=config.learning_rate,
        lr_scheduler_type=config.lr_scheduler_type,
        warmup_steps=config.warmup_steps,
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
        optim=config.optim,
        seed=config.seed,
        logging_steps=config.logging_steps,
        logging_first_step=True,
        # The filter would replace a loss of NaN by an average of older ones.
        logging_nan_inf_filter=False,
        eval_strategy="steps" if config.eval_steps else "no",
        eval_steps=config.eval_steps,
        save_strategy="steps" if config.save_steps else "no",
        save_steps=config.save_steps or 500,
        save_total_limit=1,
        report_to="none",
        disable_tqdm=True,
        log_level="error",
        dataloader_pin_memory=device.type == "cuda",
        **{_CHECKPOINTING_FIELD: config.gradient_checkpointing},
    )


def save_adapter(trainer: SFTTrainer, tokenizer: PreTrainedTokenizerBase, output_dir: Path, reference: str) -> None:
    """Write adapter, tokenizer with its chat template, and the training's log history.

    The adapter names its base as PEFT expects: the hub's name and commit where there is one, else the reference.
    """
    base = resolve_base_model(reference)
    adapter = trainer.model.peft_config["default"]
    adapter.base_model_name_or_path = base.id.removeprefix("hf://").partition("@")[0] if base.revision else base.id
    adapter.revision = base.revision
    # Said outright: PEFT would ask the hub whether adapters were put on the embeddings' vocabulary.
    trainer.model.save_pretrained(output_dir, safe_serialization=True, save_embedding_layers=False)
    # PEFT's model card is an empty template with this machine's path to the base in it.
    (output_dir / "README.md").unlink(missing_ok=True)
    tokenizer.save_pretrained(output_dir)
    history = {"max_steps": trainer.state.max_steps, "log_history": trainer.state.log_history}
    (output_dir / "training.json").write_text(json.dumps(history, indent=2) + "\n", encoding="utf-8")


def _metrics(trainer: SFTTrainer, seconds: float, device: torch.device) -> dict[str, float]:
    history: list[dict[str, Any]] = trainer.state.log_history
    losses = [entry["loss"] for entry in history if "loss" in entry]
    num_tokens = max((entry.get("num_tokens", 0.0) for entry in history), default=0.0)
    if device.type == "cuda":
        peak_memory = torch.cuda.max_memory_allocated(device)
    else:
        # Linux counts kilobytes, macOS bytes.
        peak_memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return {
        "train/loss": losses[-1],
        "train/num_tokens": num_tokens,
        "train/num_steps": trainer.state.global_step,
        "train/seconds": seconds,
        "train/tokens_per_second": num_tokens / seconds,
        "train/peak_memory_bytes": peak_memory,
    }
