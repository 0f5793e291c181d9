"""`finemill bench scale`: one training on several GPUs by strategy: tokens/s, memory of each, losses, waiting.

Every run trains the same rows, as many per step in all, from the same random checkpoint, so that losses compare from
one GPU to eight and from strategy to strategy. `ddp` and `shard` are on finemill's kernels, the others on the plain
path; `--reference` adds the same training by Accelerate and DeepSpeed alone, with the same recomputation. A run is a
group of processes of its own, and ends with a line `BENCH {...}`. `--profile` writes where the time of a step goes, on
the GPU and in Python, so that two runs can be laid side by side.
"""

import argparse
import json
import os
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from finemill.commands.parser import CommandParser
from finemill.kernels.bench.data import ensure_checkpoint
from finemill.kernels.bench.runs import Quantiles, ScaleRun, add_record_argument, header, record_runs
from finemill.kernels.bench.step import check_device
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.models.bitsandbytes_import import import_bitsandbytes
from finemill.runtime.processes import run_in_processes

STRATEGIES = ("ddp", "shard", "fsdp2", "zero2", "zero3")
ON_KERNELS = ("ddp", "shard")
RESULT_VARIABLE = "FINEMILL_BENCH_SCALE_RESULT"
"""Names the file that the main process of a run writes its measurements to."""


def main(argv: list[str]) -> int:
    """Run the benchmark. Returns: exit code."""
    args = _parse(argv)
    if RESULT_VARIABLE in os.environ:
        import_bitsandbytes()
        from finemill.commands.bench_scale_run import measure

        measure(args)
        return 0
    ensure_checkpoint(args.shape, args.layers, torch.device(args.device))
    runs: list[ScaleRun] = []
    for implementation in ("finemill", "reference") if args.reference else ("finemill",):
        for strategy in args.strategy:
            for gpus in args.gpus:
                if implementation == "reference" and strategy in ON_KERNELS:
                    continue
                run = _run(args, argv, implementation, strategy, gpus)
                print("BENCH " + json.dumps(run.model_dump(mode="json")), flush=True)
                runs.append(run)
    print(table(runs))
    if args.record:
        record_runs(args.record, runs)
    return 0


def _run(args: argparse.Namespace, argv: list[str], implementation: str, strategy: str, gpus: int) -> ScaleRun:
    """One group of processes, on the first GPUs. Returns: what it measured."""
    with TemporaryDirectory(prefix="finemill-scale-") as folder:
        result = Path(folder, "result.json")
        os.environ[RESULT_VARIABLE] = str(result)
        if args.device == "cuda":
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, range(gpus)))
        one = [*argv, "--strategy", strategy, "--gpus", str(gpus), "--implementation", implementation]
        try:
            run_in_processes(["bench", "scale", *one], gpus)
        finally:
            del os.environ[RESULT_VARIABLE]
        measured = json.loads(result.read_text(encoding="utf-8"))
    seconds = measured.pop("step_s")
    step_s = Quantiles.of(seconds[args.warmup :])
    return ScaleRun(
        **header("scale", argv),
        kind="scale",
        implementation=implementation,
        shape=args.shape,
        layers=args.layers,
        method=args.method,
        strategy=strategy,
        context_parallel=gpus if args.context_parallel else 1,
        offload=args.offload,
        processes=gpus,
        seq=args.seq,
        rows=args.rows,
        memory_gb=args.memory_gb,
        tokens_per_s=round(args.rows * args.seq / step_s.p50, 1),
        step_s=step_s,
        **measured,
    )


def table(runs: list[ScaleRun]) -> str:
    """The runs side by side; linear is the speed of the fewest GPUs times as many."""
    lines = ["implementation  strategy  GPUs     tok/s  of linear  GiB per GPU  waiting    idle    loss"]
    for run in runs:
        like = (other for other in runs if (other.implementation, other.strategy) == (run.implementation, run.strategy))
        first = min(like, key=lambda other: other.processes)
        linear = first.tokens_per_s / first.processes * run.processes
        waiting, idle = ("-" if share is None else f"{share:.1%}" for share in (run.waiting, run.idle))
        peak = max(run.peak_bytes) / 2**30
        lines.append(
            f"{run.implementation:<15} {run.strategy:<9} {run.processes:>4} {run.tokens_per_s:>9,.0f} "
            f"{run.tokens_per_s / linear:>10.1%} {peak:>12.2f} {waiting:>8} {idle:>7} "
            f"{run.losses[-1]:>7.4f}"
        )
    return "\n".join(lines)


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog="finemill bench scale", description=__doc__)
    parser.add_argument("--gpus", type=_counts, default=[1, 2], help="numbers of GPUs, comma separated")
    parser.add_argument("--strategy", type=_strategies, default=["ddp"], help=f"of {', '.join(STRATEGIES)}")
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--layers", type=int, default=0, help="cut the model to this many layers (0: all)")
    parser.add_argument("--method", default="qlora", choices=["qlora", "lora", "full"])
    parser.add_argument("--offload", action="store_true", help="shards wait in host memory")
    parser.add_argument("--recompute", default="auto", choices=["auto", "on", "off"], help="gradient_checkpointing")
    parser.add_argument("--context-parallel", action="store_true", help="the GPUs share each row, one after the other")
    parser.add_argument("--seq", type=int, default=2048, help="tokens per row")
    parser.add_argument("--bs", type=int, default=2, help="rows per GPU and forward pass")
    parser.add_argument("--rows", type=int, default=16, help="rows per optimizer step in all GPUs together")
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--warmup", type=int, default=3, help="steps left out of the timing")
    parser.add_argument("--memory-gb", type=float, help="memory of a GPU to stay within, GiB")
    parser.add_argument("--reference", action="store_true", help="the same by Accelerate and DeepSpeed alone, too")
    parser.add_argument("--profile", type=Path, help="folder for a table per run: kernels, and Python's functions")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument(
        "--implementation", default="finemill", choices=["finemill", "reference"], help=argparse.SUPPRESS
    )
    add_record_argument(parser)
    args = parser.parse_args(argv)
    check_device(parser, args.device)
    uneven = [gpus for gpus in args.gpus if args.rows % (args.bs * (1 if args.context_parallel else gpus))]
    if uneven:
        parser.error(f"--rows {args.rows} cannot be shared by {uneven[0]} GPUs with --bs {args.bs}: make it a multiple")
    if args.device == "cuda" and max(args.gpus) > torch.cuda.device_count():
        parser.error(f"--gpus {max(args.gpus)}: {torch.cuda.device_count()} are visible")
    if args.warmup >= args.steps:
        parser.error(f"--warmup {args.warmup} must be smaller than --steps {args.steps}")
    return args


def _counts(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def _strategies(text: str) -> list[str]:
    names = text.split(",")
    if unknown := sorted(set(names) - set(STRATEGIES)):
        raise argparse.ArgumentTypeError(f"'{unknown[0]}' is none of {', '.join(STRATEGIES)}")
    return names
