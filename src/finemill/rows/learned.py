"""What the data exclude from learning: flags of a turn, of a row, and lists of flags beside the turns."""

import re
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from typing import Any

from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.speakers import ROLES, snake_case, turn_role
from finemill.rows.values import is_true, parse_json

# What tells good answers from bad ones in unpaired preferences.
_GOOD = (
    *("label", "kto_tag", "kto_label", "completion_label", "desirable", "is_desirable", "good", "is_good", "correct"),
    *("is_correct", "accepted", "is_accepted", "preferred", "is_preferred", "chosen", "is_chosen", "is_positive"),
    *("thumbs_up", "liked", "like", "upvoted", "upvote", "feedback", "labels"),
)
_BAD = (
    *("bad", "is_bad", "rejected", "is_rejected", "undesirable", "is_undesirable", "is_negative", "is_incorrect"),
    *("thumbs_down", "disliked", "dislike", "downvoted", "downvote"),
)
MARKS = frozenset((*_GOOD, *_BAD))
"""Columns, and keys of turns, that may say whether an answer is a good one."""
# Words that name a bad answer, and nothing that a text is classified as.
_BAD_WORDS = (
    *(
        "bad",
        "rejected",
        "undesirable",
        "unacceptable",
        "disliked",
        "thumbs_down",
        "downvoted",
        "-1",
        "-1.0",
        "dislike",
    ),
    *("reject", "downvote", "incorrect", "wrong", "dispreferred", "not_preferred", "\U0001f44e"),
)
# Under these names only such a word tells.
_VERDICTS = (
    "rating",
    "quality",
    "thumbs",
    "thumb",
    "correctness",
    "verdict",
    "judgement",
    "judgment",
    "vote",
    "reaction",
)
# Other names under which false or no, and nothing else, says that an answer is no good one: a number may count
# anything.
_SAYS_GOOD = re.compile(
    r"(?:is_|was_|\w+_is_)?(?:good|correct|valid|verified|passed|accepted|approved|preferred|desirable|liked|helpful|safe"
    r"|success(?:ful)?|resolved|solved)"
    r"(?:_(?:answer|response|completion|output|solution))?|(?:binary|response|answer|completion|preference|kto)_label"
    r"|(?:answer|response|completion|solution|output|problem|question)_(?:is_)?(?:good|correct|valid|verified|accepted)"
)

_LEARNED_KEYS = (
    *("weight", "train", "training", "trainable", "loss", "loss_weight", "loss_scale", "loss_mask", "learn"),
    *("trained", "is_trained", "train_on_turn", "compute_loss", "calculate_loss", "use_loss", "train_on"),
    *("train_turn", "use_for_training", "include_in_loss", "in_loss", "supervise", "supervised", "is_label"),
    "is_target",
)
_EXCLUDED_KEYS = (
    *("mask", "masked", "is_masked", "ignore", "ignored", "exclude", "excluded", "skip", "no_loss", "no_train"),
    *("no_training", "ignore_loss", "exclude_from_loss", "exclude_from_training"),
)
_ABOUT = ("metadata", "meta", "annotations", "extra", "additional_kwargs")
_SEGMENTS = ("train_detail", "training_detail")
FLAGS = frozenset((*_LEARNED_KEYS, *_EXCLUDED_KEYS, *_SEGMENTS))
"""Columns, and keys of turns, that may say whether something is learned."""
# Other names that flags of turns have.
_SAYS_LEARNED = re.compile(
    r"(?:^|_)(?:train(?:able|ed|ing|s)?|loss(?:es)?|learn(?:able|ed|ing)?|weights?|supervis(?:e|ed|ion)|sft"
    r"|grad(?:ient)?s?|backprop)(?:_|$)"
)
_SAYS_EXCLUDED = re.compile(
    r"(?:^|_)(?:(?:no|not|non|dont|do_not|without)_\w*(?:loss|train|learn|supervis|grad|backprop)\w*|skip(?:ped)?|ignored?"
    r"|un(?:train|learn|supervis)\w*|excluded?|mask(?:ed|s)?|omit(?:ted)?|frozen|freeze|context_only|only_context"
    r"|is_context|as_context)(?:_|$)"
)
_LEARNED_MASK = re.compile(
    r"(?:^|_)(?:loss|train\w*|learn\w*|assistants?|labels?|targets?|completions?|responses?|answers?|outputs?|sft"
    r"|supervis\w*|gradients?)_masks?$"
)
# What ends so counts or names something.
_NO_FLAG = re.compile(
    r"_(?:ids?|idx|index|no|num|number|steps?|epochs?|count|size|split|set|scores?|types?|names?|dates?|time|versions?"
    r"|order|rank|history|values?)$"
)
# Of a row: only its last answer is learned.
_LAST_ONLY = re.compile(r"(?:^|_)(?:only_(?:the_)?(?:last|final)|(?:last|final)_(?:[a-z]+_)?only)(?:_|$)")
_MASK = re.compile(r"(?:^|_)masks?(?:_|$)")


@lru_cache(maxsize=4096)
def says_learned(name: str) -> bool | None:
    """Whether a flag of this name says what is learned (True) or what is not (False); None for other names."""
    name = snake_case(name)
    if _NO_FLAG.search(name):
        return None
    if name in _LEARNED_KEYS or _LEARNED_MASK.search(name):
        return True
    if name in _EXCLUDED_KEYS or _SAYS_EXCLUDED.search(name):
        return False
    return True if _SAYS_LEARNED.search(name) else None


def read_label(row: Reader, *, bad_answers: bool) -> bool | None:
    """Whether the row's answer is marked as good or as bad; None for neither. One mark as bad is enough.

    Raises: DroppedRowError: it is bad, and `bad_answers` is not set.
    """
    marks = dict(_marks(row))
    bad = next((name for name, is_good in marks.items() if not is_good), None)
    if bad is not None and not bad_answers:
        raise DroppedRowError("labelled_bad", bad)
    return bad is None if marks else None


def _marks(reader: Reader) -> Iterator[tuple[str, bool]]:
    """The names under which an answer is marked, each with whether as a good one; they are read."""
    for name in reader.names:
        says_good = _says_good(name) if isinstance(name, str) else None
        if says_good is None or (marked := _is_marked(name, reader.peek(name))) is None:
            continue
        reader.get(name)
        yield name, marked is says_good


@lru_cache(maxsize=4096)
def _says_good(name: str) -> bool | None:
    """Whether a mark of this name says that an answer is good (True) or bad (False); None for other names."""
    name = snake_case(name)
    if name in _BAD:
        return False
    return True if name in _GOOD or name in _VERDICTS or _SAYS_GOOD.fullmatch(name) else None


def _is_marked(name: str, value: Any) -> bool | None:
    """What a label says: a yes or no, or a word for a bad answer; None for any other value."""
    if isinstance(value, str | int | float) and str(value).strip().lower().replace(" ", "_") in _BAD_WORDS:
        return False
    if name in MARKS:
        return is_true(value)
    plain = str(value).strip().lower() in ("true", "false", "yes", "no") and snake_case(name) not in _VERDICTS
    return is_true(value) if plain else None


def check_excluded(reader: Reader) -> None:
    """Raises: DroppedRowError: a column says that the row is not to be learned."""
    if reader.names.isdisjoint(FLAGS):
        return
    for keys, wanted in ((_LEARNED_KEYS, True), (_EXCLUDED_KEYS, False)):
        for key in filter(reader.has, keys):
            value = parse_json(reader.peek(key))
            if isinstance(value, list) or is_true(value) is None:
                continue
            reader.get(key)
            if is_true(value) is not wanted:
                raise DroppedRowError("excluded_row", key)


def excluded_turns(reader: Reader, turns: Sequence[Mapping[str, Any]]) -> set[int]:
    """The turns that lists of flags beside them exclude: a flag for each turn, or for each of the assistant's.

    Args:
        reader: of the row.
        turns: each with a role.
    Raises: DroppedRowError: a list excludes something and is for neither, or excludes every answer.
    """
    lists, last_only = list(_flag_lists(reader)), _learns_last_only(reader)
    if not lists and not last_only:
        return set()
    answers = [number for number, turn in enumerate(turns) if ROLES.get(turn_role(turn)) == "assistant"]
    by_length = {len(answers): answers, len(turns): list(range(len(turns)))}
    excluded = set(answers[:-1]) if last_only else set()
    for name, learned in lists:
        if len(learned) == len(turns) and _MASK.search(snake_case(name)):
            learned = _by_questions(learned, answers)
        places = by_length.get(len(learned))
        if places is None and not (all(learned) and all(is_true(flag) for flag in parse_json(reader.peek(name)))):
            raise DroppedRowError("partly_excluded_row", name)
        excluded.update(place for place, flag in zip(places or (), learned, strict=False) if not flag)
        if answers and excluded.issuperset(answers):
            raise DroppedRowError("excluded_row", name)
    return excluded


def _learns_last_only(reader: Reader) -> bool:
    names = [name for name in reader.names if isinstance(name, str) and _is_last_only(name)]
    says = [is_true(reader.peek(name)) for name in names]
    for name, said in zip(names, says, strict=True):
        if said is not None:
            reader.get(name)
    return True in says


@lru_cache(maxsize=4096)
def _is_last_only(name: str) -> bool:
    return _LAST_ONLY.search(snake_case(name)) is not None


def _by_questions(learned: list[bool], answers: Sequence[int]) -> list[bool]:
    """What a mask says is learned, which may be its ones or its zeros: what all questions have is not."""
    asked = {flag for number, flag in enumerate(learned) if number not in answers}
    return [not flag for flag in learned] if asked == {True} and not all(learned) else learned


def _flag_lists(reader: Reader) -> Iterator[tuple[str, list[bool]]]:
    """Lists of nothing but flags by name, as what is learned."""
    for name in reader.names:
        if not isinstance(name, str) or (wanted := says_learned(name)) is None:
            continue
        value = parse_json(reader.peek(name))
        flags = [_flag(item) for item in value] if isinstance(value, list) and value else [None]
        if None in flags:
            continue
        if all(is_true(item) is not None for item in value):
            reader.get(name)
        yield name, [flag is wanted for flag in flags]


def _flag(value: Any) -> bool | None:
    """What a flag says; a weight is one: between 0 and 1 it is learned, below 0 it is not."""
    said = is_true(value)
    if said is None and isinstance(value, int | float) and not isinstance(value, bool):
        return value > 0
    return said


def is_learned(turn: Reader, *, only_excluded: bool = False) -> bool:
    """Whether the data want this turn learned. Weights between 0 and 1 cannot be kept, so they are not read.

    With `only_excluded` what says that it is learned is not read: only an assistant's turns are.
    Raises: DroppedRowError: only a part of it is to be learned.
    """
    segments = parse_json(turn.get(*_SEGMENTS))
    if isinstance(segments, list) and any(
        is_true(s.get("train", True)) is False for s in segments if isinstance(s, Mapping)
    ):
        raise DroppedRowError("partly_excluded_turn")
    learned = only_excluded or all(is_good for _, is_good in _marks(turn))
    # What else is said of a turn, as in Label Studio's and others' exports.
    for name in _ABOUT:
        if isinstance(about := turn.peek(name), Mapping) and not only_excluded:
            inside = Reader(about)
            learned &= is_learned(inside)
            if not inside.unread:
                turn.get(name)
    for name in turn.names:
        wanted = says_learned(name) if isinstance(name, str) else None
        if wanted is None or (says := _flag(turn.peek(name))) is None or (only_excluded and says is wanted):
            continue
        if is_true(turn.peek(name)) is not None or says is not wanted:
            turn.get(name)
        learned &= says is wanted
    return learned
