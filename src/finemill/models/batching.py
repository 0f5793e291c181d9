"""Continuous batching: a row that has ended makes room for the next one, and none waits for the longest of its batch.

Prompts that come later are run by themselves and put where rows have ended, see row_cache.py. On a GPU the forward
pass of one token per row is a CUDA graph.
"""

# B rows, T tokens of a prompt, V vocabulary

from collections.abc import Callable, Sequence
from typing import Any

import torch

from finemill.models.decode_graph import CaptureError, DecodeGraph, can_capture
from finemill.models.row_cache import Layers, RowCache
from finemill.models.sampling import Sampling

# Padded tokens of prompts that are run at once: their activations are in memory together.
_PROMPT_TOKENS = 16384
# A share of the rows has ended before others are put in their places, or the batch gets smaller: a prompt costs more
# than a token, and a smaller batch a new graph.
_SHARE_REPLACED, _SHARE_GIVEN_UP, _SHARE_GIVEN_UP_OF_GRAPH = 8, 8, 2
# A graph costs as much as two passes without one.
_WORTH_A_GRAPH = 8
# In the place of a prompt.
_NONE = -1


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
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    batch = _Batch(model, min(batch_size, len(prompts)), sampling)
    written: list[list[int]] = [[] for _ in prompts]
    ended: set[int] = set()

    def note(rows: Sequence[int], tokens: Sequence[int]) -> None:
        for index, token in ((batch.indices[row], token) for row, token in zip(rows, tokens, strict=True)):
            written[index].append(token)
            if token in stops or len(written[index]) >= max_new_tokens[index]:
                ended.add(index)

    stops = frozenset(stop_token_ids)
    while len(ended) < len(prompts):
        before = len(ended)
        free = [row for row, index in enumerate(batch.indices) if index == _NONE or index in ended]
        if waiting and len(free) >= max(1, len(batch.indices) // _SHARE_REPLACED):
            while waiting and free:
                new = _take(waiting, prompts, len(free))
                rows, free = free[: len(new)], free[len(new) :]
                on_batch(new)
                note(rows, batch.start(rows, new, [prompts[index] for index in new]))
            on_batch(batch.places)
        elif not waiting and batch.give_up(free):
            on_batch(batch.places)
        rows = [row for row, index in enumerate(batch.indices) if index not in ended]
        if rows:
            longest = max(max_new_tokens[batch.indices[row]] - len(written[batch.indices[row]]) for row in rows)
            tokens = batch.step(rows, longest, len(prompts[waiting[-1]]) if waiting else 0)
            note(rows, [tokens[row] for row in rows])
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


class _Batch:
    """Rows that are answered together, each with the place of its prompt in the list of prompts."""

    def __init__(self, model: Any, num_rows: int, sampling: Sampling) -> None:
        self.indices = [_NONE] * num_rows
        self._model, self._sampling = model, sampling
        self._generator = torch.Generator(device=model.device).manual_seed(sampling.seed)
        self._newest_B = torch.zeros(num_rows, dtype=torch.int64, device=model.device)
        self._cache: RowCache | None = None
        self._graph: DecodeGraph | None = None
        self._with_graph = can_capture(model)

    @property
    def places(self) -> list[int]:
        return [max(0, index) for index in self.indices]

    def start(self, rows: Sequence[int], indices: Sequence[int], prompts: Sequence[Sequence[int]]) -> list[int]:
        """Run prompts, which takes the places of `rows`. Returns: the first token of each answer."""
        layers, mask_BT, logits_BV = _run_prompts(self._model, prompts)
        if self._cache is None:
            self._cache = RowCache(layers, len(self.indices), mask_BT.shape[1])
        self._cache.place(rows, layers, mask_BT)
        first = choose(logits_BV, self._sampling, self._generator)
        self._newest_B[torch.tensor(rows, device=first.device)] = first
        for row, index in zip(rows, indices, strict=True):
            self.indices[row] = index
        return first.tolist()

    def give_up(self, free: Sequence[int]) -> bool:
        """Go on without the rows `free`, if they are many. Returns: whether it does."""
        kept = sorted(set(range(len(self.indices))) - set(free))
        share = _SHARE_GIVEN_UP_OF_GRAPH if self._graph else _SHARE_GIVEN_UP
        if not kept or len(free) < max(1, len(self.indices) // share):
            return False
        assert self._cache
        self._cache.keep(kept)
        self._newest_B = self._newest_B[torch.tensor(kept, device=self._newest_B.device)]
        self.indices = [self.indices[row] for row in kept]
        return True

    def step(self, rows: Sequence[int], longest: int, longest_waiting: int) -> list[int]:
        """One more token of every row; those that are not among `rows` go along unread.

        Args:
            longest: tokens that one of `rows` may still get.
            longest_waiting: length of the longest prompt that comes later.
        """
        assert self._cache
        self._cache.reserve(rows, longest_waiting)
        logits_BV = self._run_graph(longest)
        if logits_BV is None:
            logits_BV = self._run(rows)
        self._cache.advance()
        self._newest_B.copy_(choose(logits_BV, self._sampling, self._generator))
        return self._newest_B.tolist()

    def _run(self, rows: Sequence[int]) -> torch.Tensor:
        cache = self._cache
        assert cache
        columns = cache.used(rows)
        cache.mask_BT.index_fill_(1, cache.column, True)
        output = self._model(
            input_ids=self._newest_B[:, None],
            attention_mask=cache.mask_BT[:, columns],
            position_ids=cache.lengths_B[:, None],
            past_key_values=cache.for_model(columns),
            use_cache=True,
        )
        logits_BV: torch.Tensor = output.logits[:, -1]
        return logits_BV

    def _run_graph(self, longest: int) -> torch.Tensor | None:
        assert self._cache
        if not self._with_graph:
            return None
        if self._graph is None or self._graph.version != self._cache.version:
            self._graph = None
            if longest < _WORTH_A_GRAPH:
                return None
            try:
                self._graph = DecodeGraph(self._model, self._cache, self._newest_B)
            except CaptureError:
                self._with_graph = False
                return None
        return self._graph()


def _run_prompts(model: Any, prompts: Sequence[Sequence[int]]) -> tuple[Layers, torch.Tensor, torch.Tensor]:
    """Keys and values of prompts padded on the left, which columns are theirs, and the logits of the next token."""
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
    return [(layer.keys, layer.values) for layer in cache.layers], mask_BT, output.logits[:, -1]


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
