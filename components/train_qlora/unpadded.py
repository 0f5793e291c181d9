"""Rows end to end instead of padded to the longest of their batch: on a CPU padding is computed like any token.

Everything but attention looks at one token at a time, so that rows are one long sequence to it; attention goes from row
to row. The output layer sees the tokens whose next one is learned, no others.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface
from trl import SFTTrainer

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.kernels.planning.from_config import is_planned
from finemill.training.config import SHARDED

ATTENTION = "finemill_rows"
"""Name of the attention in transformers' interface; it has no mask, which is causal."""


def can_join_rows(base_model: Path, config: TrainQLoRAConfig) -> bool:
    """Whether rows of this training can be joined: NEFTune's noise would count their tokens as those of one row."""
    model = json.loads((base_model / "config.json").read_text(encoding="utf-8"))
    windows = model.get("sliding_window") is not None and model.get("use_sliding_window", True)
    return (
        is_planned(model)
        and not windows
        and config.neftune_noise_alpha is None
        and config.strategy not in SHARDED
        and config.context_parallel == 1
    )


def join_rows(rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
    """Collate rows to one sequence of N tokens.

    Returns: `lengths` (B,) of the rows, which come first: by them transformers knows how many there are; `input_ids`,
        `position_ids`, `labels`, all (1, N); `logits_to_keep` (L,), positions whose next token is learned, and that
        token as `shift_labels` (1, L).
    """
    pieces = [row.get("seq_lengths") or [len(row["input_ids"])] for row in rows]
    lengths = torch.tensor([length for row in pieces for length in row])
    labels = torch.tensor([label for row in rows for label in row["labels"]])
    starts = lengths.cumsum(0) - lengths
    # No token of the row before predicts a first one.
    labels[starts] = IGNORE_INDEX
    kept = (labels[1:] != IGNORE_INDEX).nonzero()[:, 0]
    return {
        "lengths": lengths,
        "input_ids": torch.tensor([[token for row in rows for token in row["input_ids"]]]),
        "position_ids": torch.arange(len(labels))[None] - starts.repeat_interleave(lengths),
        "labels": labels[None],
        "logits_to_keep": kept,
        "shift_labels": labels[kept + 1][None],
    }


class UnpaddedTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on rows that are joined: the loss, its metrics and its gradient are those of padded ones."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # TRL takes none where it packs rows.
        self.data_collator = join_rows
        AttentionInterface.register(ATTENTION, attend)
        self.model.set_attn_implementation(ATTENTION)
        self.model.get_decoder().register_forward_hook(_keep, with_kwargs=True)


def _keep(module: nn.Module, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
    """Leave of the hidden states (1, N, H) those that the output layer looks at, (1, L, H)."""
    output.last_hidden_state = output.last_hidden_state[:, kwargs["logits_to_keep"]]
    return output


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    lengths: Tensor,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row.

    Args:
        module: the layer.
        query: (1, H, N, D), rows one after another.
        key: (1, K, N, D).
        value: like `key`.
        attention_mask: nothing.
        dropout: share of the scores.
        scaling: of the scores; None for 1 / sqrt(D).
        lengths: (B,) of the rows, N in all.
    Returns: (1, N, H, D), and no scores.
    """
    sizes = lengths.tolist()
    rows = zip(
        query.split_with_sizes(sizes, 2), key.split_with_sizes(sizes, 2), value.split_with_sizes(sizes, 2), strict=True
    )
    fewer_keys = query.shape[1] != key.shape[1]
    output = [
        functional.scaled_dot_product_attention(
            own_query, own_key, own_value, None, dropout, is_causal=True, scale=scaling, enable_gqa=fewer_keys
        )
        for own_query, own_key, own_value in rows
    ]
    return torch.cat(output, dim=2).transpose(1, 2).contiguous(), None
