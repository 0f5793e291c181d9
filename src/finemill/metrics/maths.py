"""Whether a final answer is the right one. Two answers are equal only if that is proven; what cannot be told is wrong.

Numbers are compared exactly, with their units; sets, tuples and intervals by their brackets and element by element;
letters of choices, times and words by their spelling; all other formulas by Math-Verify and SymPy (`symbolic.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from finemill.artifacts.evaluation import Outcome
from finemill.metrics.intervals import as_interval
from finemill.metrics.letters import read_letter
from finemill.metrics.quantities import read_quantity, same_quantity
from finemill.metrics.symbolic import proven_equal
from finemill.rows.answers import after_thinking, find_answer, with_opening
from finemill.rows.characters import plain_characters
from finemill.rows.formulas import strip_delimiters, tidy
from finemill.rows.numerals import in_digits

_CHOICE = re.compile(r"\(?(?P<letter>[A-J])\)?[.:]?")
_SAID_CHOICE = re.compile(r"(?:\((?P<inside>[A-Ja-j])\)|(?P<plain>[A-J])(?=[.:)]|$))[.:)]?(?:\s.*)?", re.DOTALL)
_TIME = re.compile(
    r"(?P<h>\d{1,2})(?::(?P<m>\d{2})(?::(?P<s>\d{2}))?\s*(?P<half>[ap]\.?\s?m\.?)?|\s*(?P<whole>[ap]\.?\s?m\.?))",
    re.IGNORECASE,
)
_RATIO = re.compile(r"\d[\d.]*(?:\s*:\s*\d[\d.]*)+")
_IN_A_BASE = re.compile(r"\(?(?P<digits>[0-9A-F]+)\)?_\{?\d+\}?")
_NAME = re.compile(
    r"(?:\((?:\s*[A-Za-z]\s*,)+\s*[A-Za-z]\s*\)|\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([^()]*\))?|[A-Za-z][A-Za-z ]*)"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-][^\W\d_]+)*")
_EMPTY = ("\\emptyset", "\\varnothing", "\\{\\}", "\u2205", "empty set")
_SEPARATOR = r",\s*(?:\\text\{\s*)?(?:and|or)\b(?:\s*\})?|[,;]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b"
_THOUSANDS = re.compile(r"[-+]?\s*\\?\$?\s*\d{1,3}(?:,\d{3})+(?:\.\d+)?(?![\d,]*,\d)\D*")
_PAIRS = (("yes", "no"), ("true", "false"))
# Without "no idea" and "no one".
_YES_OR_NO = re.compile(
    r"\W*((?i:yes|true|false)\b|(?i:no)(?=\W*$|\s*[,.;:!]|\s+(?:it|they|he|she|there|this|because)\b))"
)
_OPEN, _CLOSE = "([{", ")]}"
_LONGEST = 1000
"""Characters of an answer; a longer one is a text, equal where it is spelled alike."""


@dataclass(frozen=True)
class Verdict:
    """What an answer says in the end, tidied, and what became of it: a cut-off is neither right nor wrong."""

    final_answer: str | None
    outcome: Outcome


def judge(gold: str, answer: str, *, prompt: str = "", finished: bool = True) -> Verdict:
    """Judge a model's whole `answer` to `prompt` by its final answer.

    Args:
        prompt: the rendered prompt, which may open the thinking block.
        finished: whether the model ended its turn. A text that was cut may have lost digits: of one only a closed box
            counts.
    """
    text = with_opening(prompt, answer)
    found = find_answer(text)
    if not finished and not (found and found.boxed):
        return Verdict(None, "cut_off")
    said = found.text if found else None
    if equal_answers(gold, said):
        return Verdict(tidy(said) if said else None, "right")
    label = _said_label(gold, text)
    said = label or said
    return Verdict(tidy(said) if said else None, "right" if label and equal_answers(gold, label) else "wrong")


def _said_label(gold: str, text: str) -> str | None:
    """The choice, or the yes or no, that a sentence gives where the right answer is one."""
    plain = tidy(gold)
    if _CHOICE.fullmatch(plain):
        return read_letter(text)
    pair = next((pair for pair in _PAIRS if plain.casefold() in pair), None)
    opening = _YES_OR_NO.match(after_thinking(text)) if pair else None
    return opening[1] if pair and opening and opening[1].casefold() in pair else None


@dataclass(frozen=True)
class _Collection:
    """Several answers in one: `brackets` is "()", "[)", ..., or "" for those whose order does not matter."""

    brackets: str
    items: tuple[str, ...]


def equal_answers(gold: str, said: str | None) -> bool:
    """Whether `said` is the answer `gold`, both as their writers put them."""
    if said is None or not tidy(said) or not tidy(gold):
        return False
    if tidy(gold) == tidy(said):
        return True
    if max(len(gold), len(said)) > _LONGEST:
        return False
    choice = _CHOICE.fullmatch(tidy(gold))
    if choice:
        found = _SAID_CHOICE.fullmatch(tidy(said))
        return found is not None and (found["inside"] or found["plain"]).upper() == choice["letter"]
    return _equal(_prepared(gold), _prepared(re.sub(r"^\s*(?:\\text(?:bf)?\{)?\([A-J]\)\}?\s*(?=\S)", "", said)))


def _prepared(text: str) -> str:
    text = in_digits(strip_delimiters(plain_characters(text)))
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])|\\!", "", text)
    text = re.sub(r"\\[,;:]", " ", text)
    text = re.sub(r"(?<![\w})])\+\s*(?=\\infty)", "", text)
    text = re.sub(r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda match: "\\{" if match[0] == "\\lbrace" else "\\}", text)
    text = re.sub(r"(?<=[^.])\.$", "", text.strip()).strip()
    return text.replace("{,}", ",")


def _equal(gold: str, said: str) -> bool:
    gold, said = _right_sides(gold.strip(), said.strip())
    if not gold or not said:
        return False
    times = [_TIME.fullmatch(tidy(text)) for text in (gold, said)]
    if any(times):
        return all(times) and _same_time(*times)
    gold_union, said_union = (_split(text, r"\\cup(?![A-Za-z])") for text in (gold, said))
    if len(gold_union) > 1 or len(said_union) > 1:
        return _match(gold_union, said_union)
    intervals = as_interval(gold), as_interval(said)
    if any(intervals) and not all(intervals):
        gold, said = intervals[0] or gold, intervals[1] or said
    collections = _collection(gold), _collection(said)
    if any(collections):
        return _same_collection(*collections)
    quantities = read_quantity(gold), read_quantity(said)
    if quantities[0] and quantities[1]:
        return same_quantity(quantities[0], quantities[1])
    return _equal_formulas(gold, said)


def _right_sides(gold: str, said: str) -> tuple[str, str]:
    r"""Both without `x =` or `x \\in`, where they do not name different things."""
    sides = [re.split(r"(?<![<>!\\])=|\\in(?![A-Za-z])", text) for text in (gold, said)]
    names = [side[0].strip() if len(side) > 1 else "" for side in sides]
    if all(names) and tidy(names[0]) != tidy(names[1]):
        return gold, said
    plain = []
    for text, side in zip((gold, said), sides, strict=True):
        named = _NAME.fullmatch(tidy(side[0]).strip()) or not re.search(r"[A-Za-z]", side[0])
        listed = len(_split(text, _SEPARATOR)) > 1 and len(side) > 2
        plain.append(side[-1].strip() if len(side) > 1 and named and not listed else text)
    return plain[0], plain[1]


def _same_time(gold: re.Match[str] | None, said: re.Match[str] | None) -> bool:
    def parts(time: re.Match[str]) -> tuple[int, int, int, str]:
        hour, half = int(time["h"]), (time["half"] or time["whole"] or "").lower()[:1]
        hour, half = (hour - 12, "p") if hour > 12 and half in ("", "p") else (hour, half)
        return hour, int(time["m"] or 0), int(time["s"] or 0), half

    if gold is None or said is None:
        return False
    mine, theirs = parts(gold), parts(said)
    # A half of the day that the right answer leaves open may be named.
    return mine[:3] == theirs[:3] and mine[3] in ("", theirs[3])


def _split(text: str, separator: str) -> list[str]:
    """Parts of `text` between separators outside all brackets."""
    parts, depth, begin = [], 0, 0
    pattern = re.compile(separator)
    position = 0
    while position < len(text):
        if text[position] in _OPEN:
            depth += 1
        elif text[position] in _CLOSE:
            depth -= 1
        elif depth == 0 and (match := pattern.match(text, position)):
            parts.append(text[begin:position])
            begin = position = match.end()
            continue
        position += 1
    return [part.strip() for part in [*parts, text[begin:]]]


def _collection(text: str) -> _Collection | None:
    """The elements of a set, tuple, interval or list; None for one answer."""
    if tidy(text).lower() in _EMPTY or text in _EMPTY:
        return _Collection("", ())
    if text.count("\\pm") == 1:
        return _Collection("", (text.replace("\\pm", "+"), text.replace("\\pm", "-")))
    brackets, inner = _brackets(text)
    if not brackets:
        if _THOUSANDS.fullmatch(text) and ", " not in text:
            return None
        parts = [part for part in _split(text, _SEPARATOR) if part]
        return _Collection("", tuple(parts)) if len(parts) > 1 else None
    spaced = ", " in inner and bool(re.search(r"\d,\d{3}(?!\d)", inner))
    parts = _split(inner, r",\s|;" if spaced else r"[,;]")
    if len(parts) == 1 and brackets != "{}":
        return None
    return _Collection("" if brackets == "{}" else brackets, tuple(parts))


def _brackets(text: str) -> tuple[str, str]:
    """The brackets around all of `text` and what they hold."""
    if text.startswith("\\{") and text.endswith("\\}"):
        return "{}", text[2:-2]
    if len(text) < 2 or text[0] not in _OPEN or text[-1] not in _CLOSE:
        return "", text
    depth = 0
    for position, character in enumerate(text):
        depth += (character in _OPEN) - (character in _CLOSE)
        if depth == 0:
            return (text[0] + text[-1], text[1:-1]) if position == len(text) - 1 else ("", text)
    return "", text


def _same_collection(gold: _Collection | None, said: _Collection | None) -> bool:
    if gold is None or said is None or gold.brackets != said.brackets or len(gold.items) != len(said.items):
        return False
    if gold.brackets:
        return all(_equal(*pair) for pair in zip(gold.items, said.items, strict=True))
    return _match(gold.items, said.items)


def _match(gold: Sequence[str], said: Sequence[str]) -> bool:
    """Whether each of `said` is another one of `gold`, in any order."""
    left = list(said)
    for item in gold:
        found = next((index for index, other in enumerate(left) if _equal(item, other)), None)
        if found is None:
            return False
        left.pop(found)
    return not left


def _equal_formulas(gold: str, said: str) -> bool:
    plain = tidy(gold), tidy(said)
    if plain[0] == plain[1]:
        return True
    if any(_WORDS.fullmatch(text) and len(text) > 1 for text in plain):
        return _same_words(*map(_words, plain))
    if all(_RATIO.fullmatch(text) for text in plain):
        return "".join(plain[0].split()) == "".join(plain[1].split())
    # The base that a question asks for may be left out, but a number in another one is not the same digits in ten.
    based = _IN_A_BASE.fullmatch(plain[0])
    if based and based["digits"] == plain[1]:
        return True
    # A ratio is no quotient, and Math-Verify drops the base of 10_2.
    if any(":" in text or re.search(r"\d\}?_", text) for text in plain):
        return False
    return proven_equal(*plain)


def _words(text: str) -> str:
    return re.sub(r"^(?:the|a|an)\s+", "", " ".join(text.replace("\u2019", "'").split()), flags=re.IGNORECASE)


def _same_words(gold: str, said: str) -> bool:
    """Whether two words differ in nothing but capitals, or in a short one, maybe points of a figure, in the first."""
    if len(gold) > 3 or gold.casefold() in ("yes", "no"):
        return gold.casefold() == said.casefold()
    return gold[:1].casefold() + gold[1:] == said[:1].casefold() + said[1:]
