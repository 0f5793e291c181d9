"""Train LoRA adapters on the 4-bit base with TRL and PEFT."""

from pathlib import Path

import pyarrow.compute as pc
import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import SFTConfig, SFTTrainer

from finemill.artifacts.dataset import take_chat_template
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.components.train_qlora.rows import load_rows
from finemill.components.train_qlora.whole_loss import WholeLossTrainer
from finemill.runtime.context import StepContext
from finemill.training.adapter import lora_config
from finemill.training.config import SHARDED
from finemill.training.kernels import check_kernels, open_trainer
from finemill.training.positions import check_positions
from finemill.training.strategy import check_strategy
from finemill.training.trainer import choose_device, run_training, shared_arguments


def run(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainQLoRAConfig, context: StepContext
) -> dict[str, float]:
    """Train on the dataset's train split and write the adapter, its tokenizer and `training.json` to `output_dir`.

    Returns: the last logged loss, tokens and steps, seconds, tokens per second, peak memory in bytes.
    Raises: UserError: unusable rows, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    check_strategy(config)
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
    check_positions(base_model, longest, config.max_length, config.rope_scaling)
    plenty = config.strategy in SHARDED and not config.gradient_checkpointing
    plain = WholeLossTrainer if plenty else SFTTrainer
    trainer_class, model = open_trainer(base_model, config, device, plain, _fast_trainer)
    adapters = lora_config(base_model, config)  # before the arguments: with them DeepSpeed would cut its empty model
    trainer: SFTTrainer = trainer_class(
        model=model,
        args=_arguments(config, scratch, device),
        train_dataset=rows,
        eval_dataset=load_rows(dataset, "validation", config.max_length) if config.eval_steps else None,
        processing_class=tokenizer,
        peft_config=adapters,
    )
    check_kernels(trainer, config)
    return trainer


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
