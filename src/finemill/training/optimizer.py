"""Learning rates of their own for LoRA's B matrices (LoRA+) and for embeddings and output layer."""

from typing import Any

from transformers import Trainer

from finemill.training.config import TABLES, LoRATrainingConfig


def set_learning_rates(trainer: Trainer, config: LoRATrainingConfig) -> None:
    """Give the trainer its named optimizer with a group of parameters per learning rate, where there are several."""
    if config.loraplus_lr_ratio is None and config.embedding_learning_rate is None:
        return
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    groups: dict[tuple[float, float], list[Any]] = {}
    for name, parameter in trainer.model.named_parameters():
        if parameter.requires_grad:
            decay = config.weight_decay if name in decayed else 0.0
            groups.setdefault((_learning_rate(name, config), decay), []).append(parameter)
    optimizer_class, arguments = trainer.get_optimizer_cls_and_kwargs(trainer.args, trainer.model)
    trainer.optimizer = optimizer_class(
        [{"params": found, "lr": rate, "weight_decay": decay} for (rate, decay), found in groups.items()], **arguments
    )


def _learning_rate(name: str, config: LoRATrainingConfig) -> float:
    parts = name.split(".")
    if config.loraplus_lr_ratio is not None and {"lora_B", "lora_embedding_B"} & set(parts):
        return config.learning_rate * config.loraplus_lr_ratio
    if config.embedding_learning_rate is not None and any(table in parts for table in TABLES):
        return config.embedding_learning_rate
    return config.learning_rate
