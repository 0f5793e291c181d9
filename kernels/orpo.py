"""ORPO's loss on the batches of TRL's DPOTrainer, from the log probabilities that its fused head gives.

`preferences.on_engine` makes the same of it on the engine.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from trl import DPOTrainer


class ORPOTrainer(DPOTrainer):  # type: ignore[misc]
    """ORPO (Hong et al., 2024): the loss of the chosen answer, and beta times that of the odds ratio; no reference."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        mask = inputs["completion_mask"][:, 1:]
        outputs = model(
            input_ids=inputs["input_ids"],
            attention_mask=inputs["attention_mask"],
            labels=inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100),
            use_cache=False,
            fused_lm_head=True,
        )
        # Chosen answers first, then the rejected ones.
        log_probs = outputs.log_probs * mask
        chosen, rejected = (log_probs.sum(1) / mask.sum(1)).chunk(2)
        chosen_mask = mask.chunk(2)[0]
        likelihood: Tensor = log_probs.chunk(2)[0].sum() / chosen_mask.sum()
        self._keep_metrics(inputs, chosen.detach(), rejected.detach())
        return orpo_loss(chosen, rejected, self.beta) - likelihood

    def _keep_metrics(self, inputs: dict[str, Any], chosen: Tensor, rejected: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        gather, metrics = self.accelerator.gather_for_metrics, self._metrics[mode]
        if mode == "train":
            self._total_train_tokens += int(gather(inputs["attention_mask"].sum()).sum())
        metrics["num_tokens"] = [self._total_train_tokens]
        better, worse = self.beta * gather(chosen), self.beta * gather(rejected)
        metrics["rewards/chosen"].append(better.mean().item())
        metrics["rewards/rejected"].append(worse.mean().item())
        metrics["rewards/accuracies"].append((better > worse).float().mean().item())
        metrics["rewards/margins"].append((better - worse).mean().item())


def orpo_loss(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """The part of ORPO's loss that prefers, a scalar.

    Args:
        chosen: mean log probability per token of the better answers, [pairs].
        rejected: of the worse ones, [pairs].
        beta: the paper's lambda.
    """
    log_odds = (chosen - rejected) - (_log1mexp(chosen) - _log1mexp(rejected))
    return -beta * functional.logsigmoid(log_odds).mean()


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 - exp(x)); an answer that is certain to the last bit counts as nearly so."""
    return torch.log(-torch.expm1(x.float().clamp(max=-1e-6)))
