"""`finemill estimate`: predict memory and speed of a QLoRA training step from a model's configuration, without a GPU.

The numbers are the planner's (planner.py), for the plan it would choose under the given memory: peak of allocated
device memory, tokens per second at a card's measured rates, what is kept, recomputed and moved to the host. cuDNN's
frontend and flash-attn-4 are taken to be installed.
"""

import argparse
import json
from pathlib import Path
from typing import Any

from finemill.errors import UserError
from finemill.kernels.engine.plan import Plan
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.kernels.planning.planner import plan_step, workload_under
from finemill.kernels.planning.rates import RATES
from finemill.kernels.planning.workload import Workload, workload_of_config

DEFAULT_MEMORY_GB = 80.0


class EstimateError(UserError):
    """No estimate for this model or memory; the message says why."""


def main(argv: list[str]) -> int:
    """Print the estimate. Returns: exit code."""
    args = _parse(argv)
    work = workload(args.model, rank=args.rank, quantized=args.quant == "nf4", rows=args.bs * args.accum, row=args.seq)
    budget = int(args.memory_gb * 2**30)
    plan = plan_step(work, budget, rates=RATES[args.gpu], allow_stream=args.quant == "nf4")
    result = summarize(work, plan)
    print(json.dumps(result) if args.json else "\n".join(f"{name:<22} {value}" for name, value in result.items()))
    return 0


def _parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="finemill estimate", description=__doc__)
    parser.add_argument("--model", required=True, help=f"folder with config.json, or one of {', '.join(SHAPES)}")
    parser.add_argument("--seq", type=int, default=2048, help="tokens per row")
    parser.add_argument("--bs", type=int, default=2, help="rows per micro-batch")
    parser.add_argument("--accum", type=int, default=4, help="micro-batches per optimizer step")
    parser.add_argument("--rank", type=int, default=16, help="LoRA rank on all seven linear layers")
    parser.add_argument("--quant", default="nf4", choices=["nf4", "bf16"])
    parser.add_argument("--memory-gb", type=float, default=DEFAULT_MEMORY_GB, help="device memory to stay within, GiB")
    parser.add_argument("--gpu", default="h200", choices=sorted(RATES), help="card whose measured rates are taken")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser.parse_args(argv)


def workload(model: str, *, rank: int, quantized: bool, rows: int, row: int) -> Workload:
    """Describe a model and a step to the planner.

    Args:
        model: folder with a Hugging Face config.json, or a name in SHAPES.
        rank: LoRA rank.
        quantized: NF4 base.
        rows: per optimizer step.
        row: tokens per row.
    Raises: EstimateError: neither a known name nor such a folder, or a configuration without the usual fields.
    """
    try:
        return workload_of_config(_config(model), rank=rank, quantized=quantized, tokens=rows * row, row=row)
    except KeyError as error:
        raise EstimateError(
            f"config.json of {model} has no {error}: estimates cover Llama, Mistral and Qwen decoders"
        ) from error


def _config(model: str) -> dict[str, Any]:
    if (shape := SHAPES.get(model)) is not None:
        return {
            "hidden_size": shape.hidden,
            "intermediate_size": shape.intermediate,
            "num_attention_heads": shape.heads,
            "num_key_value_heads": shape.kv_heads,
            "head_dim": shape.head_dim,
            "rms_norm_eps": shape.eps,
            "num_hidden_layers": shape.layers,
            "vocab_size": shape.vocabulary,
            "tie_word_embeddings": shape.tied,
        }
    file = Path(model) / "config.json"
    if not file.is_file():
        raise EstimateError(f"{file} not found: pass a model folder, or one of {', '.join(SHAPES)}")
    return dict(json.loads(file.read_text()))


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
        "host_gb": round(plan.host_bytes(plan.micro_batch or work.tokens) / 2**30, 2),
        "decoded_weights_kept": plan.cached_layers == work.num_layers,
        "embedding_on_host": plan.embedding_on_host,
        "weights_streamed": plan.stream_weights,
        "optimizer_bits": 8 if plan.eight_bit else 32,
    }
