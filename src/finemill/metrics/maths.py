"""Whether a final answer is the right one. Two answers are equal only if that is proven; what cannot be told is wrong.

Numbers are compared exactly, with their units; sets, tuples and intervals by their brackets and element by element;
letters of choices, times and words by their spelling; all other formulas by Math-Verify and SymPy (`symbolic.py`).
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import product

from finemill.artifacts.evaluation import Outcome
from finemill.metrics.angles import has_degrees, in_radians, without_minutes
from finemill.metrics.intervals import as_interval
from finemill.metrics.letters import read_letter, read_letters
from finemill.metrics.lists import SEPARATOR, Collection, elements, read_collection, split_outside
from finemill.metrics.matrices import Matrix, read_matrix
from finemill.metrics.moments import same_moment
from finemill.metrics.named_values import read_named_values
from finemill.metrics.quantities import read_compound, read_quantity, same_quantity
from finemill.metrics.ratios import is_fraction, may_be_time, read_ratio, same_ratio
from finemill.metrics.regions import same_region
from finemill.metrics.spelling import prepared, without_choice
from finemill.metrics.symbolic import proven_equal, proven_order
from finemill.metrics.unit_vectors import components, read_unit_vector
from finemill.rows.answers import after_thinking, find_answer, said_of_it, with_opening
from finemill.rows.characters import plain_characters
from finemill.rows.chemistry import chemical_spelling, is_certain
from finemill.rows.formulas import MAGNITUDES, UNITS, tidy
from finemill.rows.numerals import in_digits

_CHOICE = re.compile(r"(?:\(?(?P<letter>[A-J])\)?|\((?P<small>[a-j])\))[.:]?")
_SAID_CHOICE = re.compile(r"(?:\((?P<inside>[A-Ja-j])\)|(?P<plain>[A-J])(?=[.:)]|$))[.:)]?(?:\s.*)?", re.DOTALL)
_IN_A_BASE = re.compile(r"\(?(?P<digits>[0-9A-F]+)\)?_\{?(?P<base>\d+)\}?")
_NAME = re.compile(
    r"(?:\((?:\s*[A-Za-z]\s*,)+\s*[A-Za-z]\s*\)|\\?[A-Za-z]+(?:_\{?\w+\}?)?'?(?:\([^()]*\))?|[A-Za-z][A-Za-z ]*"
    r"|\\angle\s*[A-Z]{1,3}|\|[A-Z]{1,2}\|)"
)
# As contests ask: m + n for the m/n that is found. A sum of x and y is as often the equation of a line.
_SUM_ASKED_FOR = re.compile(r"\d*[a-wA-W](?:\s*\+\s*\d*[a-wA-W])+")
_REMARK = re.compile(r"(?P<said>[^()]*?[^()\s])\s*(?:\\text\{\s*)?\((?P<again>[^()]+)\)\s*\}?")
_WHOLE_AND_PART = re.compile(
    r"(?P<whole>-?\d+)\s*(?:\\text\{\s*)?and(?:\s*\})?\s*(?P<part>\\frac\s*(?:\{\d+\}|\d)\s*(?:\{\d+\}|\d)|\d+/\d+)"
)
_SHORT_MAGNITUDE = re.compile(r"(?P<number>\d[\d.,]*)\s?(?P<letter>[kKMB])")
_MAGNITUDE_OF = {"K": "thousand", "M": "million", "B": "billion"}
_WORDS = re.compile(r"[^\W\d_]+(?:[ '\u2019-][^\W\d_]+)*")
_RANGE_END = r"[$\u20ac\u00a3]?\d[\d.,/]*\s*(?:\\?%|[A-Za-z]+)?"
_RANGE = re.compile(
    rf"(?P<low>{_RANGE_END}?)\s*(?P<word>-{{1,2}}|\bto\b|\bthrough\b)\s*(?P<high>{_RANGE_END})", re.IGNORECASE
)
_BETWEEN = re.compile(
    rf"(?:between|from)\s+(?P<low>{_RANGE_END}?)\s+(?P<word>and|to)\s+(?P<high>{_RANGE_END})", re.IGNORECASE
)
_MODULUS = re.compile(r"\s*(?:\\pmod\s*\{?|\(\s*\\?(?:bmod|mod)\s*|\\bmod\s*|\bmod\s+)(?P<modulus>\w+)\s*[})]*\s*$")
_FORMULA_UNIT = re.compile(r"(?<=[\w})])\s+(?P<unit>[A-Za-z]+(?:[ /]+[A-Za-z]+)*)(?P<power>\s*\^\{?[23]\}?)?$")
_CONSTANT = re.compile(r"\+\s*[Cc]$")
_GOES_ON = re.compile(r"\.\.\.|\\[lcvd]?dots(?![A-Za-z])")
_SAME = r"\\text\{\s*or\s*\}|\bor\b|="
_SHORT_WORDS = dict.fromkeys(("dne", "doesn't exist"), "does not exist")
# Of Japanese and Korean, written with the word before them.
_SENTENCE_END = re.compile("(?:です|でした|である|입니다|이다)$")
_PAIRS = (("yes", "no"), ("true", "false"))
# Without "no idea" and "no one".
_YES_OR_NO = re.compile(
    r"\W*((?i:yes|true|false)\b|(?i:no)(?=\W*$|\s*[,.;:!]|\s+(?:it|they|he|she|there|this|because)\b))"
)
_UNIT_NAME = "|".join(sorted((name for name in [*UNITS, *MAGNITUDES] if len(name) > 3), key=len, reverse=True))
_ASKED = re.compile(
    rf"\bhow\s+many\s+(?:(?:more|total|whole|full|additional|extra)\s+)?(?P<unit>{_UNIT_NAME})s?\b|\bin\s+(?P<in>{_UNIT_NAME})s?\b",
    re.IGNORECASE,
)
_BARE = re.compile(r"-?\d[\d,.]*")
_LONGEST_QUESTION = 2000
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
    if _is_right(gold, said, prompt) or (found and found.exclaimed and "!" in gold and equal_answers(gold, f"{said}!")):
        return Verdict(tidy(said) if said else None, "right")
    label = _said_label(gold, text)
    said = label or said
    return Verdict(tidy(said) if said else None, "right" if label and equal_answers(gold, label) else "wrong")


def _is_right(gold: str, said: str | None, prompt: str) -> bool:
    """Whether `said` is the right answer, in the unit of "how many dozen" or "in cents" where it names none itself."""
    if equal_answers(gold, said):
        return True
    asked = list(_ASKED.finditer(prompt[-_LONGEST_QUESTION:])) if _BARE.fullmatch(gold.strip()) else []
    return bool(asked) and equal_answers(f"{gold} {asked[-1]['unit'] or asked[-1]['in']}", said)


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


def equal_answers(gold: str, said: str | None) -> bool:
    """Whether `said` is the answer `gold`, both as their writers put them."""
    if said is None or not tidy(said) or not tidy(gold):
        return False
    if tidy(gold) == tidy(said):
        return True
    if max(len(gold), len(said)) > _LONGEST:
        return False
    letters, saids = read_letters(tidy(gold)), read_letters(tidy(said))
    if letters and letters == saids:
        return True
    choice = _CHOICE.fullmatch(tidy(gold))
    if choice:
        found = _SAID_CHOICE.fullmatch(tidy(said))
        return (
            not saids
            and found is not None
            and (found["inside"] or found["plain"]).upper() == (choice["letter"] or choice["small"].upper())
        )
    substances = chemical_spelling(plain_characters(gold)), chemical_spelling(plain_characters(said))
    if substances[0] and is_certain(substances[0]) and (substances[1] or gold.casefold() == said.casefold()):
        return substances[0] == substances[1]
    return _equal(prepared(gold), prepared(without_choice(said))) or _with_remark(prepared(gold), prepared(said))


def _with_remark(gold: str, said: str) -> bool:
    """Whether `said` is the right answer, and again in brackets: `5 (five)`."""
    match = _REMARK.fullmatch(said)
    return match is not None and all(_equal(gold, in_digits(match[part].strip())) for part in ("said", "again"))


def _equal(gold: str, said: str) -> bool:
    gold, said = _right_sides(gold.strip(), said.strip())
    if not gold or not said:
        return False
    ratios = read_ratio(gold), read_ratio(said)
    # 1:2 is no time of day, and so 5:10 beside it is none.
    if any(ratio and not may_be_time(text) for ratio, text in zip(ratios, (gold, said), strict=True)):
        return _equal_ratios(gold, said, *ratios)
    moments = same_moment(gold, said)
    if moments is not None:
        return moments
    vectors = read_unit_vector(gold), read_unit_vector(said)
    if any(vectors) and (same := _same_vector(gold, said, *vectors)) is not None:
        return same
    region = same_region(gold, said, _order) if _about_one_letter(gold, said) else None
    if region is not None:
        return region
    intervals = as_interval(gold), as_interval(said)
    if all(intervals) and _about_one_letter(gold, said) and _same_union(*map(_union, map(str, intervals))):
        return True
    if any(intervals) and not all(intervals):
        gold, said = intervals[0] or gold, intervals[1] or said
    unions = _union(gold), _union(said)
    if any(len(union) > 1 for union in unions):
        return _same_union(*unions)
    gold, said = without_minutes(gold), without_minutes(said)
    compounds = read_compound(gold), read_compound(said)
    if any(compounds):
        sums = compounds[0] or read_quantity(gold), compounds[1] or read_quantity(said)
        return sums[0] is not None and sums[1] is not None and same_quantity(sums[0], sums[1])
    ranges = _range(gold), _range(said)
    if ranges[0] and ranges[1] and all(_equal(*pair) for pair in zip(ranges[0].ends, ranges[1].ends, strict=True)):
        return True
    if any(found and found.worded for found in ranges):
        return False
    matrices = read_matrix(gold), read_matrix(said)
    if all(matrices):
        return _same_matrix(*matrices)
    if any(matrices) and all("\\begin" in text for text in (gold, said)):
        # A multiple of a matrix.
        return proven_equal(gold, said)
    values = tuple(read_named_values(split_outside(text, SEPARATOR)) for text in (gold, said))
    collections = read_collection(gold, matrices), read_collection(said, (matrices[1], matrices[0]))
    if any(values):
        return _same_named(values, collections)
    quantities = read_quantity(gold), read_quantity(said)
    if quantities[0] and any(
        other and same_quantity(quantities[0], other) for other in map(read_quantity, _other_readings(said))
    ):
        return True
    if all(collections) or any(collection and collection.brackets for collection in collections):
        return _same_collection(*collections)
    if quantities[0] and quantities[1]:
        return same_quantity(quantities[0], quantities[1])
    if "\\approx" in gold + said:
        return any(_equal(*pair) for pair in product(*(re.split(r"\\approx\b", text) for text in (gold, said))))
    if not collections[0] and "=" not in gold and len(parts := split_outside(said, _SAME)) > 1:
        return all(_equal(gold, part) for part in parts)
    if any(collections):
        only = [one.items if one else (text,) for one, text in zip(collections, (gold, said), strict=True)]
        return len(only[0]) == len(only[1]) == 1 and _equal(only[0][0], only[1][0])
    return _equal_formulas(gold, said)


def _right_sides(gold: str, said: str) -> tuple[str, str]:
    r"""Both without `x =` or `x \\in`, where they do not name different things."""
    sides = [split_outside(text, r"(?<![<>!\\])=|\\(?:in|equiv)(?![A-Za-z])") for text in (gold, said)]
    sides = [side[::-1] if len(side) == 2 and re.fullmatch(r"\s*[A-Za-z]\s*", side[1]) else side for side in sides]
    names = [side[0].strip() if len(side) > 1 else "" for side in sides]
    if all(names) and tidy(names[0]) != tidy(names[1]):
        return gold, said
    plain = []
    for text, side in zip((gold, said), sides, strict=True):
        name = tidy(side[0]).strip()
        named = _NAME.fullmatch(name) or _SUM_ASKED_FOR.fullmatch(name) or not re.search(r"[A-Za-z]", side[0])
        listed = len(split_outside(text, SEPARATOR)) > 1 and len(side) > 2
        plain.append(side[-1].strip() if len(side) > 1 and named and not listed else text)
    return plain[0], plain[1]


def _equal_ratios(gold: str, said: str, golds: Sequence[str] | None, saids: Sequence[str] | None) -> bool:
    """Two ratios, the second maybe as `3 to 4` or as a fraction; beside the quotient 1/3, 1:3 may be odds."""
    found = _range(said)
    if golds and not saids and found and found.worded:
        saids = found.ends
    if golds and not saids and len(golds) == 2 and is_fraction(said):
        return _equal(f"({golds[0]})/({golds[1]})", said)
    return bool(golds and saids) and same_ratio(golds or (), saids or (), _equal)


def _about_one_letter(gold: str, said: str) -> bool:
    """Whether two inequalities are about the same variable, as far as each names one."""
    letters = [set(re.findall(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", text)) - {"R"} for text in (gold, said)]
    return not all(letters) or letters[0] == letters[1]


def _same_vector(gold: str, said: str, golds: Mapping[str, str] | None, saids: Mapping[str, str] | None) -> bool | None:
    """Whether two vectors, one at least a sum of unit vectors, are the same; None where the other is no vector."""
    if golds and saids:
        return all(_equal(golds.get(axis, "0"), saids.get(axis, "0")) for axis in {*golds, *saids})
    other = said if golds else gold
    listed = read_collection(other, (read_matrix(other), None))
    if not listed or listed.brackets != "()" or len(listed.items) not in (2, 3):
        return None
    along = components(golds or saids or {}, len(listed.items))
    return along is not None and all(_equal(*pair) for pair in zip(along, listed.items, strict=True))


def _order(one: str, other: str) -> int | None:
    """-1, 0 or 1 as a number is less than another, equal to it or more; None where one is none."""
    quantities = read_quantity(one), read_quantity(other)
    if quantities[0] and quantities[1]:
        if quantities[0].unit or quantities[1].unit:
            return None
        return (quantities[0].value > quantities[1].value) - (quantities[0].value < quantities[1].value)
    return proven_order(one, other)


def _union(text: str) -> list[str]:
    return split_outside(text, r"\\cup(?![A-Za-z])")


def _same_union(gold: Sequence[str], said: Sequence[str]) -> bool:
    """Whether two unions have the same parts; sets are taken apart, and intervals may be listed with commas."""
    return _match(*([item for part in union for item in elements(part)] for union in (gold, said)))


def _other_readings(said: str) -> list[str]:
    """What an answer to a question for a number may mean as well: `3 and 1/2` one number, `12K` a short 12 thousand."""
    mixed = _WHOLE_AND_PART.fullmatch(said)
    short = _SHORT_MAGNITUDE.fullmatch(said)
    readings = [f"{mixed['whole']} {mixed['part']}"] if mixed else []
    return [*readings, f"{short['number']} {_MAGNITUDE_OF[short['letter'].upper()]}"] if short else readings


def _same_named(
    values: Sequence[Mapping[str, str] | None], collections: "tuple[Collection | None, Collection | None]"
) -> bool:
    """Values by name against those of the same names, or against a tuple or list in the order of the names."""
    gold, said = values
    if gold and said:
        return gold.keys() == said.keys() and all(_equal(gold[name], said[name]) for name in gold)
    ordered = [
        tuple(one.values()) if one else other.items if other and other.brackets in ("", "()") else ()
        for one, other in zip(values, collections, strict=True)
    ]
    return len(ordered[0]) == len(ordered[1]) and all(_equal(*pair) for pair in zip(*ordered, strict=True))


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


def _same_collection(gold: Collection | None, said: Collection | None) -> bool:
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
    constants = [_CONSTANT.search(text) for text in (gold, said)]
    if all(constants):
        gold, said = (_CONSTANT.sub("", text) for text in (gold, said))
    # Math-Verify drops primes, of 90' and of f'(x), and what goes on.
    if gold.count("'") != said.count("'") or bool(_GOES_ON.search(gold)) != bool(_GOES_ON.search(said)):
        return False
    plain = tidy(gold), tidy(said)
    if plain[0] == plain[1]:
        return True
    if has_degrees(plain[0]) or has_degrees(plain[1]) or "rad" in gold + said:
        plain = in_radians(plain[0]), in_radians(plain[1])
    if any(map(_has_unit, plain)) and not any(map(_IN_A_BASE.fullmatch, plain)):
        units = [match[0].replace(" ", "") if (match := _FORMULA_UNIT.search(text)) else "" for text in plain]
        return (not all(units) or units[0] == units[1]) and _equal(*(_FORMULA_UNIT.sub("", text) for text in plain))
    if any(_WORDS.fullmatch(text) and len(text) > 1 for text in plain) and not any("\\cdot" in text for text in plain):
        return _same_words(*map(_words, plain))
    based = _IN_A_BASE.fullmatch(plain[0]), _IN_A_BASE.fullmatch(plain[1])
    if any(based):
        return _same_in_a_base(*based, *plain)
    # Math-Verify drops the base of 10_2.
    if any(":" in text or re.search(r"\d\}?_", text) for text in plain):
        return False
    return proven_equal(*map(_one_counter, plain))


def _same_in_a_base(gold: re.Match[str] | None, said: re.Match[str] | None, gold_text: str, said_text: str) -> bool:
    """Numbers of which one at least is in another base: the base that a question asks for may be left out."""
    if gold and not said:
        return gold["digits"] == said_text
    value = _value_in_base(gold) if gold else None
    quantity = read_quantity(gold_text) if not gold else None
    of_said = _value_in_base(said) if said else None
    return of_said is not None and of_said == (quantity.value if quantity else value)


def _value_in_base(number: re.Match[str]) -> int | None:
    try:
        return int(number["digits"], int(number["base"]))
    except ValueError:
        return None


def _one_counter(text: str) -> str:
    r"""A formula with $\pi$ and one integer, $k\pi$, with that named k: whether it is k or n says nothing."""
    letters = set(re.findall(r"(?<![\\A-Za-z])[a-z](?![A-Za-z])", text))
    if "\\pi" not in text or len(letters) != 1 or not letters <= set("kmn"):
        return text
    return re.sub(rf"(?<![\\A-Za-z]){letters.pop()}(?![A-Za-z])", "k", text)


def _has_unit(text: str) -> bool:
    match = _FORMULA_UNIT.search(text)
    return match is not None and {word.lower() for word in re.split(r"[ /]+", match["unit"])} <= UNITS | {
        "unit",
        "units",
    }


def _words(text: str) -> str:
    text = _SENTENCE_END.sub("", text.strip()) or text
    text = re.sub(r"^(?:the|a|an)\s+", "", " ".join(text.replace("\u2019", "'").split()), flags=re.IGNORECASE)
    return _SHORT_WORDS.get(text.casefold(), text)


def _same_words(gold: str, said: str) -> bool:
    """Whether two words differ in nothing but capitals, or in a short one, maybe points of a figure, in the first."""
    if len(gold) > 3 or gold.casefold() in ("yes", "no"):
        return gold.casefold() == said.casefold()
    return gold[:1].casefold() + gold[1:] == said[:1].casefold() + said[1:]
