"""`finemill chat MODEL`: ask a model, in a conversation or one question from a pipe."""

import argparse
import json
import sys
from collections.abc import Iterator
from dataclasses import asdict

from finemill.asking.open_model import Messages, open_model
from finemill.commands.chat_session import Session
from finemill.commands.model_argument import add_model_arguments, add_sampling_arguments, found_model, read_overrides
from finemill.commands.parser import CommandParser
from finemill.errors import UserError
from finemill.models.reply import End, Piece, Reply, collect


def execute(name: str, arguments: list[str]) -> int:
    """Open the model, and talk. Returns: the exit code."""
    parsed = _parser(name).parse_intermixed_args(arguments)
    found, question = found_model(parsed), parsed.question
    if question is None and not sys.stdin.isatty():
        question = _read_question()
    if question is not None and not question.strip():
        raise UserError("the question is empty: write it behind the model, or pipe it in")
    overrides = read_overrides(parsed)
    options = {
        "model_name": parsed.model_name, "context_length": parsed.context_length, "load_in_4bit": parsed.load_in_4bit
    }  # fmt: skip
    with open_model(found, **options) as model:

        def ask(messages: Messages, thinking: bool | None) -> Iterator[Piece | End]:
            return model.streams.stream(
                messages,
                sampling=model.sampling(parsed.preset, thinking, overrides),
                max_new_tokens=parsed.max_new_tokens,
                thinking=thinking,
            )

        if question is None:
            if parsed.json:
                raise UserError("--json is for one question: write it behind the model, or pipe it in")
            Session(model.name, ask, parsed.system, parsed.thinking).talk()
            return 0
        system = [{"role": "system", "content": parsed.system}] if parsed.system else []
        reply = collect(ask([*system, {"role": "user", "content": question.strip()}], parsed.thinking))
        if parsed.json:
            sampling = asdict(model.sampling(parsed.preset, parsed.thinking, overrides))
            shown = {"model": model.name, "question": question.strip(), **asdict(reply), "sampling": sampling}
            print(json.dumps(shown, ensure_ascii=False))
        else:
            _print_reply(reply, parsed.max_new_tokens)
    return 0


def _read_question() -> str:
    try:
        return sys.stdin.read()
    except UnicodeDecodeError as error:
        raise UserError(f"standard input is not {error.encoding} (byte {error.start})") from None


def _parser(name: str) -> argparse.ArgumentParser:
    parser = CommandParser(
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
    add_sampling_arguments(parser, preset="recommended")
    parser.add_argument("--load-in-4bit", action="store_true", help="quantize a folder's weights to NF4")
    return parser


def _print_reply(reply: Reply, max_new_tokens: int) -> None:
    if reply.thinking:
        print(reply.thinking, file=sys.stderr)
    print(reply.answer)
    if not reply.finished:
        print(f"finemill chat: cut after {max_new_tokens} tokens: raise --max-new-tokens", file=sys.stderr)
