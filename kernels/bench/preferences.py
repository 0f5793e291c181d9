"""`finemill bench dpo`: preferences on the engine beside TRL's own trainer, on one base, in one call.

Rows are pairs of `--seq` tokens each, a prompt and two answers of random ids; the base is a random checkpoint in NF4,
its own reference. TRL's trainer runs first, with its fused head and checkpointed activations as it comes; then ours,
twice: within `--share` of the memory that TRL's took (with the leanest plan, if that is more), and with what the card
has. Prints a line of JSON for each: tokens_per_s (of both answers, median after warm-up), peak_bytes, losses; and the
ratios to TRL's.

Every step trains on the same pairs, so that losses fall far below what 16-bit rounding changes in a sum of a thousand
log probabilities, and all lists can be held against those of TRL's trainer in float32, which runs before: PEFT adds an
adapter's output to one that is rounded to 16 bits already, where a first update is less than half of a step between two
numbers and vanishes; the engine adds them before rounding. A line of agreement ends each comparison: the largest
difference of the losses, and the cosine between the first step's gradients, ours and TRL's in 16 bits. The exit code is
1 where one of ours is beyond `LARGEST_DIFFERENCE` or `LEAST_COSINE`.
"""

import argparse
import gc
import json
import math
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, PrinterCallback, TrainerCallback
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer

from finemill.errors import UserError
from finemill.kernels.accelerate import restore_model
from finemill.kernels.bench.data import ensure_checkpoint
from finemill.kernels.bench.runs import PreferenceRun, Quantiles, add_record_argument, environment, header, record_runs
from finemill.kernels.bench.step import check_device
from finemill.kernels.engine.model import LINEARS
from finemill.kernels.engine.plan import Plan
from finemill.kernels.orpo import ORPOTrainer
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.kernels.planning.planner import MARGIN, NoPlanError
from finemill.kernels.preferences import FastDPOTrainer, FastKTOTrainer, PreferenceSteps, on_engine

TRAINERS: dict[str, tuple[Any, Any, Any]] = {
    "dpo": (DPOTrainer, FastDPOTrainer, DPOConfig),
    "kto": (KTOTrainer, FastKTOTrainer, KTOConfig),
    "orpo": (ORPOTrainer, on_engine(ORPOTrainer), DPOConfig),
}
"""By loss: the trainer on TRL's fused head, ours, and their arguments."""
LARGEST_DIFFERENCE = 0.05
"""Of a step's loss to that of TRL in float32, in 16 bits over a thousand tokens."""
LEAST_COSINE = 0.95
"""Between the gradients of the first step, which both take at the same adapters."""


@dataclass
class Outcome:
    """A training that was measured: its line of JSON, and the first step's gradient by parameter, on the CPU."""

    record: dict[str, Any]
    gradient: dict[str, Tensor]


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns: exit code, 1 where losses are not TRL's."""
    args = _parse(argv)
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    path = ensure_checkpoint(args.shape, args.layers, device)
    exact = measure(load_base(path, device, torch.float32), path, args, device, None)
    records = [exact.record]
    _print(exact.record)
    _free(device)
    theirs = exact
    base = load_base(path, device)
    if base.dtype != torch.float32:
        theirs = measure(base, path, args, device, None)
        records.append(theirs.record)
        _print(theirs.record)
    limits = [args.share * theirs.record["peak_bytes"] / 2**30] if device.type == "cuda" else []
    same = True
    for memory_gb in (*limits, 0.0):
        ours = measure(base, path, args, device, memory_gb)
        record, reference = ours.record, theirs.record
        record["speed_ratio"] = round(record["tokens_per_s"] / reference["tokens_per_s"], 3)
        record["memory_ratio"] = round(record["peak_bytes"] / max(1, reference["peak_bytes"]), 3)
        records.append(record)
        _print(record)
        agreement = compare(exact, theirs, ours)
        print("AGREEMENT " + json.dumps(agreement), flush=True)
        same = same and agreement["same"]
    if args.record:
        record_runs(args.record, [_preference_run(args, argv, record) for record in records])
    return 0 if same else 1


def _preference_run(args: argparse.Namespace, argv: list[str], record: dict[str, Any]) -> PreferenceRun:
    """Put a record into a line of results."""
    same = ("implementation", "dtype", "loss", "shape", "seq", "tokens_per_s", "peak_bytes", "losses")
    return PreferenceRun(
        **header("dpo", argv),
        kind="preferences",
        rows=args.bs * args.accum,
        memory_gb=record["memory_gb"] or None,
        step_s=Quantiles.of(record["step_s"][args.warmup :]),
        **{name: record[name] for name in same},
    )


def compare(exact: Outcome, theirs: Outcome, ours: Outcome) -> dict[str, Any]:
    """Hold two trainings' losses and first gradients against those of float32; `same` if ours are within the bounds."""
    difference, cosine = _differences(exact, ours)
    their_difference, their_cosine = _differences(exact, theirs)
    return {
        "losses_float32": exact.record["losses"],
        "losses_trl": theirs.record["losses"],
        "losses": ours.record["losses"],
        "largest_difference": difference,
        "largest_difference_trl": their_difference,
        "bound": LARGEST_DIFFERENCE,
        "gradient_cosine": cosine,
        "gradient_cosine_trl": their_cosine,
        "least_cosine": LEAST_COSINE,
        "same": difference <= LARGEST_DIFFERENCE and cosine >= LEAST_COSINE,
    }


def _differences(exact: Outcome, other: Outcome) -> tuple[float, float]:
    """The largest difference between two trainings' losses, and the cosine between their first gradients."""
    losses = (outcome.record["losses"] for outcome in (exact, other))
    products = torch.zeros(3, dtype=torch.float64)
    for name, wanted in exact.gradient.items():
        left, right = wanted.double().flatten(), other.gradient[name].double().flatten()
        products += torch.stack((left @ right, left @ left, right @ right))
    inner, *squares = products.tolist()
    cosine = inner / max(math.sqrt(math.prod(squares)), 1e-30)
    return round(max(abs(a - b) for a, b in zip(*losses, strict=True)), 5), round(cosine, 5)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finemill bench dpo", description=__doc__)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers (0: all)")
    parser.add_argument("--loss", default="dpo", choices=sorted(TRAINERS))
    parser.add_argument("--seq", type=int, default=2048, help="tokens of a prompt with an answer")
    parser.add_argument("--prompt", type=int, default=512, help="tokens of a prompt")
    parser.add_argument("--bs", type=int, default=2, help="pairs (kto: answers) per micro-batch")
    parser.add_argument("--accum", type=int, default=4, help="micro-batches per optimizer step")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument("--warmup", type=int, default=2, help="steps left out of the timing")
    parser.add_argument("--lr", type=float, default=5e-6)
    parser.add_argument("--share", type=float, default=0.6, help="of TRL's memory that ours may take")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    add_record_argument(parser)
    args = parser.parse_args(argv)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} must be smaller than --steps {args.steps}")
    if not 0 < args.prompt < args.seq:
        parser.error(f"--prompt {args.prompt} must be smaller than --seq {args.seq}")
    check_device(parser, args.device)
    return args


def load_base(path: Path, device: torch.device, dtype: torch.dtype | None = None) -> Any:
    """Load a checkpoint with transformers, its linear layers in NF4; by default it computes in the device's dtype."""
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
    )
    return AutoModelForCausalLM.from_pretrained(
        path, device_map={"": device}, dtype=dtype, quantization_config=quantization
    )


def make_rows(args: argparse.Namespace) -> Dataset:
    """Draw a step's random pairs, or for KTO answers that are good and bad in turn."""
    generator = torch.Generator().manual_seed(99)
    limit = SHAPES[args.shape].vocabulary - 16

    def draw(size: int) -> list[int]:
        return torch.randint(0, limit, (size,), generator=generator).tolist()

    answer = args.seq - args.prompt
    columns = ("prompt_ids", "completion_ids", "KL_completion_ids")
    if args.loss != "kto":
        columns = ("prompt_ids", "chosen_ids", "rejected_ids")
    rows: list[dict[str, Any]] = []
    for index in range(args.bs * args.accum):
        sizes = (args.prompt, answer, answer)
        row: dict[str, Any] = dict(zip(columns, map(draw, sizes), strict=True))
        rows.append(row if args.loss != "kto" else row | {"label": index % 2 == 0})
    return Dataset.from_list(rows)


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Times optimizer steps with the device idle before and after, and the peak after the warm-up."""

    def __init__(self, warmup: int, device: torch.device) -> None:
        self.warmup, self.device = warmup, device
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        if self.device.type == "cuda":
            if state.global_step == self.warmup:
                torch.cuda.reset_peak_memory_stats()
            torch.cuda.synchronize()
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


@dataclass
class FirstGradient(TrainerCallback):  # type: ignore[misc]
    """Keeps the first step's gradient, by parameter, on the CPU; clipped or not."""

    gradient: dict[str, Tensor] = field(default_factory=dict)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, model: Any = None, **_: Any) -> None:
        """Copy what the first step is about to take."""
        if not self.gradient:
            trained = ((name, p.grad) for name, p in model.named_parameters() if p.grad is not None)
            self.gradient = {name: grad.to("cpu", torch.float32, copy=True) for name, grad in trained}


class LeanestPlan(PreferenceSteps):
    """Part of a trainer that goes on with the leanest plan where its limit of memory has none."""

    def _make_plan(self) -> Plan:
        try:
            return super()._make_plan()
        except NoPlanError as error:
            self._memory_gb = error.least / MARGIN / 2**30 + 1e-3
            return super()._make_plan()


def measure(base: Any, path: Path, args: argparse.Namespace, device: torch.device, memory_gb: float | None) -> Outcome:
    """Train fresh adapters on the base, and take them off it.

    Args:
        base: loaded model.
        path: where its tokenizer is.
        args: the command line.
        device: where the base is.
        memory_gb: GiB that ours may take, 0 for the card's; None for TRL's trainer.
    """
    plain, fast, arguments = TRAINERS[args.loss]
    parents = (plain,) if memory_gb is None else (LeanestPlan, fast)
    kind: Any = type("Tokenized", parents, {"_prepare_dataset": lambda _, rows, *__: rows})
    timer, first = StepTimer(args.warmup, device), FirstGradient()
    trainer = kind(
        model=base,
        args=arguments(**_settings(args, base.dtype, device)),
        train_dataset=make_rows(args),
        processing_class=AutoTokenizer.from_pretrained(path),
        peft_config=LoraConfig(r=args.rank, lora_alpha=args.rank, target_modules=list(LINEARS), task_type="CAUSAL_LM"),
        callbacks=[timer, first],
        **({"memory_gb": memory_gb} if memory_gb else {}),
    )
    record: dict[str, Any] = {"implementation": "trl" if memory_gb is None else "finemill", "memory_gb": memory_gb}
    if memory_gb is not None:
        if memory_gb:
            record["memory_gb"] = round(trainer._memory_gb, 3)
        if not trainer.fast:
            raise UserError(f"the engine does not run this model: {trainer.acceleration.reason}")
        record |= {"predicted_peak_bytes": trainer._plan.peak, "levels": [level.name for level in trainer._plan.levels]}
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    median = statistics.median(timer.seconds[args.warmup :])
    sequences = args.bs * args.accum * (1 if args.loss == "kto" else 2)
    record |= {
        "dtype": str(base.dtype).removeprefix("torch."),
        "loss": args.loss,
        "shape": args.shape,
        "seq": args.seq,
        "pairs_per_pass": args.bs,
        "step_s": [round(seconds, 4) for seconds in timer.seconds],
        "tokens_per_s": round(sequences * args.seq / median, 1),
        "peak_bytes": torch.cuda.max_memory_allocated() if device.type == "cuda" else 0,
        "losses": [round(entry["loss"], 5) for entry in trainer.state.log_history if "loss" in entry],
    }
    if memory_gb is not None:
        restore_model(trainer.model)
    trainer.model.unload()
    del trainer
    _free(device)
    return Outcome(record, first.gradient)


def _free(device: torch.device) -> None:
    """Give back what nothing but a cycle of references holds."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _settings(args: argparse.Namespace, dtype: torch.dtype, device: torch.device) -> dict[str, Any]:
    settings = {
        "output_dir": "/tmp/bench_out",
        "use_cpu": device.type == "cpu",
        "bf16": dtype == torch.bfloat16,
        "tf32": device.type == "cuda",
        "per_device_train_batch_size": args.bs,
        "gradient_accumulation_steps": args.accum,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": args.seq,
        "disable_tqdm": True,
    }
    return settings | ({"train_sampling_strategy": "sequential"} if args.loss == "kto" else {})


def _print(record: dict[str, Any]) -> None:
    print("BENCH " + json.dumps(record | environment()), flush=True)
