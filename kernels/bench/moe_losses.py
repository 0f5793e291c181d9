"""`finemill bench moe losses`: a mixture's training losses on the engine against those of transformers + PEFT.

One model of Qwen3-30B-A3B's widths is trained from the same adapters on the same batches, for several seeds of both: by
transformers with each of its attentions ("sdpa", "eager"), by it in float32, and on the engine. Between losses l, m of
all seeds s and steps t:

    distance(l, m) = sqrt(mean_{s,t} (l[s,t] - m[s,t])^2)

The engine trains the same if it is as near to float32 as transformers is in 16 bits: within `LARGEST_RATIO` times the
distance of its farther attention. At a learning rate that turns tokens to other experts in a few steps all four part
for good, and nothing can be told from them. Prints one line `BENCH {...}`.
"""

import argparse
import contextlib
import gc
import json
import math
from itertools import cycle, islice
from pathlib import Path
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
LARGEST_RATIO = 1.2
"""A few seeds say the distance itself to some tenths."""
ROUNDING = 1e-4
"""Distance below which two trainings are the same, however close transformers' own are."""
Losses = dict[str, list[list[float]]]
"""By training, of each seed, the loss of each step."""


def measure_losses(args: argparse.Namespace, argv: list[str], path: Path) -> int:
    """Train each seed four times and compare.

    Args:
        args: `moe.make_parser`'s.
        argv: the command line, for the record.
        path: of the checkpoint.
    Returns: exit code, 1 where the engine's losses are farther from float32's than transformers'.
    """
    device = torch.device(args.device, 0) if args.device == "cuda" else torch.device("cpu")
    dtype = torch.bfloat16 if args.device == "cuda" else torch.float32
    losses: Losses = {}
    model = load_adapted(args, path, device, dtype)
    for attention in ("sdpa", "eager"):
        model.get_base_model().set_attn_implementation(attention)
        losses[attention] = train_seeds(model, args, dtype)
    acceleration = accelerate_model(model)
    if not acceleration.active:
        raise UserError(f"the engine does not run this model: {acceleration.reason}")
    losses["finemill"] = train_seeds(model, args, dtype)
    del model, acceleration
    gc.collect()
    exact = load_adapted(args, path, device, torch.float32)
    losses["float32"] = train_seeds(exact, args, torch.float32)
    record = {"kind": "mixture-losses", **_settings(args), "losses": losses} | compare(losses)
    print("BENCH " + json.dumps(record | environment()), flush=True)
    if args.record:
        record_runs(args.record, [MixtureLosses(**header("moe", argv), **record)])
    return 0 if record["same"] else 1


def compare(losses: Losses) -> dict[str, Any]:
    """Evaluate the formulas in the header. Returns: distances, and whether the engine's is small enough."""
    from_float32 = {name: distance(losses[name], losses["float32"]) for name in losses if name != "float32"}
    theirs = max(from_float32["sdpa"], from_float32["eager"])
    return {
        "from_float32": {name: round(value, 6) for name, value in from_float32.items()},
        "spread": round(distance(losses["sdpa"], losses["eager"]), 6),
        # A comparison with NaN is false: a diverged run is not the same.
        "same": from_float32["finemill"] <= max(LARGEST_RATIO * theirs, ROUNDING),
    }


def distance(left: list[list[float]], right: list[list[float]]) -> float:
    """Return the root mean square of the differences between two trainings' losses."""
    pairs = [pair for rows in zip(left, right, strict=True) for pair in zip(*rows, strict=True)]
    return math.sqrt(sum((a - b) ** 2 for a, b in pairs) / len(pairs))


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


def train_seeds(model: Any, args: argparse.Namespace, dtype: torch.dtype) -> list[list[float]]:
    """Train each seed's adapters on its batches. Returns: of each seed, the loss of each step."""
    losses = []
    for seed in range(args.seeds):
        start_adapters(model, seed)
        losses.append(train(model, draw_batches(args, model, seed), args, dtype))
    return losses


def start_adapters(model: Any, seed: int) -> None:
    """Begin anew, as PEFT does: A is random, B is zero."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in _trained(model):
        with torch.no_grad():
            bound = parameter.shape[1] ** -0.5 if "lora_A" in name else 0.0
            parameter.copy_(torch.empty(parameter.shape).uniform_(-bound, bound, generator=generator))


def draw_batches(args: argparse.Namespace, model: Any, seed: int) -> list[Tensor]:
    """Draw a few batches of random tokens, which a training that sees them again and again learns by heart."""
    generator, size = torch.Generator().manual_seed(1000 + seed), (args.rows, args.seq)
    drawn = (torch.randint(0, model.config.vocab_size - 16, size, generator=generator) for _ in range(args.sets))
    return [ids.to(model.device) for ids in drawn]


def train(model: Any, batches: list[Tensor], args: argparse.Namespace, dtype: torch.dtype) -> list[float]:
    """Train the adapters as they are, with `moe step`'s settings. Returns: the loss of each step."""
    parameters = dict(_trained(model))
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
    return {name: getattr(args, name) for name in ("layers", "quant", "rank", "seq", "rows", "steps", "lr", "seeds")}
