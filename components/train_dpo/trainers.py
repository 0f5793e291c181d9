"""TRL's preference trainers on rows that are tokenized already, and ORPO's loss on the same batches as DPO's.

Given texts, TRL's trainers would tokenize them anew: with a first token that the template has written already, and with
control tokens in what a user typed.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from torch import Tensor
from torch.nn import functional
from trl import DPOTrainer, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference


class PairCollator(DataCollatorForPreference):  # type: ignore[misc]
    """TRL's, with `chosen_learned` and `rejected_learned` where the answers hold what the model does not write."""

    def torch_call(self, examples: list[dict[str, Any]]) -> dict[str, Any]:
        """Padded pairs, the chosen conversations first; `completion_mask` is 0 where nothing is learned."""
        batch: dict[str, Any] = super().torch_call(examples)
        if "chosen_learned" in examples[0]:
            masks = [example[name] for name in ("chosen_learned", "rejected_learned") for example in examples]
            starts = [len(example["prompt_ids"]) for example in examples] * 2
            for row, start, mask in zip(batch["completion_mask"], starts, masks, strict=True):
                learned = torch.tensor(mask, dtype=row.dtype)[: len(row) - start]
                row[start : start + len(learned)] *= learned
        return batch


def share_cache(dataset: Any) -> None:
    """Have all processes of a machine look where the main one keeps what it computes of a dataset in memory.

    `datasets` gives each a folder of its own, in which TRL would not find the main one's reference log probabilities.
    """
    folder = [Path(dataset._get_cache_file_path("any")).parent]
    broadcast_object_list(folder)
    dataset._get_cache_file_path = lambda fingerprint: str(folder[0] / f"cache-{fingerprint}.arrow")


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPO."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        share_cache(dataset)
        return super()._precompute_ref_logps(dataset, name, batch_size)

    @property
    def data_collator(self) -> PairCollator:
        """TRL's collator, which also reads what is learned of the answers."""
        return self._data_collator

    @data_collator.setter
    def data_collator(self, collator: DataCollatorForPreference) -> None:
        self._data_collator = PairCollator(**vars(collator))

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns = dict.fromkeys((*vars(self)["_signature_columns"], "chosen_learned", "rejected_learned"))
        self._signature_columns = list(columns)


class TokenizedKTOTrainer(KTOTrainer):  # type: ignore[misc]
    """TRL's KTO."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        share_cache(dataset)
        return super()._precompute_ref_logps(dataset, name, batch_size)


class ORPOTrainer(TokenizedDPOTrainer):
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
