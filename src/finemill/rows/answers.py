r"""The final answer of a worked solution, as its writer put it.

Looked for after the thinking block. An explicit answer counts first: the last `\boxed{...}`, a last `#### 72`, what
directly follows "the answer is". Otherwise it is the last thing with a number in it, taken whole: of 3/4 the fraction,
of "2 or 3" both, of "x - 2" the expression, of 十二个 the 12. A model is not called wrong for leaving out a box, nor
right for a piece of what it said.
"""

import re
from dataclasses import dataclass

from finemill.rows.characters import plain_characters
from finemill.rows.formulas import Span, boxed, formulas, strip_delimiters, tidy
from finemill.rows.numerals import last_counted

THINK_OPEN, THINK_CLOSE = "<think>", "</think>"
# What models of other families write for the same: Magistral, Seed, Command A, Granite and others.
_NAMES = "thinking|thought|reasoning|seed:think"
_OPENS = re.compile(rf"<(?:{_NAMES})>|\[THINK\]|<\|START_THINKING\|>")
_CLOSES = re.compile(rf"</(?:{_NAMES})>|\[/THINK\]|<\|END_THINKING\|>")
# gpt-oss's channels.
_ANALYSIS = re.compile(r"<\|channel\|>analysis<\|message\|>(?P<thinking>.*?)(?P<end><\|end\|>|\Z)", re.DOTALL)
_CHANNEL = re.compile(r"<\|start\|>assistant|<\|channel\|>final<\|message\|>|<\|return\|>")

_LONGEST_MARK = 64
"""Characters at the end of a prompt that the mark is looked for in."""

_HEADING = re.compile(r"^[ \t]*####[ \t]*(?P<rest>\S.*?)[ \t]*$", re.MULTILINE)
_MARK = re.compile(
    r"""(?ix)
    \b(?: answer | (?:correct|right)\s+(?:option|choice) )\b (?: [\s*_]* (?: (?:is|are|was)\b | [:=] ) | [ *_:]*\n )
    | (?: 答案 | 答え | 解答 | 答 | 정답 | 답 ) [\s*_]* (?: 是 | 为 | 為 | は | 은 | 는 | : )
    """
)
_LETTER = re.compile(
    r"(?:\\(?:text|mathrm|textbf|mathbf)\{)?\(?(?P<letter>[A-J])\)?\}?(?:\*\*)?(?=$|[.,;:)\]\n]|\s*(?:because|since|as)\b)"
)
_NEGATED = re.compile(r"(?i)(?:\b(?:not|never|neither|nor|no longer)|n['\u2019]t)(?:\s+(?:be|equal(?:\s+to)?))?\s*\W*$")
# Words for the sign of a number; after another number "minus" is a subtraction.
_NEGATIVE = re.compile(
    r"(?i)\b(?:negative|(?:(?<=is )|(?<=are )|(?<=equals )|(?<=[=:] )|(?<=\A))minus)\s+(?=\$?[\d.]*\d)"
)
_SENTENCE_END = re.compile(r"[.!?](?=\s|$|\*)|\n")
_MOST_WORDS = 3
"""Words of an answer that is neither number nor formula; a longer text is a sentence about something."""


@dataclass(frozen=True)
class FinalAnswer:
    """What a text gives as its answer."""

    text: str
    """As written, without the box or the mark around it."""
    boxed: bool = False
    """Whether a closed box holds it: it is complete even where the text was cut after it."""


def final_answer(text: str) -> str | None:
    r"""The answer that `text` ends with, tidied, or None where there is none: `\boxed{\$1{,}000}` as 1000."""
    found = find_answer(text)
    return tidy(found.text) if found else None


def find_answer(text: str) -> FinalAnswer | None:
    """The answer that `text` ends with; None where there is none, or where the text ends inside the thinking block."""
    text = plain_thinking(text)
    if inside_thinking(text):
        return None
    text = text.rpartition(THINK_CLOSE)[2]
    box = boxed(text)
    if box is not None:
        # A box may hold a sentence: "The answer is 5".
        inner = _marked(tidy(box)) if _MARK.search(box) else None
        return FinalAnswer(inner.text if inner else box, boxed=True) if box.strip() else None
    if _unclosed_box(text):
        return None
    text = _NEGATIVE.sub("-", plain_characters(text))
    return _marked(text) or _last_formula(text) or _counted(text) or _short(text)


def plain_thinking(text: str) -> str:
    """`text` with its thinking between `<think>` and `</think>`, whatever marks its model's family writes."""
    if "<|channel|>" in text:
        text = _ANALYSIS.sub(_as_block, text)
        text = _CHANNEL.sub("", text)
    if not _OPENS.search(text) and not _CLOSES.search(text):
        return text
    return _CLOSES.sub(THINK_CLOSE, _OPENS.sub(THINK_OPEN, text))


def _as_block(match: re.Match[str]) -> str:
    return f"{THINK_OPEN}{match['thinking']}{THINK_CLOSE if match['end'] else ''}"


def inside_thinking(text: str) -> bool:
    """Whether `text` ends inside a thinking block."""
    text = plain_thinking(text)
    return text.rfind(THINK_OPEN) > text.rfind(THINK_CLOSE)


def after_thinking(text: str) -> str:
    """What `text` says after its thinking block, without outer white space; "" where it ends inside the block."""
    text = plain_thinking(text)
    return "" if inside_thinking(text) else text.rpartition(THINK_CLOSE)[2].strip()


def with_opening(prompt: str, answer: str) -> str:
    """`answer`, its thinking in `<think>`, with the opening mark that some templates put at the end of the prompt."""
    prompt, answer = plain_thinking(prompt[-_LONGEST_MARK:]), plain_thinking(answer)
    opened = prompt.rstrip().endswith(THINK_OPEN) and not answer.lstrip().startswith(THINK_OPEN)
    return f"{THINK_OPEN}\n{answer}" if opened else answer


def _unclosed_box(text: str) -> bool:
    return "\\boxed{" in text or "\\fbox{" in text


def _marked(text: str) -> FinalAnswer | None:
    """The last explicit answer: what directly follows a mark, or a heading of GSM8K's form."""
    found: list[tuple[int, str]] = []
    for heading in _HEADING.finditer(text):
        last = not text[heading.end() :].strip()
        content = strip_delimiters(heading["rest"])
        span = _formula_at_start(content)
        if span and (last or not content[span.end :].strip(" .*")):
            found.append((heading.start(), content[span.start :].rstrip(" .*")))
        elif last and not _MARK.search(content) and len(content.split()) <= _MOST_WORDS and not list(formulas(content)):
            found.append((heading.start(), content))
    for mark in _MARK.finditer(text):
        said = _after_mark(text[mark.end() :])
        if said:
            found.append((mark.start(), said))
    return FinalAnswer(max(found)[1]) if found else None


def _after_mark(rest: str) -> str | None:
    """The answer that `rest` begins with, None if it begins with a sentence."""
    rest = rest.lstrip(" *_:\"'")
    letter = _LETTER.match(rest)
    if letter:
        return letter["letter"]
    span = _formula_at_start(rest)
    if span:
        return rest[span.start : span.end]
    end = _SENTENCE_END.search(rest)
    words = rest[: end.start() if end else None].strip(" *_\"'.`")
    return words if words and len(words.split()) <= _MOST_WORDS and not any(c.isdigit() for c in words) else None


def _formula_at_start(text: str) -> Span | None:
    first = next(iter(formulas(text)), None)
    return first if first and not text[: first.start].strip(" *_(\"'") else None


def _last_formula(text: str) -> FinalAnswer | None:
    found = list(formulas(text))
    if not found or _NEGATED.search(text[: found[-1].start]):
        return None
    return FinalAnswer(text[found[-1].start : found[-1].end])


def _counted(text: str) -> FinalAnswer | None:
    number = last_counted(text)
    return FinalAnswer(number) if number else None


def _short(text: str) -> FinalAnswer | None:
    """A text that is nothing but an answer: `Paris.`, `(B)`."""
    words = text.strip().strip("*_\"'.` ")
    return FinalAnswer(words) if words and len(words.split()) <= _MOST_WORDS else None
