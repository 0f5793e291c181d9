"""A transformers model asked in a chat, its answer streamed while it is written."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from transformers import AutoTokenizer, StoppingCriteria
from transformers.generation.streamers import BaseStreamer

from finemill.artifacts.adapter import has_tokenizer
from finemill.errors import UserError
from finemill.models.adapter import load_adapter
from finemill.models.causal_lm import load_causal_lm, suitable_threads
from finemill.models.generation import (
    generate_answers,
    generation_config,
    stop_token_ids,
    without_own_generation_config,
)
from finemill.models.reply import End, Piece, Reply, ThinkingSplitter, collect
from finemill.models.rope import position_limit
from finemill.models.sampling import Sampling
from finemill.rows.answers import THINK_OPEN, plain_thinking

_LONGEST_MARK = 64
"""Characters at the end of a prompt that the mark of a thinking block is looked for in."""


class LocalChat:
    """A model in this process: a folder of weights, with an adapter on it or without."""

    def __init__(self, folder: Path, adapter: Path | None = None, *, load_in_4bit: bool = False) -> None:
        source = adapter if adapter and has_tokenizer(adapter) else folder
        self._tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False)
        if not self._tokenizer.chat_template:
            raise UserError(f"the tokenizer in {source} has no chat template: a base model cannot be asked in a chat")
        base = load_causal_lm(folder, load_in_4bit=load_in_4bit)
        self._model = load_adapter(base, adapter) if adapter else base
        self._stops = stop_token_ids(self._tokenizer, folder)

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        thinking: bool | None = None,
    ) -> Iterator[Piece | End]:
        """The answer to a chat as it is written. Whoever stops reading stops the model.

        Args:
            thinking: None leaves it to the template; otherwise its `enable_thinking`.
        Raises: UserError: the template refuses the chat, or it is longer than the model's context.
        """
        prompt = self._prompt(messages, thinking)
        ids = self._tokenizer(prompt, add_special_tokens=False)["input_ids"]
        room = self._room(len(ids), max_new_tokens)
        splitter = ThinkingSplitter(opened=_opened(prompt))
        tokens = _Tokens()
        writer = threading.Thread(target=self._write, args=(ids, sampling, room, tokens), daemon=True)
        writer.start()
        written: list[int] = []
        shown = ""
        finished = False
        try:
            while (token := tokens.next()) is not None:
                written.append(token)
                finished = token in self._stops
                text = self._tokenizer.decode(written[:-1] if finished else written, skip_special_tokens=False)
                # A character may take several tokens.
                if finished or not text.endswith("\N{REPLACEMENT CHARACTER}"):
                    yield from splitter.add(text[len(shown) :])
                    shown = text
            yield from splitter.close()
            yield End(finished, len(written))
        finally:
            tokens.stopped.set()
            writer.join()

    def answers(
        self,
        chats: Sequence[Sequence[Mapping[str, str]]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        thinking: bool | None = None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Reply]:
        """The answers to many chats, batch by batch. Raises: UserError: as `stream`."""
        prompts = [self._prompt(chat, thinking) for chat in chats]
        ids = [self._tokenizer(prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
        room = min((self._room(len(prompt), max_new_tokens) for prompt in ids), default=max_new_tokens)
        with suitable_threads(self._model):
            found = generate_answers(
                self._model,
                self._tokenizer,
                ids,
                stop_token_ids=self._stops,
                max_new_tokens=room,
                sampling=sampling,
                on_progress=on_progress,
            )
        return [
            collect([*_split(answer.text, opened=_opened(prompt)), End(answer.finished, answer.num_tokens)])
            for prompt, answer in zip(prompts, found, strict=True)
        ]

    def _prompt(self, messages: Sequence[Mapping[str, str]], thinking: bool | None) -> str:
        options = {} if thinking is None else {"enable_thinking": thinking}
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, **options
            )
        # Templates are programs of other people.
        except Exception as error:
            raise UserError(f"the model's chat template refuses the chat: {error}") from None
        return text

    def _room(self, num_prompt_tokens: int, max_new_tokens: int) -> int:
        limit = position_limit(self._model.config)
        if limit is None:
            return max_new_tokens
        if num_prompt_tokens >= limit:
            raise UserError(f"the chat has {num_prompt_tokens} tokens, the model takes {limit}: begin a new one")
        return min(max_new_tokens, limit - num_prompt_tokens)

    def _write(self, ids: Sequence[int], sampling: Sampling, max_new_tokens: int, tokens: "_Tokens") -> None:
        input_ids_BT = torch.tensor([list(ids)], device=self._model.device)
        pad_id = self._tokenizer.pad_token_id
        config = generation_config(self._stops, self._stops[0] if pad_id is None else pad_id, max_new_tokens, sampling)
        try:
            torch.manual_seed(sampling.seed)
            with torch.inference_mode(), without_own_generation_config(self._model), suitable_threads(self._model):
                self._model.generate(
                    input_ids=input_ids_BT,
                    attention_mask=torch.ones_like(input_ids_BT),
                    generation_config=config,
                    streamer=tokens,
                    stopping_criteria=[tokens],
                )
            tokens.fail(None)
        except Exception as error:
            tokens.fail(error)


def _opened(prompt: str) -> bool:
    """Whether the prompt has opened the thinking block."""
    return plain_thinking(prompt[-_LONGEST_MARK:]).rstrip().endswith(THINK_OPEN)


def _split(text: str, *, opened: bool) -> Iterator[Piece]:
    splitter = ThinkingSplitter(opened=opened)
    yield from splitter.add(text)
    yield from splitter.close()


class _Tokens(BaseStreamer, StoppingCriteria):  # type: ignore[misc]
    """Carries tokens from the thread that generates to the one that shows them."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self._queue: SimpleQueue[int | None] = SimpleQueue()
        self._error: Exception | None = None
        self._has_prompt = False

    def put(self, value: torch.Tensor) -> None:
        """The prompt comes first."""
        if self._has_prompt:
            for token in value.flatten().tolist():
                self._queue.put(token)
        self._has_prompt = True

    def end(self) -> None:
        """Nothing to do: `fail` ends the stream, with an error or without."""

    def fail(self, error: Exception | None) -> None:
        self._error = error
        self._queue.put(None)

    def next(self) -> int | None:
        token = self._queue.get()
        if token is None and self._error:
            raise self._error
        return token

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> torch.Tensor:
        return torch.full((len(input_ids),), self.stopped.is_set(), dtype=torch.bool, device=input_ids.device)
