"""TRL's preference trainers on the engine: DPO, KTO, and any that asks a model for log probabilities as they do.

The losses stay TRL's own. What they ask the model for, each token's log probability under the adapter and under the
frozen base, comes from the engine (token_scores.py): the same layers as in a training on demonstrations, the base
decoded once for both answers of every pair in a batch, no logits of more than a chunk of tokens, one backward, and a
plan that keeps it all within a limit of memory.

A pair's loss compares its answers, so that a micro-batch is a whole: memory is planned for all its sequences at once.
"""

import logging
from typing import Any

import torch
from torch import Tensor
from transformers import Trainer
from trl import DPOTrainer, KTOTrainer

from finemill.kernels.accelerate import Acceleration, accelerate_model, has_unequal_layers, leave_unchanged, workload_of
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.shapes import Buckets, Shapes
from finemill.kernels.engine_trainer import EAGER_BUCKET, EngineTrainer, budget_bytes, host_limit
from finemill.kernels.planning.planner import plan_step
from finemill.kernels.planning.rates import rates_of

logger = logging.getLogger(__name__)


class PreferenceSteps(EngineTrainer):
    """Part of a trainer that asks its model for log probabilities; the other part is TRL's.

    Args:
        memory_gb: device memory that training may allocate at its peak, GiB; None for what the card has free.
        eight_bit: whether the moments of `adamw_torch` may have 8 bits: always, never, or None for where memory is
            short.
        kwargs: the trainer's own arguments.
    """

    def __init__(
        self, *args: Any, memory_gb: float | None = None, eight_bit: bool | None = None, **kwargs: Any
    ) -> None:
        self._memory_gb, self._allowed_moments = memory_gb, eight_bit
        self._passes = 0
        """Micro-batches of the step at hand that were begun."""
        super().__init__(*args, **kwargs)
        if not hasattr(self, "acceleration"):
            self._accelerate()

    def _precompute_ref_logps(self, *args: Any) -> Any:
        """Score the references on the engine, too: TRL's trainers do it while they are built."""
        if not hasattr(self, "acceleration"):
            self._accelerate()
        return super()._precompute_ref_logps(*args)

    def _accelerate(self) -> None:
        self._choose_moments(self._allowed_moments)
        reason = self._other_training()
        self.acceleration: Acceleration = (
            accelerate_model(self.model) if reason is None else leave_unchanged(self.model, reason)
        )
        if not self.fast:
            return
        plan = self._make_plan()
        self._adopt_plan(plan)
        if plan.micro_batch is not None:
            self._shapes = Shapes(Buckets(EAGER_BUCKET, EAGER_BUCKET, plan.micro_batch))
            self.model.get_base_model()._finemill_scorer.shapes = self._shapes
        self._hold_model()
        # The plan says what is recomputed; TRL would visit every module in each step to switch it off and on.
        self.args.gradient_checkpointing = False

    def _other_training(self) -> str | None:
        """Say what asks for another step than the engine's, None if nothing does."""
        args = self.args
        reasons = {
            "DeepSpeed or FSDP own the model": self.is_deepspeed_enabled or self.is_fsdp_enabled,
            "only some layers have experts, and plans are of equal layers": has_unequal_layers(self.model),
            f"neftune_noise_alpha is {args.neftune_noise_alpha}": args.neftune_noise_alpha is not None,
            "use_weighting asks for more than log probabilities": getattr(args, "use_weighting", False),
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def _make_plan(self) -> Plan:
        engine, args = self._engine, self.args
        if engine.device.type != "cuda":
            return Plan.everything(len(engine.layers))
        longest = args.max_length or 2048
        sequences = 1 if isinstance(self, KTOTrainer) else 2
        tokens = args.per_device_train_batch_size * sequences * longest
        work = workload_of(engine, tokens=tokens, row=longest, whole=True)
        budget = budget_bytes(engine.device, self._memory_gb)
        plan = plan_step(
            work,
            budget,
            rates=rates_of(torch.cuda.get_device_name(engine.device)),
            allow_stream=True,
            streamed=engine.weight_stream is not None,
            eight_bit=self._eight_bit,
            host=host_limit(engine, work),
        )
        logger.info("plan: %s tokens per micro-batch, %.2f GiB", plan.micro_batch, plan.peak / 2**30)
        return plan

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run a micro-batch as TRL does; several processes then average the flat gradient once per step."""
        if not self.fast:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        engine, args = self._engine, self.args
        if engine.dropout_seed is not None:
            # Of the step, not a count of batches run: a resumed training draws the masks it would have drawn.
            stream = self._passes * args.world_size + args.process_index
            engine.dropout_seed.fill_((args.seed << 40) + (self.state.global_step << 16) + stream)
        loss: Tensor = super().training_step(model, inputs, num_items_in_batch)
        self._passes += 1
        if self.accelerator.sync_gradients:
            self._passes = 0
            if args.world_size > 1:
                torch.distributed.all_reduce(engine.adapters.grad)
                engine.adapters.grad.div_(args.world_size)
        return loss


class FastDPOTrainer(PreferenceSteps, DPOTrainer):  # type: ignore[misc]
    """DPOTrainer whose model runs on finemill's kernels; the arguments are DPOTrainer's and `PreferenceSteps`'."""


class FastKTOTrainer(PreferenceSteps, KTOTrainer):  # type: ignore[misc]
    """KTOTrainer whose model runs on finemill's kernels; the arguments are KTOTrainer's and `PreferenceSteps`'."""


def on_engine(trainer_class: type[Trainer]) -> type[Trainer]:
    """Make the same of another trainer that asks its model for log probabilities, as subclasses of TRL's do."""
    return type(f"Fast{trainer_class.__name__}", (PreferenceSteps, trainer_class), {})
