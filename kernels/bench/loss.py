"""`finemill bench loss`: training losses of FastSFTTrainer against TRL's SFTTrainer as it is, over several seeds.

Every run sees the same rows in the same order. A seed chooses the adapters' start and, with --dropout, the masks; so
what differs between two seeds of Hugging Face is the trajectory, not the batches. Over steps t and seeds s, with ours
o[s,t] and theirs h[s,t]:

    step difference  d[s] = mean_t |o[s,t] - h[s,t]|         step spread  min over pairs  mean_t |h[s,t] - h[s',t]|
    end difference   e[s] = |mean o[s,-50:] - mean h[s,-50:]|     end spread  max_s - min_s of mean h[s,-50:]

The verdict is "inside the seed spread" if every d[s] is below the step spread and every e[s] below the end spread.
Prints a table and one line `BENCH {...}`; --json has every loss, and is written anew after each run.
"""

import argparse
import gc
import json
import time
from itertools import combinations
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from datasets import Dataset
from transformers import AutoTokenizer, PrinterCallback
from trl import SFTTrainer

from finemill.errors import UserError
from finemill.kernels.bench.data import chat_rows, ensure_checkpoint
from finemill.kernels.bench.runs import LossRun, add_record_argument, environment, header, record_runs
from finemill.kernels.bench.step import check_device, files
from finemill.kernels.bench.trainer import load_adapted, sft_arguments
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.kernels.trainer import FastSFTTrainer

END = 50
"""Last steps whose mean loss is compared."""
Losses = dict[str, dict[str, list[float]]]
"""Implementation -> seed -> loss of each step."""


def main(argv: list[str]) -> int:
    """Train every seed twice and compare. Returns: 0 inside the seed spread, 1 outside."""
    args = _parse(argv)
    path = args.model or ensure_checkpoint(args.shape, args.layers, torch.device(args.device))
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer or path)
    rows = chat_rows(args.rows, tokenizer, args.num_rows, args.seq)
    losses: Losses = {}
    record = _settings(args) | environment() | {"num_rows": len(rows), "losses": losses, "seconds": []}
    for seed in args.seeds:
        for name, trainer_class in (("hf", SFTTrainer), ("finemill", FastSFTTrainer)):
            begin = time.perf_counter()
            losses.setdefault(name, {})[str(seed)] = _train(args, trainer_class, path, tokenizer, rows, seed)
            record["seconds"].append(round(time.perf_counter() - begin, 1))
            print(f"{name}, seed {seed}: {record['seconds'][-1]} s", flush=True)
            _write(args.json, record)
    record |= compare(losses)
    print(table(record))
    print("BENCH " + json.dumps({name: value for name, value in record.items() if name != "losses"}), flush=True)
    _write(args.json, record)
    if args.record:
        record_runs(args.record, [loss_run(args, argv, record)])
    return 0 if record["inside"] else 1


def loss_run(args: argparse.Namespace, argv: list[str], record: dict[str, Any]) -> LossRun:
    """Put a record into a line of results."""
    names = ("by_seed", "step_spread", "end_spread", "inside")
    return LossRun(
        **header("loss", argv),
        kind="loss",
        shape=args.shape or args.model.name,
        steps=args.steps,
        rows=args.bs * args.accum,
        **{name: record[name] for name in names},
    )


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finemill bench loss", description=__doc__)
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--model", type=Path, help="folder of a checkpoint with its tokenizer")
    source.add_argument("--shape", choices=sorted(SHAPES), help="a random checkpoint of this shape instead")
    parser.add_argument("--layers", type=int, default=0, help="--shape: cut to this many layers (0: all)")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of another tokenizer, of no more tokens than the model's"
    )
    parser.add_argument(
        "--rows", type=files, required=True, help="chat files (.parquet, .json, .jsonl), comma separated"
    )
    parser.add_argument("--num-rows", type=int, default=10_000)
    parser.add_argument("--seq", type=int, default=1024, help="tokens that rows are cut to")
    parser.add_argument("--bs", type=int, default=8, help="rows per micro-batch")
    parser.add_argument("--accum", type=int, default=1, help="micro-batches per optimizer step")
    parser.add_argument("--packing", action="store_true")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--alpha", type=float, default=0.0, help="lora_alpha (0: same as rank)")
    parser.add_argument("--dropout", type=float, default=0.0, help="lora_dropout")
    parser.add_argument(
        "--fp32-adapters",
        action="store_true",
        help="keep Hugging Face's adapters in float32, as ours; on a 4-bit base TRL makes them bfloat16",
    )
    parser.add_argument("--quant", default="nf4", choices=["nf4", "bf16", "fp32"])
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--seeds", type=_seeds, default=[1, 2, 3], help="comma separated, two at least")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--clip", type=float, default=1.0, help="gradient-norm clipping")
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--json", type=Path, default=None, help="file to write the result to")
    add_record_argument(parser)
    args = parser.parse_args(argv)
    check_device(parser, args.device)
    return args


def _seeds(text: str) -> list[int]:
    seeds = [int(part) for part in text.split(",")]
    if len(set(seeds)) < 2:
        raise argparse.ArgumentTypeError("a spread needs two seeds at least")
    return seeds


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    plain = {name: value for name, value in vars(args).items() if isinstance(value, int | float | str | list)}
    return {"kind": "loss", **plain, "model": args.shape or args.model.name, "rows": [file.name for file in args.rows]}


def _train(
    args: argparse.Namespace, trainer_class: Any, path: Path, tokenizer: Any, rows: list[Any], seed: int
) -> list[float]:
    """Train one seed. Returns: the loss of every step."""
    args.seed = seed
    more = {"data_seed": 0, "dataset_kwargs": {"skip_prepare_dataset": not args.packing}}
    torch.manual_seed(seed)
    trainer = trainer_class(
        model=load_adapted(args, path, b_std=0.0, seed=seed),
        args=sft_arguments(args, **more),
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
    )
    if trainer_class is FastSFTTrainer and not trainer.fast:
        raise UserError(f"the engine does not run this model: {trainer.acceleration.reason}")
    trainer.remove_callback(PrinterCallback)
    if args.fp32_adapters and trainer_class is SFTTrainer:
        for parameter in trainer.model.parameters():
            if parameter.requires_grad:
                parameter.data = parameter.data.float()
    trainer.train()
    losses = [float(entry["loss"]) for entry in trainer.state.log_history if "loss" in entry]
    del trainer
    gc.collect()
    if args.device == "cuda":
        torch.cuda.empty_cache()
    return losses


def compare(losses: Losses) -> dict[str, Any]:
    """Evaluate the formulas in the header. Returns: by seed, the spreads, and whether all differences lie inside."""
    ours, theirs = losses["finemill"], losses["hf"]

    def distance(left: list[float], right: list[float]) -> float:
        return fmean(abs(a - b) for a, b in zip(left, right, strict=True))

    ends = {seed: (fmean(ours[seed][-END:]), fmean(theirs[seed][-END:])) for seed in theirs}
    step_spread = min(distance(theirs[a], theirs[b]) for a, b in combinations(theirs, 2))
    end_spread = max(end for _, end in ends.values()) - min(end for _, end in ends.values())
    by_seed = {
        seed: {
            "end_ours": ends[seed][0],
            "end_hf": ends[seed][1],
            "step_difference": distance(ours[seed], theirs[seed]),
            "end_difference": abs(ends[seed][0] - ends[seed][1]),
        }
        for seed in theirs
    }
    # A comparison with NaN is false: a diverged run is outside.
    inside = all(
        row["step_difference"] < step_spread and row["end_difference"] < end_spread for row in by_seed.values()
    )
    return {"by_seed": by_seed, "step_spread": step_spread, "end_spread": end_spread, "inside": inside}


def table(record: dict[str, Any]) -> str:
    """Lay the comparison out as a table of Markdown."""
    names = ("end_hf", "end_ours", "end_difference", "step_difference")
    lines = [f"| seed | {' | '.join(names)} |", "| --- " * (len(names) + 1) + "|"]
    for seed, row in record["by_seed"].items():
        lines.append(f"| {seed} | {' | '.join(f'{row[name]:.5f}' for name in names)} |")
    lines.append(f"| spread over HF's seeds | | | {record['end_spread']:.5f} | {record['step_spread']:.5f} |")
    return "\n".join([*lines, f"{'inside' if record['inside'] else 'OUTSIDE'} the seed spread"])


def _write(file: Path | None, record: dict[str, Any]) -> None:
    if file is not None:
        file.write_text(json.dumps(record) + "\n")
