"""TRL's trainer where memory is plentiful: the loss of transformers' own forward pass, nothing read back between."""

from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from finemill.artifacts.dataset import IGNORE_INDEX


class WholeLossTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer on whole logits.

    TRL's computes them in pieces, again in the backward pass, and waits for all processes after each forward pass to
    add up its metrics. It also reads the output layer's weight without the layer's own forward pass, which FSDP2's
    prefetching needs. A host that never waits for its GPU is what keeps the GPU busy.
    """

    _sums: Tensor | None = None
    """Right tokens, learned tokens and all tokens since the last point of the curve."""

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Tensor | int | None = None,
    ) -> Any:
        """The loss of a training pass, a scalar; of an evaluation, or a mixture whose routers learn, as TRL has it."""
        if not model.training or return_outputs or self.aux_loss_enabled or "attention_mask" not in inputs:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        # TRL pads on the right, where no token of a causal model looks, and padding has no label. transformers would
        # read the mask back to find out.
        unmasked = {name: value for name, value in inputs.items() if name != "attention_mask"}
        outputs = model(**unmasked, use_cache=False, num_items_in_batch=num_items_in_batch)
        self._count(outputs.logits.detach(), inputs)
        if num_items_in_batch is None or not self.args.average_tokens_across_devices:
            return outputs.loss
        # The items are those of all processes, whose gradients are averaged.
        return outputs.loss * self.accelerator.num_processes

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """None: transformers would count the weights, shard by shard, in every pass."""
        return 0

    def _count(self, logits: Tensor, inputs: dict[str, Any]) -> None:
        labels = inputs["labels"][:, 1:]
        learned = labels != IGNORE_INDEX
        right = (logits[:, :-1].argmax(-1) == labels) & learned
        sums = torch.stack((right.sum(), learned.sum(), inputs["attention_mask"].sum()))
        self._sums = sums if self._sums is None else self._sums + sums

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the sums kept on the device, then log as SFTTrainer does."""
        if self._sums is not None and self.model.training:
            right, learned, tokens = self.accelerator.reduce(self._sums, "sum").tolist()
            self._total_train_tokens += tokens
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._metrics["train"]["mean_token_accuracy"].append(right / max(1, learned))
            self._sums = None
        super().log(logs, start_time)
