"""Tokens that the base does not know: which trainings take them, and what PEFT leaves out around them."""

import logging
from functools import partial

import torch
from peft.utils.other import TrainableTokensWrapper
from transformers import PreTrainedModel

from finemill.errors import UserError
from finemill.training.config import ConfigT

logger = logging.getLogger(__name__)


def with_new_tokens(config: ConfigT, num_tokens: int) -> ConfigT:
    """The configuration of a training whose data set has tokens that the base does not know.

    Their rows are trained on transformers' layers, on a copy of the model per process.

    Raises: UserError: something else is asked for.
    """
    if not num_tokens:
        return config
    if config.kernels == "on":
        raise UserError(
            f"kernels 'on', and the data set has {num_tokens} new tokens, whose embeddings they do not train: use "
            "kernels 'auto', or run chat-format without new_tokens"
        )
    if config.strategy not in ("auto", "ddp", "zero2"):
        raise UserError(
            f"strategy '{config.strategy}' cuts or divides the embeddings, and of the {num_tokens} new tokens of the "
            "data set rows alone are trained: use strategy 'ddp', or run chat-format without new_tokens"
        )
    if config.kernels == "auto" and config.method == "lora" and torch.cuda.is_available():
        logger.warning(
            "trains without finemill's kernels, which do not learn the embeddings of %d new tokens", num_tokens
        )
    strategy = "ddp" if config.strategy == "auto" else config.strategy
    return config.model_copy(update={"kernels": "off", "strategy": strategy})


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
