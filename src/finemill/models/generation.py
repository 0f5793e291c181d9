"""Answers of a transformers model to many prompts: batched, with a key-value cache, up to the end of the turn."""

# B batch, T tokens

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from finemill.models.sampling import GREEDY, Sampling, read_generation_defaults

if TYPE_CHECKING:
    from transformers import GenerationConfig

# Rows that one forward pass of a GPU answers at once; a CPU gains nothing past a few dozen.
_BATCH_SIZE = {"cuda": 64, "cpu": 64}

# An answer that no template writes by itself.
_PROBE = "the-probed-answer"


@dataclass(frozen=True)
class Answer:
    """What a model wrote after a prompt."""

    text: str
    """Without the token that ended the turn; a thinking block and other marks are kept."""
    num_tokens: int
    finished: bool
    """Whether the model ended its turn, rather than being cut at the limit."""


def stop_token_ids(tokenizer: Any, folder: Path) -> list[int]:
    """Ids that end an answer.

    The tokenizer's last token, the one that its chat template writes after an answer, those of `folder`'s generation
    config, and padding, which no answer holds.
    """
    eos = read_generation_defaults(folder).get("eos_token_id")
    found = [tokenizer.eos_token_id, _end_of_turn(tokenizer), *(eos if isinstance(eos, list) else [eos])]
    if tokenizer.pad_token_id != tokenizer.unk_token_id:
        found.append(tokenizer.pad_token_id)
    return list(dict.fromkeys(token_id for token_id in found if _is_token(tokenizer, token_id)))


def _is_token(tokenizer: Any, token_id: object) -> bool:
    """A generation config may name tokens of another model's, which nothing here ever says."""
    is_id = isinstance(token_id, int) and not isinstance(token_id, bool) and token_id >= 0
    return is_id and tokenizer.convert_ids_to_tokens(token_id) is not None


def _end_of_turn(tokenizer: Any) -> int | None:
    """The token that the chat template writes after an answer; None if it writes none, or there is no template."""
    added = {token.content: token_id for token_id, token in tokenizer.added_tokens_decoder.items()}
    if not tokenizer.chat_template or not added:
        return None
    messages = [{"role": "user", "content": "Hello."}, {"role": "assistant", "content": _PROBE}]
    try:
        text = tokenizer.apply_chat_template(messages, tokenize=False)
    # Templates are programs of other people.
    except Exception:
        return None
    tokens = "|".join(re.escape(content) for content in sorted(added, key=len, reverse=True))
    end = re.compile(rf"\s*({tokens})").match(text.rpartition(_PROBE)[2])
    return added[end[1]] if end else None


def generate_answers(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling = GREEDY,
    batch_size: int | None = None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[Answer]:
    """Answer each prompt, in the order given; `on_progress` gets the number of prompts answered so far.

    Prompts of similar length share a batch, padded on the left. With greedy choice an answer does not depend on the
    batch it is in, but for the last bits of the arithmetic.

    Args:
        prompts: token ids, the generation prompt included.
        stop_token_ids: any of these ends an answer.
    """
    batch_size = batch_size or _BATCH_SIZE[model.device.type]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]), reverse=True)
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        new_ids_BT = _generate_batch(
            model, tokenizer, [prompts[index] for index in batch], stop_token_ids, max_new_tokens, sampling, start
        )
        for index, new_ids_T in zip(batch, new_ids_BT.tolist(), strict=True):
            answers[index] = read_answer(tokenizer, new_ids_T, stop_token_ids)
        on_progress(len(answers))
    return [answers[index] for index in range(len(prompts))]


@torch.inference_mode()
def _generate_batch(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Sequence[int]],
    stop_token_ids: Sequence[int],
    max_new_tokens: int,
    sampling: Sampling,
    start: int,
) -> torch.Tensor:
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else next(iter(stop_token_ids), 0)
    width = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.full((len(prompts), width), pad_id, device=model.device)
    attention_mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, width - len(prompt) :] = torch.tensor(list(prompt))
        attention_mask_BT[row, width - len(prompt) :] = 1
    config = generation_config(stop_token_ids, pad_id, max_new_tokens, sampling)
    torch.manual_seed(sampling.seed + start)
    with without_own_generation_config(model):
        output_BT: torch.Tensor = model.generate(
            input_ids=input_ids_BT, attention_mask=attention_mask_BT, generation_config=config
        )
    return output_BT[:, width:]


def generation_config(
    stop_token_ids: Sequence[int], pad_id: int, max_new_tokens: int, sampling: Sampling
) -> "GenerationConfig":
    """transformers' settings of a generation."""
    from transformers import GenerationConfig

    drawn: dict[str, Any] = {"do_sample": False}
    if sampling.temperature > 0:
        drawn = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p}
        drawn |= {"top_k": sampling.top_k, "min_p": sampling.min_p or None}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        eos_token_id=list(stop_token_ids) or None,
        pad_token_id=pad_id,
        use_cache=True,
        **drawn,
    )


@contextmanager
def without_own_generation_config(model: Any) -> Iterator[None]:
    """Set the model's own generation config aside: transformers takes from it whatever a call leaves open.

    A repetition penalty there would change greedy answers.
    """
    from transformers import GenerationConfig

    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    own = inner.generation_config
    inner.generation_config = GenerationConfig()
    try:
        yield
    finally:
        inner.generation_config = own


def read_answer(tokenizer: Any, new_ids: Sequence[int], stop_token_ids: Sequence[int]) -> Answer:
    """The answer that the generated ids spell, up to the first stop token."""
    stops = set(stop_token_ids)
    end = next((position for position, token_id in enumerate(new_ids) if token_id in stops), None)
    kept = new_ids[:end]
    text = tokenizer.decode(kept, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    return Answer(text, len(kept) + (end is not None), finished=end is not None)
