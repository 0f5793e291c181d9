"""Train LoRA adapters on the 4-bit base with TRL and PEFT."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pyarrow.compute as pc
import torch
from trl import SFTConfig, SFTTrainer

from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.context_parallel import ContextParallelTrainer, check_context_parallel
from finemill.components.train_qlora.rows import load_rows
from finemill.components.train_qlora.unpadded import UnpaddedTrainer, can_join_rows
from finemill.components.train_qlora.whole_loss import WholeLossTrainer
from finemill.runtime.context import StepContext
from finemill.training.config import SHARDED
from finemill.training.inputs import TrainingInputs, check_tokens, open_inputs
from finemill.training.kernels import make_trainer
from finemill.training.positions import check_positions
from finemill.training.trainer import run_training, shared_arguments


def run(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainQLoRAConfig, context: StepContext
) -> dict[str, float]:
    """Train on the dataset's train split and write the adapter, its tokenizer and `training.json` to `output_dir`.

    Returns: the last logged loss, tokens and steps, seconds, tokens per second, peak memory in bytes.
    Raises: UserError: unusable rows, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    check_context_parallel(base_model, config)
    inputs, config = open_inputs(base_model, dataset, config)
    return run_training(partial(build_trainer, inputs), inputs, output_dir, config, context)


def build_trainer(inputs: TrainingInputs, scratch: Path, config: TrainQLoRAConfig) -> SFTTrainer:
    """TRL's trainer on rows that are tokenized and labelled already."""
    rows = load_rows(inputs.dataset, "train", config.max_length)
    input_ids = rows.data.column("input_ids")
    check_tokens(inputs, pc.max(pc.list_flatten(input_ids)).as_py())
    longest = pc.max(pc.list_value_length(input_ids)).as_py()
    check_positions(inputs.base_model, longest, config.max_length, config.rope_scaling)
    return make_trainer(
        inputs,
        config,
        plain=_plain_trainer(inputs, config),
        fast=_fast_trainer,
        arguments=lambda: _arguments(config, scratch, inputs.device),
        train_dataset=rows,
        eval_dataset=load_rows(inputs.dataset, "validation", config.max_length) if config.eval_steps else None,
    )


def _plain_trainer(inputs: TrainingInputs, config: TrainQLoRAConfig) -> Callable[..., SFTTrainer]:
    if config.context_parallel > 1:
        return partial(ContextParallelTrainer, parts=config.context_parallel)
    if inputs.device.type == "cpu" and can_join_rows(inputs.base_model, config):
        return UnpaddedTrainer
    plenty = config.strategy in SHARDED and not config.gradient_checkpointing
    return WholeLossTrainer if plenty else SFTTrainer


def _fast_trainer() -> type[SFTTrainer]:
    from finemill.kernels.trainer import FastSFTTrainer

    return FastSFTTrainer


def _arguments(config: TrainQLoRAConfig, scratch: Path, device: torch.device) -> SFTConfig:
    return SFTConfig(
        **shared_arguments(config, scratch, device),
        # load_rows has cut the rows; only packing is left to the trainer.
        packing=config.packing,
        dataset_kwargs={"skip_prepare_dataset": not config.packing},
        train_sampling_strategy=config.train_sampling_strategy,
    )
