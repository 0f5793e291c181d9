"""`finemill estimate`: memory and speed of a QLoRA training step from a model's configuration: no GPU, no weights.

The numbers are the planner's (kernels/planning/planner.py), for the plan it would choose under the given memory: peak
of allocated device memory, tokens per second at a card's measured rates, what is kept, recomputed and moved to the
host; with `--gpus` of one card, and the tokens of all. cuDNN's frontend and flash-attn-4 are taken to be installed.
With `--dataset`: steps and time of training on it, its rows packed and one by one. With `--table`: what each size of
model needs; of a family that the kernels do not have, what it needs on transformers' own layers.
"""

import argparse
import json
import logging
import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

from finemill.artifacts.dataset import read_lengths
from finemill.commands.parser import CommandParser
from finemill.components.chat_format.duration import steps_and_hours
from finemill.components.chat_format.packing import num_packs_of_all
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.kernels.engine.expert_layout import EXPERT_FAMILIES, has_dense_layers
from finemill.kernels.engine.plan import Plan
from finemill.kernels.planning.from_config import is_planned, workload_of_config
from finemill.kernels.planning.model_shapes import MIXTURES, SHAPES
from finemill.kernels.planning.planner import host_bytes, plan_step, prefers_shards, workload_under
from finemill.kernels.planning.rates import RATES
from finemill.kernels.planning.workload import FAMILIES, Workload
from finemill.models.base.resolve import FORMS, resolve_base_model
from finemill.storage.store import artifact_folder
from finemill.training.decoder import read_decoder
from finemill.training.memory import needed_gib

CARD_GB = 80.0
METHODS: dict[str, dict[str, Any]] = {
    "QLoRA": {},
    "LoRA, 16-bit": {"load_in_4bit": False},
    "QLoRA, plain": {"kernels": "off"},
    "LoRA, 8-bit, plain": {"kernels": "off", "load_in_8bit": True},
    "LoRA, 16-bit, plain": {"kernels": "off", "load_in_4bit": False},
    "full, plain": {"kernels": "off", "method": "full"},
}
"""Columns of the table: on finemill's kernels the least they need, and what transformers' own layers take."""
PLAIN_METHODS = [name for name, choice in METHODS.items() if choice.get("kernels") == "off"]
_IDLE_BESIDE_TABLE = ("quant", "memory_gb", "host_gb", "gpus", "gpu", "dataset")
logger = logging.getLogger(__name__)


def execute(name: str, arguments: list[str]) -> int:
    """Print the estimate. Returns: exit code."""
    args = _parse(name, arguments)
    if args.table:
        return _print_needed(table(args), args)
    if args.dataset is None and not is_planned(model := _config(args.model)):
        logger.warning("speed is known of the families of finemill's kernels alone: memory on transformers' layers")
        return _print_needed({args.model: _needed(model, args, PLAIN_METHODS)}, args)
    work = workload(args.model, rank=args.rank, quantized=args.quant == "nf4", rows=args.bs * args.accum, row=args.seq)
    memory_gb = args.card_gb if args.memory_gb is None else args.memory_gb
    work, plan = planned(args, work, memory_gb)
    result = summarize(work, plan)
    if args.gpus > 1:
        shared = {"strategy": "shard" if work.shards > 1 else "ddp", "tokens_per_s": args.gpus * result["tokens_per_s"]}
        result |= shared
    if args.dataset is not None:
        result |= training_time(args, memory_gb)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<22} {value}" for name, value in result.items()))
    return 0


def _parse(name: str, argv: list[str]) -> argparse.Namespace:
    parser = CommandParser(prog=f"finemill {name}", description=__doc__)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--model", help=f"one of {', '.join([*SHAPES, *MIXTURES])}, or a base model: {FORMS}")
    what.add_argument("--table", action="store_true", help="GiB that each known size needs at least, by method")
    parser.add_argument("--seq", type=_count, default=2048, help="tokens per row")
    parser.add_argument("--bs", type=_count, default=2, help="rows per GPU and micro-batch")
    parser.add_argument("--accum", type=_count, default=4, help="micro-batches per optimizer step")
    parser.add_argument("--rank", type=_count, default=16, help="LoRA rank on all seven linear layers")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "bf16"])
    parser.add_argument("--card-gb", type=_gib, default=CARD_GB, help="memory of the card, GiB (default: %(default)g)")
    parser.add_argument("--memory-gb", type=_gib, help="device memory to stay within, GiB (default: the card's)")
    parser.add_argument("--host-gb", type=_gib, help="host memory for what waits there, GiB (default: any amount)")
    parser.add_argument("--gpus", type=_count, default=1, help="cards of one host that train together")
    parser.add_argument("--gpu", default="h200", choices=sorted(RATES), help="card whose measured rates are taken")
    parser.add_argument("--dataset", help="what chat-format printed: steps and hours of training on it, too")
    parser.add_argument("--epochs", type=_count, default=1, help="how often training goes through the dataset")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    args = parser.parse_args(argv)
    idle = {name: "beside --table" for name in _IDLE_BESIDE_TABLE if args.table}
    idle |= {"epochs": "without --dataset"} if args.dataset is None else {}
    for option, where in idle.items():
        if getattr(args, option) != parser.get_default(option):
            parser.error(f"--{option.replace('_', '-')} has no effect {where}: leave it out")
    return args


def _count(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text} is no count: at least 1 is needed")
    return int(text)


def _gib(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no amount of memory: GiB above 0 are needed")
    return value


def workload(model: str, *, rank: int, quantized: bool, rows: int, row: int) -> Workload:
    """Describe a model and a step to the planner.

    Args:
        model: a name in SHAPES or MIXTURES, or the reference of a base model.
        rank: LoRA rank.
        quantized: NF4 base.
        rows: per optimizer step.
        row: tokens per row.
    Raises: UserError: no such model, or one that the kernels do not train.
    """
    config = _config(model)
    if not is_planned(config):
        mixed = config.get("model_type") in EXPERT_FAMILIES and has_dense_layers(config)
        problem = "has layers without experts" if mixed else f"is of the family '{config.get('model_type')}'"
        covered = ", ".join([*FAMILIES, *EXPERT_FAMILIES])
        raise UserError(f"{model} {problem}: estimates cover {covered}, with equal layers, as finemill's kernels do")
    try:
        return workload_of_config(config, rank=rank, quantized=quantized, tokens=rows * row, row=row)
    except KeyError as error:
        raise UserError(f"config.json of {model} has no {error}") from None


def planned(args: argparse.Namespace, work: Workload, memory_gb: float) -> tuple[Workload, Plan]:
    """The plan of one of the cards, and its part of the work: `strategy: auto` may divide the base among them."""
    budget, rates = int(memory_gb * 2**30), RATES[args.gpu]
    if prefers_shards(work, budget, args.gpus, rates=rates):
        work = replace(work, shards=args.gpus)
    streamed = work.shards > 1
    host = None if args.host_gb is None else int(args.host_gb * 2**30)
    return work, plan_step(work, budget, rates=rates, allow_stream=args.quant == "nf4", streamed=streamed, host=host)


def training_time(args: argparse.Namespace, memory_gb: float) -> dict[str, float]:
    """Steps and hours of training on a dataset, with its rows in packs of `--seq` tokens and one by one.

    Raises: UserError: no dataset, or one without training rows.
    """
    dataset = artifact_folder(args.dataset, "dataset", "chat-format")
    lengths = [min(length, args.seq) for length in read_lengths(dataset, "train")]
    if not lengths:
        raise UserError(f"{args.dataset} has no training row")
    rows_per_step = args.bs * args.accum

    def seconds(sequences: int, row: int) -> float:
        work = workload(args.model, rank=args.rank, quantized=args.quant == "nf4", rows=rows_per_step, row=row)
        return planned(args, work, memory_gb)[1].seconds

    counts = {"examples": len(lengths), "tokens": sum(lengths), "packs": num_packs_of_all(lengths, args.seq)}
    per_step = args.gpus * rows_per_step
    return counts | steps_and_hours(**counts, seconds=seconds, sequences_per_step=per_step, epochs=args.epochs)


def _config(model: str) -> Mapping[str, Any]:
    if (shape := SHAPES.get(model)) is not None:
        return shape.config()
    if model in MIXTURES:
        return MIXTURES[model]
    folder = resolve_base_model(model, "config").path
    return read_decoder(folder)


def table(args: argparse.Namespace) -> dict[str, dict[str, float]]:
    """GiB of GPU memory by model and method."""
    models = {name: shape.config() for name, shape in SHAPES.items() if not name.endswith("-tiny")} | MIXTURES
    return {name: _needed(model, args, METHODS) for name, model in models.items()}


def _needed(model: Mapping[str, Any], args: argparse.Namespace, methods: Iterable[str]) -> dict[str, float]:
    """GiB of GPU memory of one model by method. Raises: UserError: it cannot be told, or an option is out of bounds."""
    settings = {
        "max_length": args.seq,
        "per_device_train_batch_size": args.bs,
        "gradient_accumulation_steps": args.accum,
    }
    needed = {}
    for method in methods:
        choice = METHODS[method]
        rank = {} if choice.get("method") == "full" else {"lora_r": args.rank}
        config = parse_config(TrainQLoRAConfig, settings | choice | rank, "estimate")
        # On transformers' layers this is `estimate_memory`.
        needed[method] = round(needed_gib(model, config), 1)
    return needed


def _print_needed(needed: Mapping[str, Mapping[str, float]], args: argparse.Namespace) -> int:
    print(json.dumps(needed) if args.json else _listed(needed, args.card_gb))
    return 0


def _listed(needed: Mapping[str, Mapping[str, float]], card_gb: float) -> str:
    """The table as text; what does not fit the card is in brackets."""
    methods = next(iter(needed.values()))
    width, first = max(map(len, methods)) + 2, max(20, *(len(name) + 1 for name in needed))
    lines = [f"{f'GiB, card of {card_gb:g}':<{first}}" + "".join(f"{method:>{width}}" for method in methods)]
    for name, row in needed.items():
        cells = (f"{gib:.1f}" if gib <= card_gb else f"({gib:.1f})" for gib in row.values())
        lines.append(f"{name:<{first}}" + "".join(f"{cell:>{width}}" for cell in cells))
    return "\n".join(lines)


def summarize(work: Workload, plan: Plan) -> dict[str, Any]:
    """Put a plan into words and numbers."""
    levels = [level.name.lower() for level in plan.levels]
    hosts = [level.name.lower() for level in plan.host_levels if level is not None]
    return {
        "peak_gb": round(plan.peak / 2**30, 2),
        "static_gb": round(workload_under(work, plan).static_bytes() / 2**30, 2),
        "tokens_per_s": round(work.tokens / plan.seconds),
        "step_s": round(plan.seconds, 3),
        "micro_batch_tokens": plan.micro_batch,
        "layers_kept_up_to": {name: levels.count(name) for name in sorted(set(levels))},
        "layers_on_host": {name: hosts.count(name) for name in sorted(set(hosts))},
        "host_gb": round(host_bytes(work, plan) / 2**30, 2),
        "decoded_weights_kept": plan.cached_layers == work.num_layers,
        "embedding_on_host": plan.embedding_on_host,
        "weights_streamed": plan.stream_weights and work.shards == 1,
        "optimizer_bits": 8 if plan.eight_bit else 32,
    }
