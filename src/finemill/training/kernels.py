"""Which trainer takes a training: the one that runs its steps on finemill's kernels, or TRL's as it comes."""

import logging
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel, Trainer

from finemill.errors import UserError
from finemill.models.nf4.config import is_quantized
from finemill.models.token_rows import begin_token_rows
from finemill.training.adapter import keep_trained_in_float32, lora_config
from finemill.training.config import SHARDED, LoRATrainingConfig
from finemill.training.decoder import read_decoder
from finemill.training.inputs import TrainingInputs
from finemill.training.lora_on_cpu import add_in_place
from finemill.training.memory import eight_bit_moments, must_stream, not_on_kernels
from finemill.training.positions import base_config
from finemill.training.quantized_base import compute_dtype, load_base, memory_limit
from finemill.training.trainer import cap_memory

logger = logging.getLogger(__name__)

_REFUSALS = ("is incompatible with Mamba-based models", "is not supported. Currently, only the following modules")
"""What PEFT's errors say of layers that it puts no adapters on."""


def make_trainer(
    inputs: TrainingInputs,
    config: LoRATrainingConfig,
    *,
    plain: Callable[..., Trainer],
    fast: Callable[[], Callable[..., Trainer]],
    arguments: Callable[[], Any],
    **options: Any,
) -> Trainer:
    """Load the base and make the trainer that runs here, which puts the adapters on it.

    Args:
        inputs: of the training.
        config: what is trained, and how.
        plain: TRL's trainer.
        fast: imports and returns the one on the kernels.
        arguments: makes the trainer's; after the base, for with them DeepSpeed would cut its empty model.
        options: of the trainer, rows among them.
    Raises: UserError: as `_open_trainer`, or `kernels` is on, and they cannot run.
    """
    make, model = _open_trainer(inputs.base_model, config, inputs.device, plain, fast)
    if inputs.new_tokens:
        begin_token_rows(model, inputs.new_tokens)
        if inputs.device.type == "cuda":
            logger.warning(
                "trains without finemill's kernels, which do not learn embeddings: the data set has %d new tokens",
                len(inputs.new_tokens),
            )
    adapters = lora_config(inputs.base_model, config, inputs.new_tokens)
    try:
        trainer = make(
            model=model,
            args=arguments(),
            processing_class=inputs.tokenizer,
            peft_config=adapters,
            **options,
        )
    except ValueError as error:
        if not any(words in str(error) for words in _REFUSALS):
            raise
        line = " ".join(str(error).split())
        raise UserError(
            f"PEFT puts no adapters on these layers ({line:.250}): name others in target_modules, or use method 'full'"
        ) from None
    if inputs.new_tokens:
        complete_wrapper(trainer.model)
    if config.method == "full":
        keep_own_names(trainer.model)
    check_kernels(trainer, config)
    if inputs.device.type == "cpu" and config.strategy not in SHARDED:
        add_in_place(trainer.model)
    return trainer


def _open_trainer(
    base_model: Path,
    config: LoRATrainingConfig,
    device: torch.device,
    plain: Callable[..., Trainer],
    fast: Callable[[], Callable[..., Trainer]],
) -> tuple[Callable[..., Trainer], PreTrainedModel]:
    """Choose a trainer, and load the base as it needs it.

    Returns: what makes the trainer, and the base for it.
    Raises: UserError: not even the leanest plan fits into `memory_gb`, or LoftQ with a base that waits in host memory.
    """
    reason = not_on_kernels(config)
    if reason or device.type != "cuda":
        if config.kernels != "off" and device.type == "cuda":
            logger.warning("trains without finemill's kernels: %s", reason)
        cap_memory(config, device)
        return plain, load_base(base_model, config, device)
    model = read_decoder(base_model)
    from finemill.kernels.engine.host_memory import free_host_bytes

    divided = config.strategy == "shard"
    # Layers that differ in their bits cannot take each other's place on the card.
    streamed = divided or (
        not is_quantized(base_model)
        and must_stream(model, config, memory_limit(config, device), host=free_host_bytes())
    )
    trainer = partial(fast(), memory_gb=config.memory_gb, eight_bit=eight_bit_moments(config))
    if not streamed:
        return trainer, load_base(base_model, config, device)
    if config.init_lora_weights == "loftq":
        raise UserError(
            "init_lora_weights 'loftq' needs the whole base on the card: give more in memory_gb, or use 'default'"
        )
    from finemill.kernels.engine.weight_shards import WeightShards
    from finemill.kernels.streamed import load_streamed

    return trainer, load_streamed(
        base_model,
        device=device,
        dtype=compute_dtype(config, device),
        double_quant=config.bnb_4bit_use_double_quant,
        shards=WeightShards.of_host() if divided else None,
        config=base_config(base_model, config.rope_scaling),
    )


def check_kernels(trainer: Trainer, config: LoRATrainingConfig) -> None:
    """Hold a trainer to what `kernels` asks for, and its adapters to float32.

    Raises: UserError: `kernels` is on, and they cannot run.
    """
    acceleration = getattr(trainer, "acceleration", None)
    if acceleration is None or not acceleration.active:
        if config.kernels == "on":
            reason = acceleration.reason if acceleration else not_on_kernels(config) or "there is no GPU"
            raise UserError(f"kernels: on, but they cannot run here ({reason}): use kernels: auto or off")
        keep_trained_in_float32(trainer.model)
    elif not config.gradient_checkpointing:
        logger.warning("gradient_checkpointing false has no effect on finemill's kernels: they plan it by memory_gb")


def keep_own_names(model: PreTrainedModel) -> None:
    """Have checkpoints of a whole model hold its weights in one file, by its own names.

    transformers would write a mixture's experts as the hub has them, one by one, and pass them by when it goes on.
    """
    model.save_pretrained = partial(model.save_pretrained, save_original_format=False, max_shard_size=sys.maxsize)


def complete_wrapper(model: PreTrainedModel) -> None:
    """Add what PEFT's wrapper around new rows lacks: the output matrix's bias, which TRL's losses ask for, and
    checkpoints that hold these rows alone, not the embedding that they make larger.

    Raises: UserError: the output matrix has a bias, which the wrapper leaves out of its product.
    """
    head = model.get_output_embeddings()
    if not isinstance(head, TrainableTokensWrapper):
        return
    if head.original_module.bias is not None:
        raise UserError(
            "the base model's output layer has a bias, and PEFT's rows of new tokens have none: add lm_head and "
            "embed_tokens to modules_to_save"
        )
    head.register_parameter("bias", None)
    model.save_pretrained = partial(model.save_pretrained, save_embedding_layers=False)
