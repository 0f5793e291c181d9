"""How far changed copies of a model are from it, at any size: one layer of one of them in memory at a time."""

# B rows, T tokens, N compared positions, V vocabulary

import math
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field

import torch

from finemill.models.stored_model import StoredModel
from finemill.models.streaming import batches, streamed

# Logits of a batch that are looked at: more would be the largest thing in memory.
_MAX_LOGITS = 1 << 27


@dataclass(frozen=True)
class Divergence:
    """KL(model || copy) in nats per token, mean and 99.9th percentile over `positions`; the copy's perplexity."""

    kl: float
    kl_p999: float
    perplexity: float
    top1_agreement: float
    positions: int


@dataclass
class _Found:
    """What was found at each position, float64."""

    divergences: list[torch.Tensor] = field(default_factory=list)
    losses: list[torch.Tensor] = field(default_factory=list)
    agrees: list[torch.Tensor] = field(default_factory=list)

    def add(self, log_p_NV: torch.Tensor, log_q_NV: torch.Tensor, next_N: torch.Tensor) -> None:
        """Compare the copy's log-probabilities with the model's."""
        self.divergences.append((log_p_NV.exp() * (log_p_NV - log_q_NV)).sum(-1).double().cpu())
        self.losses.append(-log_q_NV.gather(-1, next_N[:, None])[:, 0].double().cpu())
        self.agrees.append((log_p_NV.argmax(-1) == log_q_NV.argmax(-1)).double().cpu())

    def summary(self) -> Divergence:
        """Over all positions."""
        kl = torch.cat(self.divergences)
        return Divergence(
            kl=max(float(kl.mean()), 0.0),
            kl_p999=float(kl.sort().values[math.ceil(0.999 * len(kl)) - 1]),
            perplexity=float(torch.cat(self.losses).mean().exp()),
            top1_agreement=float(torch.cat(self.agrees).mean()),
            positions=len(kl),
        )


@torch.inference_mode()
def divergences(
    stored: StoredModel, copies: Mapping[str, StoredModel], rows: Sequence[Sequence[int]]
) -> dict[str, Divergence]:
    """Compare each copy with `stored` on the tokens of `rows`, in float32: at every position, or evenly spread ones.

    Args:
        rows: token ids, two or more in each.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = {name: _Found() for name in copies}
    with ExitStack() as stack:
        for model in (stored, *copies.values()):
            stack.enter_context(streamed(model.model, model, device))
        for batch in batches(rows, device):
            # A row's last token has no next one.
            kept_N2 = batch.mask[:, 1:].nonzero()
            most = max(1, _MAX_LOGITS // len(stored.model.get_input_embeddings().weight))
            kept_N2 = kept_N2[:: -(-len(kept_N2) // most)]
            next_N = batch.input_ids[kept_N2[:, 0], kept_N2[:, 1] + 1]
            log_p_NV = _log_probabilities(stored, batch.input_ids, kept_N2)
            for name, copy in copies.items():
                found[name].add(log_p_NV, _log_probabilities(copy, batch.input_ids, kept_N2), next_N)
    return {name: of.summary() for name, of in found.items()}


def _log_probabilities(stored: StoredModel, input_ids_BT: torch.Tensor, kept_N2: torch.Tensor) -> torch.Tensor:
    def keep(_module: object, inputs: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return inputs[0][kept_N2[:, 0], kept_N2[:, 1]], *inputs[1:]

    hook = stored.model.get_output_embeddings().register_forward_pre_hook(keep)
    try:
        logits_NV: torch.Tensor = stored.model(input_ids=input_ids_BT, use_cache=False).logits
    finally:
        hook.remove()
    return logits_NV.float().log_softmax(-1)
