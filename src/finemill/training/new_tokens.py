"""Which trainings take a data set with tokens that the base does not know. Without torch: preflight asks, too."""

from finemill.errors import UserError
from finemill.training.config import ConfigT


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
    if config.processes_per_row > 1:
        raise UserError(
            f"context_parallel {config.processes_per_row} trains adapters alone, and the data set has {num_tokens} new "
            "tokens, whose embeddings are trained: use context_parallel 1, or run chat-format without new_tokens"
        )
    strategy = "ddp" if config.strategy == "auto" else config.strategy
    return config.model_copy(update={"kernels": "off", "strategy": strategy})
