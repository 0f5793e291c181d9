"""`finemill bench eval`: answers of base and tuned in one pass, beside the plain batched loop of one model.

The model has a published shape and drawn weights, so that nothing is fetched; no token ends an answer, each row has its
length. Tokens per second count what rows ask for, not what a batch writes until its longest row ends.
"""

import argparse
import json
import time
from collections.abc import Callable
from typing import Any

import torch

from finemill.commands.parser import CommandParser, count
from finemill.errors import UserError
from finemill.kernels.planning.model_shapes import SHAPES
from finemill.models.adapter_rows import adapter_by_row
from finemill.models.batching import generate_continuously
from finemill.models.generation import generation_config
from finemill.models.sampling import GREEDY


def main(argv: list[str]) -> int:
    """Measure and print. Returns: the exit code."""
    parser = CommandParser(prog="finemill bench eval", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shape", choices=tuple(SHAPES), default="qwen3-8b")
    parser.add_argument("--rows", type=count, default=99, help="rows, each answered by base and tuned (default: 99)")
    parser.add_argument("--prompt-tokens", type=count, default=128, help="mean length of a prompt (default: 128)")
    parser.add_argument("--new-tokens", type=count, default=128, help="longest answer (default: 128)")
    parser.add_argument("--mixed", action="store_true", help="a few long answers among short ones")
    parser.add_argument("--batch-size", type=count, default=256, help="answers at once (default: 256)")
    parser.add_argument("--plain-batch-size", type=count, default=128, help="of the plain loop (default: 128)")
    parser.add_argument("--json", action="store_true", help="one object per way")
    args = parser.parse_args(argv)
    if min(args.rows, args.prompt_tokens, args.new_tokens, args.batch_size, args.plain_batch_size) < 1:
        raise UserError("bench eval: rows, lengths and batch sizes are 1 or more")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = _model(args.shape, device)
    prompts, lengths = _rows(args)
    ways: dict[str, tuple[int, Callable[[], Any]]] = {
        "plain loop, base alone": (sum(lengths), lambda: _plain(model, prompts, lengths, args.plain_batch_size)),
        "base and tuned in one pass": (2 * sum(lengths), lambda: _one_pass(model, prompts, lengths, args.batch_size)),
    }
    for name, (tokens, way) in ways.items():
        _plain(model, prompts[:2], [2, 2], 2)
        seconds = _timed(way, device)
        found = {"way": name, "tokens": tokens, "seconds": round(seconds, 2), "tokens_per_s": round(tokens / seconds)}
        print(
            json.dumps(found)
            if args.json
            else f"{name:<28}{tokens:>9} tokens{seconds:>9.2f} s{tokens / seconds:>9.0f} tok/s"
        )
    return 0


def _model(name: str, device: torch.device) -> Any:
    """A PEFT model with a drawn adapter of rank 16 on all linear layers."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**SHAPES[name].config())
    torch.manual_seed(0)
    with device:
        base = AutoModelForCausalLM.from_config(
            config, dtype=torch.bfloat16 if device.type == "cuda" else torch.float32
        )
        tuned = get_peft_model(base, LoraConfig(r=16, lora_alpha=16, target_modules="all-linear"))
    return tuned.eval()


def _rows(args: argparse.Namespace) -> tuple[list[list[int]], list[int]]:
    """Prompts of half to one and a half times the mean; of mixed answers one in eight is long, the rest an eighth."""
    generator = torch.Generator().manual_seed(0)
    vocabulary = SHAPES[args.shape].vocabulary
    half = args.prompt_tokens // 2
    sizes = (torch.randint(max(1, half), args.prompt_tokens + half + 1, (args.rows,), generator=generator)).tolist()
    prompts = [torch.randint(0, vocabulary, (size,), generator=generator).tolist() for size in sizes]
    short = max(1, args.new_tokens // 8) if args.mixed else args.new_tokens
    return prompts, [args.new_tokens if row % 8 == 0 else short for row in range(args.rows)]


def _timed(way: Callable[[], Any], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize()
    start = time.perf_counter()
    way()
    if device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def _plain(model: Any, prompts: list[list[int]], lengths: list[int], batch_size: int) -> None:
    """transformers' generate without the adapter, each batch until its longest answer."""
    with model.disable_adapter():
        for start in range(0, len(prompts), batch_size):
            batch = prompts[start : start + batch_size]
            width = max(map(len, batch))
            input_ids_BT = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in batch], device=model.device)
            mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in batch]
            longest = max(lengths[start : start + batch_size])
            config = generation_config([], 0, longest, GREEDY)
            model.generate(
                input_ids=input_ids_BT,
                attention_mask=torch.tensor(mask, device=model.device),
                generation_config=config,
            )


def _one_pass(model: Any, prompts: list[list[int]], lengths: list[int], batch_size: int) -> None:
    on = [False] * len(prompts) + [True] * len(prompts)
    with adapter_by_row(model) as rows:
        generate_continuously(
            model,
            [*prompts, *prompts],
            stop_token_ids=[],
            max_new_tokens=[*lengths, *lengths],
            sampling=GREEDY,
            batch_size=batch_size,
            on_batch=lambda indices: rows.set([on[index] for index in indices]),
        )
