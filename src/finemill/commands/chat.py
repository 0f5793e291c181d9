"""`finemill chat MODEL`: ask a model, in a conversation or one question from a pipe."""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from typing import Any, Protocol

from finemill.commands.chat_session import Session
from finemill.commands.model_argument import add_model_arguments, found_model
from finemill.errors import UserError
from finemill.models.reply import End, Piece, collect
from finemill.models.sampling import GREEDY, Sampling, read_generation_defaults, read_model_type, recommended_sampling
from finemill.registry.find_model import FoundModel

_PRESETS = ("recommended", "greedy")
_OVERRIDES = ("temperature", "top_p", "top_k", "min_p", "seed")


class _Streams(Protocol):
    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        thinking: bool | None = None,
    ) -> Iterator[Piece | End]: ...


@dataclass(frozen=True)
class Asked:
    """A model that is ready, and how it is asked."""

    name: str
    model: _Streams
    max_new_tokens: int
    preset: str
    overrides: Mapping[str, Any]
    model_type: str | None
    defaults: Mapping[str, object]

    def sampling(self, thinking: bool | None) -> Sampling:
        """What is recommended for the mode, or the greedy choice, with what the user set."""
        recommended = recommended_sampling(self.model_type, self.defaults, thinking=thinking is not False)
        chosen = GREEDY if self.preset == "greedy" else recommended
        return replace(chosen, **self.overrides)

    def stream(self, messages: Sequence[Mapping[str, str]], thinking: bool | None) -> Iterator[Piece | End]:
        """The answer to `messages`."""
        return self.model.stream(
            messages, sampling=self.sampling(thinking), max_new_tokens=self.max_new_tokens, thinking=thinking
        )


def execute(name: str, arguments: list[str]) -> int:
    """Open the model, and talk. Returns: the exit code."""
    parsed = _parser(name).parse_intermixed_args(arguments)
    question = parsed.question
    if question is None and not sys.stdin.isatty():
        question = _read_question()
    if question is not None and not question.strip():
        raise UserError("the question is empty: write it behind the model, or pipe it in")
    with ExitStack() as stack:
        asked = _open(parsed, stack)
        if question is None:
            if parsed.json:
                raise UserError("--json is for one question: write it behind the model, or pipe it in")
            Session(asked.name, asked.stream, parsed.system, parsed.thinking).talk()
            return 0
        return _ask_once(asked, question.strip(), parsed)


def _read_question() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} (byte {error.start})") from None


def _parser(name: str) -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=f"finemill {name}",
        description="Ask a model. In a conversation /think and /no_think switch its thinking, /help lists the rest. "
        "A question behind the model or from a pipe is answered once: the answer on standard output, the thinking on "
        "standard error.",
        allow_abbrev=False,
    )
    add_model_arguments(parser)
    parser.add_argument("question", metavar="QUESTION", nargs="?", help="one question; default: a conversation")
    parser.add_argument("--json", action="store_true", help="thinking, answer and how it ended as one JSON object")
    parser.add_argument("--system", metavar="TEXT", help="system prompt")
    mode = parser.add_mutually_exclusive_group()
    mode.add_argument("--think", dest="thinking", action="store_true", default=None, help="begin with thinking")
    mode.add_argument("--no-think", dest="thinking", action="store_false", help="begin without thinking")
    parser.add_argument("--preset", choices=_PRESETS, default="recommended", help="sampling (default: recommended)")
    for option in _OVERRIDES:
        kind = int if option in ("top_k", "seed") else float
        parser.add_argument(f"--{option.replace('_', '-')}", type=kind, metavar="N", help=f"{option} over the preset's")
    parser.add_argument("--max-new-tokens", type=int, default=2048, metavar="N", help="longest answer (default: 2048)")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantize a folder's weights to NF4")
    return parser


def _open(parsed: argparse.Namespace, stack: ExitStack) -> Asked:
    overrides = {name: value for name in _OVERRIDES if (value := getattr(parsed, name)) is not None}
    _check(overrides, parsed.max_new_tokens)
    found = found_model(parsed)
    model: _Streams
    model_type: str | None = None
    defaults: Mapping[str, object] = {}
    if found.folder:
        from finemill.models.chat import LocalChat

        model = LocalChat(found.folder, found.adapter, load_in_4bit=parsed.load_in_4bit)
        model_type, defaults = read_model_type(found.folder), read_generation_defaults(found.folder)
    else:
        from finemill.models.endpoint import Endpoint

        url, model_type = _served(found, parsed, stack)
        model = Endpoint(url, parsed.model_name if found.url else None)
    return Asked(found.name, model, parsed.max_new_tokens, parsed.preset, overrides, model_type, defaults)


def _served(found: FoundModel, parsed: argparse.Namespace, stack: ExitStack) -> tuple[str, str | None]:
    """The address of the model, and its family where it is known."""
    if found.gguf is None:
        assert found.url is not None
        return found.url, None
    from finemill.models.cores import available_cores
    from finemill.models.llama_cpp import architecture, serve_chats

    length = parsed.context_length or 8192
    address = stack.enter_context(serve_chats(found.gguf, available_cores(), length))
    return address, architecture(found.gguf)


def _check(overrides: Mapping[str, float], max_new_tokens: int) -> None:
    limits = {"temperature": (0.0, 5.0), "top_p": (1e-6, 1.0), "top_k": (0, 1_000_000), "min_p": (0.0, 1.0)}
    for name, (low, high) in limits.items():
        value = overrides.get(name)
        if value is not None and not low <= value <= high:
            raise UserError(f"--{name.replace('_', '-')} {value:g}: allowed is {low:g} to {high:g}")
    if max_new_tokens < 1:
        raise UserError(f"--max-new-tokens {max_new_tokens}: allowed is 1 or more")


def _ask_once(asked: Asked, question: str, parsed: argparse.Namespace) -> int:
    system = [{"role": "system", "content": parsed.system}] if parsed.system else []
    messages = [*system, {"role": "user", "content": question}]
    reply = collect(asked.stream(messages, parsed.thinking))
    if parsed.json:
        sampling = asdict(asked.sampling(parsed.thinking))
        print(
            json.dumps(
                {"model": asked.name, "question": question, **asdict(reply), "sampling": sampling}, ensure_ascii=False
            )
        )
        return 0
    if reply.thinking:
        print(reply.thinking, file=sys.stderr)
    print(reply.answer)
    if not reply.finished:
        print(f"finemill chat: cut after {parsed.max_new_tokens} tokens: raise --max-new-tokens", file=sys.stderr)
    return 0
