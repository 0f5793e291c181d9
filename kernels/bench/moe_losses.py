"""`finemill bench moe losses`: a mixture's training losses on the engine against those of transformers + PEFT.

One model of Qwen3-30B-A3B's widths is trained from the same adapters on the same batches: by transformers with each of
its attentions ("sdpa", "eager"), by transformers in float32, and on the engine. Between losses l and m of T steps:

    distance(l, m) = mean_t |l[t] - m[t]|        spread = the largest distance between two of transformers' trainings

The engine trains the same if its distance to transformers' "sdpa" is within that spread. Prints one line `BENCH {...}`.
"""

import argparse
import contextlib
import gc
import json
from itertools import combinations, cycle, islice
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM

from finemill.errors import UserError
from finemill.kernels.accelerate import accelerate_model
from finemill.kernels.bench.runs import MixtureLosses, environment, header, record_runs
from finemill.kernels.engine.model import ATTENTION
from finemill.kernels.engine.quantized_experts import quantize_experts

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ROUNDING = 1e-4
"""Distance below which two trainings are the same, however close transformers' own are."""
Losses = dict[str, list[float]]
"""Loss of each step by training."""


def measure_losses(args: argparse.Namespace, argv: list[str], path: Path) -> int:
    """Train four times and compare.

    Args:
        args: `moe.make_parser`'s.
        argv: the command line, for the record.
        path: of the checkpoint.
    Returns: exit code, 1 where the engine's losses are outside transformers' spread.
    """
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    losses: Losses = {}
    model = load_adapted(args, path, device, dtype)
    start = {name: parameter.detach().clone() for name, parameter in _trained(model)}
    batches = draw_batches(args, model.config.vocab_size, device)
    for attention in ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(attention)
        losses[attention] = train(model, start, batches, args, dtype)
    acceleration = accelerate_model(model)
    if not acceleration.active:
        raise UserError(f"the engine does not run this model: {acceleration.reason}")
    losses["finemill"] = train(model, start, batches, args, dtype)
    del model, acceleration
    gc.collect()
    exact = load_adapted(args, path, device, torch.float32)
    losses["float32"] = train(exact, start, batches, args, torch.float32)
    record = {"kind": "mixture-losses", **_settings(args), "losses": losses} | compare(losses)
    print("BENCH " + json.dumps(record | environment()), flush=True)
    if args.record:
        record_runs(args.record, [MixtureLosses(**header("moe", argv), **record)])
    return 0 if record["same"] else 1


def compare(losses: Losses) -> dict[str, Any]:
    """Evaluate the formulas in the header. Returns: distances to "sdpa" and "float32", spread, whether it is kept."""
    theirs = [name for name in losses if name != "finemill"]
    spread = max(distance(losses[a], losses[b]) for a, b in combinations(theirs, 2))
    difference = distance(losses["finemill"], losses["sdpa"])
    return {
        "difference": round(difference, 6),
        "largest_difference": round(
            max(abs(a - b) for a, b in zip(losses["finemill"], losses["sdpa"], strict=True)), 6
        ),
        "spread": round(spread, 6),
        "from_float32": {name: round(distance(losses[name], losses["float32"]), 6) for name in losses},
        # A comparison with NaN is false: a diverged run is not the same.
        "same": difference <= max(spread, ROUNDING),
    }


def distance(left: list[float], right: list[float]) -> float:
    """Return the mean difference between the losses of two trainings."""
    return fmean(abs(a - b) for a, b in zip(left, right, strict=True))


def load_adapted(args: argparse.Namespace, path: Path, device: torch.device, dtype: torch.dtype) -> Any:
    """Load the checkpoint with fresh adapters on attention and on every expert; NF4 is that of the experts."""
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=dtype, device_map={"": device}, experts_implementation="grouped_mm"
    )
    model.requires_grad_(False)
    for layer in model.model.layers if args.quant == "nf4" else ():
        quantize_experts(layer.mlp.experts)
    torch.manual_seed(7)
    settings = LoraConfig(
        r=args.rank,
        lora_alpha=args.rank,
        target_modules=list(ATTENTION),
        target_parameters=STACKS,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, settings).train()


def draw_batches(args: argparse.Namespace, vocabulary: int, device: torch.device) -> list[Tensor]:
    """Draw a few batches of random tokens, which a training that sees them again and again learns by heart."""
    generator = torch.Generator().manual_seed(9)
    size = (args.rows, args.seq)
    return [torch.randint(0, vocabulary - 16, size, generator=generator).to(device) for _ in range(args.sets)]


def train(
    model: Any, start: dict[str, Tensor], batches: list[Tensor], args: argparse.Namespace, dtype: torch.dtype
) -> list[float]:
    """Train from the given adapters, as bench_moe's peers are. Returns: the loss of each step."""
    parameters = dict(_trained(model))
    with torch.no_grad():
        for name, parameter in parameters.items():
            parameter.copy_(start[name])
    device = batches[0].device
    optimizer = torch.optim.AdamW(parameters.values(), lr=args.lr, fused=device.type == "cuda")
    losses = []
    for ids in islice(cycle(batches), args.steps):
        low = dtype != torch.float32
        with torch.autocast(device.type, dtype=dtype) if low else contextlib.nullcontext():
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.detach())
    return [round(float(loss), 5) for loss in losses]


def _trained(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    return [(name, parameter) for name, parameter in model.named_parameters() if parameter.requires_grad]


def _settings(args: argparse.Namespace) -> dict[str, Any]:
    return {name: getattr(args, name) for name in ("layers", "quant", "rank", "seq", "rows", "steps")}
