import json
from typing import Any

import pytest

from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation
from finemill.rows.speakers import chat_turns, named, snake_case, transcript_turns

Row = dict[str, Any]
ASKED = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]
AGAIN = [{"role": "user", "content": "3+3?"}, {"role": "assistant", "content": "6"}]


def messages_of(row: Row) -> list[Row]:
    messages: list[Row] = to_conversation(row, detect_shape(row) or "").messages
    return messages


@pytest.mark.parametrize(
    "turns",
    [
        [{"speaker": "user", "text": "2+2?"}, {"speaker": "assistant", "text": "4"}],
        [{"Speaker": "Human", "utterance": "2+2?"}, {"Speaker": "Bot", "utterance": "4"}],
        [{"sender": "user", "message": "2+2?"}, {"sender": "assistant", "message": "4"}],
        [{"author": "user", "body": "2+2?"}, {"author": "assistant", "body": "4"}],
        [{"author": {"role": role}, "content": {"content_type": "text", "parts": [text]}}
         for role, text in (("user", "2+2?"), ("assistant", "4"))],
        [{"user": "2+2?"}, {"assistant": "4"}],
        [{"user": "2+2?", "assistant": "4"}],
        [{"Human": "2+2?", "Assistant": "4"}],
        [{"input": "2+2?", "output": "4"}],
        [["user", "2+2?"], ["assistant", "4"]],
        ["2+2?", "4"],
        ["Human: 2+2?", "Assistant: 4"],
        {"messages": ASKED},
        {"from": ["human", "gpt"], "value": ["2+2?", "4"]},
        [{"role": "user", "parts": [{"text": "2+2?"}]}, {"role": "model", "parts": [{"text": "4"}]}],
        "Human: 2+2?\n\nAssistant: 4",
        "USER: 2+2?\n\n\nASSISTANT: 4 <|endoftext|>\n\n\n",
        "### User: 2+2?\n### Assistant: 4",
    ],
)  # fmt: skip
@pytest.mark.parametrize("as_json", [False, True])
def test_turns_are_read_in_every_form(turns: Any, as_json: bool) -> None:
    written = json.dumps(turns) if as_json and not isinstance(turns, str) else turns
    assert messages_of({"conversation": written}) == ASKED


def test_pairs_keep_their_order_and_the_system_message_of_the_first() -> None:
    pairs = [{"system": "Be brief.", "input": "2+2?", "output": "4"}, {"input": "3+3?", "output": "6"}]
    assert messages_of({"conversation": pairs}) == [{"role": "system", "content": "Be brief."}, *ASKED, *AGAIN]


def test_what_a_pair_holds_beside_its_texts_is_the_answers() -> None:
    conversation = to_conversation(
        {"chat": [{"user": "2+2?", "assistant": "4", "thinking": "two and two", "id": 7}]}, "sharegpt"
    )
    assert conversation.messages[1]["reasoning_content"] == "two and two"
    assert list(conversation.unread) == ["chat[].id"]


@pytest.mark.parametrize(
    "value", [None, 5, "a title", ["one"], [1, 2], [["a", "b"]], [{"a": 1}], {"user": 1, "b": 2}, []]
)
def test_other_values_are_no_turns(value: Any) -> None:
    assert chat_turns(value) is None


@pytest.mark.parametrize(
    "text", ["Human: Hi", "He said.\nHuman: Hi\nAssistant: Hello", "Assistant manager: a\nUser: b"]
)
def test_a_text_that_only_mentions_speakers_is_no_transcript(text: str) -> None:
    assert transcript_turns(text) is None


@pytest.mark.parametrize("name", ["systemPrompt", "System Prompt", "system-prompt", "SYSTEM_PROMPT", " system_prompt"])
def test_names_are_known_however_they_are_spelled(name: str) -> None:
    assert snake_case(name) == "system_prompt"
    assert named({name: "a", "other": "b"}, {"system_prompt"}) == {"system_prompt": "a", "other": "b"}
    assert named({name: "a", "system_prompt": "b"}, {"system_prompt"}) == {name: "a", "system_prompt": "b"}


def test_a_system_that_answers_a_user_is_the_assistant() -> None:
    turns = [{"speaker": "USER", "text": "2+2?"}, {"speaker": "SYSTEM", "text": "4"}]
    assert messages_of({"dialogue": turns}) == ASKED


def test_objects_under_a_general_name_are_no_chat() -> None:
    assert detect_shape({"data": [{"prompt": "2+2?", "completion": "4"}]}) is None
    assert detect_shape({"turns": ["2+2?", "3+3?"]}) == "turns"
    assert detect_shape({"data": ["2+2?", "4"]}) == "sharegpt"


def test_a_speaker_who_is_not_known_leaves_the_row_out() -> None:
    with pytest.raises(DroppedRowError, match=r"^unknown_role$"):
        messages_of({"dialogue": [{"speaker": "Alice", "text": "Hi"}, {"speaker": "Bob", "text": "Hello"}]})
