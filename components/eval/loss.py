"""Loss of a model on the assistant's turns of given conversations."""

# B batch, T tokens, V vocabulary

from collections.abc import Sequence
from typing import Any

import torch
from torch.nn.functional import cross_entropy

from finemill.artifacts.dataset import IGNORE_INDEX, HeldOutRow

# Logits held at once; 2^27 values are 0.5 GB in float32.
_MAX_LOGITS = 1 << 27


@torch.inference_mode()
def assistant_losses(model: Any, rows: Sequence[HeldOutRow]) -> list[tuple[float, int]]:
    """(sum of negative log-likelihoods in nats, number of tokens) over each row's labelled tokens.

    A token is predicted from those before it, so that a label on the first token of a row counts for nothing.
    """
    order = sorted(range(len(rows)), key=lambda index: len(rows[index].input_ids), reverse=True)
    losses: dict[int, tuple[float, int]] = {}
    while order:
        batch_size = max(1, _MAX_LOGITS // (len(rows[order[0]].input_ids) * model.config.vocab_size))
        batch, order = order[:batch_size], order[batch_size:]
        input_ids_BT, labels_BT = _padded([rows[index] for index in batch], model.device)
        # Padding is on the right, where causal attention never looks.
        logits_BTV = model(input_ids=input_ids_BT).logits[:, :-1]
        targets_BT = labels_BT[:, 1:]
        learned_BT = targets_BT != IGNORE_INDEX
        # N labelled tokens of the batch, row after row
        losses_N = cross_entropy(logits_BTV[learned_BT].float(), targets_BT[learned_BT], reduction="none")
        counts_B = learned_BT.sum(1).tolist()
        sums_B = [float(losses_T.double().sum()) for losses_T in torch.split(losses_N, counts_B)]
        losses.update(zip(batch, zip(sums_B, counts_B, strict=True), strict=True))
    return [losses[index] for index in range(len(rows))]


def _padded(rows: Sequence[HeldOutRow], device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(row.input_ids) for row in rows)
    input_ids_BT = torch.zeros((len(rows), width), dtype=torch.int64)
    labels_BT = torch.full((len(rows), width), IGNORE_INDEX)
    for index, row in enumerate(rows):
        input_ids_BT[index, : len(row.input_ids)] = torch.tensor(row.input_ids)
        labels_BT[index, : len(row.labels)] = torch.tensor(row.labels)
    return input_ids_BT.to(device), labels_BT.to(device)
