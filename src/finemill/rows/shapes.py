"""The shapes of rows that public data sets come in: how each is told from the others, and what it says."""

import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from finemill.rows.answers import final_answer
from finemill.rows.conversation import Conversation, checked
from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.tools import to_tools
from finemill.rows.turns import (
    MEDIA_COLUMNS,
    THINKING_KEYS,
    Message,
    assistant,
    check_excluded,
    check_unread_thinking,
    is_prose,
    thinking_under,
    to_messages,
    turn_list,
)
from finemill.rows.values import as_text, is_true, parse_json

Row = Mapping[str, Any]
ShapeName = Literal[
    "preference",
    "messages",
    "sharegpt",
    "multiple_choice",
    "reasoning",
    "alpaca",
    "prompt_completion",
    "question_answer",
    "turns",
    "text",
]

_CHATS = ("conversations", "conversation", "dialog", "dialogue", "chat")
_TEXTS = ("text", "content", "document")
_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_TOOLS = ("tools", "functions")
_CONTEXT = ("input", "context", "passage", "document", "background")
_FINAL = ("expected_answer", "final_answer", "answer")
_CHOICES = ("choices", "options")
_CORRECT = ("answer", "answerKey", "answer_key", "answer_index", "answer_idx", "label")
# What tells good answers from bad ones in unpaired preferences.
_GOOD = (
    *("label", "kto_tag", "kto_label", "completion_label", "desirable", "is_desirable", "good", "is_good", "correct"),
    *("is_correct", "accepted", "is_accepted", "preferred", "is_preferred", "chosen", "is_chosen", "is_positive"),
    *("thumbs_up", "liked", "upvoted", "feedback"),
)
_BAD = (
    *("bad", "is_bad", "rejected", "is_rejected", "undesirable", "is_undesirable", "is_negative", "is_incorrect"),
    *("thumbs_down", "disliked", "downvoted"),
)
# Words that name a bad answer, and nothing that a text is classified as.
_BAD_WORDS = ("bad", "rejected", "undesirable", "unacceptable", "disliked", "thumbs_down", "downvoted", "-1", "-1.0")
_MARKS = frozenset((*_GOOD, *_BAD))
_ROW_THINKING = (*THINKING_KEYS, "complex_cot")
# Switches that some sets keep in a column with the name of a thinking block.
_SWITCHES = ("on", "off", "yes", "no", "true", "false")
# Prompt columns and answer columns by shape; of each the first that says something counts.
_PAIRS = {
    "reasoning": (("problem",), ("generated_solution", "solution", "answer")),
    "alpaca": (("instruction",), ("output", "response", "answer", "completion")),
    "prompt_completion": (("prompt", "query", "input"), ("completion", "response", "output", "answer")),
    "question_answer": (("question",), ("answer", "response", "output", "completion", "solution")),
}
_PROMPTS = tuple(name for prompts, _ in _PAIRS.values() for name in prompts)


@dataclass(frozen=True)
class Shape:
    """One shape: its columns as people read them, those that tell it, a test, and what a row of it says."""

    columns: str
    main: tuple[str, ...]
    matches: Callable[[Reader], bool]
    convert: Callable[[Reader], Conversation]


def detect_shape(row: Row, named: Collection[str] = ()) -> str | None:
    """The name in `SHAPES` of the shape that `row` has, None if it has none.

    Of several the first, or the first of those with the most columns in `named`: the columns that the user named.
    """
    for reader in (Reader(row), Reader(row, blank_counts=True)):
        found = (name for name, shape in SHAPES.items() if shape.matches(reader))
        best = (
            max(found, key=lambda name: len(set(SHAPES[name].main) & set(named)), default=None)
            if named
            else next(found, None)
        )
        if best is not None:
            return best
    return None


def to_conversation(row: Row, shape: str) -> Conversation:
    """Convert a row of `shape` (a name in `SHAPES`) and check it.

    Raises: DroppedRowError: it cannot be learned from as it is meant; the message is the reason.
    """
    reader = Reader(row)
    try:
        if not reader.names.isdisjoint(MEDIA_COLUMNS) and (media := next(filter(reader.has, MEDIA_COLUMNS), None)):
            raise DroppedRowError("not_text", media)
        _check_label(reader, shape)
        check_excluded(reader)
        conversation = checked(SHAPES[shape].convert(reader))
        # Beside a preference stands why one answer is better; beside an answer that thinks the same thinking again.
        if conversation.text is None and conversation.rejected is None and not any(map(_thinks, conversation.messages)):
            check_unread_thinking(reader)
    except RecursionError:
        raise DroppedRowError("too_deep") from None
    return replace(conversation, unread=reader.unread)


def _check_label(row: Reader, shape: str) -> None:
    """Raises: DroppedRowError: the row is an example of a bad answer."""
    if shape in ("text", "multiple_choice", "preference") or row.names.isdisjoint(_MARKS):
        return
    for column, says_good in (*((name, True) for name in _GOOD), *((name, False) for name in _BAD)):
        if row.has(column) and (marked := _is_marked(row.peek(column))) is not None:
            row.get(column)
            if marked is not says_good:
                raise DroppedRowError("labelled_bad", column)


def _is_marked(value: Any) -> bool | None:
    """What a label says: a yes or no, or a word for a bad answer; None for any other value."""
    return False if str(value).strip().lower().replace(" ", "_") in _BAD_WORDS else is_true(value)


def _system(row: Reader) -> list[Message]:
    """The system message that some data sets keep in a column of its own."""
    text = row.text(*_SYSTEM)
    return [{"role": "system", "content": text}] if text else []


def _with_system(row: Reader, messages: list[Message]) -> list[Message]:
    system = _system(row)
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    return messages if system and messages[:1] == system else [*system, *messages]


def _from_chat(column: str) -> Callable[[Reader], Conversation]:
    def convert(row: Reader) -> Conversation:
        messages = _with_row_thinking(row, _messages(row, column))
        return Conversation(_with_system(row, messages), to_tools(row.get(*_TOOLS)))

    return convert


def _with_row_thinking(row: Reader, messages: list[Message]) -> list[Message]:
    """Messages with the thinking block that stands in a column beside them, which is that of a single answer.

    Raises: DroppedRowError: there are several answers.
    """
    if row.names.isdisjoint(_ROW_THINKING):
        return messages
    column = next((name for name in _ROW_THINKING if row.has(name)), None)
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    if column is None or not is_prose(row.peek(column)) or any(_thinks(messages[number]) for number in said):
        return messages
    if len(said) != 1:
        raise DroppedRowError("thinking_not_read", column)
    answer = messages[said[0]]
    return [*messages[: said[0]], {**answer, **assistant(answer["content"], thinking_under(row, [column]))}]


def _thinks(message: Message) -> bool:
    return "reasoning_content" in message or "</think>" in message["content"]


def _messages(row: Reader, column: str) -> list[Message]:
    return to_messages(turn_list(row.get(column)) or [], row, column)


def _first_chat(row: Reader) -> str | None:
    """The first column that holds turns, other than `messages`."""
    return next((name for name in _CHATS if turn_list(row.peek(name))), None)


def _history(row: Reader) -> list[Message]:
    """Earlier turns beside a question: pairs of question and answer, or messages."""
    value = parse_json(row.get("history"))
    if value is None or turn_list(value):
        return to_messages(turn_list(value) or [], row, "history")
    pairs = value if isinstance(value, list) else [value]
    if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
        raise DroppedRowError("bad_history", "history")
    return [m for asked, said in pairs for m in (_user(as_text(asked, "history")), assistant(as_text(said, "history")))]


def _in_column(column: str, read: Callable[..., Message], *values: str) -> Message:
    """What `read` makes of values of a column, which a reason then names."""
    try:
        return read(*values)
    except DroppedRowError as reason:
        raise reason.within(column) from None


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _matches_pair(shape: str) -> Callable[[Reader], bool]:
    prompts, answers = _PAIRS[shape]
    return lambda row: row.has(*prompts) and any(row.has(name) for name in answers if name not in prompts)


def _from_pair(shape: str) -> Callable[[Reader], Conversation]:
    prompts, answers = _PAIRS[shape]

    def convert(row: Reader) -> Conversation:
        before = _asked(row, prompts)
        column = next((name for name in answers if row.has(name)), None)
        if column is None:
            raise DroppedRowError("no_answer", " or ".join(answers))
        value = row.get(column)
        if turn_list(value):
            said = _turns(row, column, value)
        else:
            answer = as_text(value, column)
            said = [_in_column(column, assistant, answer, _row_thinking(row, answer))]
        return Conversation(_with_system(row, [*before, *said]), to_tools(row.get(*_TOOLS)), _final(row, shape, value))

    return convert


def _asked(row: Reader, columns: tuple[str, ...]) -> list[Message]:
    """The messages before an answer; of a prompt that is a list of messages no answer is learned."""
    column = next((name for name in columns if row.has(name)), None)
    if column is None:
        raise DroppedRowError("empty_turn", " or ".join(columns))
    value = row.get(column)
    if turn_list(value):
        return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in _turns(row, column, value)]
    context = row.text(*(name for name in _CONTEXT if name != column))
    return [*_history(row), _user("\n\n".join(filter(None, (as_text(value, column), context))))]


def _turns(row: Reader, column: str, value: Any) -> list[Message]:
    return to_messages(turn_list(value) or [], row, column)


def _row_thinking(row: Reader, answer: str) -> str:
    """A thinking block in a column of its own, unless the answer has one or the column is a switch."""
    columns = [name for name in _ROW_THINKING if row.has(name)]
    if not columns or "</think>" in answer or str(row.peek(columns[0])).strip().lower() in _SWITCHES:
        return ""
    return thinking_under(row, columns)


def _final(row: Reader, shape: str, answer: Any) -> str | None:
    """The final answer for exact match, where the row states one."""
    if not isinstance(answer, str | int | float):
        return None
    if shape == "reasoning":
        stated = next((name for name in _FINAL if row.has(name)), None)
        return final_answer(str(answer)) if stated is None else as_text(row.get(stated), stated)
    # GSM8K's answers end with `#### <final answer>`.
    return final_answer(str(answer)) if "####" in str(answer) else None


def _is_preference(row: Reader) -> bool:
    if not row.has("chosen") or not row.has("rejected"):
        return False
    asked = row.has(*_PROMPTS) or any(turn_list(row.peek(name)) for name in (*_CHATS, "messages"))
    answers = [row.peek("chosen"), row.peek("rejected")]
    return asked or all(_whole_chat(answer) is not None for answer in answers)


_TRANSCRIPT = re.compile(r"(?:\A|\n\n)(Human|Assistant):")


def _whole_chat(answer: Any) -> list[Any] | None:
    """The turns of an answer that brings its own question: messages, or a transcript as in HH-RLHF; None for others."""
    turns = turn_list(answer)
    if turns:
        return turns if len(turns) > 1 else None
    if not isinstance(answer, str) or not answer.lstrip().startswith("Human:"):
        return None
    pieces = _TRANSCRIPT.split(answer.strip())
    return [{"role": role, "content": text.strip()} for role, text in zip(pieces[1::2], pieces[2::2], strict=True)]


def _from_preference(row: Reader) -> Conversation:
    """Both answers after what they share. Each may be a text, or messages with or without those before them."""
    asked = _preference_prompt(row)
    better, worse = (_after(asked, _answer_messages(row, column)) for column in ("chosen", "rejected"))
    if not asked and worse and worse[0]["role"] == "assistant":
        worse = [*better[:-1], *worse]
    better, worse = _with_system(row, better), _with_system(row, worse)
    if better == worse:
        raise DroppedRowError("chosen_is_rejected", "rejected")
    pairs = zip(better, worse, strict=False)
    shared = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(better), len(worse)))
    if any(message["role"] in ("system", "user") for message in (*better[shared:], *worse[shared:])):
        raise DroppedRowError("histories_differ", "rejected")
    before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in better[:shared]]
    return Conversation(
        [*before, *better[shared:]],
        to_tools(row.get(*_TOOLS)),
        rejected=[*before, *worse[shared:]],
    )


def _preference_prompt(row: Reader) -> list[Message]:
    column = next((name for name in _PROMPTS if row.has(name)), None)
    if column is not None:
        return _asked(row, (column,))
    chat = next((name for name in (*_CHATS, "messages") if turn_list(row.peek(name))), None)
    return [] if chat is None else _messages(row, chat)


def _answer_messages(row: Reader, column: str) -> list[Message]:
    value = row.get(column)
    turns = _whole_chat(value) or turn_list(value)
    return to_messages(turns, row, column) if turns else [_in_column(column, assistant, as_text(value, column))]


def _after(asked: list[Message], answer: list[Message]) -> list[Message]:
    """An answer after its question, which it may bring along. Raises: DroppedRowError: it brings another."""
    if not asked or not answer or answer[0]["role"] not in ("system", "user"):
        return [*asked, *answer]
    texts = [message["content"].strip() for message in answer if message["role"] == "user"]
    if not all(message["content"].strip() in texts for message in asked if message["role"] == "user"):
        raise DroppedRowError("prompt_differs", "chosen")
    system = [m for m in asked if m["role"] == "system"]
    return [*system, *answer] if answer[0]["role"] != "system" else answer


def _is_multiple_choice(row: Reader) -> bool:
    return row.has("question") and row.has(*_CHOICES) and row.has(*_CORRECT)


def _from_multiple_choice(row: Reader) -> Conversation:
    """The choices by letter under the question; the answer is a letter, or the text that the row gives."""
    letters, texts = _choices(parse_json(row.get(*_CHOICES)))
    marks = (
        f"{letter}. " if not re.match(rf"\(?{re.escape(letter)}[).:]", text) else ""
        for letter, text in zip(letters, texts, strict=True)
    )
    lines = [f"{mark}{text}" for mark, text in zip(marks, texts, strict=True)]
    answer = _correct_letter(row.get(*_CORRECT), letters, texts)
    messages = [_user("\n".join([row.text("question"), *lines])), assistant(answer)]
    return Conversation(_with_system(row, messages), answer=answer if answer in letters else None)


def _choices(value: Any) -> tuple[list[str], list[str]]:
    """Letters and texts: of a list, of `{"text": [...], "label": [...]}`, or of texts by letter."""
    if isinstance(value, Mapping) and isinstance(value.get("text"), list):
        letters, texts = value.get("label"), value["text"]
    elif isinstance(value, Mapping):
        letters, texts = list(value), list(value.values())
    else:
        letters, texts = None, value if isinstance(value, list) else [value]
    if not isinstance(letters, list) or len(letters) != len(texts):
        letters = [chr(ord("A") + number) for number in range(len(texts))]
    return list(map(str, letters)), [as_text(text, "choices") for text in texts]


def _correct_letter(answer: Any, letters: list[str], texts: list[str]) -> str:
    stated = as_text(answer, "answer").strip()
    if stated in letters:
        return stated
    if stated in texts:
        return letters[texts.index(stated)]
    if not stated.isdecimal():
        return stated
    if int(stated) >= len(letters):
        raise DroppedRowError("bad_choices", "answer")
    return letters[int(stated)]


def _is_turns(row: Reader) -> bool:
    turns = row.peek("turns")
    return isinstance(turns, list) and bool(turns) and all(isinstance(turn, str) for turn in turns)


def _from_turns(row: Reader) -> Conversation:
    questions, answers = row.get("turns"), row.get("reference")
    if not isinstance(answers, list) or len(questions) != len(answers):
        raise DroppedRowError("no_answer", "reference")
    if not all(isinstance(answer, str) for answer in answers):
        raise DroppedRowError("no_answer", "reference")
    pairs = zip(questions, answers, strict=True)
    return Conversation([message for asked, said in pairs for message in (_user(asked), assistant(said))])


def _text_column(row: Reader) -> str | None:
    """The column of a document; a row with a role is one message of a conversation and none."""
    named = (name for name in _TEXTS if row.has(name) and isinstance(row.peek(name), str))
    return None if row.has("role", "from") else next(named, None)


def _from_text(row: Reader) -> Conversation:
    column = _text_column(row)
    if column is None:
        raise DroppedRowError("empty_turn", "text")
    return Conversation([], text=row.text(column))


SHAPES: Mapping[str, Shape] = {
    "preference": Shape(
        "prompt or conversations, chosen, rejected", ("chosen", "rejected", *_PROMPTS), _is_preference, _from_preference
    ),
    "messages": Shape(
        "messages (role, content)",
        ("messages",),
        lambda row: turn_list(row.peek("messages")) is not None,
        _from_chat("messages"),
    ),
    "sharegpt": Shape(
        "conversations (from, value)",
        _CHATS,
        lambda row: _first_chat(row) is not None,
        lambda row: _from_chat(_first_chat(row) or "")(row),
    ),
    "multiple_choice": Shape(
        "question, choices, answer", ("question", *_CHOICES), _is_multiple_choice, _from_multiple_choice
    ),
    **{
        name: Shape(columns, (*_PAIRS[name][0], *_PAIRS[name][1]), _matches_pair(name), _from_pair(name))
        for name, columns in {
            "reasoning": "problem, generated_solution or solution, expected_answer",
            "alpaca": "instruction, input, output",
            "prompt_completion": "prompt, query or input, completion, response or output",
            "question_answer": "question, answer",
        }.items()
    },
    "turns": Shape("turns, reference", ("turns",), _is_turns, _from_turns),
    "text": Shape("text", _TEXTS, lambda row: _text_column(row) is not None, _from_text),
}
"""Every known shape by name, the more specific before the more general."""

_OTHERS = (*_CHATS, *_TEXTS, *_SYSTEM, *_TOOLS, *_CONTEXT, *_FINAL, *_CHOICES, *_CORRECT, *_GOOD, *_BAD, *_ROW_THINKING)
KNOWN_COLUMNS = frozenset(
    (*(name for shape in SHAPES.values() for name in shape.main), *_OTHERS, "history", "reference")
)
"""Every column that some shape reads."""
