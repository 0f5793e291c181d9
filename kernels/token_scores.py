"""Per-token log probabilities from the engine, as TRL's preference trainers ask a model for them.

Those trainers call `model(..., labels=labels, fused_lm_head=True)` twice for each batch: once for what is trained, once
with the adapter switched off for the reference, which is the same frozen base. Both are answered here without logits of
more than a chunk of tokens; any loss of the log probabilities is differentiated by the engine's one backward.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from transformers.utils import ModelOutput

from finemill.kernels.engine.model import FastModel, TokenLosses
from finemill.kernels.engine.shapes import Shapes
from finemill.kernels.ops.packing import IGNORE_INDEX, PackedBatch, pack_longest_first, send


@dataclass
class TokenScores(ModelOutput):  # type: ignore[misc]
    """What TRL's fused head gives, (B, S - 1) each, 0 where there is no label; only `log_probs` has a gradient.

    `loss` is the mean over the labels, `entropy` in nats, `mean_logits` over the vocabulary, `is_top1` whether the
    label is the most likely token.
    """

    loss: Tensor | None = None
    log_probs: Tensor | None = None
    entropy: Tensor | None = None
    mean_logits: Tensor | None = None
    is_top1: Tensor | None = None


@dataclass
class TokenScorer:
    """Scores a trainer's batches on an engine.

    Args:
        engine: what `accelerate_model` built.
        shapes: round batches to, so that kernels serve more than one of them; None leaves them as they are.
    """

    engine: FastModel
    shapes: Shapes | None = None
    _packed: tuple[Tensor, Tensor, PackedBatch, Tensor] | None = field(default=None, repr=False)
    """The batch packed last: a reference asks for the same as what is trained."""

    def score(
        self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None, *, adapters: bool, train: bool
    ) -> TokenScores:
        """Score the labels of a batch.

        Args:
            input_ids: (B, S).
            labels: (B, S), unshifted, -100 where there is nothing to score.
            attention_mask: (B, S), 0 at padding; None without padding.
            adapters: False for the frozen base alone.
            train: whether the log probabilities will be differentiated.
        """
        engine = self.engine
        batch, places = self._pack(input_ids, labels, attention_mask)
        if train:
            if engine.dropout_seed is not None:
                engine.dropout_seed += 1
            values = TokenLosses.apply(engine.adapters.parameters[0], engine, batch)
        else:
            with torch.no_grad():
                values = engine.score(batch, adapters=adapters, mean_logits=True).by_token(batch.num_tokens)
        loss, entropy, correct, mean_logits = (_spread(value, places, input_ids.shape) for value in values)
        labelled = labels[:, 1:] != IGNORE_INDEX
        return TokenScores(
            loss=loss.sum() / labelled.sum().clamp(min=1),
            log_probs=-loss,
            entropy=entropy,
            mean_logits=mean_logits * labelled,
            is_top1=correct > 0,
        )

    def _pack(self, input_ids: Tensor, labels: Tensor, attention_mask: Tensor | None) -> tuple[PackedBatch, Tensor]:
        """Return the batch on the device, and where each of its tokens stands in (B, S), (T,)."""
        last = self._packed
        if last is not None and last[0] is input_ids and last[1] is labels:
            return last[2], last[3]
        batch, places = pack_longest_first(input_ids, labels, attention_mask)
        if self.shapes is not None:
            batch = self.shapes.prepare(batch)
        # What fills up the batch goes where nothing is read.
        places = torch.nn.functional.pad(places, (0, batch.num_tokens - len(places)), value=input_ids.shape[1] - 1)
        batch, places = batch.to(self.engine.device), send(places, self.engine.device)
        self._packed = input_ids, labels, batch, places
        return batch, places


def _spread(values: Tensor, places: Tensor, shape: torch.Size) -> Tensor:
    """Put (T,) values where their tokens stand in (B, S). Returns: (B, S - 1), without the last column."""
    spread = values.new_zeros(shape.numel()).index_put((places,), values)
    return spread.view(shape)[:, :-1]
