"""Rows that several GPUs share: each holds a part of the tokens, and in attention all tokens of a part of the heads.

This is DeepSpeed-Ulysses (arXiv:2309.14509): everything but attention looks at one token at a time, so a row can be cut
anywhere; before attention an all-to-all exchanges tokens for heads, behind it another one exchanges them back.
"""

import os
from collections.abc import Sequence
from functools import partial
from math import gcd
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn import functional
from torch.utils.data import DataLoader
from transformers import AttentionInterface, AutoConfig
from trl import SFTTrainer

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.errors import UserError
from finemill.runtime.processes import num_processes, process_rank

ATTENTION = "finemill_ulysses"
"""Name of the attention in transformers' interface; it has no mask, which is causal."""


def check_context_parallel(base_model: Path, config: TrainQLoRAConfig) -> None:
    """Refuse what cannot run, before anything is loaded.

    Raises: UserError: not as many processes on this host, heads that cannot be shared, attention that is not to all
        tokens before.
    """
    count = config.context_parallel
    if count == 1:
        return
    here = int(os.environ.get("LOCAL_WORLD_SIZE") or num_processes())
    if here % count:
        raise UserError(
            f"context_parallel {count} shares a row among {count} processes of a host, and there are {here}: use a "
            "number that divides it"
        )
    model = AutoConfig.from_pretrained(base_model, local_files_only=True, trust_remote_code=False).get_text_config()
    heads = model.num_attention_heads
    if heads % count:
        raise UserError(f"context_parallel {count} cannot share {heads} attention heads: use a number that divides it")
    kinds = {kind for kind in getattr(model, "layer_types", None) or () if kind != "full_attention"}
    if getattr(model, "sliding_window", None):
        kinds.add("sliding_attention")
    if kinds:
        raise UserError(
            f"context_parallel {count} is for attention to all tokens before, and the base has {sorted(kinds)[0]}: use "
            "context_parallel 1"
        )


class CutRows:
    """Collates rows to this process's part of them.

    Args:
        parts: processes that share a row.
        part: the number of this one among them.
    """

    def __init__(self, parts: int, part: int) -> None:
        self._parts, self._part = parts, part

    def __call__(self, rows: Sequence[dict[str, list[int]]]) -> dict[str, Tensor]:
        """Pad (B, S) on the right until S can be cut, shift labels over the cuts, and take the part: (B, S / parts).

        Every part knows the positions of its tokens; `shift_labels` holds the token that comes next, also where another
        process has it.
        """
        longest = max(len(row["input_ids"]) for row in rows)
        part = -(-longest // self._parts)
        size = part * self._parts
        labels = _padded([row["labels"][1:] for row in rows], size, IGNORE_INDEX)
        batch = {
            "input_ids": _padded([row["input_ids"] for row in rows], size, 0),
            "attention_mask": _padded([[1] * len(row["input_ids"]) for row in rows], size, 0),
            "position_ids": torch.arange(size).expand(len(rows), size),
            "labels": labels,
            "shift_labels": labels,
        }
        own = slice(self._part * part, (self._part + 1) * part)
        return {name: values[:, own].contiguous() for name, values in batch.items()}


def _padded(rows: Sequence[list[int]], size: int, value: int) -> Tensor:
    return torch.tensor([row + [value] * (size - len(row)) for row in rows])


class ContextParallelTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose processes share rows, in groups of consecutive ranks.

    Losses are summed over the labels of all processes and divided by their number, as SFTTrainer does it: cut or not,
    the sum is the same.
    """

    def __init__(self, *args: Any, parts: int, **kwargs: Any) -> None:
        super().__init__(*args, data_collator=CutRows(parts, process_rank() % parts), **kwargs)
        self._parts = parts
        group, _ = torch.distributed.new_subgroups(parts)
        AttentionInterface.register(ATTENTION, partial(attend, group=group))
        self.model.set_attn_implementation(ATTENTION)

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Batches that are the same in all processes of a group."""
        loader: DataLoader[Any] = super().get_train_dataloader()
        shard: Any = loader.batch_sampler
        shard.num_processes, shard.process_index = num_processes() // self._parts, process_rank() // self._parts
        return loader


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    group: ProcessGroup,
    **_: Any,
) -> tuple[Tensor, None]:
    """Causal attention over rows of which each process of the group has a part.

    Args:
        module: the layer.
        query: (B, H, S / N, D) in a group of N.
        key: (B, K, S / N, D), where K divides H; heads are repeated where N does not divide K.
        value: like `key`.
        attention_mask: nothing; padding is on the right, where no token looks.
        dropout: share of the scores.
        scaling: of the scores; None for 1 / sqrt(D).
        group: processes that share a row, in its order.
    Returns: (B, S / N, H, D), and no scores.
    """
    parts = group.size()
    repeats = parts // gcd(parts, key.shape[1])
    if repeats > 1:
        key, value = key.repeat_interleave(repeats, dim=1), value.repeat_interleave(repeats, dim=1)
    query, key, value = (_Exchange.apply(tensor, group, True) for tensor in (query, key, value))
    output = functional.scaled_dot_product_attention(
        query, key, value, dropout_p=dropout, is_causal=True, scale=scaling, enable_gqa=query.shape[1] != key.shape[1]
    )
    return _Exchange.apply(output, group, False).transpose(1, 2).contiguous(), None


class _Exchange(torch.autograd.Function):
    """Tokens for heads, (B, H, S / N, D) to (B, H / N, S, D), or back; the one is the other's gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, group: ProcessGroup, to_heads: bool) -> Tensor:
        ctx.group, ctx.to_heads = group, to_heads
        return _exchange(tensor, group, to_heads)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return _exchange(gradient, ctx.group, not ctx.to_heads), None, None


def _exchange(tensor: Tensor, group: ProcessGroup, to_heads: bool) -> Tensor:
    cut, joined = (1, 2) if to_heads else (2, 1)
    sent = torch.stack(tensor.chunk(group.size(), cut))
    received = torch.empty_like(sent)
    torch.distributed.all_to_all_single(received, sent, group=group)
    return received.movedim(0, joined).flatten(joined, joined + 1)
