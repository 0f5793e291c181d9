"""Pretrain the small Qwen3 that runs without a hub start from: `python -m finemill.models.base.pretrain`.

The recipe that made the shipped weights: 4 million parameters, one pass over text generated from `corpus.py`, AdamW
with a cosine schedule, bfloat16 autocast. About two and a half minutes on an H200; about eleven hours on two CPU cores.
"""

# R rows, T tokens

import argparse
import logging
import math
import multiprocessing
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from random import Random

import numpy as np
import torch
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from finemill.artifacts.dataset import IGNORE_INDEX
from finemill.models.base.corpus import document
from finemill.models.base.tokenizer import train_tokenizer

logger = logging.getLogger(__name__)

CHAT_TEMPLATE = Path(__file__).parent / "tiny_qwen3" / "chat_template.jinja"
_ROWS_PER_SHARD = 8192
_TOKENIZER_DOCUMENTS = 40_000


@dataclass(frozen=True)
class Recipe:
    """Everything that determines the weights."""

    seed: int = 0
    vocab_size: int = 1536
    row_length: int = 256
    rows_per_step: int = 256
    steps: int = 2600
    learning_rate: float = 3e-3
    warmup_steps: int = 200
    weight_decay: float = 0.1
    # Standard deviation of the noise put on each weight matrix during a step, as a share of the matrix's own. It is
    # the size of 4-bit rounding, so that NF4 and Q4_K_M copies of the model behave like the model.
    weight_noise: float = 0.08


def model_config(recipe: Recipe, tokenizer: PreTrainedTokenizerFast) -> Qwen3Config:
    """Every row length (hidden, feed-forward, attention output) is a multiple of 256, llama.cpp's K-quant block."""
    return Qwen3Config(
        vocab_size=recipe.vocab_size,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=6,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )


def pack_shard(arguments: tuple[str, int, int, int]) -> np.ndarray:
    """(folder of the tokenizer, seed, shard, row length) -> tokens, shape (_ROWS_PER_SHARD, T), uint16.

    Documents stay whole: one that does not fit begins the next row, the rest of a row is padding.
    """
    folder, seed, shard, row_length = arguments
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    end = tokenizer.pad_token_id
    rng = Random(f"{seed} {shard}")
    rows_RT = np.full((_ROWS_PER_SHARD, row_length), end, dtype=np.uint16)
    row = position = 0
    while True:
        for encoding in tokenizer.backend_tokenizer.encode_batch([document(rng) for _ in range(1000)]):
            tokens = [*encoding.ids[: row_length - 1], end]
            if position + len(tokens) > row_length:
                row, position = row + 1, 0
                if row == _ROWS_PER_SHARD:
                    return rows_RT
            rows_RT[row, position : position + len(tokens)] = tokens
            position += len(tokens)


def training_batches(recipe: Recipe, tokenizer_folder: Path, workers: int) -> Iterator[np.ndarray]:
    """Tokens of each step, shape (rows_per_step, T), uint16; the same for any number of `workers` processes."""
    num_rows = recipe.steps * recipe.rows_per_step
    shards = range(math.ceil(num_rows / _ROWS_PER_SHARD))
    tasks = [(str(tokenizer_folder), recipe.seed, shard, recipe.row_length) for shard in shards]
    with multiprocessing.get_context("spawn").Pool(workers) as pool:
        shard_batches = (
            np.split(rows_RT, _ROWS_PER_SHARD // recipe.rows_per_step) for rows_RT in pool.imap(pack_shard, tasks)
        )
        yield from islice(chain.from_iterable(shard_batches), recipe.steps)


@contextmanager
def perturbed(weights: list[torch.Tensor], share: float) -> Iterator[None]:
    """Add Gaussian noise to `weights` inside the block and take it away again after."""
    noise = [torch.randn_like(weight) * (weight.std() * share) for weight in weights]
    torch._foreach_add_(weights, noise)
    yield
    torch._foreach_sub_(weights, noise)


def pretrain(
    recipe: Recipe, batches: Iterable[np.ndarray], model: Qwen3ForCausalLM, device: torch.device
) -> Qwen3ForCausalLM:
    """Train `model` in place, a step for each of `batches`, and return it."""
    model.to(device).train()
    parameters = list(model.parameters())
    matrices = [parameter.data for parameter in parameters if parameter.ndim == 2]
    optimizer = torch.optim.AdamW(
        [
            {"params": [p for p in parameters if p.ndim == 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
        ],
        lr=recipe.learning_rate,
        betas=(0.9, 0.95),
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_share(step, recipe))
    started = time.monotonic()
    for step, rows in enumerate(batches):
        input_ids = torch.from_numpy(rows.astype(np.int64)).to(device, non_blocking=True)
        labels = labels_of(input_ids, model.config.pad_token_id)
        with torch.autocast(device.type, dtype=torch.bfloat16), perturbed(matrices, recipe.weight_noise):
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 100 == 0 or step == recipe.steps - 1:
            logger.info("step %d of %d, loss %.4f, %.0f s", step, recipe.steps, loss.item(), time.monotonic() - started)
    return model


def labels_of(input_ids: torch.Tensor, pad_token_id: int) -> torch.Tensor:
    """Train on every token and on the first <|endoftext|> after each document, not on the padding behind it."""
    is_pad = input_ids == pad_token_id
    after_pad = torch.zeros_like(is_pad)
    after_pad[:, 1:] = is_pad[:, :-1]
    return input_ids.masked_fill(is_pad & after_pad, IGNORE_INDEX)


def learning_rate_share(step: int, recipe: Recipe) -> float:
    """Linear warm-up, then a cosine down to zero."""
    if step < recipe.warmup_steps:
        return (step + 1) / recipe.warmup_steps
    return 0.5 * (1 + math.cos(math.pi * (step - recipe.warmup_steps) / (recipe.steps - recipe.warmup_steps)))


def make_tokenizer(recipe: Recipe) -> PreTrainedTokenizerFast:
    """The tokenizer, learned from the beginning of the corpus."""
    rng = Random(recipe.seed)
    return train_tokenizer(
        islice(iter(lambda: document(rng), None), _TOKENIZER_DOCUMENTS), recipe.vocab_size, CHAT_TEMPLATE
    )


def main() -> None:
    """Train the tokenizer and the model and write both to `--output`."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder to write")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--rows-per-step", type=int, default=Recipe.rows_per_step)
    parser.add_argument("--workers", type=int, default=multiprocessing.cpu_count(), help="processes that make text")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    recipe = Recipe(steps=arguments.steps, rows_per_step=arguments.rows_per_step)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    tokenizer = make_tokenizer(recipe)
    tokenizer.save_pretrained(arguments.output)
    torch.manual_seed(recipe.seed)
    model = Qwen3ForCausalLM(model_config(recipe, tokenizer))
    pretrain(recipe, training_batches(recipe, arguments.output, arguments.workers), model, device)
    model.generation_config.do_sample = False
    model.to(torch.bfloat16).save_pretrained(arguments.output)
    logger.info("wrote %s", arguments.output)


if __name__ == "__main__":
    main()
