"""Train LoRA adapters on preferences with TRL's DPO and PEFT: the 4-bit base with its adapters off is the reference."""

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerBase
from trl import DPOConfig, DPOTrainer

from finemill.artifacts.dataset import take_chat_template
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.rows import load_pairs
from finemill.runtime.context import StepContext
from finemill.training.adapter import keep_trained_in_float32, lora_config
from finemill.training.quantized_base import load_base
from finemill.training.trainer import cap_memory, choose_device, run_training, shared_arguments


def run(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainDPOConfig, context: StepContext
) -> dict[str, float]:
    """Train on the preferences of the dataset's train split and write what `train-qlora` writes to `output_dir`.

    Returns: the last logged loss, reward accuracy and margin, tokens and steps, seconds, tokens per second, peak memory
        in bytes.
    Raises: UserError: no preferences, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    lora_config(base_model, config)  # refuses what the base has not, before anything is loaded
    device = choose_device()
    tokenizer = AutoTokenizer.from_pretrained(base_model, local_files_only=True)
    take_chat_template(dataset, tokenizer)

    cap_memory(config, device)

    def build(scratch: Path, config: TrainDPOConfig) -> DPOTrainer:
        return build_trainer(base_model, dataset, tokenizer, scratch, config, device)

    return run_training(build, tokenizer, output_dir, config, context)


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's trainer on pairs that are tokenized already.

    Given texts, it would tokenize them anew: with a first token that the template has written already, and with control
    tokens in what a user typed.
    """

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset


def build_trainer(
    base_model: Path,
    dataset: Path,
    tokenizer: PreTrainedTokenizerBase,
    scratch: Path,
    config: TrainDPOConfig,
    device: torch.device,
) -> DPOTrainer:
    """TRL's trainer on chat-format's tokens, without a second model as reference."""
    train_dataset = load_pairs(dataset, "train", config.max_length)
    trainer = TokenizedDPOTrainer(
        model=load_base(base_model, config, device),
        ref_model=None,
        args=_arguments(config, scratch, device),
        train_dataset=train_dataset,
        eval_dataset=load_pairs(dataset, "validation", config.max_length) if config.eval_steps else None,
        processing_class=tokenizer,
        peft_config=lora_config(base_model, config),
    )
    keep_trained_in_float32(trainer.model)
    return trainer


def _arguments(config: TrainDPOConfig, scratch: Path, device: torch.device) -> DPOConfig:
    return DPOConfig(
        **shared_arguments(config, scratch, device),
        beta=config.beta,
        loss_type=[config.loss_type],
        label_smoothing=config.label_smoothing,
        precompute_ref_log_probs=config.precompute_ref_log_probs,
        # TRL would switch off the adapters' own dropout too.
        disable_dropout=not config.lora_dropout,
    )
