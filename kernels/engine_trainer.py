"""What a trainer of TRL's gets when its model runs on the engine: the plan, the flat optimizer, the gradient's norm."""

import json
import logging
from pathlib import Path
from typing import Any

import torch
from transformers import Trainer

from finemill.kernels.accelerate import Acceleration, adopt_plan
from finemill.kernels.engine.host_memory import free_host_bytes
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.optimizer import FlatAdamW
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.shapes import Shapes
from finemill.kernels.planning.workload import NF4_BYTES, Workload

logger = logging.getLogger(__name__)

FLAT_ADAMW = {"adamw_torch": None, "adamw_torch_fused": None, "adamw_8bit": True, "adamw_bnb_8bit": True}
"""Names of `optim` that FlatAdamW is, and whether they ask for 8-bit moments; None where the caller chooses."""
EAGER_BUCKET = 128
"""Token and label counts are rounded up to this without graphs, for the tiles of matrix products."""


class EngineTrainer(Trainer):  # type: ignore[misc]
    """Part of a trainer whose `acceleration` may be active; the other part is the trainer of TRL's.

    `adamw_torch` and `adamw_torch_fused` are FlatAdamW with fp32 moments, or with 8-bit ones where memory is short and
    `eight_bit` allows it; `adamw_8bit` is FlatAdamW with 8-bit ones. Any other optimizer, paged ones among them, or the
    caller's own, steps as it would, on gradients that are views of the flat one.
    """

    acceleration: Acceleration
    _plan: Plan
    _eight_bit: bool | None
    """As `plan_step` takes it; another optimizer's moments have 4 bytes each at most."""
    _shapes: Shapes | None = None
    _parameters: int | None = None

    @property
    def fast(self) -> bool:
        """Whether steps run on the engine."""
        return self.acceleration.active

    @property
    def steps_flat(self) -> bool:
        """Whether the engine's own optimizer is the one that will step."""
        given = self.optimizer is not None or self.optimizer_cls_and_kwargs is not None
        return self.fast and not given and self._optimizer_name in FLAT_ADAMW

    @property
    def _engine(self) -> FastModel:
        engine = self.acceleration.engine
        assert engine is not None
        return engine

    def _choose_moments(self, eight_bit: bool | None) -> None:
        """Take what the caller allows of 8-bit moments, where `optim` leaves it open."""
        asked = FLAT_ADAMW.get(self._optimizer_name, False)
        self._eight_bit = eight_bit if asked is None else asked

    def keep_moments(self, eight_bit: bool) -> None:
        """Go on with moments of a checkpoint's precision, whatever this card's memory would allow."""
        if self._eight_bit is None:
            self._eight_bit = eight_bit

    def _hold_model(self) -> None:
        """Have one set of adapters in all processes, and no wrapper around the model."""
        if self.args.world_size > 1:
            torch.distributed.broadcast(self._engine.adapters.master, src=0)
        # The model is where it belongs (an embedding in host memory would come back to the device), and
        # DistributedDataParallel would wait for gradients that no hook sees.
        prepare = self.accelerator.prepare_model
        self.accelerator.prepare_model = lambda model, **_: prepare(model, device_placement=False, evaluation_mode=True)
        # Replacing a NaN loss by an average needs the loss on the host after every micro-batch.
        self.args.logging_nan_inf_filter = False

    def _adopt_plan(self, plan: Plan) -> None:
        self._plan = plan
        adopt_plan(self.model, plan)

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Build FlatAdamW if the arguments ask for an AdamW that it is; otherwise what TRL's trainer would."""
        args, name = self.args, self._optimizer_name
        if not self.steps_flat:
            if self.fast and self.optimizer is None and name not in FLAT_ADAMW:
                logger.warning("optim %s steps as in transformers: the kernels compute its gradient", name)
            return super().create_optimizer()  # type: ignore[no-any-return]
        if self._eight_bit is None:
            self._eight_bit = self._plan.eight_bit
        optimizer = FlatAdamW(
            self._engine.adapters,
            lr=args.learning_rate,
            betas=(args.adam_beta1, args.adam_beta2),
            eps=args.adam_epsilon,
            weight_decay=args.weight_decay,
            max_norm=args.max_grad_norm if args.max_grad_norm > 0 else None,
            bits=8 if self._eight_bit else 32,
        )
        self.optimizer: Any = optimizer
        return optimizer

    @property
    def _optimizer_name(self) -> str:
        """What the arguments name as `optim`."""
        return str(getattr(self.args.optim, "value", self.args.optim))

    @property
    def _flat_optimizer(self) -> FlatAdamW | None:
        """The engine's optimizer, if it is the one that steps."""
        optimizer = getattr(self.optimizer, "optimizer", self.optimizer)
        return optimizer if isinstance(optimizer, FlatAdamW) else None

    @property
    def _scaler(self) -> torch.amp.GradScaler | None:
        """What multiplies the loss in float16, whose gradients would be zero without it."""
        scaler: torch.amp.GradScaler | None = self.accelerator.scaler
        return scaler

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Estimate a micro-batch's operations as transformers does, without counting the parameters each time."""
        if not self.fast:
            return int(super().floating_point_ops(inputs))
        if self._parameters is None:
            self._parameters = int(self.model.num_parameters(exclude_embeddings=True))
        return int(6 * inputs["input_ids"].numel() * self._parameters)

    def _save_rng_state(self, output_dir: str) -> None:
        """Save the slots of batches seen beside the random numbers: with others, attention might round otherwise."""
        super()._save_rng_state(output_dir)
        if self._shapes is not None:
            self._shapes_file(output_dir).write_text(json.dumps(self._shapes.state()))

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if self._shapes is not None and checkpoint is not None and (file := self._shapes_file(checkpoint)).is_file():
            self._shapes.restore(json.loads(file.read_text()))

    def _shapes_file(self, checkpoint: str) -> Path:
        """Each process has its own: it sees other batches."""
        return Path(checkpoint) / f"finemill_slots_{self.args.process_index}.json"

    def _clip_grad_norm(self, model: Any) -> Any:
        """FlatAdamW clips inside its step; its norm is reported."""
        optimizer = self._flat_optimizer
        if optimizer is None:
            return super()._clip_grad_norm(model)
        if self._scaler is not None:
            self._scaler.unscale_(optimizer)
        return optimizer.measure_norm()

    def _get_grad_norm(self, model: Any, grad_norm: Any = None) -> Any:
        if self._flat_optimizer is None:
            return super()._get_grad_norm(model, grad_norm=grad_norm)
        return self._clip_grad_norm(model) if grad_norm is None else grad_norm


def host_limit(engine: FastModel, work: Workload) -> int:
    """Host memory that a plan may take: what is free, and what this engine has there already."""
    waits = engine.weight_stream is not None and engine.shards == 1
    weights = int(work.num_layers * work.layer_weights * NF4_BYTES) if waits else 0
    return free_host_bytes() + weights + (0 if engine.arena is None else engine.arena.slab.numel())


def budget_bytes(device: torch.device, memory_gb: float | None) -> int:
    """What a plan may allocate on the card: `memory_gb` as far as there is that much, or what `free_bytes` says."""
    if memory_gb is None:
        return free_bytes(device)
    free, _ = torch.cuda.mem_get_info(device)
    there, asked = free + torch.cuda.memory_allocated(device), int(memory_gb * 2**30)
    if asked > there:
        logger.warning("memory_gb %g, and the card has %.2f GiB free: plans for those", memory_gb, there / 2**30)
    return min(asked, there)


def free_bytes(device: torch.device) -> int:
    """What this process may allocate on the card; a twentieth is left for fragments and other processes."""
    free, _ = torch.cuda.mem_get_info(device)
    return int((free + torch.cuda.memory_allocated(device)) * 0.95)
