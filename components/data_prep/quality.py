"""What is doubtful about a row that can be learned: named and counted, left out only if the user says so."""

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

from finemill.rows.conversation import Conversation
from finemill.rows.thinking import split_thinking

Flag = Literal[
    "control_tokens",
    "damaged_encoding",
    "language_mix",
    "placeholder",
    "refusal",
    "repeated_turn",
    "repetition",
    "truncated_answer",
]

_CONTROL = re.compile(
    r"<\|[a-z_0-9]+\|>|</?s>|\[/?INST\]|<(?:start|end)_of_turn>|<\uff5c[^\uff5c]{1,40}\uff5c>", re.IGNORECASE
)
# UTF-8 read as Latin-1 or Windows-1252, and what a decoder puts where it cannot go on.
_DAMAGED = re.compile("\ufffd|\u00c3[\u0080-\u00bf]|\u00e2\u20ac[\u2122\u0153\u201c\u009d\u00a6]|\u00c2[\u00a0-\u00bf]")
_PLACEHOLDER = re.compile(
    r"\[(?:insert|your|enter|add|todo)\b[^\]\n]{0,60}\]|<(?:insert|your)\b[^>\n]{0,60}>|\blorem ipsum\b|\bTODO\b"
    r"|\{\{[^}\n]{1,60}\}\}",
    re.IGNORECASE,
)
# Each text that one of both matches holds one of these, in lower case.
_CONTROL_PARTS = ("<|", "s>", "inst]", "_turn>", "<\uff5c")
_PLACEHOLDER_PARTS = ("insert", "your", "[enter", "[add", "todo", "lorem", "{{")
_REFUSAL = re.compile(
    r"\s*(?:(?:i['\u2019]?m|i am) (?:really |very )?sorry,? (?:but )?(?:i|as an)\b.{0,40}?\b(?:can(?:no|['\u2019])t"
    r"|unable)"
    r"|(?:sorry, )?i (?:can(?:no|['\u2019])t|am unable to|won['\u2019]t) (?:assist|help|provide|fulfil|comply|answer)"
    r"|as an ai(?: language)? model\b|\u62b1\u6b49|\u5bf9\u4e0d\u8d77|\u5f88\u62b1\u6b49)",
    re.IGNORECASE,
)
# An answer of more characters than this that ends within a word or after a comma was cut.
_CUT_LENGTH = 200
_CUT = re.compile(r"[^\W\d_]\Z|[,;(]\s*\Z")
# A shorter one was, if it ends with a word that another must follow.
_CUT_SHORT, _CUT_WORD = 40, re.compile(r"\b(?:the|an?|and|or|because|than|my|your|their|its|whose)\Z", re.IGNORECASE)
# So often a model says the same line or sentence again that has lost its way.
_LOOPS = 4
_SENTENCE = re.compile(r"(?<=[.!?\u3002\uff01\uff1f])\s*|\n+")
# Fewer letters say nothing about a text's language.
_FEWEST_LETTERS = 20


def flags_of(conversation: Conversation) -> list[Flag]:
    """What is doubtful about a conversation, in the order of the names."""
    if conversation.text is not None:
        return [name for name in ("control_tokens", "damaged_encoding") if _IN_TEXT[name](conversation.text)]
    spoken = [m for m in conversation.messages if m["role"] in ("user", "assistant")]
    texts = [split_thinking(m["content"])[1] if m["role"] == "assistant" else m["content"] for m in spoken]
    answer = texts[-1]
    question = next((text for text, m in zip(texts, spoken, strict=True) if m["role"] == "user"), "")
    found: dict[Flag, bool] = {name: any(map(test, texts)) for name, test in _IN_TEXT.items()}
    found["refusal"] = _REFUSAL.match(answer) is not None
    found["truncated_answer"] = _is_cut(answer.rstrip("\n "))
    found["repetition"] = any(map(_loops, (text for text, m in zip(texts, spoken, strict=True) if m["role"] != "user")))
    found["language_mix"] = not (question.isascii() and answer.isascii()) and _differ(
        _script(question), _script(answer)
    )
    found["repeated_turn"] = _repeats([" ".join(text.split()).casefold() for text in texts])
    return sorted(name for name, holds in found.items() if holds)


_IN_TEXT: Mapping[Flag, Callable[[str], bool]] = {
    "control_tokens": lambda text: _holds_any(text, _CONTROL_PARTS) and _CONTROL.search(text) is not None,
    "damaged_encoding": lambda text: not text.isascii() and _DAMAGED.search(text) is not None,
    "placeholder": lambda text: _holds_any(text, _PLACEHOLDER_PARTS) and _PLACEHOLDER.search(text) is not None,
}


def _holds_any(text: str, parts: Sequence[str]) -> bool:
    """Whether a text holds one of these parts in any case, without which a search is not worth its time."""
    lower = text.lower()
    return any(part in lower for part in parts)


def _is_cut(answer: str) -> bool:
    if len(answer) > _CUT_LENGTH:
        return _CUT.search(answer) is not None
    return len(answer) > _CUT_SHORT and _CUT_WORD.search(answer) is not None


def _loops(answer: str) -> bool:
    """Whether an answer says one thing again and again: a line or sentence, one after the other."""
    if len(answer) < _LOOPS * _FEWEST_LETTERS:
        return False
    said = [part.strip() for part in _SENTENCE.split(answer)]
    said = [part for part in said if part]
    return any(
        len(part) >= _FEWEST_LETTERS and said[place : place + _LOOPS] == [part] * _LOOPS
        for place, part in enumerate(said[: 1 - _LOOPS])
    )


def _repeats(texts: list[str]) -> bool:
    """Whether somebody says the same again: users' turns and answers alternate."""
    said = [text for text in texts if len(text) > _FEWEST_LETTERS]
    return len(set(said)) < len(said)


def _differ(one: bool | None, other: bool | None) -> bool:
    return one is not None and other is not None and one != other


def _script(text: str) -> bool | None:
    """Whether most letters are Latin ones; None for too few letters, or for a text with much of both."""
    letters = [letter for letter in text[:2000] if letter.isalpha()]
    if len(letters) < _FEWEST_LETTERS:
        return None
    latin = sum(letter < "\u0250" for letter in letters) / len(letters)
    return latin > 0.5 if not 0.1 < latin < 0.9 else None


def advice_for(num_rows: int) -> str | None:
    """What a training set of this size is good for, None where there is nothing to say."""
    if num_rows < 100:
        return (
            f"{num_rows} training rows: enough for a tone or a format, hardly for knowledge; take a base that is tuned "
            "for chat, two or three epochs and a low rank, and collect at least 100 rows"
        )
    if num_rows < 300:
        return (
            f"{num_rows} training rows: take a base that is tuned for chat and keeps its chat template; a base model "
            "that was only pre-trained needs about 300 rows to learn to answer"
        )
    if num_rows < 1000:
        return (
            f"{num_rows} training rows: either kind of base may do; from about 1000 rows on a base model that was only "
            "pre-trained is the better start for a style of its own"
        )
    return None
