"""`finemill bench step`: one QLoRA training step, timed, on the checkpoint, batches and adapters of bench_data.py.

Prints one line `BENCH {...}` and writes the same JSON to --json: tokens_per_s (median after warm-up), peak_alloc_gb
(`torch.cuda.max_memory_allocated` after warm-up, GiB), losses, grad_norms, first_step_s, and the plan that ran.
"""

import argparse
import json
import os
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from finemill.kernels.bench.data import ensure_checkpoint, make_batches, start_adapters
from finemill.kernels.bench.runs import (
    PlanRecord,
    Quantiles,
    StepRun,
    add_record_argument,
    environment,
    header,
    record_runs,
)
from finemill.kernels.engine.graphs import GraphRunner
from finemill.kernels.engine.host_memory import free_host_bytes
from finemill.kernels.engine.load import LoraSettings, load_model
from finemill.kernels.engine.model import begin_arena
from finemill.kernels.engine.optimizer import FlatAdamW
from finemill.kernels.engine.plan import LayerShape, Plan
from finemill.kernels.engine.shapes import Shapes
from finemill.kernels.ops.attention import fitting_backend
from finemill.kernels.ops.division import CUDNN_LENGTH
from finemill.kernels.ops.packing import pack_rows
from finemill.kernels.planning.model_shapes import SHAPES, ModelShape
from finemill.kernels.planning.planner import launch_bound, plan_step
from finemill.kernels.planning.rates import rates_of
from finemill.kernels.planning.workload import Workload


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns: exit code."""
    args = _parse(argv)
    record = _settings(args)
    if args.trainer:
        from finemill.kernels.bench.trainer import run_trainer

        record |= run_trainer(args)
    else:
        record |= run(args)
    record |= environment()  # asking nvidia-smi takes time that is not the first step's
    line = json.dumps(record)
    print("BENCH " + line, flush=True)
    if args.json:
        args.json.write_text(line + "\n")
    if args.record:
        record_runs(args.record, [step_run(args, argv, record)])
    return 0


def step_run(args: argparse.Namespace, argv: list[str], record: dict[str, Any]) -> StepRun:
    """Put a record into a line of results."""
    measured = ("tokens_per_step", "tokens_per_s", "peak_bytes", "start_to_first_step_s", "losses")
    planned = ("budget_gb", "attention", "typical_length", "predicted_step_s", "predicted_peak_bytes", "plan")
    return StepRun(
        **header("step", argv),
        kind="trainer" if args.trainer else "step",
        implementation="finemill",
        shape=args.shape,
        quant=args.quant,
        rank=args.rank,
        seq=args.seq,
        rows=args.bs * args.accum,
        memory_gb=args.memory_gb or None,
        step_s=Quantiles.of(record["step_s"][args.warmup :]),
        **{name: record.get(name) for name in (*measured, *planned)},
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finemill bench step", description=__doc__)
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers (0: all)")
    parser.add_argument("--seq", type=int, default=2048, help="tokens per row")
    parser.add_argument("--bs", type=int, default=2, help="rows per micro-batch")
    parser.add_argument(
        "--accum", type=int, default=4, help="micro-batches per optimizer step; merged where memory allows"
    )
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.0, help="lora_alpha (0: same as rank)")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "bf16"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--warmup", type=int, default=4, help="steps left out of the timing")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--clip", type=float, default=1.0, help="gradient-norm clipping")
    parser.add_argument(
        "--memory-gb", type=float, default=0.0, help="device memory to stay within, GiB (0: the card's)"
    )
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--trainer", action="store_true", help="through FastSFTTrainer instead of the bare loop")
    parser.add_argument("--packing", action="store_true", help="--trainer: packing=True")
    parser.add_argument(
        "--rows", type=files, default=[], help="--trainer: chat files, comma separated, for row lengths"
    )
    parser.add_argument("--num-rows", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=3407)
    parser.add_argument("--eager", action="store_true", help="launch kernel by kernel instead of by CUDA graph")
    parser.add_argument("--json", type=Path, default=None, help="file to write the result to")
    add_record_argument(parser)
    args = parser.parse_args(argv)
    if args.record and args.layers:
        parser.error("--record keeps what whole models did: leave --layers out")
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} must be smaller than --steps {args.steps}")
    if args.trainer and args.device == "cpu":
        parser.error("--trainer is timed on a GPU: leave --device cpu out")
    check_device(parser, args.device)
    return args


def check_device(parser: argparse.ArgumentParser, device: str) -> None:
    """End with a usage error where the device is not there."""
    if device == "cuda" and not torch.cuda.is_available():
        parser.error("no CUDA device is visible to torch: run it where there is an NVIDIA GPU, or with --device cpu")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Load, train, time. Returns: the record."""
    started = _process_start()
    device = torch.device("cuda", 0) if args.device == "cuda" else torch.device("cpu")
    shape = SHAPES[args.shape]
    made = time.time()
    path = ensure_checkpoint(args.shape, args.layers, device)
    made = time.time() - made
    budget = budget_bytes(args)
    plan = make_plan(args, shape, budget)
    lora = LoraSettings(args.rank, args.alpha or args.rank, args.dropout)
    loading = time.time()
    arena = begin_arena(plan, device)
    model, parameters = load_model(
        path, device=device, quantize=args.quant == "nf4", lora=lora, embedding_on_host=plan.embedding_on_host
    )
    start_adapters(parameters)
    model.arena = arena
    model.apply_plan(plan)
    _sync(device)
    loading = time.time() - loading
    static = _allocated(device)

    sets = make_batches(shape.vocabulary, args.seq, args.bs, args.accum, 2)
    tokens = args.bs * args.accum * args.seq
    pieces = max(1, tokens // (plan.micro_batch or tokens))
    steps = [torch.cat(batches).chunk(pieces) for batches in sets]
    graphed = device.type == "cuda" and not args.eager
    runner = GraphRunner(model, patience=0 if launch_bound(plan, workload(args, shape)) else 1) if graphed else None
    shapes = Shapes()
    packed = [[shapes.prepare(pack_rows(rows, rows)).to(device) for rows in step] for step in steps]
    optimizer = FlatAdamW(
        model.adapters, lr=args.lr, weight_decay=0.01, max_norm=args.clip, bits=8 if plan.eight_bit else 32
    )
    scale = 1.0 / (args.bs * args.accum * (args.seq - 1))
    times, losses, norms, first_end = [], [], [], 0.0
    for step in range(args.steps):
        if step == args.warmup:
            _reset_peak(device)
        _sync(device)
        begin = time.perf_counter()
        total = None
        for batch in packed[step % len(packed)]:
            result = (runner or model).loss_and_grad(batch, scale)
            total = result.loss.clone() if total is None else total + result.loss
        norm = optimizer.step()
        _sync(device)
        times.append(time.perf_counter() - begin)
        assert total is not None
        losses.append(float(total) * scale)
        norms.append(float(norm[0]))
        first_end = first_end or time.time()
        print(f"step {step}: {times[-1]:.4f} s, loss {losses[-1]:.5f}, grad norm {norms[-1]:.5f}", flush=True)
    median = statistics.median(times[args.warmup :])
    peak = max(_peak(device), runner.peak_bytes if runner else 0)
    return {
        "checkpoint_gen_s": round(made, 1),
        "load_s": round(loading, 2),
        "static_gb": round(static / 2**30, 3),
        "tokens_per_step": tokens,
        "step_s": [round(t, 4) for t in times],
        "step_s_median": round(median, 4),
        "step_s_min": round(min(times[args.warmup :]), 4),
        "tokens_per_s": round(tokens / median, 1),
        "first_step_s": round(times[0], 2),
        "start_to_first_step_s": round(first_end - started - made, 2),
        "losses": [round(x, 5) for x in losses],
        "grad_norms": [round(x, 5) for x in norms],
        "peak_alloc_gb": round(peak / 2**30, 3),
        "peak_bytes": peak,
        "peak_reserved_gb": round(_peak_reserved(device) / 2**30, 3),
        "predicted_peak_gb": round(plan.peak / 2**30, 3),
        "predicted_peak_bytes": plan.peak,
        "predicted_step_s": round(plan.seconds, 4),
        "budget_gb": round(budget / 2**30, 3),
        "attention": fitting_backend(device, torch.bfloat16, shape.head_dim, args.seq),
        "plan": PlanRecord.of(plan).model_dump(),
    }


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    names = ("shape", "layers", "quant", "seq", "bs", "accum", "rank", "memory_gb")
    settings = {name: getattr(args, name) for name in names}
    return {"kind": "step", "impl": "finemill"} | settings


def files(text: str) -> list[Path]:
    """Split a comma-separated list of files."""
    return [Path(name) for name in text.split(",")]


def workload(args: argparse.Namespace, shape: ModelShape) -> Workload:
    """Describe the step to the planner."""
    attention = fitting_backend(torch.device(args.device), torch.bfloat16, shape.head_dim, args.seq)
    layer = LayerShape(shape.hidden, shape.intermediate, shape.heads, shape.kv_heads, shape.head_dim, shape.eps)
    return Workload(
        shape=layer,
        num_layers=args.layers or shape.layers,
        vocabulary=shape.vocabulary,
        tied=shape.tied,
        rank=args.rank,
        quantized=args.quant == "nf4",
        tokens=args.bs * args.accum * args.seq,
        row=args.seq,
        fa4=attention == "fa4",
        flash=attention == "flash" and args.seq > CUDNN_LENGTH,
    )


def budget_bytes(args: argparse.Namespace) -> int:
    """Memory to plan with: --memory-gb, or what the card has free."""
    if args.memory_gb:
        return int(args.memory_gb * 2**30)
    return int(torch.cuda.mem_get_info()[0] * 0.95) if args.device == "cuda" else 8 << 30


def make_plan(args: argparse.Namespace, shape: ModelShape, budget: int) -> Plan:
    """Plan a step."""
    cuda = args.device == "cuda"
    rates = rates_of(torch.cuda.get_device_name() if cuda else "")
    host = free_host_bytes() if cuda else None
    return plan_step(workload(args, shape), budget, rates=rates, allow_host=cuda, allow_stream=cuda, host=host)


def _process_start() -> float:
    """Unix time at which this process was started, from /proc."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    uptime = float(Path("/proc/uptime").read_text().split()[0])
    return time.time() - uptime + ticks / os.sysconf("SC_CLK_TCK")


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _peak_reserved(device: torch.device) -> int:
    return torch.cuda.max_memory_reserved(device) if device.type == "cuda" else 0
