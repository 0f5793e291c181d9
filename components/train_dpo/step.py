"""Train LoRA adapters on preferences with TRL and PEFT: the 4-bit base with its adapters off is the reference."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.compute as pc
import torch
from datasets import Dataset
from transformers import Trainer
from trl import DPOConfig, KTOConfig

from finemill.artifacts.splits import Split
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.rows import load_answers, load_pairs
from finemill.components.train_dpo.trainers import (
    TokenizedDPOTrainer,
    TokenizedKTOTrainer,
    TokenizedORPOTrainer,
    add_noise,
)
from finemill.runtime.context import StepContext
from finemill.training.inputs import TrainingInputs, check_tokens, open_inputs
from finemill.training.kernels import make_trainer
from finemill.training.positions import check_positions
from finemill.training.trainer import run_training, shared_arguments


def run(
    *, base_model: Path, dataset: Path, output_dir: Path, config: TrainDPOConfig, context: StepContext
) -> dict[str, float]:
    """Train on the preferences of the dataset's train split and write what `train-qlora` writes to `output_dir`.

    Returns: the last logged loss, reward accuracy and margin, tokens and steps, seconds, tokens per second, peak memory
        in bytes.
    Raises: UserError: no preferences, a loss that is not finite, a checkpoint of another training.
        TemporaryError: SIGTERM arrived; the checkpoint is in the store and the same call continues from it.
    """
    inputs, config = open_inputs(base_model, dataset, config)
    return run_training(partial(build_trainer, inputs), inputs, output_dir, config, context)


def build_trainer(inputs: TrainingInputs, scratch: Path, config: TrainDPOConfig) -> Trainer:
    """TRL's trainer on chat-format's tokens, without a second model as reference."""
    trainer_class, load = _trainer_and_rows(config)
    rows = load(inputs.dataset, "train", config.max_length)
    sequences = [name for name in rows.column_names if name.endswith("_ids")]
    answers = [name for name in sequences if name != "prompt_ids"]
    check_tokens(inputs, max(pc.max(pc.list_flatten(rows.data.column(name))).as_py() or 0 for name in sequences))
    longest = max(len(row["prompt_ids"]) + max(len(row[name]) for name in answers) for row in rows)
    check_positions(inputs.base_model, min(longest, config.max_length), config.max_length, config.rope_scaling)
    trainer = make_trainer(
        inputs,
        config,
        plain=trainer_class,
        fast=partial(_on_kernels, trainer_class),
        arguments=lambda: _arguments(config, scratch, inputs.device),
        ref_model=None,
        train_dataset=rows,
        eval_dataset=load(inputs.dataset, "validation", config.max_length) if config.eval_steps else None,
    )
    if config.neftune_noise_alpha is not None:
        add_noise(trainer.model, config.neftune_noise_alpha)
    return trainer


def _on_kernels(trainer_class: type[Trainer]) -> type[Trainer]:
    from finemill.kernels.preferences import on_engine

    return on_engine(trainer_class)


def _trainer_and_rows(config: TrainDPOConfig) -> tuple[type[Trainer], Callable[[Path, Split, int], Dataset]]:
    if config.is_unpaired:
        return TokenizedKTOTrainer, partial(load_answers, config=config)
    return (TokenizedORPOTrainer if config.loss_type == "orpo" else TokenizedDPOTrainer), load_pairs


def _arguments(config: TrainDPOConfig, scratch: Path, device: torch.device) -> DPOConfig | KTOConfig:
    shared: dict[str, Any] = {
        **shared_arguments(config, scratch, device),
        "neftune_noise_alpha": None,  # see add_noise
        "beta": config.beta,
        "precompute_ref_log_probs": config.precompute_ref_log_probs,
        # TRL would switch off the adapters' own dropout too.
        "disable_dropout": not config.lora_dropout,
    }
    return _kto_arguments(config, shared) if config.is_unpaired else _dpo_arguments(config, shared)


def _dpo_arguments(config: TrainDPOConfig, shared: dict[str, Any]) -> DPOConfig:
    # ORPOTrainer takes no loss of these.
    weights: dict[str, float] = {"sigmoid" if config.loss_type == "orpo" else config.loss_type: 1.0}
    if config.sft_weight:
        weights["sft"] = config.sft_weight
    return DPOConfig(
        **shared,
        loss_type=list(weights),
        loss_weights=list(weights.values()),
        label_smoothing=config.label_smoothing,
    )


def _kto_arguments(config: TrainDPOConfig, shared: dict[str, Any]) -> KTOConfig:
    return KTOConfig(
        **shared,
        loss_type=config.loss_type,
        desirable_weight=config.desirable_weight,
        undesirable_weight=config.undesirable_weight,
        # load_answers has shuffled the rows and chosen each one's partner in its batch.
        train_sampling_strategy="sequential",
    )
