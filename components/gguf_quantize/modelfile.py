"""A Modelfile, so that `ollama create NAME -f Modelfile` gives the model with the turns, stops and sampling it knows.

Ollama runs the GGUF file's own chat template where that does more than the Modelfile's (tools), or the Modelfile has
none. The TEMPLATE line is for all other cases, and for older versions: the same turns in Go's template language. It is
written only if it gives, on a few chats, the prompts that the chat template gives.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

Messages = Sequence[Mapping[str, str]]
# Words that no template holds, so that what stands between them is the template's own.
_SYSTEM, _QUESTION, _ANSWER, _AGAIN, _THOUGHT = "Sys7tem", "Ques7tion", "Ans7wer", "Ag7ain", "Tho7ught"
_CHATS: tuple[Messages, ...] = (
    [{"role": "user", "content": "How many?"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "How many?"}],
    [
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Two.\nOr three."},
        {"role": "user", "content": "Which?"},
    ],
    [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "How many?"},
        {"role": "assistant", "content": "Two."},
        {"role": "user", "content": "Which?"},
        {"role": "assistant", "content": "Both."},
        {"role": "user", "content": "Why?"},
    ],
)


@dataclass(frozen=True)
class Turns:
    """What a chat template writes around messages."""

    before: Mapping[str, str]
    """In front of a message, by role."""
    after: Mapping[str, str]
    """Behind it."""
    system: str | None
    """The system prompt of a chat that brings none."""
    generation: str
    """What opens the answer."""
    generation_without_thinking: str
    """The same for an answer without thinking."""
    thought: tuple[str, str] | None
    """What stands around the thinking of an answer; None for a template that knows no thinking."""

    @property
    def texts(self) -> Iterator[str]:
        """All that is written around messages."""
        yield from (*self.before.values(), *self.after.values(), self.generation, self.generation_without_thinking)
        yield from self.thought or ()

    def render(self, messages: Messages, *, thinking: bool) -> str:
        """The prompt for the next answer."""
        shown = list(messages)
        if self.system is not None and shown[0]["role"] != "system":
            shown = [{"role": "system", "content": self.system}, *shown]
        body = "".join(self.before[m["role"]] + m["content"] + self.after[m["role"]] for m in shown)
        return body + (self.generation if thinking else self.generation_without_thinking)

    def go_template(self) -> str:
        """The same in Go's template language, with Ollama's variables; `.Messages` holds system messages as well."""
        messages = "$i, $_ := .Messages" if self.thought else ".Messages"
        start = "{{- "
        if self.system == "":
            # A system turn without a prompt, which a SYSTEM line cannot say.
            empty = self.before["system"] + self.after["system"]
            start = f'{{{{- if ne (index .Messages 0).Role "system" }}}}{empty}{{{{ end }}}}{{{{ '
        return f"{start}range {messages} }}}}{self._message()}{{{{ end }}}}{self._generation()}"

    def _message(self) -> str:
        content = "{{ .Content }}"
        if self.thought:
            opening, closing = self.thought
            # Thinking of earlier answers is left out; an answer to be continued keeps its own.
            last = "eq (len (slice $.Messages $i)) 1"
            content = f"{{{{ if and .Thinking ({last}) }}}}{opening}{{{{ .Thinking }}}}{closing}{{{{ end }}}}{content}"
        alike = {
            (self.before[role].replace(role, "{{ .Role }}", 1), self.after[role])
            for role in ("system", "user", "assistant")
        }
        if len(alike) == 1:
            before, after = alike.pop()
            return f"{before}{content}{after}"
        branches = [f"{self.before[role]}{content}{self.after[role]}" for role in ("system", "user", "assistant")]
        return (
            f'{{{{ if eq .Role "system" }}}}{branches[0]}{{{{ else if eq .Role "assistant" }}}}{branches[2]}'
            f"{{{{ else }}}}{branches[1]}{{{{ end }}}}"
        )

    def _generation(self) -> str:
        on, off = self.generation, self.generation_without_thinking
        if on == off or not self.thought:
            return on
        shared = next((i for i, (a, b) in enumerate(zip(on, off, strict=False)) if a != b), min(len(on), len(off)))
        rest = f"{{{{ else }}}}{on[shared:]}" if on[shared:] else ""
        return f"{on[:shared]}{{{{ if and $.IsThinkSet (not $.Think) }}}}{off[shared:]}{rest}{{{{ end }}}}"


def modelfile(gguf_name: str, tokenizer: Any, stop_texts: Sequence[str], sampling: Mapping[str, float]) -> str:
    """Text of the Modelfile.

    Args:
        stop_texts: what ends a turn; one that Ollama's parser could not read back is left out.
        sampling: Ollama's parameter names with the model's recommended values.
    """
    lines = [f"FROM ./{gguf_name}"]
    turns = find_turns(tokenizer)
    # Without its default system prompt a template would be another one.
    if turns and _can_be_written(turns.go_template()) and _can_be_written(turns.system or ""):
        lines.append(f'TEMPLATE """{turns.go_template()}"""')
        lines += [f'SYSTEM """{turns.system}"""'] if turns.system else []
    for text in filter(_can_be_written, stop_texts):
        lines.append(f'PARAMETER stop """{text}"""' if set('"\n') & set(text) else f'PARAMETER stop "{text}"')
    lines += [f"PARAMETER {name} {value:g}" for name, value in sampling.items()]
    return "\n".join(lines) + "\n"


def find_turns(tokenizer: Any) -> Turns | None:
    """What the tokenizer's chat template writes, if that is messages one after the other; None otherwise."""
    try:
        turns = _probe(tokenizer)
        if turns is None:
            return None
        same = all(
            turns.render(chat, thinking=thinking) == _render(tokenizer, chat, enable_thinking=thinking)
            for chat in _CHATS
            for thinking in (True, False)
        )
        # Go's own marks would be executed.
        same = same and not any("{{" in text for text in turns.texts)
    # Templates are programs of other people: some take no system message, some divide by 0.
    except Exception:
        return None
    return turns if same else None


def _probe(tokenizer: Any) -> Turns | None:
    # A date would be for ever that of the export.
    if not tokenizer.chat_template or "strftime_now" in str(tokenizer.chat_template):
        return None
    chat = [
        {"role": "system", "content": _SYSTEM},
        {"role": "user", "content": _QUESTION},
        {"role": "assistant", "content": _ANSWER},
        {"role": "user", "content": _AGAIN},
    ]
    first, second, third, fourth, after_user = _between(
        _render(tokenizer, chat, add_generation_prompt=False), _SYSTEM, _QUESTION, _ANSWER, _AGAIN
    )
    alone = _render(tokenizer, chat[1:2], add_generation_prompt=False).partition(_QUESTION)[0]
    on, off = (
        _render(tokenizer, chat, enable_thinking=thinking).partition(_AGAIN)[2].removeprefix(after_user)
        for thinking in (True, False)
    )
    if not third.startswith(after_user):
        return None
    # Where the answer's end and the next question's beginning meet: most likely the answer ends as a question does.
    ends = sorted(range(len(fourth) + 1), key=lambda end: fourth[:end] != after_user)
    for end in ends:
        before_user = fourth[end:]
        if not (second.endswith(before_user) and alone.endswith(before_user)):
            continue
        after_system = second.removesuffix(before_user)
        block = alone.removesuffix(before_user)
        default = block.removeprefix(first).removesuffix(after_system) if block else None
        if default is None or f"{first}{default}{after_system}" == block:
            return Turns(
                before={"system": first, "user": before_user, "assistant": third.removeprefix(after_user)},
                after={"system": after_system, "user": after_user, "assistant": fourth[:end]},
                system=default,
                generation=on,
                generation_without_thinking=off,
                thought=_thought(tokenizer, chat) if on != off else None,
            )
    return None


def _thought(tokenizer: Any, chat: list[dict[str, str]]) -> tuple[str, str]:
    """What stands around an answer's thinking, in an answer that is to be continued."""
    answer = {"role": "assistant", "content": _ANSWER, "reasoning_content": _THOUGHT}
    text = _render(tokenizer, [*chat[:2], answer], add_generation_prompt=False)
    if text.count(_THOUGHT) == 1 and "<think>" in text:
        before, after = text.split(_THOUGHT)
        return "<think>" + before.rpartition("<think>")[2], after.partition(_ANSWER)[0]
    return "<think>\n", "\n</think>\n\n"


def _between(text: str, *words: str) -> list[str]:
    """What stands before, between and after `words`. Raises: ValueError: they are not there once, in that order."""
    parts = []
    for word in words:
        part, found, text = text.partition(word)
        if not found or word in text:
            raise ValueError(word)
        parts.append(part)
    return [*parts, text]


def _render(tokenizer: Any, messages: Messages, **options: Any) -> str:
    """The prompt, without the first token that llama.cpp adds by itself."""
    text: str = tokenizer.apply_chat_template(
        list(messages), tokenize=False, **{"add_generation_prompt": True, **options}
    )
    added = tokenizer("", add_special_tokens=True)["input_ids"]
    first = tokenizer.bos_token if added and added[0] == tokenizer.bos_token_id else None
    return text.removeprefix(first) if first else text


def _can_be_written(text: str) -> bool:
    """Whether Ollama's parser reads `text` back between quotes: it drops what does not print, and knows no escapes."""
    return '"""' not in text and all(char.isprintable() or char in "\n\t" for char in text)
