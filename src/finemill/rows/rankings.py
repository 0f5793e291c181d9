"""Preferences in rows that hold several answers and say by a verdict, by scores or by ranks which is better."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.values import is_missing, parse_json

_STEMS = ("response", "answer", "output", "completion", "conversation", "candidate", "reply", "summary", "human_ref")
_SUFFIXES = (("a", "b"), ("0", "1"), ("1", "2"))
# Of three or more, two say nothing about the best.
_NEXT = {"b": "c", "1": "2", "2": "3"}
# Two answers, a column each.
_PAIRS = [
    (form.format(stem, one), form.format(stem, other), (one, other))
    for stem in _STEMS
    for form in ("{}_{}", "{}{}")
    for one, other in _SUFFIXES
]
_LISTS = ("completions", "responses", "answers", "candidates", "outputs", "generations", "replies")
_VERDICTS = (
    *("winner", "better", "better_response", "better_response_id", "better_answer", "preferred", "preferred_response"),
    *("preferred_answer", "preference", "human_preference", "choice", "chosen", "selected", "best", "verdict"),
    *("label", "labels", "vote"),
)
# From -3, the first is much better, to 3.
_STRENGTHS = ("overall_preference", "preference_strength")
_SCORES = ("score", "overall_score", "rating", "overall_rating", "reward", "rewards", "scores", "ratings", "votes")
_RANKS = ("rank", "ranks", "ranking", "rankings")
_TEXTS = ("response", "answer", "text", "content", "output", "completion", "message", "messages", "reply")
# `model_a`, `[[B]]`, `response_1`, `A`.
_NAMES_ONE = re.compile(r"(?:\[\[)?\s*(?:[a-z]+[ _-]?)*?(?<![a-z])(?P<one>[ab012])\s*(?:\]\])?")
_NAMES_NONE = re.compile(r"\[*(?:tie|equal|both|neither|same|none|draw|c\b).*", re.DOTALL)
_ORDER = {"first": 0, "second": 1, "left": 0, "right": 1}

RANKED_COLUMNS = frozenset(
    (
        *(column for one, other, _ in _PAIRS for column in (one, other)),
        *(*_LISTS, *_VERDICTS, *_STRENGTHS, *_SCORES, *_RANKS),
    )
)
"""Every column that a ranking is read from, but for scores by answer (`score_a`)."""
_TELLS = frozenset((*(one for one, _, _ in _PAIRS), *_LISTS))


@dataclass(frozen=True)
class Answer:
    """One of several answers: where it stands and what stands there, a text, messages, or an object with either."""

    field: str
    value: Any


def ranked_answers(row: Reader) -> tuple[Answer, Answer] | None:
    """The best answer and the worst; None for a row that does not rank answers.

    Raises: DroppedRowError: neither is better, or the verdict cannot be read.
    """
    if row.names.isdisjoint(_TELLS):
        return None
    pair = next((pair for pair in _PAIRS if row.has(pair[0]) and row.has(pair[1])), None)
    if pair is not None and row.has(f"{pair[1][:-1]}{_NEXT[pair[1][-1]]}"):
        return None
    return _of_list(row) if pair is None else _of_pair(row, *pair)


def ranks_answers(row: Reader) -> bool:
    """Whether a row has several answers and says which is better, though it may be that none is."""
    if row.names.isdisjoint(_TELLS):
        return False
    try:
        return ranked_answers(Reader(row.values)) is not None
    except DroppedRowError:
        return True


def _of_pair(row: Reader, one: str, other: str, suffixes: tuple[str, str]) -> tuple[Answer, Answer] | None:
    better = _verdict(row, (one, other), suffixes)
    if better is None:
        return None
    names = (one, other)
    first, second = (Answer(name, row.get(name)) for name in (names[better], names[1 - better]))
    return first, second


def _verdict(row: Reader, columns: tuple[str, str], suffixes: tuple[str, str]) -> int | None:
    """Which of two answers is better, 0 or 1; None where nothing says so."""
    for name in filter(row.has, _STRENGTHS):
        return _by_size(name, _number(row.get(name)), 0.0)
    flags = [name for name in (f"winner_model_{s}" for s in suffixes) if name in row.names]
    if len(flags) == 2:
        row.get("winner_tie")
        return _by_size(flags[0], *(_number(row.get(name)) for name in reversed(flags)))
    for name in filter(row.has, _VERDICTS):
        if columns[0] == "human_ref_a" and _number(row.peek(name)) is not None:
            # SHP's 1 means the first.
            number = _number(row.get(name))
            return _by_size(name, 0.5, number if number in (0, 1) else None)
        return _named(name, row.get(name), columns, suffixes)
    for score in _SCORES:
        names = [f"{score}_{suffix}" for suffix in suffixes]
        if all(map(row.has, names)):
            return _by_size(names[0], *(_number(row.get(name)) for name in reversed(names)))
    return None


def _by_size(field: str, one: float | None, other: float | None) -> int:
    """0 where the first number is less, 1 where it is more."""
    if one is None or other is None:
        raise DroppedRowError("unclear_verdict", field)
    if one == other:
        raise DroppedRowError("tie", field)
    return int(one > other)


def _named(field: str, value: Any, columns: tuple[str, str], suffixes: tuple[str, str]) -> int:
    """Which of two answers a verdict names."""
    number = _number(value)
    text = str(value).strip().lower() if number is None else str(int(number))
    if text in columns:
        return columns.index(text)
    if text in _ORDER:
        return _ORDER[text]
    if _NAMES_NONE.fullmatch(text):
        raise DroppedRowError("tie", field)
    match = _NAMES_ONE.fullmatch(text)
    one = match["one"] if match else None
    if one in suffixes:
        return suffixes.index(one)
    # Of a and b a 2 is the second and a 0 the first; whether a 1 counts from 0 or from 1 cannot be told.
    if suffixes == ("a", "b") and one in ("0", "2"):
        return int(one == "2")
    raise DroppedRowError("unclear_verdict", field)


def _of_list(row: Reader) -> tuple[Answer, Answer] | None:
    """The best and the worst of a list of answers with a number each, in the answer or in a list beside it."""
    for column in filter(row.has, _LISTS):
        answers = parse_json(row.peek(column))
        if not isinstance(answers, list) or len(answers) < 2:
            continue
        ranking = _numbers_inside(answers) or next(_lists_beside(row, len(answers)), None)
        if ranking is None:
            continue
        name, numbers = ranking
        row.get(column)
        row.get(name)
        if min(numbers) == max(numbers):
            raise DroppedRowError("tie", name if name in row.names else column)
        sign = -1 if name in _RANKS else 1
        order = sorted(range(len(numbers)), key=lambda place: -sign * numbers[place])
        best, worst = (_answer(row, column, place, answers[place], name) for place in (order[0], order[-1]))
        return best, worst
    return None


def _numbers_inside(answers: Sequence[Any]) -> tuple[str, list[float]] | None:
    if not all(isinstance(answer, Mapping) and _has_text(answer) for answer in answers):
        return None
    for name in (*_RANKS, *_SCORES):
        numbers = [_number(answer.get(name)) for answer in answers]
        found = [number for number in numbers if number is not None]
        if len(found) == len(answers):
            return name, found
    return None


def _has_text(answer: Mapping[str, Any]) -> bool:
    return any(answer.get(name) for name in _TEXTS)


def _lists_beside(row: Reader, length: int) -> Iterator[tuple[str, list[float]]]:
    for name in filter(row.has, (*_RANKS, *_SCORES)):
        values = parse_json(row.peek(name))
        numbers = [_number(value) for value in values] if isinstance(values, list) else []
        found = [number for number in numbers if number is not None]
        if len(found) == len(numbers) == length:
            yield name, found


def _answer(row: Reader, column: str, place: int, value: Any, ranked_by: str) -> Answer:
    field = f"{column}[{place}]"
    if not isinstance(value, Mapping) or "role" in value:
        return Answer(field, value)
    key = next((name for name in _TEXTS if value.get(name)), None)
    if key is None:
        raise DroppedRowError("no_answer", field)
    row.note_unread(
        f"{column}[].{name}" for name, v in value.items() if name not in (key, ranked_by) and not is_missing(v)
    )
    return Answer(f"{field}.{key}", value[key])


def _number(value: Any) -> float | None:
    """A number, or a text of one."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    return float(value) if isinstance(value, int | float) and value == value else None
