"""TRL's preference trainers, and ORPO's, on rows that are tokenized already.

Given texts, TRL's trainers would tokenize them anew: with a first token that the template has written already, and with
control tokens in what a user typed.
"""

from pathlib import Path
from typing import Any

import torch
from accelerate.utils import broadcast_object_list
from transformers.integrations.neftune import neftune_post_forward_hook
from trl import DPOTrainer, KTOTrainer
from trl.trainer.dpo_trainer import DataCollatorForPreference

from finemill.kernels.orpo import ORPOTrainer
from finemill.training.adapter import keep_trained_in_float32


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


def before_reference(model: Any, dataset: Any) -> None:
    """Have reference log probabilities computed and kept as a training needs it.

    ZeRO-3 cuts the model for them: adapters that TRL has cast to bfloat16 would be shards of bfloat16 from then on. And
    all processes of a machine look where the main one keeps what it computes of a dataset in memory: `datasets` gives
    each a folder of its own, in which TRL would not find it.
    """
    keep_trained_in_float32(model)
    folder = [Path(dataset._get_cache_file_path("any")).parent]
    broadcast_object_list(folder)
    dataset._get_cache_file_path = lambda fingerprint: str(folder[0] / f"cache-{fingerprint}.arrow")


def add_noise(model: Any, alpha: float) -> None:
    """NEFTune's noise on the embeddings of passes that are learned from.

    transformers' own comes with every pass in training mode: TRL's trainers ask the same model for the reference then,
    which is a fixed one only without it.
    """
    embedding = model.get_input_embeddings()
    embedding.neftune_noise_alpha = alpha
    embedding.register_forward_hook(_noise_where_learned)


def _noise_where_learned(module: Any, args: Any, output: torch.Tensor) -> torch.Tensor:
    return neftune_post_forward_hook(module, args, output) if torch.is_grad_enabled() else output


class TokenizedDPOTrainer(DPOTrainer):  # type: ignore[misc]
    """TRL's DPO."""

    def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
        return dataset

    def _precompute_ref_logps(self, dataset: Any, name: str, batch_size: int) -> Any:
        before_reference(self.model, dataset)
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
        before_reference(self.model, dataset)
        return super()._precompute_ref_logps(dataset, name, batch_size)


class TokenizedORPOTrainer(ORPOTrainer, TokenizedDPOTrainer):
    """ORPO on TRL's batches of pairs."""
