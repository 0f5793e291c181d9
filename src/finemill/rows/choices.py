"""Questions with choices: where they, the choices and the right one stand in the data sets of every benchmark."""

import ast
import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.values import as_text, holds_nothing, is_missing, is_true, parse_json

_QUESTIONS = (
    *("question", "question_stem", "stem", "query", "ctx", "goal", "sentence", "startphrase", "problem", "prompt"),
    *("instruction", "input"),
)
_LISTS = ("choices", "options", "endings", "option", "choice")
# Several answers are choices if a number beside them says which is right.
_ANSWERS = ("answers", "candidates", "alternatives")
# Columns of choices that stand in a column each.
_LETTERED = [[form.format(letter) for letter in letters] for form, letters in (
    ("{}", "ABCDEFGHIJ"), ("option_{}", "abcdefghij"), ("choice_{}", "abcdefghij"), ("option{}", "abcdefghij"),
    ("op{}", "abcdefghij"), ("answer{}", "ABCDEFGHIJ"), ("answer_{}", "abcdefghij"),
    ("option{}", "123456789"), ("option_{}", "123456789"), ("choice{}", "123456789"), ("choice_{}", "123456789"),
    ("sol{}", "123456789"), ("answer{}", "0123456789"), ("ending{}", "0123456789"), ("option{}", "0123456789"),
    ("choice{}", "0123456789"), ("{}", "abcdefghij"),
)]  # fmt: skip
# Two columns of these are two answers, of which one may be preferred.
_LEAST = {"answer": 3}
_INDICES = ("answer_index", "answer_idx", "correct_index", "gold_index", "cop")
# PIQA's and SWAG's labels count from 0, though PIQA's columns count from 1.
_FROM_ZERO = ("sol",)
_CORRECT = (
    *("answer", "answerKey", "answer_key", *_INDICES[:2], "correct_answer", "correct_option", "correct_choice"),
    *(*_INDICES[2:], "correct", "gold", "target", "label"),
)
_TEXTS, _LETTERS = ("text", "value", "content", "option", "choice"), ("label", "key", "letter", "id")
_IS_RIGHT = ("is_correct", "correct", "is_right", "is_answer")
# `B`, `(b)`, `B.`, and what may follow.
_STATED = re.compile(r"\(?(?P<letter>[A-Za-z])\)?(?:\s*[.):]\s*(?P<text>.*))?", re.DOTALL)
# Several right ones: `A, C` and `AC`.
_SEVERAL = re.compile(r"[A-J](?:(?:\s*(?:,|;|and|&)\s*|\s?)[A-J])+")
_LISTED = re.compile(r"(?:^|(?<=[\s,;(]))(?P<letter>[A-Ja-j])\s?[.):](?=\s*\S)")
_LETTER_NAMES = "ABCDEFGHIJ"
# Lists of these names say what a row is about.
_DESCRIBES = re.compile(
    r"tag|keyword|topic|type|categor|label|domain|lang|source|skill|concept|url|id|meta", re.IGNORECASE
)
_MARKED = "{}. {}"
# What a model's own choices have, as OpenAI's servers give them.
_OF_MODELS = frozenset(("message", "logprobs", "finish_reason"))

_TELLS = frozenset((*_LISTS, *_ANSWERS, *(column for columns in _LETTERED for column in columns)))

CHOICE_COLUMNS = ("question", *_LISTS, *(column for columns in _LETTERED[1:-1] for column in columns), *_QUESTIONS[1:5])
"""Columns that tell questions with choices."""
CORRECT_COLUMNS = _CORRECT
"""Columns that say which choice is right."""


@dataclass(frozen=True)
class Choices:
    """A question and its choices, a line each, as the model sees them.

    `answer` is what it is to say; `letter` the same if that is one letter.
    """

    column: str
    asked: str
    answer: str
    letter: str | None


@dataclass(frozen=True)
class _Listed:
    letters: list[str]
    texts: list[str]
    lines: list[str]
    right: list[str]
    """The letters of choices that say themselves that they are right."""


def offers_choices(row: Reader) -> bool:
    """Whether a row has a question, its choices and the right one."""
    question = None if row.names.isdisjoint(_TELLS) and not _nested(row) else _question(row)
    if question is None:
        return False
    column = _list_column(row)
    given = _nested(row) if column is None else row.peek(column)
    if column is None and not given and not _lettered(row):
        return False
    sure = question == "question" and column in _LISTS[:3]
    if column is not None and not sure and not _may_list(given):
        return False
    return row.has(*_CORRECT) or bool(given and _marks_right(given))


def read_choices(row: Reader) -> Choices:
    """The question with its choices. Raises: DroppedRowError: they, or which is right, cannot be read."""
    column = _question(row) or "question"
    listed = _listed_in(row)
    nested = row.peek(column)
    asked = as_text(nested["stem"], column) if isinstance(nested, Mapping) and "stem" in nested else row.text(column)
    row.get(column)
    if len(listed.letters) < 2 or not all(text.strip() for text in listed.texts):
        raise DroppedRowError("bad_choices", "choices")
    name = row.first(_CORRECT)
    if name is None and not listed.right:
        raise DroppedRowError("no_answer", " or ".join(_CORRECT[:2]))
    answer = listed.right[0] if name is None else _right(name, row.get(name), listed, _kind(row))
    # Beside a letter many sets have the same answer as a text.
    for other in filter(row.has, _CORRECT):
        if other != name and _agrees(row.peek(other), answer, listed):
            row.get(other)
    return Choices(column, "\n".join([asked, *listed.lines]), answer, answer if answer in listed.letters else None)


def _question(row: Reader) -> str | None:
    return row.first(_QUESTIONS)


def _list_column(row: Reader) -> str | None:
    column = row.first(_LISTS)
    if column is not None or row.names.isdisjoint(_ANSWERS):
        return column
    column = row.first(_ANSWERS) or ""
    given, number = _parsed(row.peek(column)), row.peek(row.first(_CORRECT) or "")
    texts = isinstance(given, list) and len(given) > 1 and all(isinstance(text, str) for text in given)
    return column if texts and type(number) is int and 0 <= number < len(given) else None


def _nested(row: Reader) -> Any:
    """The choices within the question, as AI2's own files have them."""
    question = row.peek("question")
    return question.get("choices") if isinstance(question, Mapping) and "stem" in question else None


def _may_list(value: Any) -> bool:
    """Whether a value may be choices and no settings or answers of a model under the same name."""
    value = _parsed(value)
    if isinstance(value, Mapping):
        return isinstance(value.get("text"), list) or all(len(str(key)) == 1 for key in value)
    if isinstance(value, str):
        return len(_marks(value)) > 1
    return (
        isinstance(value, list)
        and len(value) > 1
        and all(
            isinstance(item, str | int | float) or (isinstance(item, Mapping) and _OF_MODELS.isdisjoint(item))
            for item in value
        )
    )


def _parsed(value: Any) -> Any:
    value = parse_json(value)
    if isinstance(value, str) and value.strip().startswith(("['", '["')):
        try:
            return ast.literal_eval(value.strip())
        except (ValueError, SyntaxError, MemoryError):
            return value
    return value


def _lettered(row: Reader) -> list[str]:
    """The columns of choices that stand in a column each: A, B; option_a, option_b; none for fewer than two."""
    for columns in _LETTERED:
        found = [column for column in columns if row.has(column)]
        if len(found) >= _LEAST.get(_stem(columns), 2) and found == columns[: len(found)]:
            return found
    return []


def _stem(columns: Sequence[str]) -> str:
    return columns[0][:-1].rstrip("_")


def _kind(row: Reader) -> str:
    """How the columns of choices are called, "" where they stand in one."""
    if _list_column(row) or _nested(row):
        return ""
    columns = _lettered(row)
    return f"{_stem(columns)}*{columns[0][-1]}" if columns else ""


def _listed_in(row: Reader) -> _Listed:
    column = _list_column(row)
    if column is not None:
        return _of_value(_parsed(row.get(column)))
    if nested := _nested(row):
        return _of_value(_parsed(nested))
    columns = _lettered(row)
    texts = [as_text(row.get(column), column) for column in columns]
    counted = columns and columns[0][-1] == "1" and _stem(columns) not in _FROM_ZERO
    return _with_lines(list("123456789"[: len(texts)]) if counted else _letters(len(texts)), texts)


def _of_value(value: Any) -> _Listed:
    """Choices of a list, of `{"text": [...], "label": [...]}`, of texts by letter, of objects, or of a text."""
    if isinstance(value, str):
        marks = _marks(value)
        edges = [*(match.start() for match in marks), len(value)]
        texts = [value[start:end].strip(" ,;\n(") for start, end in itertools.pairwise(edges)]
        return _Listed([match["letter"] for match in marks], texts, [value.strip()], [])
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        texts = [as_text(text, "choices") for text in value["text"]]
        letters = value.get("label")
        fits = isinstance(letters, list) and len(letters) == len(texts)
        return _with_lines(list(map(str, letters or ())) if fits else _letters(len(texts)), texts)
    if isinstance(value, Mapping):
        return _with_lines(list(map(str, value)), [as_text(text, "choices") for text in value.values()])
    items = value if isinstance(value, list) else [value]
    if items and all(isinstance(item, Mapping) for item in items):
        return _of_objects(items)
    return _with_lines(_letters(len(items)), [as_text(item, "choices") for item in items])


def _of_objects(items: Sequence[Mapping[str, Any]]) -> _Listed:
    """Choices that are objects: a text and a letter, or a text under its letter."""
    if all(len(item) == 1 and len(str(next(iter(item)))) == 1 for item in items):
        return _with_lines([str(next(iter(i))) for i in items], [as_text(next(iter(i.values()))) for i in items])
    texts = [as_text(next((item[key] for key in _TEXTS if key in item), None), "choices") for item in items]
    named = [next((str(item[key]) for key in _LETTERS if not is_missing(item.get(key))), "") for item in items]
    letters = named if all(len(name) == 1 for name in named) and len(set(named)) == len(named) else _letters(len(texts))
    right = [letter for letter, item in zip(letters, items, strict=True) if _says_right(item)]
    listed = _with_lines(letters, texts)
    return _Listed(letters, texts, listed.lines, right)


def _says_right(item: Mapping[str, Any]) -> bool:
    return any(is_true(item.get(key)) is True for key in _IS_RIGHT)


def _marks_right(value: Any) -> bool:
    """Whether exactly one of the choices says that it is the right one."""
    value = _parsed(value)
    items = value if isinstance(value, list) else []
    return len([item for item in items if isinstance(item, Mapping) and _says_right(item)]) == 1


def _marks(text: str) -> list[re.Match[str]]:
    """The marks of choices in one text, none unless they follow each other from A on."""
    found = list(_LISTED.finditer(text))
    letters = "".join(match["letter"] for match in found)
    return found if letters and letters in ("ABCDEFGHIJ"[: len(letters)], "abcdefghij"[: len(letters)]) else []


def _letters(number: int) -> list[str]:
    return [chr(ord("A") + place) for place in range(number)]


def _with_lines(letters: list[str], texts: list[str]) -> _Listed:
    lines = [
        text if re.match(rf"\(?{re.escape(letter)}[).:]", text) else _MARKED.format(letter, text)
        for letter, text in zip(letters, texts, strict=True)
    ]
    return _Listed(letters, texts, lines, [])


def _right(name: str, answer: Any, listed: _Listed, kind: str) -> str:
    """The letter of the right choice, or the letters of several.

    Raises: DroppedRowError: it is none of them, or a number that may count from 0 or from 1.
    """
    if isinstance(answer, list):
        found = [_right(name, one, listed, kind) for one in answer]
        return found[0] if len(found) == 1 else ", ".join(found)
    stated = as_text(answer, name).strip()
    number = _index(answer, stated)
    by_text = _by_text(stated, listed)
    # A label may count from 0 also where columns count from 1, as in COPA.
    if number is not None and name == "label" and kind.endswith("*1") and not kind.startswith(_FROM_ZERO):
        raise DroppedRowError("bad_choices", name)
    if number is None or stated in listed.letters:
        found_letter = (by_text if stated in listed.texts else None) or _by_letter(stated, listed) or by_text
        if found_letter is not None:
            return found_letter
        if _SEVERAL.fullmatch(stated) and set(re.findall("[A-J]", stated)) <= set(listed.letters):
            return stated
        raise DroppedRowError("bad_choices", name)
    if by_text is not None and isinstance(answer, str):
        return by_text
    # Of columns called A and B a 1 may be either, unless the name says that it is an index.
    lettered = kind and not kind.endswith(("*0", "*1")) and name not in _INDICES
    if number == len(listed.letters) and not lettered:
        raise DroppedRowError("choice_beyond_last", name)
    if lettered or not 0 <= number < len(listed.letters):
        raise DroppedRowError("bad_choices", name)
    letter = listed.letters[number]
    if by_text is not None and by_text != letter:
        raise DroppedRowError("bad_choices", name)
    return letter


def _index(answer: Any, stated: str) -> int | None:
    if isinstance(answer, float) and answer.is_integer():
        return int(answer)
    return int(stated) if re.fullmatch(r"-?\d{1,9}", stated) else None


def _by_letter(stated: str, listed: _Listed) -> str | None:
    """The letter that is stated, in any case, alone or before its text."""
    if stated in listed.letters:
        return stated
    match = _STATED.fullmatch(stated)
    letter = next((one for one in listed.letters if match and one.lower() == match["letter"].lower()), None)
    if match is None or letter is None or not (said := match["text"]):
        return letter
    text = _bare(listed.texts[listed.letters.index(letter)])
    return letter if _bare(said) == text else None


def _by_text(stated: str, listed: _Listed) -> str | None:
    if stated in listed.texts:
        return listed.letters[listed.texts.index(stated)] if listed.texts.count(stated) == 1 else None
    match = _STATED.fullmatch(stated)
    if match and match["text"] and match["letter"].upper() in map(str.upper, listed.letters):
        # What a letter says counts more than the text after it.
        return None
    texts = list(map(_bare, listed.texts))
    return listed.letters[texts.index(_bare(stated))] if texts.count(_bare(stated)) == 1 else None


def _bare(text: str) -> str:
    """A choice's text without its mark, but for case and spaces."""
    match = _STATED.fullmatch(text.strip())
    return " ".join((match["text"] if match and match["text"] else text).split()).lower()


def names_a_choice(answer: str) -> bool:
    """Whether an answer is nothing but the letter of a choice."""
    match = _STATED.fullmatch(answer.strip())
    return match is not None and not match["text"] and match["letter"] in _LETTER_NAMES


def lists_choices(text: str) -> bool:
    """Whether a question lists choices by letters itself."""
    return len(_LISTED.findall(text)) > 1


def may_be_choices(name: str, value: Any) -> bool:
    """Whether an unknown column may be the choices of a question: several texts, by letter or in a list."""
    value = _parsed(value)
    if isinstance(value, Mapping):
        return len(value) > 1 and (all(len(str(key)) == 1 for key in value) or isinstance(value.get("text"), list))
    texts = isinstance(value, list) and all(isinstance(text, str) and text for text in value)
    return texts and 1 < len(value) <= len(_LETTER_NAMES) and not _DESCRIBES.search(name)


def _agrees(value: Any, answer: str, listed: _Listed) -> bool:
    """Whether another column says the same: the letter, its text or its index."""
    if holds_nothing(value) or not isinstance(value, str | int) or answer not in listed.letters:
        return False
    place = listed.letters.index(answer)
    return str(value).strip() in (answer, str(place)) or _bare(str(value)) == _bare(listed.texts[place])
