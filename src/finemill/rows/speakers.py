"""Who says what: lists of turns in every form that data sets write them in, as turns with a role and a text."""

import re
from collections.abc import Collection, Iterator, Mapping
from functools import lru_cache
from typing import Any

from finemill.artifacts.messages import Role
from finemill.rows.values import parse_json

Turn = Mapping[str, Any]

CALL_ROLES = ("function_call", "tool_call", "tool_calls")
THINKING_ROLES = ("thinking", "reasoning", "thought", "analysis")
_ASSISTANTS = ("assistant", "gpt", "model", "bot", "chatbot", "chatgpt", "ai", "bard", "bing", "claude", "agent", "llm")
_RESULTS = ("function_response", "function_output", "function_result", "tool_response", "tool_result", "tool_output")
ROLES: dict[str, Role] = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human", "prompter", "customer"), "user"),
    **dict.fromkeys((*_ASSISTANTS, *CALL_ROLES, *THINKING_ROLES), "assistant"),
    **dict.fromkeys(("tool", "observation", "function", "ipython", *_RESULTS), "tool"),
}
"""The role, as transformers' templates take it, of every name that data sets give a speaker."""

_TYPES = ("human", "ai", "user", "assistant", "system", "tool")
ROLE_KEYS = ("role", "from", "speaker", "sender", "author")
"""Keys of a turn that may hold its speaker."""

# Flags of a turn whether one who asks, or one who answers, speaks.
_IS_USER = ("is_user", "is_human", "from_user", "is_created_by_user", "is_customer", "is_prompter")
_IS_ASSISTANT = ("is_bot", "is_assistant", "is_ai", "is_model", "is_agent", "from_bot")

# What two columns, or two keys of a turn, are called that hold a question and its answer.
_ASKED = ("user", "human", "question", "instruction", "prompt", "query", "input")
_SAID = (*_ASSISTANTS, "answer", "response", "completion", "output")
_BESIDE = ("system",)
_WORD = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|[\s-]+")
_TRANSCRIPT = re.compile(
    r"(?:\A|\n)[ \t]*(?:#{1,4}[ \t]*|\*\*|\[)?(?P<role>Human|User|Assistant|System|GPT|ChatGPT|Bot|AI|Function Response"
    r"|Tool)(?:\*\*|\])?:(?:\*\*)?",
    re.IGNORECASE,
)
# Before all questions, and all answers, of a list of texts.
_ASKS_AND_SAYS = (
    re.compile("\\A\\s*(?:\u95ee|\u60a3\u8005|\u75c5\u4eba|\u7528\u6237|Q|Question)\\s*[:\uff1a]\\s*"),
    re.compile("\\A\\s*(?:\u7b54|\u533b\u751f|\u52a9\u624b|A|Answer)\\s*[:\uff1a]\\s*"),
)
# Glaive's and others' end of a turn.
_END_OF_TEXT = re.compile(r"\s*<\|endoftext\|>\s*\Z")


@lru_cache(maxsize=4096)
def snake_case(name: str) -> str:
    """A name as most data sets write it: `system_prompt` for `systemPrompt`, `System Prompt` and `system-prompt`."""
    return _WORD.sub("_", name.strip()).lower()


def turn_list(value: Any) -> list[Turn] | None:
    """The turns in a list, or in one turn or JSON text of either, if each has a role; None for anything else."""
    turns = parse_json(value)
    turns = _by_turn(turns) if isinstance(turns, Mapping) else turns
    if not isinstance(turns, list) or not turns:
        return None
    found: list[Turn] = []
    for item in turns:
        turn = item if type(item) is dict else parse_json(item)
        if type(turn) is not dict and not isinstance(turn, Mapping):
            return None
        turn = turn if "role" in turn else _with_author(turn)
        if not turn_role(turn):
            return None
        found.append(turn)
    return found


def _by_turn(turns: Turn) -> list[Turn]:
    """One turn; or several, of an object with a list for each key, as `datasets` writes a `Sequence` of objects."""
    columns = {key: value for key, value in turns.items() if isinstance(value, list)}
    lengths = set(map(len, columns.values()))
    if columns.keys() != turns.keys() or len(lengths) != 1 or not any(key in columns for key in ROLE_KEYS):
        return [turns]
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def chat_turns(value: Any) -> list[Turn] | None:
    """The turns of what a column for conversations holds: besides lists of turns with a role

    - pairs: `{"user": ..., "assistant": ...}`, `{"input": ..., "output": ..., "system": ...}`
    - `{"user": ...}`, `["user", ...]` by the speaker
    - texts in turn, and a transcript: `User: ...` and `Assistant: ...` at the begin of lines.

    None for anything else.
    """
    turns = turn_list(value)
    if turns or value is None:
        return turns and _with_assistant(turns)
    parsed = parse_json(value)
    if isinstance(parsed, str):
        return transcript_turns(parsed)
    items = [parse_json(item) for item in parsed] if isinstance(parsed, list) else [parsed]
    if len(items) > 1 and all(isinstance(item, str) and item.strip() for item in items):
        return _texts_in_turn(items)
    if isinstance(parsed, Mapping) and isinstance(inner := parsed.get("messages"), list):
        return turn_list(inner)
    read = [_turns_of(item) for item in items]
    return [turn for turns in read for turn in turns] if read and all(read) else None


def _with_assistant(turns: list[Turn]) -> list[Turn]:
    """Turns in which the one who answers is called the system, as in MultiWOZ, with an assistant."""
    if turn_role(turns[-1]) != "system":
        return turns
    roles = list(map(turn_role, turns))
    if not {"user", "system"}.issuperset(ROLES.get(role) for role in roles):
        return turns
    answers = [
        {"role": "assistant", **{key: value for key, value in turn.items() if key not in ROLE_KEYS}}
        if role == "system"
        else turn
        for turn, role in zip(turns, roles, strict=True)
    ]
    return answers if roles[0] != "system" else turns


def transcript_turns(text: str) -> list[Turn] | None:
    """The turns of a text that begins with a speaker and has several, as HH-RLHF's and Glaive's; None for others."""
    found = list(_TRANSCRIPT.finditer(text))
    if len(found) < 2 or text[: found[0].start()].strip() or _role_name(found[-1]["role"]) == "system":
        return None
    ends = [*(match.start() for match in found[1:]), len(text)]
    return [
        {"role": match["role"], "content": _END_OF_TEXT.sub("", text[match.end() : end].strip())}
        for match, end in zip(found, ends, strict=True)
    ]


def _texts_in_turn(texts: list[str]) -> list[Turn]:
    """Texts of two who speak in turn; a text may name its speaker."""
    turns: list[Turn] = []
    if all(pattern.match(text) for pattern, text in zip(_ASKS_AND_SAYS * len(texts), texts, strict=False)):
        texts = [_ASKS_AND_SAYS[number % 2].sub("", text) for number, text in enumerate(texts)]
    for number, text in enumerate(texts):
        match = _TRANSCRIPT.match(text)
        role = match["role"] if match else ("user", "assistant")[number % 2]
        turns.append({"role": role, "content": text[match.end() :].strip() if match else text})
    return turns


def _turns_of(item: Any) -> list[Turn]:
    """The turns of one item of a list; none for what is no turn."""
    if isinstance(item, list):
        named = len(item) == 2 and all(isinstance(part, str) for part in item) and _role_name(item[0]) in ROLES
        return [{"role": item[0], "content": item[1]}] if named else []
    if not isinstance(item, Mapping):
        return []
    keys = {snake_case(key): key for key in item if isinstance(key, str)}
    if len(keys) == 1:
        ((name, key),) = keys.items()
        return [{"role": name, "content": item[key]}] if name in ROLES else []
    return list(_pair_turns(item, keys))


def _pair_turns(item: Turn, keys: Mapping[str, str]) -> Iterator[Turn]:
    """The turns of a question and its answer in one object, what else it holds beside the answer."""
    asked, said = (next((keys[name] for name in names if name in keys), None) for names in (_ASKED, _SAID))
    if asked is None or said is None:
        return
    if "system" in keys and item[keys["system"]]:
        yield {"role": "system", "content": item[keys["system"]]}
    rest = {key: value for key, value in item.items() if key not in (asked, said, keys.get("system"))}
    yield {"role": "user", "content": item[asked]}
    yield {"role": "assistant", "content": item[said], **rest}


def named(values: Mapping[Any, Any], known: Collection[str]) -> Mapping[Any, Any]:
    """The same values, those whose name is in `known` but for how it is spelled under that one."""
    spelled = {key: known_name(key, known) for key in values}
    if all(key == name for key, name in spelled.items()):
        return values
    return {key if name != key and name in values else name: values[key] for key, name in spelled.items()}


def known_name(key: Any, known: Collection[str]) -> Any:
    """The name in `known` that a key is but for its case or spelling; the key itself where there is none."""
    if not isinstance(key, str) or key in known:
        return key
    return next((name for name in (key.lower(), snake_case(key)) if name in known), key)


def _with_author(turn: Turn) -> Turn:
    """A turn whose speaker has a known key, and is a text also where the data say more of the author."""
    turn = named(turn, ROLE_KEYS)
    if not turn_role(turn) and isinstance(kind := turn.get("type"), str):
        return _of_type(turn, kind.lower().removesuffix("message"))
    if not turn_role(turn) or ROLES.get(turn_role(turn)) is None:
        turn = _with_flagged_role(turn)
    author = turn.get("author")
    return {**turn, "author": author["role"]} if isinstance(author, Mapping) and "role" in author else turn


def _with_flagged_role(turn: Turn) -> Turn:
    """A turn in which a flag says who speaks, with a role: SillyTavern's, LibreChat's and PIPPA's."""
    for key, value in turn.items():
        name = snake_case(key) if isinstance(key, str) else ""
        if isinstance(value, bool) and name in (*_IS_USER, *_IS_ASSISTANT):
            return {"role": "user" if value is (name in _IS_USER) else "assistant"} | {
                k: v for k, v in turn.items() if k not in (key, *ROLE_KEYS)
            }
    return turn


def _of_type(turn: Turn, kind: str) -> Turn:
    """A turn whose type says who speaks: LangChain's messages, and the items of OpenAI's Responses."""
    rest = {key: value for key, value in turn.items() if key != "type"}
    if kind in _TYPES and isinstance(data := rest.get("data"), Mapping):
        return {"role": kind, **{key: value for key, value in data.items() if key != "type"}}
    if kind in _TYPES and "content" in rest:
        return {"role": kind, **rest}
    if kind == "function_call":
        call = {
            "id": rest.pop("call_id", None),
            "name": rest.pop("name", None),
            "arguments": rest.pop("arguments", None),
        }
        return {
            "role": "assistant",
            "tool_calls": [call],
            **{k: v for k, v in rest.items() if k not in ("id", "status")},
        }
    if kind == "function_call_output":
        return {"role": "tool", "tool_call_id": rest.get("call_id"), "content": rest.get("output")}
    if kind == "reasoning" and (rest.get("summary") or rest.get("content")):
        return {"role": "assistant", "reasoning": rest.get("content") or rest["summary"]}
    return turn


def turn_role(turn: Turn) -> str:
    """A turn's role as its data set spells it, in lower case with underscores; "" if it has none."""
    for key in ROLE_KEYS:
        role = turn.get(key)
        if isinstance(role, str) and role.strip():
            return _role_name(role)
    return ""


@lru_cache(maxsize=1024)
def _role_name(role: str) -> str:
    return role.strip().lower().replace("-", "_").replace(" ", "_")
