"""Continuous batching: a row that has ended makes room for the next one, and none waits for the longest of its batch.

A running batch shares a key-value cache that is padded on the left, so that the rows' last tokens line up. Prompts
that come later are run by themselves, and their cache is joined to the running one; rows that have ended are taken out.
"""

# B rows, T tokens of the cache, V vocabulary

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from finemill.models.sampling import Sampling

# Padded tokens of prompts that are run at once: their activations are in memory together.
_PROMPT_TOKENS = 16384
# Rows are taken out, or in, when so many have ended: each time copies the cache.
_SHARE_ENDED = 8


@dataclass
class _Running:
    """Rows that are being answered, each with its place in the list of prompts."""

    indices: list[int] = field(default_factory=list)
    layers: list[tuple[torch.Tensor, torch.Tensor]] = field(default_factory=list)
    """Keys and values of each layer, shape (B, heads, T, head width)."""
    attention: torch.Tensor | None = None
    """Which columns are a row's own, shape (B, T)."""
    newest: torch.Tensor | None = None
    """Each row's newest token, which the cache does not have, shape (B,)."""

    @property
    def mask(self) -> torch.Tensor:
        assert self.attention is not None
        return self.attention


def supports_continuous_batching(model: Any) -> bool:
    """Whether every layer of the model keeps all keys and values: no sliding window, no state of its own."""
    from transformers.cache_utils import DynamicCache, DynamicLayer

    layers = DynamicCache(config=model.config).layers
    return model.config.is_encoder_decoder is not True and all(type(layer) is DynamicLayer for layer in layers)


@torch.inference_mode()
def generate_continuously(
    model: Any,
    prompts: Sequence[Sequence[int]],
    *,
    stop_token_ids: Sequence[int],
    max_new_tokens: Sequence[int],
    sampling: Sampling,
    batch_size: int,
    on_batch: Callable[[list[int]], None] = lambda indices: None,
    on_progress: Callable[[int], None] = lambda done: None,
) -> list[list[int]]:
    """The token ids that the model writes after each prompt, the stop token included, in the order of the prompts.

    Args:
        max_new_tokens: of each prompt.
        batch_size: rows that are answered at once.
        on_batch: gets the places of the prompts that the next forward passes are about, in their order in the batch.
        on_progress: gets the number of prompts that are answered, whenever it changes.
    """
    generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
    stops = frozenset(stop_token_ids)
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    written: list[list[int]] = [[] for _ in prompts]
    running = _Running()
    ended: set[int] = set()
    while waiting or running.indices:
        room = batch_size - len(running.indices) + len(ended & set(running.indices))
        enough = max(1, min(batch_size, len(running.indices)) // _SHARE_ENDED)
        if waiting and (room >= enough or not running.indices):
            _keep(running, ended)
            new = _take(waiting, prompts, batch_size - len(running.indices))
            on_batch(new)
            _join(running, _start(model, [prompts[index] for index in new], new, sampling, generator))
            on_batch(running.indices)
            _note(running, written, new, stops, max_new_tokens, ended)
        elif len(ended & set(running.indices)) >= enough:
            _keep(running, ended)
            on_batch(running.indices)
        if len(ended) == len(prompts):
            break
        if running.indices and not set(running.indices) <= ended:
            _step(model, running, sampling, generator)
            before = len(ended)
            _note(running, written, running.indices, stops, max_new_tokens, ended)
            if len(ended) > before:
                on_progress(len(ended))
    return written


def _take(waiting: list[int], prompts: Sequence[Sequence[int]], count: int) -> list[int]:
    """The next prompts, longest first, as many as may be run at once."""
    new: list[int] = []
    while waiting and len(new) < count:
        width = len(prompts[new[0] if new else waiting[-1]])
        if new and (len(new) + 1) * width > _PROMPT_TOKENS:
            break
        new.append(waiting.pop())
    return new


def _start(
    model: Any, prompts: Sequence[Sequence[int]], indices: list[int], sampling: Sampling, generator: torch.Generator
) -> _Running:
    from transformers.cache_utils import DynamicCache

    width = max(len(prompt) for prompt in prompts)
    input_ids_BT = torch.zeros((len(prompts), width), dtype=torch.int64)
    mask_BT = torch.zeros_like(input_ids_BT)
    for row, prompt in enumerate(prompts):
        input_ids_BT[row, width - len(prompt) :] = torch.tensor(list(prompt))
        mask_BT[row, width - len(prompt) :] = 1
    input_ids_BT, mask_BT = input_ids_BT.to(model.device), mask_BT.to(model.device)
    cache = DynamicCache()
    output = model(
        input_ids=input_ids_BT,
        attention_mask=mask_BT,
        position_ids=(mask_BT.cumsum(1) - 1).clamp(min=0),
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    last_B = choose(output.logits[:, -1], sampling, generator)
    return _Running(list(indices), [(layer.keys, layer.values) for layer in cache.layers], mask_BT, last_B)


def _step(model: Any, running: _Running, sampling: Sampling, generator: torch.Generator) -> None:
    """One more token of every row; those that have ended go along unread."""
    from transformers.cache_utils import DynamicCache

    assert running.newest is not None
    running.attention = torch.cat([running.mask, torch.ones_like(running.mask[:, :1])], dim=1)
    cache = DynamicCache(ddp_cache_data=running.layers)
    output = model(
        input_ids=running.newest[:, None],
        attention_mask=running.attention,
        position_ids=running.attention.sum(1, keepdim=True) - 1,
        past_key_values=cache,
        use_cache=True,
    )
    running.layers = [(layer.keys, layer.values) for layer in cache.layers]
    running.newest = choose(output.logits[:, -1], sampling, generator)


def choose(logits_BV: torch.Tensor, sampling: Sampling, generator: torch.Generator) -> torch.Tensor:
    """The next token of each row, shape (B,)."""
    if sampling.temperature == 0:
        return logits_BV.argmax(-1)
    from transformers import MinPLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits_BV = logits_BV.float() / sampling.temperature
    warpers = [
        *([TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []),
        *([TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []),
        *([MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []),
    ]
    for warper in warpers:
        logits_BV = warper(None, logits_BV)
    return torch.multinomial(logits_BV.softmax(-1), 1, generator=generator)[:, 0]


def _note(
    running: _Running,
    written: list[list[int]],
    indices: Sequence[int],
    stops: frozenset[int],
    max_new_tokens: Sequence[int],
    ended: set[int],
) -> None:
    """Write down the newest token of the rows `indices`, and which have ended with it."""
    assert running.newest is not None
    wanted = set(indices)
    for index, token in zip(running.indices, running.newest.tolist(), strict=True):
        if index in wanted and index not in ended:
            written[index].append(token)
            if token in stops or len(written[index]) >= max_new_tokens[index]:
                ended.add(index)


def _keep(running: _Running, ended: set[int]) -> None:
    """Take out the rows that have ended, and the columns of the cache that no other row has."""
    kept = [row for row, index in enumerate(running.indices) if index not in ended]
    if len(kept) == len(running.indices):
        return
    running.indices = [running.indices[row] for row in kept]
    if not kept:
        running.layers, running.attention, running.newest = [], None, None
        return
    rows = torch.tensor(kept, device=running.mask.device)
    mask_BT = running.mask[rows]
    first = int(mask_BT.any(0).int().argmax())
    running.attention = mask_BT[:, first:]
    running.newest = running.newest[rows] if running.newest is not None else None
    running.layers = [(keys[rows][:, :, first:], values[rows][:, :, first:]) for keys, values in running.layers]


def _join(running: _Running, new: _Running) -> None:
    """Add rows, both sides padded on the left to the same width."""
    if running.indices:
        assert running.newest is not None
        assert new.newest is not None
        width = max(running.mask.shape[1], new.mask.shape[1])
        new.newest = torch.cat([running.newest, new.newest])
        new.layers = [
            (torch.cat([_pad(a, width), _pad(c, width)]), torch.cat([_pad(b, width), _pad(d, width)]))
            for (a, b), (c, d) in zip(running.layers, new.layers, strict=True)
        ]
        padded = [
            torch.nn.functional.pad(mask_BT, (width - mask_BT.shape[1], 0)) for mask_BT in (running.mask, new.mask)
        ]
        new.attention = torch.cat(padded)
    running.indices = [*running.indices, *new.indices]
    running.layers, running.attention, running.newest = new.layers, new.attention, new.newest


def _pad(states: torch.Tensor, width: int) -> torch.Tensor:
    return torch.nn.functional.pad(states, (0, 0, width - states.shape[2], 0))
