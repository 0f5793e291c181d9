"""Whether a final answer is the right one. Two answers are equal only if that is proven; what cannot be told is wrong.

Numbers are compared exactly, with their units; sets, tuples and intervals by their brackets and element by element;
letters of choices, times and words by their spelling; all other formulas by Math-Verify and SymPy (`symbolic.py`).
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

from finemill.artifacts.evaluation import Outcome
from finemill.metrics.intervals import as_interval
from finemill.metrics.letters import read_letter
from finemill.metrics.matrices import Matrix, as_vector, read_matrix
from finemill.metrics.moments import same_moment
from finemill.metrics.quantities import read_compound, read_quantity, same_quantity
from finemill.metrics.symbolic import proven_equal
from finemill.rows.answers import after_thinking, find_answer, said_of_it, with_opening
from finemill.rows.characters import plain_characters
from finemill.rows.formulas import UNITS, strip_delimiters, tidy
from finemill.rows.numerals import in_digits

_CHOICE = re.compile(r"\(?(?P<letter>[A-J])\)?[.:]?")
_SAID_CHOICE = re.compile(r"(?:\((?P<inside>[A-Ja-j])\)|(?P<plain>[A-J])(?=[.:)]|$))[.:)]?(?:\s.*)?", re.DOTALL)
_RATIO = re.compile(r"\d[\d.]*(?:\s*:\s*\d[\d.]*)+")
_IN_A_BASE = re.compile(r"\(?(?P<digits>[0-9A-F]+)\)?_\{?\d+\}?")
_NAME = re.compile(
    r"(?:\((?:\s*[A-Za-z]\s*,)+\s*[A-Za-z]\s*\)|\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([^()]*\))?|[A-Za-z][A-Za-z ]*)"
)
_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-][^\W\d_]+)*")
_EMPTY = (
    *("\\emptyset", "\\varnothing", "\\{\\}", "\u2205", "empty set"),
    *("no solution", "no solutions", "no real solution", "no real solutions"),
)
_RANGE_END = r"[$\u20ac\u00a3]?\d[\d.,/]*\s*(?:\\?%|[A-Za-z]+)?"
_RANGE = re.compile(
    rf"(?P<low>{_RANGE_END}?)\s*(?P<word>-{{1,2}}|\bto\b|\bthrough\b)\s*(?P<high>{_RANGE_END})", re.IGNORECASE
)
_BETWEEN = re.compile(
    rf"(?:between|from)\s+(?P<low>{_RANGE_END}?)\s+(?P<word>and|to)\s+(?P<high>{_RANGE_END})", re.IGNORECASE
)
_MODULUS = re.compile(r"\s*(?:\\pmod\s*\{?|\(\s*\\?(?:bmod|mod)\s*|\\bmod\s*|\bmod\s+)(?P<modulus>\w+)\s*[})]*\s*$")
_FORMULA_UNIT = re.compile(r"(?<=[\w})])\s+(?P<unit>[A-Za-z]+(?:[ /]+[A-Za-z]+)*)(?P<power>\s*\^\{?[23]\}?)?$")
_SEPARATOR = r",\s*(?:\\text\{\s*)?(?:and|or)\b(?:\s*\})?|[,;]|\\text\{\s*(?:and|or)\s*\}|\b(?:and|or)\b"
_PLUS_MINUS = re.compile(r"\\pm(?![A-Za-z])")
_SAME = r"\\text\{\s*or\s*\}|\bor\b|="
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
    # An exclamation mark at a sentence's end may be a factorial.
    if equal_answers(gold, said) or (found and found.exclaimed and "!" in gold and equal_answers(gold, f"{said}!")):
        return Verdict(tidy(said) if said else None, "right")
    label = _said_label(gold, text)
    said = label or said
    return Verdict(tidy(said) if said else None, "right" if label and equal_answers(gold, label) else "wrong")


def _said_label(gold: str, text: str) -> str | None:
    """The choice, the yes or no, or the word that a sentence gives where the right answer is one."""
    plain = tidy(gold)
    if _CHOICE.fullmatch(plain):
        return read_letter(text)
    pair = next((pair for pair in _PAIRS if plain.casefold() in pair), None)
    opening = _YES_OR_NO.match(after_thinking(text)) if pair else None
    if pair and opening and opening[1].casefold() in pair:
        return opening[1]
    return said_of_it(text) if _WORDS.fullmatch(plain) else None


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
    text = re.sub(r"\bper\s+cent\b", "percent", strip_delimiters(plain_characters(text)))
    text = in_digits(text)
    text = re.sub(r"\\(?:left|right|displaystyle|big|Big|bigg|Bigg)(?![A-Za-z])|\\!\s*", "", text)
    text = re.sub(r"\\(?:text)?color\s*\{\w+\}|\\underline(?![A-Za-z])|^\s*(?:\\approx(?![A-Za-z])|~)", "", text)
    text = re.sub(r"^(?:\+|positive|plus)?\s*inf(?:inity)?$", r"\\infty", text.strip(), flags=re.IGNORECASE)
    text = re.sub(r"^(?:-|negative|minus)\s*inf(?:inity)?$", r"-\\infty", text, flags=re.IGNORECASE)
    text = re.sub(r"\\([lr])angle(?![A-Za-z])", lambda match: "(" if match[1] == "l" else ")", text)
    text = re.sub(r"\+\s?/\s?-|\+-(?=\s?\d)", r"\\pm ", text)
    text = re.sub(r"\s*(?:\.\.\.|\\[lc]?dots(?![A-Za-z]))\s*(?=,)", r"\\ldots", text)
    text = re.sub(r"_\{(\d+)\}", r"_\1", text)
    text = re.sub(r"\\text\{\s*\(mod\s*\}", r"(mod ", text)
    text = re.sub(r"\\[,;:]", " ", text)
    text = re.sub(r"(?<![\w})])\+\s*(?=\\infty)", "", text)
    text = re.sub(r"\\(?:lbrace|rbrace)(?![A-Za-z])", lambda match: "\\{" if match[0] == "\\lbrace" else "\\}", text)
    text = re.sub(r"(?<=[^.])\.$", "", text.strip()).strip()
    return text.replace("{,}", ",")


def _equal(gold: str, said: str) -> bool:
    gold, said = _right_sides(gold.strip(), said.strip())
    if not gold or not said:
        return False
    moments = same_moment(gold, said)
    if moments is not None:
        return moments
    intervals = as_interval(gold), as_interval(said)
    if any(intervals) and not all(intervals):
        gold, said = intervals[0] or gold, intervals[1] or said
    gold_union, said_union = (_split(text, r"\\cup(?![A-Za-z])") for text in (gold, said))
    if len(gold_union) > 1 or len(said_union) > 1:
        return _match(gold_union, said_union)
    compounds = read_compound(gold), read_compound(said)
    if any(compounds):
        sums = compounds[0] or read_quantity(gold), compounds[1] or read_quantity(said)
        return sums[0] is not None and sums[1] is not None and same_quantity(sums[0], sums[1])
    ranges = _range(gold), _range(said)
    if ranges[0] and ranges[1] and all(_equal(*pair) for pair in zip(ranges[0].ends, ranges[1].ends, strict=True)):
        return True
    if any(found and found.worded for found in ranges):
        ratio = ranges[1].ends if ranges[1] and _RATIO.fullmatch(gold) else ()
        return bool(ratio) and _equal_formulas(gold, ":".join(ratio))
    matrices = read_matrix(gold), read_matrix(said)
    if all(matrices):
        return _same_matrix(*matrices)
    collections = _collection(gold, matrices[0]), _collection(said, matrices[1])
    if all(collections) or any(collection and collection.brackets for collection in collections):
        return _same_collection(*collections)
    quantities = read_quantity(gold), read_quantity(said)
    if quantities[0] and quantities[1]:
        return same_quantity(quantities[0], quantities[1])
    if "\\approx" in gold + said:
        return any(_equal(*pair) for pair in product(*(re.split(r"\\approx\b", text) for text in (gold, said))))
    if not collections[0] and "=" not in gold and len(parts := _split(said, _SAME)) > 1:
        return all(_equal(gold, part) for part in parts)
    if any(collections):
        return False
    return _equal_formulas(gold, said)


def _right_sides(gold: str, said: str) -> tuple[str, str]:
    r"""Both without `x =` or `x \\in`, where they do not name different things."""
    sides = [re.split(r"(?<![<>!\\])=|\\(?:in|equiv)(?![A-Za-z])", text) for text in (gold, said)]
    names = [side[0].strip() if len(side) > 1 else "" for side in sides]
    if all(names) and tidy(names[0]) != tidy(names[1]):
        return gold, said
    plain = []
    for text, side in zip((gold, said), sides, strict=True):
        named = _NAME.fullmatch(tidy(side[0]).strip()) or not re.search(r"[A-Za-z]", side[0])
        listed = len(_split(text, _SEPARATOR)) > 1 and len(side) > 2
        plain.append(side[-1].strip() if len(side) > 1 and named and not listed else text)
    return plain[0], plain[1]


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


@dataclass(frozen=True)
class _Range:
    """Everything from one number to another; `worded` if it cannot be a subtraction."""

    ends: tuple[str, str]
    worded: bool


def _range(text: str) -> _Range | None:
    match = _RANGE.fullmatch(text) or _BETWEEN.fullmatch(text)
    if not match:
        return None
    low, high = match["low"].strip(), match["high"].strip()
    unit = re.search(r"[A-Za-z%]+$", high)
    if unit and low[-1:].isdigit():
        low = f"{low} {unit[0]}"
    return _Range((low, high), worded="-" not in match["word"])


def _same_matrix(gold: Matrix | None, said: Matrix | None) -> bool:
    if gold is None or said is None or (len(gold), len(gold[0])) != (len(said), len(said[0])):
        return False
    return all(_equal(*cells) for rows in zip(gold, said, strict=True) for cells in zip(*rows, strict=True))


def _collection(text: str, matrix: Matrix | None = None) -> _Collection | None:
    """The elements of a set, tuple, interval, vector or list; None for one answer."""
    if matrix is not None:
        vector = as_vector(matrix)
        return _Collection("()", vector) if vector else None
    if tidy(text).lower() in _EMPTY or text in _EMPTY:
        return _Collection("", ())
    if len(_PLUS_MINUS.findall(text)) == 1:
        return _Collection("", (_PLUS_MINUS.sub("+", text), _PLUS_MINUS.sub("-", text)))
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
    moduli = _MODULUS.search(gold), _MODULUS.search(said)
    if any(moduli):
        if moduli[0] and moduli[1]:
            same = moduli[0]["modulus"] == moduli[1]["modulus"]
            return same and _equal(_MODULUS.sub("", gold), _MODULUS.sub("", said))
        # Without its modulus it is a number and no quantity.
        other = said if moduli[0] else gold
        return re.fullmatch(r"-?\w+", other) is not None and _equal(_MODULUS.sub("", gold), _MODULUS.sub("", said))
    plain = tidy(gold), tidy(said)
    if plain[0] == plain[1]:
        return True
    if any(map(_has_unit, plain)) and not any(map(_IN_A_BASE.fullmatch, plain)):
        units = [match[0].replace(" ", "") if (match := _FORMULA_UNIT.search(text)) else "" for text in plain]
        return (not all(units) or units[0] == units[1]) and _equal(*(_FORMULA_UNIT.sub("", text) for text in plain))
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


def _has_unit(text: str) -> bool:
    match = _FORMULA_UNIT.search(text)
    return match is not None and {word.lower() for word in re.split(r"[ /]+", match["unit"])} <= UNITS | {
        "unit",
        "units",
    }


def _words(text: str) -> str:
    return re.sub(r"^(?:the|a|an)\s+", "", " ".join(text.replace("\u2019", "'").split()), flags=re.IGNORECASE)


def _same_words(gold: str, said: str) -> bool:
    """Whether two words differ in nothing but capitals, or in a short one, maybe points of a figure, in the first."""
    if len(gold) > 3 or gold.casefold() in ("yes", "no"):
        return gold.casefold() == said.casefold()
    return gold[:1].casefold() + gold[1:] == said[:1].casefold() + said[1:]
