"""`finemill bench step --trainer`: the step a user meets, real row lengths through FastSFTTrainer.

Rows are random token ids with the lengths of chat files (bench_data.real_rows), every token labelled. Counted are real
tokens per second: the mean number of row tokens per optimizer step over the median time of a step.
"""

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, TrainerCallback
from trl import SFTConfig

from finemill.errors import UserError
from finemill.kernels.bench.data import ensure_checkpoint, make_batches, real_rows, start_adapters
from finemill.kernels.bench.runs import PlanRecord
from finemill.kernels.engine.model import GROUPS
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.kernels.trainer import FastSFTTrainer


class StepTimer(TrainerCallback):  # type: ignore[misc]
    """Times optimizer steps with the device idle before and after, and the peak after the warm-up."""

    def __init__(self, warmup: int) -> None:
        self.warmup = warmup
        self.seconds: list[float] = []
        self._begin = 0.0

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Start the clock."""
        if state.global_step == self.warmup:
            reset_peak()
        torch.cuda.synchronize()
        self._begin = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Stop the clock."""
        torch.cuda.synchronize()
        self.seconds.append(time.perf_counter() - self._begin)


def reset_peak() -> None:
    """Begin a new measurement of the peak memory."""
    torch.cuda.reset_peak_memory_stats()


def run_trainer(args: argparse.Namespace) -> dict[str, Any]:
    """Load with transformers, train with FastSFTTrainer. Returns: the measured part of the record."""
    shape = SHAPES[args.shape]
    path = ensure_checkpoint(args.shape, args.layers, torch.device("cuda", 0))
    rows = (
        real_rows(args.rows, args.num_rows, shape.vocabulary, args.seq)
        if args.rows
        else [
            row.tolist()
            for step in make_batches(shape.vocabulary, args.seq, args.bs, args.accum, args.steps)
            for batch in step
            for row in batch
        ]
    )
    timer = StepTimer(args.warmup)
    trainer = FastSFTTrainer(
        model=load_adapted(args, path),
        args=sft_arguments(args),
        train_dataset=Dataset.from_dict({"input_ids": rows}),
        processing_class=AutoTokenizer.from_pretrained(path),
        callbacks=[timer],
        memory_gb=args.memory_gb or None,
        use_graphs=False if args.eager else None,
    )
    engine = trainer.acceleration.engine
    if engine is None:
        raise UserError(f"the engine does not run this model: {trainer.acceleration.reason}")
    free, _ = torch.cuda.mem_get_info()
    card, typical = int((free + torch.cuda.memory_allocated()) * 0.95), trainer._typical_length()
    trainer.train()
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    per_step = args.bs * args.accum * sum(map(len, rows)) / len(trainer.train_dataset)
    plan = trainer._plan
    captured = 0 if trainer._runner is None else trainer._runner.peak_bytes
    peak = max(torch.cuda.max_memory_allocated(), captured)
    median = statistics.median(timer.seconds[args.warmup :])
    return {
        "trainer": True,
        "packing": args.packing,
        "num_rows": len(rows),
        "row_tokens": sum(map(len, rows)),
        "packed_rows": len(trainer.train_dataset),
        "tokens_per_step": round(per_step),
        "step_s": [round(t, 4) for t in timer.seconds],
        "step_s_median": round(median, 4),
        "tokens_per_s": round(per_step / median, 1),
        "first_step_s": round(timer.seconds[0], 2),
        "losses": [round(entry["loss"], 5) for entry in history],
        "grad_norms": [round(float(entry["grad_norm"]), 5) for entry in history],
        "peak_alloc_gb": round(peak / 2**30, 3),
        "peak_bytes": peak,
        "peak_reserved_gb": round(torch.cuda.max_memory_reserved() / 2**30, 3),
        "predicted_peak_gb": round(plan.peak / 2**30, 3),
        "predicted_peak_bytes": plan.peak,
        "predicted_step_s": round(plan.seconds, 4),
        "budget_gb": args.memory_gb or round(card / 2**30, 3),
        "attention": engine.attention_backend(args.seq),
        "typical_length": typical,
        "micro_batch": plan.micro_batch,
        "plan": PlanRecord.of(plan).model_dump(),
        "graphs": 0 if trainer._runner is None else trainer._runner.num_graphs,
    }


def load_adapted(args: argparse.Namespace, path: Path, *, b_std: float = 0.01, seed: int = 7) -> Any:
    """Load a checkpoint with transformers, quantized by --quant, and put adapters on its seven linear layers.

    Args:
        args: quant, rank, alpha, dropout, device.
        path: of the checkpoint.
        b_std: standard deviation of B at the start, 0 as PEFT starts it.
        seed: of the adapters' start.
    """
    settings: dict[str, Any] = {"dtype": torch.float32 if args.quant == "fp32" else torch.bfloat16}
    if args.quant == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16,
        )
    model = AutoModelForCausalLM.from_pretrained(path, device_map={"": torch.device(args.device)}, **settings)
    model.requires_grad_(False)
    lora = LoraConfig(
        r=args.rank,
        lora_alpha=args.alpha or args.rank,
        lora_dropout=args.dropout,
        target_modules=[name for group in GROUPS for name in group],
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, lora)
    adapters = {name[name.index("layers.") :]: p for name, p in model.named_parameters() if "lora_" in name}
    start_adapters(adapters, b_std, seed)
    return model


def sft_arguments(args: argparse.Namespace, **more: Any) -> SFTConfig:
    """Put the command line into TRL's terms; `more` goes over it."""
    settings = {
        "output_dir": "/tmp/bench_out",
        "use_cpu": args.device == "cpu",
        "per_device_train_batch_size": args.bs,
        "gradient_accumulation_steps": args.accum,
        "max_steps": args.steps,
        "learning_rate": args.lr,
        "lr_scheduler_type": "constant",
        "warmup_steps": 0,
        "weight_decay": 0.01,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "max_length": args.seq,
        "packing": args.packing,
        "seed": args.seed,
        "max_grad_norm": args.clip,
        "bf16": args.quant != "fp32",
        "gradient_checkpointing": False,
        "dataset_kwargs": {} if args.rows else {"skip_prepare_dataset": True},
        "disable_tqdm": True,
    }
    return SFTConfig(**(settings | more))
