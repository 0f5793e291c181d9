"""Train LoRA adapters on the 4-bit base with TRL and PEFT."""

import json
import logging
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finemill.artifacts.dataset import take_chat_template
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.rows import load_rows
from finemill.errors import UserError
from finemill.runtime.context import StepContext
from finemill.training.adapter import keep_trained_in_float32, lora_config
from finemill.training.memory import eight_bit_moments, must_stream, not_on_kernels
from finemill.training.positions import check_positions
from finemill.training.quantized_base import compute_dtype, load_base
from finemill.training.trainer import cap_memory, choose_device, memory_limit, run_training, shared_arguments

logger = logging.getLogger(__name__)


def run(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainQLoRAConfig, context: StepContext
) -> dict[str, float]:
    """Train on the dataset's train split and write the adapter, its tokenizer and `training.json` to `output_dir`.

    Returns: the last logged loss, tokens and steps, seconds, tokens per second, peak memory in bytes.
    Raises: UserError: unusable rows, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    lora_config(base_model, config)  # refuses what the base has not, before anything is loaded
    device = choose_device()
    tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
    take_chat_template(dataset, tokenizer)

    def build(scratch: Path, config: TrainQLoRAConfig) -> SFTTrainer:
        return build_trainer(base_model, dataset, tokenizer, scratch, config, device)

    return run_training(build, dataset, tokenizer, output_dir, config, context)


def build_trainer(
    base_model: Path,
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    config: TrainQLoRAConfig,
    device: torch.device,
) -> SFTTrainer:
    """TRL's trainer on rows that are tokenized and labelled already."""
    rows = load_rows(dataset, "train", config.max_length)
    longest = pc.max(pc.list_value_length(rows.data.column("input_ids"))).as_py()
    check_positions(base_model, longest, config.max_length)
    trainer_class, model = _load(base_model, config, device)
    trainer = trainer_class(
        model=model,
        args=_arguments(config, scratch, device),
        train_dataset=rows,
        eval_dataset=load_rows(dataset, "validation", config.max_length) if config.eval_steps else None,
        processing_class=tokenizer,
        peft_config=lora_config(base_model, config),
    )
    acceleration = getattr(trainer, "acceleration", None)
    if acceleration is None or not acceleration.active:
        if config.kernels == "on":
            reason = acceleration.reason if acceleration else not_on_kernels(config) or "there is no GPU"
            raise UserError(f"kernels: on, but they cannot run here ({reason}): use kernels: auto or off")
        keep_trained_in_float32(trainer.model)
    elif not config.gradient_checkpointing:
        logger.warning("gradient_checkpointing false has no effect on finemill's kernels: they plan it by memory_gb")
    return trainer


def _load(base_model: Path, config: TrainQLoRAConfig, device: torch.device) -> tuple[Any, PreTrainedModel]:
    """TRL's trainer, or the one that runs its steps on finemill's kernels, and the base for it."""
    reason = not_on_kernels(config)
    if reason or device.type != "cuda":
        if config.uses_kernels and device.type == "cuda":
            logger.warning("trains without finemill's kernels: %s", reason)
        cap_memory(config, device)
        return SFTTrainer, load_base(base_model, config, device)
    model = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    streamed = must_stream(model, config, memory_limit(config, device))
    from finemill.kernels.trainer import FastSFTTrainer

    trainer_class = partial(FastSFTTrainer, memory_gb=config.memory_gb, eight_bit=eight_bit_moments(config))
    if streamed and config.init_lora_weights == "loftq":
        raise UserError(
            "init_lora_weights 'loftq' needs the base on the card: give more in memory_gb, or use 'default'"
        )
    if streamed:
        from finemill.kernels.streamed import load_streamed

        dtype, double_quant = compute_dtype(config, device), config.bnb_4bit_use_double_quant
        return trainer_class, load_streamed(base_model, device=device, dtype=dtype, double_quant=double_quant)
    return trainer_class, load_base(base_model, config, device)


def _arguments(config: TrainQLoRAConfig, scratch: Path, device: torch.device) -> SFTConfig:
    return SFTConfig(
        **shared_arguments(config, scratch, device),
        # load_rows has cut the rows; only packing is left to the trainer.
        packing=config.packing,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        train_sampling_strategy=config.train_sampling_strategy,
    )
