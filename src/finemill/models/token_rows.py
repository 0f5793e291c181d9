"""Rows of the embedding and the output matrix for tokens that a model was not trained with."""

from collections.abc import Iterable, Sequence
from typing import Any

import torch

from finemill.errors import UserError

_OF_PICTURES = ("<image_soft_token>",)


def begin_token_rows(model: Any, token_ids: Sequence[int]) -> None:
    """Let tokens begin as the mean of those before them, in a model that gets more rows where it has too few.

    The mean is what transformers begins rows with when it resizes a model, but for its noise of 0.003 %.

    Args:
        model: of transformers, with its weights.
        token_ids: ascending.
    """
    if token_ids[-1] >= len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(token_ids[-1] + 1, mean_resizing=False)
    tables = {id(table.weight): table.weight for table in (model.get_input_embeddings(), model.get_output_embeddings())}
    for weight in tables.values():
        with torch.no_grad():
            mean = weight[: token_ids[0]].mean(0, dtype=torch.float32)
            # TRL casts what is trained to bfloat16 and back: a preference's reference has these very rows.
            weight[list(token_ids)] = mean.bfloat16().to(weight.dtype)


def tokens_without_row(tokenizer: Any, num_tokens: int) -> dict[int, str]:
    """Tokens, by id, that a model with `num_tokens` rows knows nothing of.

    But for one that stands for pictures: Gemma's models of text alone share their tokenizer with those that see.
    """
    return {
        token_id: text
        for text, token_id in tokenizer.get_vocab().items()
        if token_id >= num_tokens and text not in _OF_PICTURES
    }


def check_token_ids(rows: Iterable[Sequence[int]], num_tokens: int, where: object) -> None:
    """Raises: UserError: rows in `where` hold a token that a model with `num_tokens` has no row for."""
    largest = max((max(row, default=0) for row in rows), default=0)
    if largest >= num_tokens:
        raise UserError(
            f"the dataset in {where} has token id {largest}, the model only {num_tokens} tokens: it was made for "
            "another tokenizer; run chat-format with this model's base"
        )
