"""The shapes of rows that public data sets come in: how each is told from the others, and what it says."""

import itertools
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

from finemill.artifacts.messages import Message
from finemill.rows.choices import (
    CHOICE_COLUMNS,
    CORRECT_COLUMNS,
    lists_choices,
    may_be_choices,
    names_a_choice,
    offers_choices,
    read_choices,
)
from finemill.rows.context import CONTEXT_COLUMNS, FOUND_COLUMNS, passages_in, text_beside
from finemill.rows.conversation import Conversation, checked
from finemill.rows.learned import FLAGS, MARKS, check_excluded, excluded_turns, read_label
from finemill.rows.rankings import RANKED_COLUMNS, Answer, ranked_answers, ranks_answers
from finemill.rows.reader import Reader
from finemill.rows.reasons import DroppedRowError
from finemill.rows.speakers import ROLES, Turn, chat_turns, transcript_turns, turn_list, turn_role
from finemill.rows.tools import Tool, are_calls, to_calls, to_tools
from finemill.rows.turns import (
    THINKING_KEYS,
    assistant,
    check_unread_thinking,
    is_prose,
    media_in,
    text_of,
    thinking_under,
    to_messages,
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

_CHATS = (
    *("conversations", "conversation", "dialog", "dialogue", "dialogs", "dialogues", "chat", "chats", "turns", "convo"),
    *("thread", "trajectory", "transcript", "utterances", "exchanges", "contents", "data"),
)
_TEXTS = ("text", "content", "document")
_SYSTEM = (
    "system",
    "system_prompt",
    "meta_instruction",
    "system_message",
    "system_instruction",
    "system_instructions",
    "sys_prompt",
)
_TOOLS = (
    *("tools", "functions", "available_tools", "available_functions", "tool_list", "function_list", "tool_definitions"),
    *("function_definitions", "tools_json", "apis", "tool_config"),
)
_HISTORY = (
    *("history", "chat_history", "conversation_history", "dialogue_history", "dialog_history", "message_history"),
    *("previous_turns", "previous_messages", "past_messages", "prior_turns"),
)
_FINAL = ("expected_answer", "final_answer", "answer")
_CHAT_SHAPES = ("messages", "sharegpt")
_ROW_THINKING = (*THINKING_KEYS, "complex_cot")
# Switches that some sets keep in a column with the name of a thinking block.
_SWITCHES = ("on", "off", "yes", "no", "true", "false")
# Prompt columns and answer columns by shape; of each the first that says something counts.
_PAIRS = {
    "reasoning": (("problem",), ("generated_solution", "solution", "answer")),
    "alpaca": (
        ("instruction",),
        ("output", "response", "answer", "completion", "target", "generation", "content", "code"),
    ),
    "prompt_completion": (
        (
            *("prompt", "query", "input", "user", "human", "inputs", "user_prompt", "user_input", "user_message"),
            *("user_query", "input_text", "human_input", "message"),
        ),
        (
            *("completion", "response", "output", "answer", "assistant", "gpt", "bot", "targets", "target", "reply"),
            *(
                "assistant_response",
                "assistant_message",
                "model_response",
                "model_output",
                "bot_response",
                "ai_response",
            ),
            *("output_text", "target_text", "answers", "generation", "ideal", "canonical_solution", "content", "code"),
        ),
    ),
    "question_answer": (
        ("question", "context"),
        (
            *("solution", "answer", "response", "output", "completion", "answers", "correct_answer", "best_answer"),
            *("model_answer", "generation", "content", "code"),
        ),
    ),
}
# Answers under names that may be something else: not beside these prompts, or only if they are several words.
_NO_PROMPT_OF_CONTENT = ("message", "query", "inputs", "input_text", "context")
# Documents and what is to be written about them.
_WRITTEN_ABOUT = (
    ("document", "article", "dialogue", "dialog", "post", "text"),
    ("summary", "highlights", "tldr", "code", "answer", "response", "completion", "output"),
)
# An answer of GSM8K's form with a plain number, and no sign of a box, a tag or a mark of thinking anywhere.
_PLAIN_FINAL = re.compile(r"(?:[^\\<\[\u25c1#]|<<)*#### (-?(?:0|[1-9]\d{0,14}))\n?")
_PRODIGY = ("accept", "reject", "ignore")
# What is to be done with an input beside it.
_TASKS = ("definition", "task_definition", "task_description")
# Turns under such names are shown to the model or belong to another answer.
_NO_CHAT = re.compile(r"example|shot|demo|context|history|prompt|retriev|negative|reject|worse|bad", re.IGNORECASE)
# Of lists in these columns each is a right answer; of others they may be parts of one.
_SEVERAL_RIGHT = ("answer", "answers", "targets", "ideal")
_PLACEHOLDERS = ("-", "n/a", "nan", "none", "null")
# What NuminaMath writes for problems that end with none.
_NO_FINAL = ("proof", "notfound", "not found", *_PLACEHOLDERS)
# Columns of the better and the worse answer, alone and beside a word for answer.
_PREFERENCES = [
    pair
    for form in (
        "{}", "{}_response", "{}_answer", "{}_output", "{}_completion", "{}_messages", "{}_conversation", "{}_text",
        "{}_conversations", "response_{}", "answer_{}", "output_{}", "completion_{}",
    )
    for pair in (
        (form.format(better), form.format(worse))
        for better, worse in (
            ("chosen", "rejected"), ("chosen", "reject"), ("preferred", "rejected"), ("preferred", "dispreferred"),
            ("preferred", "non_preferred"), ("accepted", "rejected"), ("winner", "loser"), ("better", "worse"),
            ("positive", "negative"), ("good", "bad"),
        )
    )
] + [("response_j", "response_k")]  # fmt: skip
_REJECTED_ALONE = ("rejected_response", "rejected_messages", "rejected_answer", "rejected")
# A worse answer beside the one of a question and its answer.
_WORSE = (
    *("rejected_response", "rejected_answer", "rejected_output", "rejected_completion", "rejected_text", "rejected"),
    *("dispreferred_response", "non_preferred_output", "bad_response", "worse_response", "negative_response"),
)
# How both answers of a preference begin, which are what follows: Step-DPO's.
_BEGINNINGS = ("initial_reason_steps", "response_prefix", "answer_prefix", "assistant_prefix")
_BETTER = frozenset(better for better, _ in _PREFERENCES)
# Columns of a question that another one beside them, the task, comes before.
_BESIDE_INSTRUCTION = ("question", "query", "prompt", "problem")
_PROMPTS = tuple(name for prompts, _ in _PAIRS.values() for name in prompts)
# Of a conversation that ends with a question.
_ANSWERS_BESIDE = (
    "completion",
    "response",
    "output",
    "answer",
    "assistant",
    "assistant_response",
    "model_response",
    "reply",
)
_ANSWERS = tuple({name for _, answers in _PAIRS.values() for name in answers} - set(_PROMPTS))


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
    return "sharegpt" if _only_chat(Reader(row)) is not None else None


def to_conversation(row: Row, shape: str, *, bad_answers: bool = False) -> Conversation:
    """Convert a row of `shape` (a name in `SHAPES`) and check it.

    Args:
        row: as it was read.
        shape: its shape.
        bad_answers: whether a row may be labelled as an example of a bad answer, the only one in it that counts.
    Raises: DroppedRowError: it cannot be learned from as it is meant; the message is the reason.
    """
    reader = Reader(row)
    try:
        if media := media_in(row):
            raise DroppedRowError("not_text", media)
        is_labelled = shape not in ("text", "multiple_choice", "preference")
        desirable = read_label(reader, bad_answers=bad_answers) if is_labelled else None
        check_excluded(reader)
        conversation = checked(_labelled(_without_excluded(reader, shape, SHAPES[shape].convert(reader)), desirable))
        # Beside a preference stands why one answer is better; beside an answer that thinks the same thinking again.
        if conversation.text is None and conversation.rejected is None and not any(map(_thinks, conversation.messages)):
            check_unread_thinking(reader)
        unread = reader.unread
        return replace(conversation, unread=unread) if unread else conversation
    except RecursionError:
        raise DroppedRowError("too_deep") from None


def _labelled(conversation: Conversation, desirable: bool | None) -> Conversation:
    """The conversation with its label; before a bad answer no other one is learned."""
    if desirable is None or conversation.text is not None:
        return conversation
    messages = conversation.messages
    if desirable is False:
        earlier = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages[:-1]]
        messages = [*earlier, *messages[-1:]]
    return replace(conversation, messages=messages, desirable=desirable)


def _without_excluded(row: Reader, shape: str, conversation: Conversation) -> Conversation:
    """The conversation with the answers marked that lists of flags beside a row of columns exclude."""
    if shape in _CHAT_SHAPES or shape in ("preference", "multiple_choice") or conversation.text is not None:
        return conversation
    excluded = excluded_turns(row, conversation.messages)
    if not excluded:
        return conversation
    messages = [
        {**message, "weight": 0} if number in excluded and message["role"] == "assistant" else message
        for number, message in enumerate(conversation.messages)
    ]
    return replace(conversation, messages=messages)


def _system(row: Reader) -> list[Message]:
    """The system message that some data sets keep in a column of its own."""
    # Glaive's and others begin with their speaker.
    text = re.sub(r"\A\s*SYSTEM:\s*", "", text_of(row.get(*_SYSTEM), "system"))
    return [{"role": "system", "content": text}] if text else []


def _with_system(row: Reader, messages: list[Message]) -> list[Message]:
    system = _system(row)
    messages = [m for m in messages if m["role"] != "system" or m["content"].strip()]
    return messages if system and messages[:1] == system else [*system, *messages]


def _from_chat(column: str) -> Callable[[Reader], Conversation]:
    def convert(row: Reader) -> Conversation:
        turns, tools = _split_tools(_by_speakers(row, chat_turns(row.get(column)) or [], row.peek(column)))
        if excluded := excluded_turns(row, turns):
            turns = [{**turn, "weight": 0} if number in excluded else turn for number, turn in enumerate(turns)]
        messages = to_messages(turns, row, column)
        asks = bool(messages) and messages[-1]["role"] != "assistant"
        answer = row.first(_ANSWERS_BESIDE) if asks else None
        if answer is not None:
            messages = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in messages]
            asked = messages[-1]["content"]
            messages += _said(row, answer)[0]
            if names_a_choice(messages[-1]["content"]) and not lists_choices(asked):
                _check_unread_choices(row)
        messages = _with_system(row, _with_row_thinking(row, messages))
        if row.has("prompt") and any(message["content"] == row.peek("prompt") for message in messages):
            row.get("prompt")
        return Conversation(*_with_template_variables(row, messages, row.get(*_TOOLS) or tools))

    return convert


def _with_template_variables(
    row: Reader, messages: list[Message], tools: Any
) -> tuple[list[Message], list[Tool] | None]:
    """Messages and functions with those that SmolTalk2 and others keep among the template's variables of a row."""
    variables = row.peek("chat_template_kwargs")
    if not isinstance(variables, Mapping):
        return messages, to_tools(tools)
    inside = Reader(variables)
    system, listed = (
        text_of(inside.get(*_SYSTEM, "custom_instructions"), "chat_template_kwargs"),
        inside.get("tools", "xml_tools"),
    )
    # It follows from the answers.
    inside.get("enable_thinking")
    row.get("chat_template_kwargs")
    row.note_unread(f"chat_template_kwargs.{name}" for name in inside.unread)
    if system and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": system}, *messages]
    elif system:
        messages = [{**messages[0], "content": f"{system}\n\n{messages[0]['content']}"}, *messages[1:]]
    return messages, to_tools(tools or listed)


def _by_speakers(row: Reader, turns: list[Turn], value: Any) -> list[Turn]:
    """Turns that are texts, by a list of speakers beside them. Raises: DroppedRowError: they do not speak in turn."""
    speakers = parse_json(row.peek("speakers"))
    if not isinstance(speakers, list) or len(speakers) != len(turns) or not isinstance(parse_json(value), list):
        return turns
    if not all(isinstance(text, str) for text in parse_json(value)):
        return turns
    row.get("speakers")
    if all(turn_role({"role": speaker}) in ROLES for speaker in speakers):
        return [{**turn, "role": speaker} for turn, speaker in zip(turns, speakers, strict=True)]
    if len({*map(str, speakers)}) > 2 or any(a == b for a, b in itertools.pairwise(speakers)):
        raise DroppedRowError("role_order", "speakers")
    return turns


def _split_tools(turns: Sequence[Turn]) -> tuple[list[Turn], Any]:
    """Turns without the functions that one of them may bring, and those."""
    place = next((number for number, turn in enumerate(turns) for name in _TOOLS[:2] if turn.get(name)), None)
    if place is None:
        return list(turns), None
    name = next(name for name in _TOOLS[:2] if turns[place].get(name))
    rest = {key: value for key, value in turns[place].items() if key != name}
    return [*turns[:place], rest, *turns[place + 1 :]], turns[place][name]


def _with_row_thinking(row: Reader, messages: list[Message]) -> list[Message]:
    """Messages with the thinking block that stands in a column beside them, which is that of a single answer.

    Raises: DroppedRowError: there are several answers.
    """
    if row.names.isdisjoint(_ROW_THINKING):
        return messages
    column = row.first(_ROW_THINKING)
    said = [number for number, message in enumerate(messages) if message["role"] == "assistant"]
    thoughts = parse_json(row.peek(column or ""))
    if len(said) > 1 and isinstance(thoughts, list) and len(thoughts) == len(said):
        return _with_each_thinking(messages, said, row.get(column or ""), column or "")
    if column is None or not is_prose(row.peek(column)) or any(_thinks(messages[number]) for number in said):
        return messages
    if len(said) != 1:
        raise DroppedRowError("thinking_not_read", column)
    answer = messages[said[0]]
    return [*messages[: said[0]], {**answer, **assistant(answer["content"], thinking_under(row, [column]))}]


def _with_each_thinking(messages: list[Message], said: Sequence[int], value: Any, column: str) -> list[Message]:
    """Messages with a text of a list as the thinking block of each answer; "" and null for none."""
    thoughts = dict(zip(said, parse_json(value), strict=True))
    return [
        {**message, **_in_column(column, assistant, message["content"], as_text(thoughts[number] or "", column))}
        if number in thoughts
        else message
        for number, message in enumerate(messages)
    ]


def _thinks(message: Message) -> bool:
    return "reasoning_content" in message or "</think>" in message["content"]


def _messages(row: Reader, column: str) -> list[Message]:
    return to_messages(chat_turns(row.get(column)) or [], row, column)


def _first_chat(row: Reader) -> str | None:
    """The first column that holds turns, other than `messages`."""
    return next((name for name in _CHATS if name in row.names and _is_chat(row, name)), None)


def _only_chat(row: Reader) -> str | None:
    """The one column, whatever its name, with turns of one who asks and one who answers; None for several."""
    names = [name for name in row.names if isinstance(name, str) and not _NO_CHAT.search(name)]
    found = [name for name in names if _is_dialogue(turn_list(row.peek(name)))]
    return found[0] if len(found) == 1 else None


def _is_dialogue(turns: list[Turn] | None) -> bool:
    return {"user", "assistant"} <= {ROLES.get(turn_role(turn)) for turn in turns or ()}


def _is_chat(row: Reader, name: str) -> bool:
    value = row.peek(name)
    texts = isinstance(value, list) and all(isinstance(turn, str) for turn in value)
    if texts and row.has("question") and row.has("answer", "label") and row.peek("question") not in value:
        # They are what is asked about.
        return False
    # Texts under `turns` are MT-bench's questions; under `data` they alone are a chat, objects may be rows.
    return (
        texts is (name == "data") and chat_turns(value) is not None
        if name in ("turns", "data")
        else (chat_turns(value) is not None)
    )


def _history(row: Reader) -> list[Message]:
    """Earlier turns beside a question: messages, or pairs of question and answer."""
    column = row.first(_HISTORY)
    if column is None and isinstance(row.peek("context"), list) and not passages_in(row.peek("context")):
        column = "context" if chat_turns(row.peek("context")) else None
    if column is None:
        return []
    value = parse_json(row.get(column))
    pairs = value if isinstance(value, list) else [value]
    if not (turns := chat_turns(value)):
        if not all(isinstance(pair, list | tuple) and len(pair) == 2 for pair in pairs):
            raise DroppedRowError("bad_history", column)
        turns = [
            {"role": role, "content": as_text(text, column)}
            for pair in pairs
            for role, text in zip(("user", "assistant"), pair, strict=True)
        ]
    return to_messages(turns, row, column)


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
    if shape == "prompt_completion":
        return lambda row: _answer_column(row, prompts, answers) is not None or _written_about(row) is not None
    return lambda row: _answer_column(row, prompts, answers) is not None


def _answer_column(row: Reader, prompts: tuple[str, ...], answers: tuple[str, ...]) -> str | None:
    """The column of the answer to the question in one of `prompts`, None where there is no question or no answer."""
    prompt = row.first(prompts)
    if prompt is None:
        return None
    found = next(
        (name for name in answers if name not in prompts and row.has(name) and _answers(row, prompt, name)), None
    )
    if found == "solution" and "answer" in answers and _is_longer(row.peek("answer"), row.peek("solution")):
        # The result is called so there, and how it is found the answer.
        return "answer"
    return found


def _is_longer(one: Any, other: Any) -> bool:
    return isinstance(one, str) and isinstance(other, str) and len(one) > len(other)


def _answers(row: Reader, prompt: str, name: str) -> bool:
    """Whether a column holds an answer: a `content` may be a page that was found, a `code` a language's."""
    if name == "content":
        return prompt not in _NO_PROMPT_OF_CONTENT and not row.has("role", "from")
    return name != "code" or is_prose(row.peek(name))


def _written_about(row: Reader) -> tuple[str, str] | None:
    """The columns of a document and of what is written about it, as sets of summaries have them."""
    if row.has(*_PROMPTS):
        return None
    document, written = map(row.first, _WRITTEN_ABOUT)
    text, said = row.peek(document or ""), row.peek(written or "")
    if document is None or written is None or not isinstance(text, str) or not isinstance(said, str):
        return None
    # Prodigy's verdicts; a text that was rendered with its answer.
    if written in _ANSWERS and (said.strip() in _PRODIGY or said.strip() in text):
        return None
    return (document, written) if written != "code" or is_prose(said) else None


def _from_pair(shape: str) -> Callable[[Reader], Conversation]:
    prompts, answers = _PAIRS[shape]

    def convert(row: Reader) -> Conversation:
        column = _answer_column(row, prompts, answers)
        if column is None and shape == "prompt_completion" and (about := _written_about(row)) is not None:
            document, column = about
            before = [_user(row.text(document))]
        else:
            before = _asked(row, prompts, column)
        if column is None:
            raise DroppedRowError("no_answer", " or ".join(answers))
        said, value = _said(row, column)
        if isinstance(value, str) and names_a_choice(value) and not lists_choices(before[-1]["content"]):
            _check_unread_choices(row)
        return Conversation(
            _with_system(row, [*before, *said]), to_tools(row.get(*_TOOLS)), _final(row, shape, column, value)
        )

    return convert


def _check_unread_choices(row: Reader) -> None:
    """Raises: DroppedRowError: beside an answer that is a letter stands what may be choices."""
    column = next((name for name in row.unread if may_be_choices(name, row.peek(name))), None)
    if column is not None:
        raise DroppedRowError("bad_choices", column)


def _said(row: Reader, column: str) -> tuple[list[Message], Any]:
    """The messages of the answer in a column, and what stands there."""
    value = row.get(column)
    value = _first_answer(row, column, value) if column == "answers" or isinstance(value, list) else value
    if turn_list(value):
        return _with_row_thinking(row, _turns(row, column, value)), value
    if column == "answers" and are_calls(value):
        return [{"role": "assistant", "content": "", "tool_calls": to_calls(value)}], value
    answer = as_text(value, column)
    return [_in_column(column, assistant, answer, _row_thinking(row, answer))], value


def _first_answer(row: Reader, column: str, given: Any) -> Any:
    """The first of several answers that all are right, the others named as not read: texts, or SQuAD's objects."""
    if are_calls(given) or turn_list(given):
        return given
    answers = parse_json(given)
    texts = answers.get("text") if isinstance(answers, Mapping) else answers
    if isinstance(texts, list) and all(isinstance(item, Mapping) and "text" in item for item in texts):
        texts = [item["text"] for item in texts]
    if not isinstance(texts, list) or not texts or not all(isinstance(text, str) for text in texts):
        return given
    if texts != texts[:1] * len(texts):
        if column not in _SEVERAL_RIGHT:
            return given
        row.note_unread([f"{column}[1:]"])
    return texts[0]


def _single(answers: Any) -> Any:
    """The answer of a list with one."""
    answers = parse_json(answers)
    return answers[0] if isinstance(answers, list) and answers and answers == answers[:1] * len(answers) else answers


def _asked(row: Reader, columns: tuple[str, ...], answer: str | None = None) -> list[Message]:
    """The messages before an answer; of a prompt that is a list of messages no answer is learned.

    `answer` is the column of the answer.
    """
    column = row.first(columns)
    if column is None:
        raise DroppedRowError("empty_turn", " or ".join(columns))
    value = row.get(column)
    if isinstance(value, Mapping) and turn_list(value.get("messages")):
        row.note_unread(f"{column}.{name}" for name in value if name not in ("messages", *_TOOLS))
        value = value["messages"]
    turns = transcript_turns(value) if isinstance(value, str) and value.rstrip().endswith(":") else None
    if turns and not turns[-1]["content"]:
        # HH-RLHF's prompts end with the speaker who is to answer.
        return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in to_messages(turns[:-1], row, column)]
    if turn_list(value):
        return [{**m, "weight": 0} if m["role"] == "assistant" else m for m in _turns(row, column, value)]
    history, question = _history(row), as_text(value, column)
    if question.strip().lower() in _PLACEHOLDERS:
        raise DroppedRowError("empty_turn", column)
    names = [*CONTEXT_COLUMNS]
    if column == "question":
        names += [name for name in ("dialogue", "dialog", "conversation") if passages_in(row.peek(name))]
    if column == "instruction":
        names += [name for name in _BESIDE_INSTRUCTION if not _repeats(row, name, question, answer)]
    context = text_beside(row, [n for n in names if n not in (column, answer) and not (history and n == "context")])
    task = row.text(*_TASKS) if column in ("input", "inputs") else ""
    return [*history, _user("\n\n".join(filter(None, (task, question, context))))]


def _repeats(row: Reader, name: str, question: str, answer: str | None) -> bool:
    """Whether a column beside an instruction is made of it: a prompt that was rendered, with or without the answer."""
    text, said = row.peek(name), row.peek(answer or "")
    if not isinstance(text, str):
        return False
    rendered = any(line.startswith("### ") for line in text.splitlines())
    return rendered or question.strip() in text or (isinstance(said, str) and is_prose(said) and said.strip() in text)


def _turns(row: Reader, column: str, value: Any) -> list[Message]:
    return to_messages(turn_list(value) or [], row, column)


def _row_thinking(row: Reader, answer: str) -> str:
    """A thinking block in a column of its own, unless the answer has one or the column is a switch."""
    columns = [name for name in _ROW_THINKING if row.has(name)]
    if not columns or "</think>" in answer or str(row.peek(columns[0])).strip().lower() in _SWITCHES:
        return ""
    return thinking_under(row, columns)


def _final(row: Reader, shape: str, column: str, answer: Any) -> str | None:
    """The final answer for exact match, where the row states one."""
    if not isinstance(answer, str | int | float):
        return None
    solved = shape == "reasoning" or column == "solution"
    stated = row.first(_FINAL) if solved else None
    if stated is not None:
        text = as_text(row.get(stated), stated)
        return None if text.strip().lower() in _NO_FINAL else text
    # GSM8K's answers end with `#### <final answer>`.
    if shape != "reasoning" and "####" not in str(answer):
        return None
    if (plain := _PLAIN_FINAL.fullmatch(str(answer))) is not None:
        return plain[1]
    # Its patterns take as long to compile as all others here, and most rows need none of them.
    from finemill.rows.answers import final_answer

    return final_answer(str(answer))


def _answer_columns(row: Reader) -> tuple[str, str] | None:
    """The columns of the better and of the worse answer."""
    if not row.names.isdisjoint(_BETTER):
        pair = next((pair for pair in _PREFERENCES if row.has(pair[0]) and row.has(pair[1])), None)
        if pair is not None:
            return pair
    worse = row.first(_WORSE)
    if worse is None or is_true(row.peek(worse)) is not None:
        return None
    found = (_answer_column(row, prompts, (*answers, "text")) for prompts, answers in _PAIRS.values())
    better = next(filter(None, found), None)
    return None if better is None else (better, worse)


def _is_preference(row: Reader) -> bool:
    columns = _answer_columns(row)
    if columns is None and _rejected_alone(row) is not None:
        return True
    if columns is None:
        return ranks_answers(row) and (_is_asked(row) or row.has("history") or _is_chat(row, "conversation_a"))
    answers = [row.peek(column) for column in columns]
    return not any(_is_label(row, answer) for answer in answers) and (
        _is_asked(row) or all(_whole_chat(answer) is not None for answer in answers)
    )


def _rejected_alone(row: Reader) -> str | None:
    """The column of a worse answer beside a conversation that ends with the better one, as ms-swift has it."""
    name = next((name for name in _REJECTED_ALONE if row.has(name) and is_true(row.peek(name)) is None), None)
    turns = turn_list(row.peek("messages")) if name is not None else None
    return name if turns and ROLES.get(turn_role(turns[-1])) == "assistant" else None


def _is_asked(row: Reader) -> bool:
    return row.has(*_PROMPTS) or any(turn_list(row.peek(name)) for name in (*_CHATS, "messages", "history"))


def _is_label(row: Reader, answer: Any) -> bool:
    """Whether what stands in an answer's column labels another answer; as a text, yes and no are answers, too."""
    return is_true(answer) is not None and (not isinstance(answer, str) or row.has(*_ANSWERS))


def _whole_chat(answer: Any) -> list[Turn] | None:
    """The turns of an answer that brings its own question: messages, or a transcript as in HH-RLHF; None for others."""
    turns = turn_list(answer)
    if turns:
        return turns if len(turns) > 1 else None
    starts = isinstance(answer, str) and answer.lstrip().startswith("Human:")
    return transcript_turns(answer) if starts else None


def _from_preference(row: Reader) -> Conversation:
    """Both answers after what they share. Each may be a text, or messages with or without those before them."""
    columns = _answer_columns(row)
    if columns is None and (alone := _rejected_alone(row)) is not None:
        turns = turn_list(row.get("messages")) or []
        return _of_answers(
            row,
            to_messages(turns[:-1], row, "messages"),
            [Answer("messages", turns[-1:]), Answer(alone, row.get(alone))],
        )
    answers = ranked_answers(row) if columns is None else [Answer(column, row.peek(column)) for column in columns]
    if answers is None:
        raise DroppedRowError("no_answer", " or ".join(_PREFERENCES[0]))
    for column in columns or ():
        row.get(column)
    whole = _turn_by_turn(row, answers)
    asked = [] if whole else _preference_prompt(row)
    return _of_answers(row, asked, whole or answers)


def _of_answers(row: Reader, asked: list[Message], answers: Sequence[Answer]) -> Conversation:
    """The conversation with the better answer and the worse one after the messages before both."""
    better, worse = (_after(asked, _answer_messages(row, answer)) for answer in answers)
    if not asked and worse and worse[0]["role"] == "assistant":
        worse = [*better[:-1], *worse]
    better, worse = _with_system(row, better), _with_system(row, worse)
    if better == worse:
        raise DroppedRowError("chosen_is_rejected", answers[1].field)
    pairs = zip(better, worse, strict=False)
    shared = next((n for n, (one, other) in enumerate(pairs) if one != other), min(len(better), len(worse)))
    if any(message["role"] in ("system", "user") for message in (*better[shared:], *worse[shared:])):
        raise DroppedRowError("histories_differ", answers[1].field)
    before = [{**m, "weight": 0} if m["role"] == "assistant" else m for m in better[:shared]]
    return Conversation(
        [*before, *better[shared:]],
        to_tools(row.get(*_TOOLS)),
        rejected=[*before, *worse[shared:]],
    )


def _turn_by_turn(row: Reader, answers: Sequence[Answer]) -> list[Answer] | None:
    """Whole conversations of questions and answers that are lists, a text a turn; None for other rows."""
    column = row.first(_PROMPTS)
    questions, *said = (parse_json(v) for v in (row.peek(column or ""), *(answer.value for answer in answers)))
    lists = (questions, *said)
    if not all(isinstance(texts, list) and texts and all(isinstance(text, str) for text in texts) for texts in lists):
        return None
    if len({*map(len, lists)}) > 1:
        raise DroppedRowError("no_answer", answers[0].field)
    row.get(column or "")
    turns = [
        [turn for asked, text in zip(questions, texts, strict=True) for turn in (_user(asked), assistant(text))]
        for texts in said
    ]
    return [Answer(answer.field, own) for answer, own in zip(answers, turns, strict=True)]


def _preference_prompt(row: Reader) -> list[Message]:
    column = row.first(_PROMPTS)
    if column is not None:
        return _asked(row, (column,))
    chat = next((name for name in (*_CHATS, "messages", "history") if turn_list(row.peek(name))), None)
    if chat is not None:
        return _messages(row, chat)
    # SHP's question.
    return [_user(row.text("history"))] if isinstance(row.peek("history"), str) else []


def _answer_messages(row: Reader, answer: Answer) -> list[Message]:
    turns = _whole_chat(answer.value) or turn_list(answer.value)
    if turns:
        return to_messages(turns, row, answer.field)
    thinking = thinking_under(row, [f"{answer.field}_{name}" for name in THINKING_KEYS])
    # Both answers begin so: what DPO learns of a beginning that they share is nothing.
    text = row.text(*_BEGINNINGS) + as_text(_single(answer.value), answer.field)
    return [_in_column(answer.field, assistant, text, thinking)]


def _after(asked: list[Message], answer: list[Message]) -> list[Message]:
    """An answer after its question, which it may bring along. Raises: DroppedRowError: it brings another."""
    if not asked or not answer or answer[0]["role"] not in ("system", "user"):
        return [*asked, *answer]
    texts = [message["content"].strip() for message in answer if message["role"] == "user"]
    if not all(message["content"].strip() in texts for message in asked if message["role"] == "user"):
        raise DroppedRowError("prompt_differs", "chosen")
    system = [m for m in asked if m["role"] == "system"]
    return [*system, *answer] if answer[0]["role"] != "system" else answer


def _from_multiple_choice(row: Reader) -> Conversation:
    """The choices by letter under the question; the answer is a letter, or the letters of several."""
    choices = read_choices(row)
    names = [
        *CONTEXT_COLUMNS,
        *(name for name in ("dialogue", "dialog", "conversation") if passages_in(row.peek(name))),
    ]
    context = text_beside(row, [name for name in names if name != choices.column])
    messages = [
        _user("\n\n".join(filter(None, (context, choices.asked)))),
        assistant(choices.answer, _row_thinking(row, choices.answer)),
    ]
    return Conversation(_with_system(row, messages), answer=choices.letter)


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
        "prompt or conversations, chosen, rejected",
        (*(name for pair in _PREFERENCES for name in pair), *_PROMPTS),
        _is_preference,
        _from_preference,
    ),
    "messages": Shape(
        "messages (role, content)",
        ("messages",),
        lambda row: "messages" in row.names and chat_turns(row.peek("messages")) is not None,
        _from_chat("messages"),
    ),
    "sharegpt": Shape(
        "conversations (from, value)",
        _CHATS,
        lambda row: _first_chat(row) is not None,
        lambda row: _from_chat(_first_chat(row) or _only_chat(row) or "")(row),
    ),
    "multiple_choice": Shape(
        "question, choices, answer",
        CHOICE_COLUMNS,
        offers_choices,
        _from_multiple_choice,
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

_OTHERS = (
    *_CHATS,
    *_TEXTS,
    *_SYSTEM,
    *_TOOLS,
    *CONTEXT_COLUMNS,
    *FOUND_COLUMNS,
    *_FINAL,
    *CORRECT_COLUMNS,
    *_ROW_THINKING,
    *_HISTORY,
    *_BEGINNINGS,
)
KNOWN_COLUMNS = frozenset(
    (
        *(name for shape in SHAPES.values() for name in shape.main),
        *_OTHERS,
        *MARKS,
        *FLAGS,
        *RANKED_COLUMNS,
        "reference",
    )
)
"""Every column that some shape reads."""
