"""TRL's SFTTrainer on the engine: the same data, arguments, callbacks, checkpoints and logs, another step.

What differs from the stock trainer, and why (measured in bench/results.md):

- The micro-batches of one optimizer step are merged into one bag of sequences and packed into token-budget batches that
  memory allows: same gradient, fewer and fuller launches. Batches stay on the CPU until then.
- A step runs outside autograd, as CUDA graphs where that pays, and reads nothing back: loss, entropy,
  accuracy and gradient norm are summed on the device and fetched when the trainer logs.
- Several processes, one per GPU, sum the flat gradient once per step, weighted by their labels: the loss is a mean over
  all labels.
- Evaluation takes its loss from the engine, too: no logits of whole batches, and nothing beyond the plan's memory.
- A step that runs out of memory is begun again with half the micro-batch: the same sequences, the same gradient.
- The optimizer is the flat one where it covers what the arguments name (engine_trainer.py).

A model the engine does not cover, or arguments that change the loss, train as SFTTrainer does: `trainer.fast` is False
and `trainer.acceleration.reason` says why.
"""

import logging
from dataclasses import replace
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer

from finemill.kernels.accelerate import Acceleration, accelerate_model, has_unequal_layers, leave_unchanged, workload_of
from finemill.kernels.engine.graphs import GraphRunner
from finemill.kernels.engine.plan import Plan
from finemill.kernels.engine.shapes import Buckets, Shapes
from finemill.kernels.engine_trainer import EAGER_BUCKET, EngineTrainer, budget_bytes, free_bytes, host_limit
from finemill.kernels.ops.packing import IGNORE_INDEX, PackedBatch, pack_budget, send, split_rows
from finemill.kernels.planning.planner import MARGIN, plan_graphed_step, plan_step
from finemill.kernels.planning.rates import rates_of

logger = logging.getLogger(__name__)

_COLUMNS = {"input_ids", "labels", "attention_mask", "position_ids", "cu_seq_lens_q", "cu_seq_lens_k", "max_length_q"}
_COLUMNS |= {"max_length_k", "seq_idx", "seq_lengths"}
"""Columns that a batch may hold: rows, and their boundaries once more."""
BUCKETS_PER_BATCH = 8
"""Token and label counts of graphs are rounded up to this share of the token budget."""
SAMPLED_ROWS = 1000
"""Rows of the data whose lengths are looked at before planning."""


class FastSFTTrainer(EngineTrainer, SFTTrainer):  # type: ignore[misc]
    """SFTTrainer whose training step runs on finemill's kernels.

    Args:
        memory_gb: device memory the step may allocate at its peak, GiB; None for what the card has free.
        use_graphs: capture micro-batches as CUDA graphs at once, or not at all; None decides by their predicted time
            and by how often a shape comes.
        eight_bit: whether the moments of `adamw_torch` may have 8 bits: always, never, or None for where memory is
            short.
        kwargs: SFTTrainer's own arguments.
    """

    def __init__(
        self,
        *args: Any,
        memory_gb: float | None = None,
        use_graphs: bool | None = None,
        eight_bit: bool | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(*args, **kwargs)
        self._choose_moments(eight_bit)
        reason = self._other_training()
        self.acceleration: Acceleration = (
            accelerate_model(self.model) if reason is None else leave_unchanged(self.model, reason)
        )
        self._runner: GraphRunner | None = None
        self._sequences: list[tuple[Tensor, Tensor]] = []
        """Token ids and labels of the optimizer step at hand, on the CPU."""
        self._prepared: list[PackedBatch] | None = None
        """The same as batches, until the step begins."""
        self._sums: Tensor | None = None
        self._labels = 0
        """Labelled tokens of the step at hand, in this process."""
        self._counts = torch.zeros(2)
        """Labels and tokens of the step, on the device."""
        if self.acceleration.engine is None:
            return
        self._adopt(*self._make_plan(memory_gb, use_graphs))
        self._hold_model()

    def _other_training(self) -> str | None:
        """Say what in the arguments asks for another step than the engine's, None if nothing does."""
        args = self.args
        loss_type = getattr(args, "loss_type", None) or "nll"
        reasons = {
            "DeepSpeed or FSDP own the model": self.is_deepspeed_enabled or self.is_fsdp_enabled,
            "only some layers have experts, and plans are of equal layers": has_unequal_layers(self.model),
            f"loss_type is {loss_type!r}": loss_type not in ("nll", "chunked_nll"),
            f"label_smoothing_factor is {args.label_smoothing_factor}": args.label_smoothing_factor > 0,
            f"neftune_noise_alpha is {args.neftune_noise_alpha}": args.neftune_noise_alpha is not None,
            "compute_loss_func is given": self.compute_loss_func is not None,
            "compute_loss is overridden": type(self).compute_loss is not SFTTrainer.compute_loss,
        }
        return next((reason for reason, applies in reasons.items() if applies), None)

    def get_train_dataloader(self) -> Any:
        """Leave batches on the CPU: they are packed there, and sent in one piece."""
        loader = super().get_train_dataloader()
        if self.fast and hasattr(loader, "device"):
            loader.device = None
        return loader

    def get_batch_samples(self, epoch_iterator: Any, num_batches: int, device: torch.device) -> tuple[list[Any], Any]:
        """Fetch an optimizer step's micro-batches and pack them, while the device still works on the step before."""
        samples, num_items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self.fast:
            if unknown := {name for batch in samples for name in batch} - _COLUMNS:
                raise ValueError(f"batches hold {', '.join(sorted(unknown))}: train with SFTTrainer")
            self._sequences = [pair for batch in samples for pair in _sequences(batch)]
            self._prepared = self._pack(self._sequences)
            tokens = sum(ids.numel() for ids, _ in self._sequences)
            self._labels = _count_labels(self._sequences)
            self._counts = send(torch.tensor([self._labels, tokens]), self._engine.device)
        return samples, num_items

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Tensor:
        """Run the whole optimizer step's forward and backward on its first micro-batch, nothing on the others.

        The device then computes while the host goes through the rest of the trainer's loop.
        Returns: the step's loss on its first micro-batch, zero after it.
        """
        if not self.fast:
            return super().training_step(model, inputs, num_items_in_batch)  # type: ignore[no-any-return]
        engine = self._engine
        batches, self._prepared = self._prepared, None
        if batches is None:
            return torch.zeros((), device=engine.device)
        if not model.training:  # visiting every module takes milliseconds
            model.train()
        if self._flat_optimizer is None or self._scaler is not None:
            engine.adapters.attach_grads()
        total = torch.zeros(5, dtype=torch.float64, device=engine.device)
        while True:
            try:
                total[:3] = self._run_batches(batches)
                break
            except torch.OutOfMemoryError:
                del batches
            # Outside the handler: the exception's traceback holds the tensors of the pass that failed.
            batches = self._halve()
        total[3:] = self._counts
        if self.args.world_size > 1:
            engine.adapters.grad.mul_(self._labels)
            torch.distributed.all_reduce(engine.adapters.grad)
            torch.distributed.all_reduce(total)
            engine.adapters.grad.div_(total[3].clamp(min=1))
        self._sums = total if self._sums is None else self._sums + total
        return (total[0] / total[3].clamp(min=1)).float()

    def _run_batches(self, batches: list[PackedBatch]) -> Tensor:
        """Add the gradient of a step's batches. Returns: their summed loss, entropy and correct predictions."""
        engine, mean = self._engine, 1.0 / max(1, self._labels)
        scale: Tensor | float = mean
        if self._scaler is not None:
            scale = self._scaler.scale(torch.full((1,), mean, device=engine.device))
        total = torch.zeros(3, dtype=torch.float64, device=engine.device)
        for index, batch in enumerate(batches):
            if engine.dropout_seed is not None:
                # Of the step, not a count of batches run: a resumed training draws the masks it would have drawn.
                stream = index * self.args.world_size + self.args.process_index
                engine.dropout_seed.fill_((self.args.seed << 40) + (self.state.global_step << 16) + stream)
            result = (self._runner or engine).loss_and_grad(batch, scale)
            total += torch.stack((result.loss, result.entropy, result.correct))
        return total

    def _halve(self) -> list[PackedBatch]:
        """Plan for micro-batches of half the tokens. Returns: the step's sequences in such batches, to begin again.

        Raises: OutOfMemoryError: a micro-batch is one row already.
        """
        engine, before = self._engine, self._plan
        tokens = before.micro_batch or sum(ids.numel() for ids, _ in self._sequences)
        if before.micro_batch is None or tokens // 2 < self._longest:
            raise torch.OutOfMemoryError(
                f"out of memory with micro-batches of {tokens} tokens, and a row may have {self._longest}: lower "
                "max_length, or free memory on the card"
            )
        self._runner = self._shapes = None
        engine.abandon()
        engine.adapters.grad.zero_()
        budget = before.peak
        if engine.device.type == "cuda":
            torch.cuda.empty_cache()
            budget = min(budget, free_bytes(engine.device))
        work = replace(self._workload, tokens=max(self._longest, tokens // 2))
        plan = plan_step(
            work,
            int(budget / MARGIN),
            allow_stream=True,
            streamed=self._streamed,
            eight_bit=self._eight_bit,
            host=host_limit(engine, work) if engine.device.type == "cuda" else None,
        )
        self._adopt(plan, None)
        logger.warning("out of memory: micro-batches of %d tokens instead of %d from here on", work.tokens, tokens)
        return self._pack(self._sequences)

    def prediction_step(
        self, model: Any, inputs: dict[str, Any], prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> Any:
        """Take a batch's mean loss from the engine where nothing but the loss is asked for."""
        if not self.fast or not prediction_loss_only or not _COLUMNS.issuperset(inputs) or "labels" not in inputs:
            return super().prediction_step(model, inputs, prediction_loss_only, ignore_keys)
        engine = self._engine
        sequences = _sequences(inputs)
        count = max(1, _count_labels(sequences))
        total = torch.zeros(3, dtype=torch.float64, device=engine.device)
        with torch.no_grad():
            for batch in self._pack(sequences):
                result = engine.score(batch)
                total += torch.stack((result.loss, result.entropy, result.correct))
        loss, entropy, correct = (total / count).tolist()
        self._metrics["eval"]["entropy"].append(entropy)
        self._metrics["eval"]["mean_token_accuracy"].append(correct)
        return torch.tensor(loss, device=engine.device), None, None

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Fetch the sums kept on the device, then log as SFTTrainer does."""
        if self._sums is not None and self.model.training:
            _, entropy, correct, labels, tokens = self._sums.tolist()
            self._total_train_tokens += int(tokens)
            self._metrics["train"]["num_tokens"] = [self._total_train_tokens]
            self._metrics["train"]["entropy"].append(entropy / max(1.0, labels))
            self._metrics["train"]["mean_token_accuracy"].append(correct / max(1.0, labels))
            self._sums = None
        super().log(logs, start_time)

    def _pack(self, sequences: list[tuple[Tensor, Tensor]]) -> list[PackedBatch]:
        """Batches of at most the plan's tokens, on their way to the device."""
        budget = self._plan.micro_batch or sum(ids.numel() for ids, _ in sequences)
        batches = pack_budget(sequences, budget)
        shapes, device = self._shapes, self._engine.device
        return [(batch if shapes is None else shapes.prepare(batch)).to(device) for batch in batches]

    def _typical_length(self) -> int | None:
        """Length of the sequence that a token is in, on average over the first rows; None for a stream of rows."""
        if not isinstance(self.train_dataset, Dataset):
            return None
        columns = self.train_dataset.column_names
        column = next((name for name in ("seq_lengths", "input_ids") if name in columns), None)
        if column is None:
            return None
        rows = self.train_dataset.select_columns(column)[:SAMPLED_ROWS][column]
        lengths = [length for row in rows for length in row] if column == "seq_lengths" else list(map(len, rows))
        return int(sum(length**2 for length in lengths) // max(1, sum(lengths)))

    def _adopt(self, plan: Plan, patience: int | None) -> None:
        """Take on a plan; `patience` as `_make_plan` returns it."""
        self._adopt_plan(plan)
        self._runner = None if patience is None else GraphRunner(self._engine, patience)
        if (micro_batch := plan.micro_batch) is not None:
            step = EAGER_BUCKET if self._runner is None else max(256, micro_batch // BUCKETS_PER_BATCH)
            self._shapes = Shapes(Buckets(step, step, micro_batch))

    @property
    def _streamed(self) -> bool:
        """Whether the NF4 weights wait in host memory already."""
        return self._engine.weight_stream is not None

    def _make_plan(self, memory_gb: float | None, use_graphs: bool | None) -> tuple[Plan, int | None]:
        """Return the plan, and how often a shape of micro-batches runs before it is captured, None without graphs."""
        engine, args = self._engine, self.args
        longest = self._longest = args.max_length or 2048
        rows = args.per_device_train_batch_size * args.gradient_accumulation_steps
        work = self._workload = workload_of(engine, tokens=rows * longest, row=longest, typical=self._typical_length())
        if engine.device.type != "cuda":
            return Plan.everything(len(engine.layers)), None
        card = free_bytes(engine.device)
        budget = budget_bytes(engine.device, memory_gb)
        rates = rates_of(torch.cuda.get_device_name(engine.device))
        if engine.attention_backend(longest) == "plain":
            use_graphs = False  # it reads the boundaries on the host, which no graph can hold
        plan, patience = plan_graphed_step(
            work,
            budget,
            card,
            rates=rates,
            use_graphs=use_graphs,
            allow_stream=True,
            streamed=self._streamed,
            eight_bit=self._eight_bit,
            host=host_limit(engine, work),
        )
        logger.info("plan: %s tokens per micro-batch, %.2f GiB", plan.micro_batch, plan.peak / 2**30)
        return plan, patience


def _sequences(batch: dict[str, Any]) -> list[tuple[Tensor, Tensor]]:
    """Token ids and labels of every sequence in a batch of the trainer's."""
    return split_rows(batch["input_ids"], batch["labels"], batch.get("attention_mask"), batch.get("position_ids"))


def _count_labels(sequences: list[tuple[Tensor, Tensor]]) -> int:
    """Tokens that a loss is taken on: a sequence's first has nothing before it."""
    return sum(int((labels[1:] != IGNORE_INDEX).sum()) for _, labels in sequences)
