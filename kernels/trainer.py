"""TRL's SFTTrainer on the engine: the same data, arguments, callbacks, checkpoints and logs, another step.

What differs from the stock trainer, and why (performance measured in results.md):

- The micro-batches of one optimizer step are merged into one bag of sequences and packed into token-budget batches that
  memory allows: same gradient, fewer and fuller launches. Batches stay on the CPU until then.
- A step runs outside autograd, as CUDA graphs where launches would dominate, and reads nothing back: loss, entropy,
  accuracy and gradient norm are summed on the device and fetched when the trainer logs.
- The optimizer is FlatAdamW; `optim` chooses 8-bit or fp32 moments.

A model the engine does not cover trains as SFTTrainer does (`trainer.acceleration.reason` says why).
"""

import logging
from typing import Any

import torch
from torch import Tensor
from trl import SFTTrainer

from finemill.kernels.accelerate import Acceleration, accelerate_model, workload_of
from finemill.kernels.graphs import Buckets, GraphRunner
from finemill.kernels.loss_head import HeadResult
from finemill.kernels.optimizer import FlatAdamW
from finemill.kernels.packing import PackedBatch, pack_budget, split_rows
from finemill.kernels.planner import Plan, launch_bound, plan_step

logger = logging.getLogger(__name__)

BUCKETS_PER_BATCH = 8
"""Token and label counts of graphs are rounded up to this share of the token budget."""


class FastSFTTrainer(SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose training step runs on finemill's kernels.

    Args:
        memory_gb: device memory the step may allocate at its peak, GiB; None for what the card has free.
        use_graphs: capture micro-batches as CUDA graphs; None decides by their predicted time.
        kwargs: SFTTrainer's own arguments.
    """

    def __init__(
        self, *args: Any, memory_gb: float | None = None, use_graphs: bool | None = None, **kwargs: Any
    ) -> None:
        super().__init__(*args, **kwargs)
        self.acceleration: Acceleration = accelerate_model(self.model)
        self._runner: GraphRunner | None = None
        self._waiting: list[tuple[Tensor, Tensor]] = []
        self._sums: Tensor | None = None
        self._norm: Tensor | None = None
        if self.acceleration.engine is None or self.args.world_size > 1:
            return
        self._plan = self._make_plan(memory_gb)
        self.acceleration.engine.apply_plan(self._plan)
        cuda = self.acceleration.engine.device.type == "cuda"
        wanted = launch_bound(self._plan, self._work) if use_graphs is None else use_graphs
        if cuda and wanted:
            step = max(256, (self._plan.micro_batch or 0) // BUCKETS_PER_BATCH)
            self._runner = GraphRunner(self.acceleration.engine, Buckets(step, step, 64, 512))
        # Replacing a NaN loss by an average needs the loss on the host after every micro-batch.
        self.args.logging_nan_inf_filter = False

    @property
    def fast(self) -> bool:
        """Whether steps run on the engine."""
        return self.acceleration.active and self.args.world_size == 1

    def get_train_dataloader(self) -> Any:
        """Leave batches on the CPU: they are packed there, and sent in one piece."""
        loader = super().get_train_dataloader()
        if self.fast and hasattr(loader, "device"):
            loader.device = None
        return loader

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build FlatAdamW from the training arguments, unless the caller passed an optimizer."""
        if not self.fast or self.optimizer is not None:
            return super().create_optimizer(model) if model is not None else super().create_optimizer()
        engine, args = self.acceleration.engine, self.args
        assert engine is not None
        self.optimizer = FlatAdamW(
            engine.adapters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_norm=args.max_grad_norm or None,
            bits=8 if self._plan.eight_bit else 32,
        )
        return self.optimizer

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Collect the micro-batch; on the last one of an optimizer step, run the whole step's forward and backward.

        Returns: the step's loss on its last micro-batch, zero before.
        """
        if not self.fast:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        engine = self.acceleration.engine
        assert engine is not None
        model.train()
        self._waiting += split_rows(
            inputs["input_ids"], inputs["labels"], inputs.get("attention_mask"), inputs.get("position_ids")
        )
        if not self.accelerator.gradient_state.sync_gradients:
            return torch.zeros((), device=engine.device)
        sequences, self._waiting = self._waiting, []
        tokens = sum(ids.numel() for ids, _ in sequences)
        batches = pack_budget(sequences, self._plan.micro_batch or tokens)
        labels = sum(batch.num_labels for batch in batches)
        scale = 1.0 / max(1, labels)
        total = torch.zeros(4, device=engine.device)
        for batch in batches:
            result = self._run(batch, scale)
            total[0] += result.loss
            total[1] += result.entropy
            total[2] += result.correct
        total[3] += labels
        self._sums = total if self._sums is None else self._sums + total
        self._total_train_tokens += tokens
        self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
        return total[0] * scale

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the sums kept on the device, then log as SFTTrainer does."""
        if self._sums is not None and self.model.training:
            _, entropy, correct, labels = self._sums.tolist()
            self._metrics["train"]["entropy"].append(entropy / max(1.0, labels))
            self._metrics["train"]["mean_token_accuracy"].append(correct / max(1.0, labels))
            self._sums = None
        super().log(logs, start_time)

    def _run(self, batch: PackedBatch, scale: float) -> HeadResult:
        engine = self.acceleration.engine
        assert engine is not None
        if engine.dropout_seed is not None:
            engine.dropout_seed += 1
        if self._runner is not None:
            return self._runner.loss_and_grad(batch, scale)
        return engine.loss_and_grad(batch.to(engine.device), scale)

    def _clip_grad_norm(self, model: Any) -> Any:
        """The optimizer clips inside its step; its norm is reported."""
        if not self.fast:
            return super()._clip_grad_norm(model)
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer.measure_norm()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if not self.fast:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm

    def _make_plan(self, memory_gb: float | None) -> Plan:
        engine, args = self.acceleration.engine, self.args
        assert engine is not None
        longest = args.max_length or 2048
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        self._work = workload_of(engine, tokens=rows * longest, row=longest)
        if engine.device.type != "cuda":
            return Plan.everything(len(engine.layers))
        if memory_gb is not None:
            budget = int(memory_gb * 2**30)
        else:
            budget = int((torch.cuda.mem_get_info(engine.device)[0] + torch.cuda.memory_allocated(engine.device)) * 0.95)
        plan = plan_step(self._work, budget)
        logger.info("plan: %s tokens a micro-batch, %.2f GiB", plan.micro_batch, plan.peak / 2**30)
        return plan
