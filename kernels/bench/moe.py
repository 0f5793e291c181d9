"""`finemill bench moe`: a training step of a mixture of experts, timed, and the tiles of its grouped products.

    finemill bench moe step    Qwen3-30B-A3B's widths, random weights, 8 rows of 2048, LoRA on attention and experts
    finemill bench moe tiles   every product of a layer with every candidate of tile sizes
    finemill bench moe losses  a short training's losses, on the engine and by transformers (moe_losses.py)

Prints JSON lines. The checkpoint's weights, the batches, the optimizer and its settings are those of a transformers +
PEFT step on the same folder, so that first losses agree: adapters start with B = 0.
"""

import argparse
import json
import math
import statistics
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import triton
from safetensors.torch import save_file
from torch import Tensor

from finemill.kernels.bench.case import rand
from finemill.kernels.bench.runs import MixtureRun, Quantiles, add_record_argument, environment, header, record_runs
from finemill.kernels.bench.step import check_device
from finemill.kernels.engine.graphs import GraphRunner
from finemill.kernels.engine.load import LoraSettings, load_model
from finemill.kernels.engine.model import FastModel
from finemill.kernels.engine.optimizer import FlatAdamW
from finemill.kernels.engine.plan import Level, Plan
from finemill.kernels.engine.shapes import Shapes
from finemill.kernels.ops.expert_rows import ExpertRows, sort_by_expert
from finemill.kernels.ops.grouped_gemm import Tile, grouped_gemm
from finemill.kernels.ops.packing import PackedBatch, pack_rows
from finemill.kernels.planning.from_config import workload_of_config
from finemill.kernels.planning.model_shapes import MIXTURES
from finemill.kernels.planning.planner import peak_bytes, plan_step, step_seconds, workload_under
from finemill.kernels.planning.rates import rates_of

HIDDEN, INTERMEDIATE, EXPERTS, PER_TOKEN = 2048, 768, 128, 8
HEADS, KV_HEADS, HEAD_DIM, VOCABULARY = 32, 4, 128, 151936
FOLDER = Path("/dev/shm")
SKEW = 1.82
"""Factor of one expert's row of the router that makes it one of a token's eight of 128 for a fifth of all tokens."""

TILES = {
    128: (
        Tile(256, 64, 8, 3, 1),
        Tile(256, 64, 8, 3, 1, flatten=False),
        Tile(128, 64, 8, 4, 1),
        Tile(128, 64, 4, 4, 1),
        Tile(128, 64, 4, 2, 2, flatten=False),
        Tile(128, 128, 8, 2, 1),
    ),
    64: (Tile(256, 64, 4, 3, 1), Tile(256, 64, 4, 2, 2, flatten=False), Tile(128, 64, 4, 4, 2), Tile(128, 64, 4, 3, 2)),
}
"""Candidates by rows of a block."""


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns: exit code."""
    parser = make_parser()
    args = parser.parse_args(argv)
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} must be smaller than --steps {args.steps}")
    if args.what != "losses" and args.rows % args.micro_rows:
        parser.error(f"--rows {args.rows} must be a multiple of --micro-rows {args.micro_rows}")
    if args.stream and args.quant != "nf4":
        parser.error("--stream: only NF4 weights are streamed")
    check_device(parser, args.device)
    if args.what == "tiles":
        measure_tiles(args)
    elif args.what == "losses":
        from finemill.kernels.bench.moe_losses import measure_losses

        return measure_losses(args, argv, ensure_checkpoint(args.folder, args.layers, torch.device(args.device)))
    else:
        record = run_step(args)
        print("BENCH " + json.dumps(record | environment()), flush=True)
        if args.record:
            record_runs(args.record, [_mixture_run(args, argv, record)])
    return 0


def make_parser() -> argparse.ArgumentParser:
    """What the command line takes."""
    parser = argparse.ArgumentParser(prog="finemill bench moe", description=__doc__)
    parser.add_argument("what", choices=["step", "tiles", "losses"])
    parser.add_argument("--layers", type=int, default=12, help="of Qwen3-30B-A3B's 48")
    parser.add_argument("--rows", type=int, default=8, help="per optimizer step")
    parser.add_argument("--seq", type=int, default=2048, help="tokens per row")
    parser.add_argument("--micro-rows", type=int, default=8, help="rows per micro-batch")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--quant", default="nf4", choices=["nf4", "bf16"])
    parser.add_argument("--level", default="GATE_UP", choices=[level.name for level in Level], help="what layers keep")
    parser.add_argument("--cached", type=int, default=0, help="leading layers whose decoded weights are kept")
    parser.add_argument("--head-chunk", type=int, default=1024, help="rows of logits at a time")
    parser.add_argument("--eight-bit", action="store_true", help="8-bit optimizer states")
    parser.add_argument("--stream", action="store_true", help="NF4 weights wait in host memory")
    parser.add_argument("--memory-gb", type=float, help="let the planner choose all of that within so many GiB")
    parser.add_argument("--skew", action="store_true", help="one expert takes a fifth of all tokens")
    parser.add_argument("--eager", action="store_true", help="launch kernel by kernel instead of by CUDA graph")
    parser.add_argument("--profile", action="store_true", help="list the kernels of one eager step by time")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps left out of the timing")
    parser.add_argument("--sets", type=int, default=4, help="losses: batches that are repeated in turn")
    parser.add_argument("--seeds", type=int, default=3, help="losses: of adapters and batches")
    parser.add_argument("--lr", type=float, default=5e-4)
    parser.add_argument("--folder", type=Path, default=FOLDER, help="where the checkpoint is found or made")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    add_record_argument(parser)
    return parser


def run_step(args: argparse.Namespace) -> dict[str, Any]:
    """Load, train, time. Returns: the record."""
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    started = time.time()
    path = ensure_checkpoint(args.folder, args.layers, device)
    made = time.time()
    torch.manual_seed(7)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    lora = LoraSettings(args.rank, args.rank)
    plan = make_plan(args, torch.cuda.get_device_name() if device.type == "cuda" else "")
    model, _ = load_model(
        path,
        device=device,
        dtype=dtype,
        quantize=args.quant == "nf4",
        lora=lora,
        embedding_on_host=plan.embedding_on_host,
    )
    model.apply_plan(plan)
    if args.skew:
        for layer in model.layers:
            layer.mlp.router[0] *= SKEW  # type: ignore[union-attr]
    _sync(device)
    loaded = time.time()
    optimizer = FlatAdamW(model.adapters, lr=args.lr, weight_decay=0.01, max_norm=1.0, bits=8 if plan.eight_bit else 32)
    static = torch.cuda.memory_allocated() if device.type == "cuda" else 0
    runner = None if args.eager or device.type == "cpu" else GraphRunner(model, patience=1)
    generator, shapes, scale = torch.Generator().manual_seed(9), Shapes(), 1.0 / (args.rows * (args.seq - 1))
    times, losses, norms = [], [], []
    for step in range(args.steps):
        batches = next_batches(args, plan, generator, shapes, device)
        if step == args.warmup and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        _sync(device)
        begin = time.perf_counter()
        total = torch.zeros((), device=device)
        for batch in batches:
            total += (runner or model).loss_and_grad(batch, scale).loss
        norm = optimizer.step()
        _sync(device)
        times.append(time.perf_counter() - begin)
        losses.append(round(float(total) * scale, 4))
        norms.append(round(float(norm[0]), 4))
        print(f"step {step}: {times[-1]:.4f} s, loss {losses[-1]}, grad norm {norms[-1]}", flush=True)
    if args.profile and device.type == "cuda":
        profile_step(model, next_batches(args, plan, generator, shapes, device), scale)
    median = statistics.median(times[args.warmup :])
    peak = 0
    if device.type == "cuda":
        peak = max(torch.cuda.max_memory_allocated(), runner.peak_bytes if runner else 0)
    names = ["layers", "rows", "seq", "rank", "quant", "skew", "memory_gb"]
    if args.memory_gb is None:
        names += ["micro_rows", "level", "cached", "eight_bit", "stream"]
    else:
        print(f"plan: {plan}", flush=True)
    return (
        {"kind": "moe-step", "impl": "finemill"}
        | {name: getattr(args, name) for name in (*names, "eager")}
        | {
            "tok_s": round(args.rows * args.seq / median),
            "step_s": round(median, 4),
            "times": [round(t, 4) for t in times],
            "peak_gib": round(peak / 2**30, 2),
            "predicted_gib": round(plan.peak / 2**30, 2),
            "predicted_s": round(plan.seconds, 4),
            "static_gib": round(static / 2**30, 2),
            "losses": losses,
            "grad_norms": norms,
            "trainable_m": round(model.adapters.master.numel() / 1e6, 1),
            "checkpoint_s": round(made - started, 1),
            "load_s": round(loaded - made, 1),
        }
    )


def make_plan(args: argparse.Namespace, gpu: str) -> Plan:
    """The plan that the arguments spell, with what the planner predicts of it on a card, or the planner's own."""
    work = workload_of_config(
        configuration(args.layers),
        rank=args.rank,
        quantized=args.quant == "nf4",
        tokens=args.rows * args.seq,
        row=args.seq,
    )
    rates = rates_of(gpu)
    if args.memory_gb is not None:
        return plan_step(work, int(args.memory_gb * 2**30), rates=rates, allow_stream=args.quant == "nf4")
    plan = Plan(
        (Level[args.level],) * args.layers,
        (None,) * args.layers,
        args.cached,
        args.head_chunk,
        work.host_bytes_per_token(),
        micro_batch=args.micro_rows * args.seq,
        eight_bit=args.eight_bit,
        stream_weights=args.stream,
    )
    work = workload_under(work, plan)
    return replace(plan, peak=peak_bytes(work, plan), seconds=step_seconds(work, rates, plan))


def _mixture_run(args: argparse.Namespace, argv: list[str], record: dict[str, Any]) -> MixtureRun:
    """Put a record into a line of results."""
    same = ("layers", "quant", "rank", "seq", "rows", "skew", "losses")
    return MixtureRun(
        **header("moe", argv),
        kind="mixture",
        implementation="finemill",
        tokens_per_s=record["tok_s"],
        step_s=Quantiles.of(record["times"][args.warmup :]),
        peak_bytes=round(record["peak_gib"] * 2**30),
        **{name: record[name] for name in same},
    )


def next_batches(
    args: argparse.Namespace, plan: Plan, generator: torch.Generator, shapes: Shapes, device: torch.device
) -> list[PackedBatch]:
    """Draw an optimizer step's rows, as a step of two micro-batches would, and pack them into micro-batches."""
    half = max(1, args.rows // 2)
    drawn = [torch.randint(0, VOCABULARY - 16, (half, args.seq), generator=generator) for _ in range(args.rows // half)]
    rows = torch.cat(drawn)
    pieces = rows.split((plan.micro_batch or len(rows) * args.seq) // args.seq)
    return [shapes.prepare(pack_rows(piece, piece)).to(device) for piece in pieces]


def profile_step(model: FastModel, batches: list[PackedBatch], scale: float) -> None:
    """Print the device time of one eager step by kernel."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        for batch in batches:
            model.loss_and_grad(batch, scale)
        torch.cuda.synchronize()
    rows = sorted(profile.key_averages(), key=lambda row: -row.device_time_total)
    total = sum(row.device_time_total for row in rows)
    print(json.dumps({"kind": "moe-profile", "device_ms": round(total / 1e3, 2)}))
    for row in rows[:45]:
        print(json.dumps({"ms": round(row.device_time_total / 1e3, 3), "calls": row.count, "kernel": row.key[:90]}))


def measure_tiles(args: argparse.Namespace) -> None:
    """Time the four products of a layer with every candidate, against torch's own grouped product."""
    device, dtype, tokens = torch.device("cuda"), torch.bfloat16, args.micro_rows * args.seq
    shapes = {"gate_up": (2 * INTERMEDIATE, HIDDEN), "down": (HIDDEN, INTERMEDIATE)}
    torch.manual_seed(0)
    experts = torch.rand(tokens, EXPERTS, device=device).topk(PER_TOKEN).indices.int()
    for block, tiles in TILES.items():
        rows = sort_by_expert(experts, EXPERTS, block)
        for name, (n, k) in shapes.items():
            weight = rand(device, dtype, EXPERTS, n, k)
            for transposed in (False, True):
                inputs, outputs = (n, k) if transposed else (k, n)
                x, low = rand(device, dtype, rows.num_rows, inputs), rand(device, dtype, rows.num_rows, args.rank)
                factor = rand(device, dtype, EXPERTS, *((args.rank, k) if transposed else (n, args.rank)))
                out = torch.empty((rows.num_rows, outputs), dtype=dtype, device=device)
                head = {"kind": "moe-tile", "block": block, "product": name, "transposed": transposed}
                flops = 2 * tokens * PER_TOKEN * n * k
                for tile in tiles:
                    print(
                        json.dumps(
                            head
                            | {"tile": list(tile)}
                            | _time_tile(x, weight, rows, out, low, factor, transposed, tile, flops)
                        ),
                        flush=True,
                    )
                if block == 128:
                    dense = weight if transposed else weight.transpose(1, 2)
                    ms = _milliseconds(
                        lambda x=x, dense=dense, ends=rows.starts[1:]: torch._grouped_mm(x, dense, offs=ends)
                    )
                    print(
                        json.dumps(
                            head
                            | {"tile": "torch._grouped_mm, no LoRA", "ms": ms, "tflops": round(flops / ms / 1e9, 1)}
                        ),
                        flush=True,
                    )


def _time_tile(
    x: Tensor,
    weight: Tensor,
    rows: ExpertRows,
    out: Tensor,
    low: Tensor,
    factor: Tensor,
    transposed: bool,
    tile: Tile,
    flops: int,
) -> dict[str, Any]:
    try:
        ms = _milliseconds(lambda: grouped_gemm(x, weight, rows, out, low, factor, transposed=transposed, tile=tile))
    except Exception as error:  # a candidate that the compiler refuses must not end the others' run
        return {"error": str(error)[:200]}
    return {"ms": ms, "tflops": round(flops / ms / 1e9, 1)}


def _milliseconds(call: Any) -> float:
    return round(float(triton.testing.do_bench(call, warmup=30, rep=80, return_mode="median")), 4)


def ensure_checkpoint(folder: Path, layers: int, device: torch.device) -> Path:
    """Find or make the random checkpoint of so many layers."""
    path = folder / f"moe-L{layers}"
    if (path / "DONE").exists():
        return path
    path.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator(device=device).manual_seed(1)

    def draw(*shape: int) -> Tensor:
        return torch.empty(shape, dtype=torch.bfloat16, device=device).normal_(0, 0.02, generator=generator).cpu()

    def ones(size: int) -> Tensor:
        return torch.ones(size, dtype=torch.bfloat16)

    files: dict[str, str] = {}

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        name = f"model-{number:05d}.safetensors"
        save_file(tensors, path / name, metadata={"format": "pt"})
        files.update(dict.fromkeys(tensors, name))

    tables = {"model.embed_tokens.weight": draw(VOCABULARY, HIDDEN), "lm_head.weight": draw(VOCABULARY, HIDDEN)}
    write(1, tables | {"model.norm.weight": ones(HIDDEN)})
    for layer in range(layers):
        tensors = {
            "self_attn.q_proj.weight": draw(HEADS * HEAD_DIM, HIDDEN),
            "self_attn.k_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.v_proj.weight": draw(KV_HEADS * HEAD_DIM, HIDDEN),
            "self_attn.o_proj.weight": draw(HIDDEN, HEADS * HEAD_DIM),
            "self_attn.q_norm.weight": ones(HEAD_DIM),
            "self_attn.k_norm.weight": ones(HEAD_DIM),
            "input_layernorm.weight": ones(HIDDEN),
            "post_attention_layernorm.weight": ones(HIDDEN),
            "mlp.gate.weight": draw(EXPERTS, HIDDEN),
        }
        for expert in range(EXPERTS):
            prefix = f"mlp.experts.{expert}"
            tensors |= {
                f"{prefix}.gate_proj.weight": draw(INTERMEDIATE, HIDDEN),
                f"{prefix}.up_proj.weight": draw(INTERMEDIATE, HIDDEN),
                f"{prefix}.down_proj.weight": draw(HIDDEN, INTERMEDIATE),
            }
        write(layer + 2, {f"model.layers.{layer}.{name}": tensor for name, tensor in tensors.items()})
    index = {"metadata": {}, "weight_map": files}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text(json.dumps(configuration(layers)))
    (path / "DONE").write_text("ok")
    return path


def configuration(layers: int) -> dict[str, Any]:
    """config.json of Qwen3-30B-A3B with so many layers."""
    return MIXTURES["qwen3-30b-a3b"] | {
        "architectures": ["Qwen3MoeForCausalLM"],
        "num_hidden_layers": layers,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "hidden_act": "silu",
        "attention_bias": False,
        "torch_dtype": "bfloat16",
        "initializer_range": 1 / math.sqrt(2500),
    }


def _sync(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
