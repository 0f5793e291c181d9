"""A conversation at a terminal: the answer while it is written, thinking dimmed, switches in lines of their own."""

import sys
from collections.abc import Callable, Iterator, Mapping, Sequence

from finemill.errors import StepError
from finemill.models.reply import End, Piece, Reply, collect

_DIM, _PLAIN = "\x1b[2m", "\x1b[0m"
_HELP = """\
/think, /no_think   switch thinking on or off; also at the end of a question
/system TEXT        another system prompt, and a new conversation
/reset              a new conversation
/exit               leave; so does Ctrl-D. Ctrl-C stops an answer"""

Ask = Callable[[Sequence[Mapping[str, str]], bool | None], Iterator[Piece | End]]


class Session:
    """One conversation.

    Args:
        ask: streams the answer to messages, with thinking on, off, or as the template has it.
    """

    def __init__(self, name: str, ask: Ask, system: str | None, thinking: bool | None) -> None:
        self._name = name
        self._ask = ask
        self._system = system
        self._thinking = thinking
        self._turns: list[dict[str, str]] = []
        self._dims = sys.stdout.isatty()

    def talk(self) -> None:
        """Read and answer lines until the user leaves."""
        import readline  # noqa: F401 gives `input` a line that can be edited

        print(f"{self._name}; /help lists what can be switched")
        while True:
            try:
                line = input("> ").strip()
            except (EOFError, KeyboardInterrupt):
                print()
                return
            if line in ("/exit", "/quit"):
                return
            if line:
                self.take(line)

    def take(self, line: str) -> None:
        """Do what one line asks for."""
        question = self._switched(line)
        if question:
            self._answer(question)

    def _switched(self, line: str) -> str:
        """What is left of `line` as a question, "" where it only switched something."""
        for word, thinking in (("/think", True), ("/no_think", False)):
            if line == word or line.endswith((f" {word}", f"\n{word}")):
                self._thinking = thinking
                question = line.removesuffix(word).strip()
                if not question:
                    print(f"thinking is {'on' if thinking else 'off'}")
                return question
        if line == "/reset":
            self._turns = []
        elif line == "/system" or line.startswith("/system "):
            self._system, self._turns = line.removeprefix("/system").strip() or None, []
        elif line.startswith("/"):
            print(_HELP)
        else:
            return line
        return ""

    def _answer(self, question: str) -> None:
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = {"role": "user", "content": question}
        try:
            reply = self._show([*system, *self._turns, asked])
        except StepError as error:
            print(f"finemill chat: {error}", file=sys.stderr)
            return
        if reply:
            self._turns += [asked, {"role": "assistant", "content": reply.answer}]

    def _show(self, messages: Sequence[Mapping[str, str]]) -> Reply | None:
        """Print an answer as it comes. Returns: None where Ctrl-C stopped it: it is no part of the conversation."""
        events: list[Piece | End] = []
        stream = self._ask(messages, self._thinking)
        dim = False
        try:
            for event in stream:
                events.append(event)
                if isinstance(event, Piece):
                    if event.thinking != dim:
                        dim = event.thinking
                        self._mark(dim)
                    print(event.text, end="", flush=True)
        except KeyboardInterrupt:
            print(f"{_PLAIN if self._dims else ''}\n(stopped)")
            return None
        finally:
            close = getattr(stream, "close", None)
            if close:
                close()
        reply = collect(events)
        print(_PLAIN if self._dims and dim else "")
        if not reply.finished:
            print("(cut at --max-new-tokens)")
        return reply

    def _mark(self, thinking: bool) -> None:
        dim, plain = (_DIM, f"{_PLAIN}\n") if self._dims else ("[thinking] ", "\n[answer] ")
        print(dim if thinking else plain, end="")
