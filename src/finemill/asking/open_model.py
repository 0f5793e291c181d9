"""A model that was found, loaded or connected to, and asked in chats."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

from finemill.asking.find_model import FoundModel
from finemill.models.reply import End, Piece, Reply, collect
from finemill.models.sampling import GREEDY, Sampling, read_generation_defaults, read_model_type, recommended_sampling

Preset = Literal["recommended", "greedy"]
Messages = Sequence[Mapping[str, str]]
# Requests that a server has at once; llama.cpp's and vLLM batch them.
_PARALLEL = 8


class _Streams(Protocol):
    def stream(
        self, messages: Messages, *, sampling: Sampling, max_new_tokens: int, thinking: bool | None = None
    ) -> Iterator[Piece | End]: ...


@dataclass(frozen=True)
class OpenModel:
    """A model that answers. `batch` answers many chats at once where the model is in this process."""

    name: str
    streams: _Streams
    model_type: str | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    batch: Callable[..., list[Reply]] | None = None

    def sampling(self, preset: Preset, thinking: bool | None, overrides: Mapping[str, Any]) -> Sampling:
        """What is recommended for the mode, or the greedy choice, with what the user set."""
        recommended = recommended_sampling(self.model_type, self.defaults, thinking=thinking is not False)
        return replace(GREEDY if preset == "greedy" else recommended, **overrides)

    def answers(
        self,
        chats: Sequence[Messages],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        thinking: bool | None,
        on_progress: Callable[[int], None] = lambda done: None,
    ) -> list[Reply]:
        """The answers to many chats, in their order; `on_progress` gets the number of chats answered so far."""
        if self.batch is not None:
            return self.batch(
                chats, sampling=sampling, max_new_tokens=max_new_tokens, thinking=thinking, on_progress=on_progress
            )

        def one(chat: Messages) -> Reply:
            return collect(
                self.streams.stream(chat, sampling=sampling, max_new_tokens=max_new_tokens, thinking=thinking)
            )

        replies: list[Reply] = []
        with ThreadPoolExecutor(_PARALLEL) as pool:
            for reply in pool.map(one, chats):
                replies.append(reply)
                on_progress(len(replies))
        return replies


@contextmanager
def open_model(
    found: FoundModel,
    *,
    model_name: str | None = None,
    context_length: int | None = None,
    load_in_4bit: bool = False,
    parallel: int = 1,
) -> Iterator[OpenModel]:
    """Load the model, or connect to it, while the block runs.

    Args:
        model_name: what an endpoint calls the model. Default: its first.
        context_length: tokens of a chat with a GGUF file. Default: 8192.
        parallel: chats that a GGUF file is to answer at once.
    Raises: UserError: a tokenizer without a chat template, an endpoint without a model. StepError: llama.cpp refuses
    the file. TemporaryError: the endpoint is out of reach.
    """
    if found.folder is not None:
        from finemill.models.chat import LocalChat

        chat = LocalChat(found.folder, found.adapter, load_in_4bit=load_in_4bit)
        yield OpenModel(
            found.name, chat, read_model_type(found.folder), read_generation_defaults(found.folder), chat.answers
        )
        return
    from finemill.models.endpoint import Endpoint

    if found.gguf is None:
        assert found.url is not None
        yield OpenModel(found.name, Endpoint(found.url, model_name))
        return
    from finemill.models.cores import available_cores
    from finemill.models.llama_cpp import architecture, serve_chats

    with serve_chats(found.gguf, available_cores(), context_length or 8192, parallel=parallel) as address:
        yield OpenModel(found.name, Endpoint(address), architecture(found.gguf))
