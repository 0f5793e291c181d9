"""What base and tuned model answer: both in one pass where the adapter can be switched row by row."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import torch

from finemill.artifacts.metrics import MODELS, ModelName
from finemill.models.adapter import read_adapter_config
from finemill.models.adapter_rows import adapter_by_row, can_switch_rows
from finemill.models.batching import generate_continuously, supports_continuous_batching
from finemill.models.causal_lm import suitable_threads
from finemill.models.generation import Answer, generate_answers, read_answer
from finemill.models.sampling import Sampling

# Rows answered at once; a CPU gains nothing past a few dozen.
_MOST_ROWS = {"cuda": 256, "cpu": 64}
# Of the free memory; joining rows holds the cache twice.
_CACHE_SHARE = 0.4


def switches(tuned: Any) -> dict[ModelName, Callable[[], AbstractContextManager[Any]]]:
    """What makes the one loaded model the base, and the tuned model."""
    return {"base": tuned.disable_adapter, "tuned": nullcontext}


def answer_both(
    tuned: Any,
    adapter: Path,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    batch_size: int | None,
    on_progress: Callable[[str], None],
) -> dict[ModelName, list[Answer]]:
    """Both models' answers to every prompt, in the order of the prompts."""
    with suitable_threads(tuned):
        if can_switch_rows(read_adapter_config(adapter)) and supports_continuous_batching(tuned):
            size = batch_size or fitting_batch(tuned, max(map(len, prompts)) + max_new_tokens)
            # Base first: row by row the prompts are those of one model, then those of the other.
            is_tuned = [model == "tuned" for model in MODELS for _ in prompts]
            with adapter_by_row(tuned) as rows:
                written = generate_continuously(
                    tuned,
                    [*prompts, *prompts],
                    stop_token_ids=stop_token_ids,
                    max_new_tokens=[max_new_tokens] * len(is_tuned),
                    sampling=sampling,
                    batch_size=size,
                    on_batch=lambda indices: rows.set([is_tuned[index] for index in indices]),
                    on_progress=_tenths(len(is_tuned), on_progress),
                )
            found = [read_answer(tokenizer, ids, stop_token_ids) for ids in written]
            return {"base": found[: len(prompts)], "tuned": found[len(prompts) :]}
        answers: dict[ModelName, list[Answer]] = {}
        for name, switch in switches(tuned).items():
            with switch():
                answers[name] = generate_answers(
                    tuned,
                    tokenizer,
                    prompts,
                    stop_token_ids=stop_token_ids,
                    max_new_tokens=max_new_tokens,
                    sampling=sampling,
                    batch_size=batch_size,
                    on_progress=lambda done, name=name: on_progress(f"{name}: {done} of {len(prompts)} rows"),  # type: ignore[misc]
                )
        return answers


def _tenths(total: int, say: Callable[[str], None]) -> Callable[[int], None]:
    """Say every tenth of the way."""
    said = 0

    def progress(done: int) -> None:
        nonlocal said
        if 10 * done // total > said:
            said = 10 * done // total
            say(f"base and tuned: {done} of {total} answers")

    return progress


def fitting_batch(model: Any, length: int) -> int:
    """How many rows of `length` tokens are answered at once on the model's device."""
    most = _MOST_ROWS.get(model.device.type, _MOST_ROWS["cpu"])
    if model.device.type != "cuda":
        return most
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * heads * width * model.dtype.itemsize * length
    free, _ = torch.cuda.mem_get_info(model.device)
    return max(1, min(most, int(_CACHE_SHARE * free / row_bytes)))
