import json
from typing import Any

import pytest

from finemill.rows.answers import final_answer
from finemill.rows.conversation import first_question, whole_text
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import SHAPES, detect_shape, to_conversation

Row = dict[str, Any]


def pair(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def sharegpt(*turns: tuple[str, str]) -> Row:
    return {"conversations": [{"from": role, "value": text} for role, text in turns]}


def read(row: Row) -> Any:
    shape = detect_shape(row)
    assert shape is not None
    return to_conversation(row, shape)


def messages_of(row: Row) -> list[Row]:
    messages: list[Row] = read(row).messages
    return messages


ROWS = {
    "messages": {"messages": pair("2+2?", "4")},
    "sharegpt": sharegpt(("human", "2+2?"), ("gpt", "4")),
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "question_answer": {"question": "2+2?", "answer": "4"},
    "reasoning": {"problem": "2+2?", "generated_solution": "4", "expected_answer": "4"},
    "preference": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "multiple_choice": {"question": "2+2?", "choices": ["3", "4"], "answer": 1},
    "turns": {"question_id": 1, "turns": ["2+2?"], "reference": ["4"]},
    "text": {"text": "2+2?"},
}


def test_every_shape_has_an_example_here() -> None:
    assert set(ROWS) == set(SHAPES)


@pytest.mark.parametrize("shape", ROWS)
def test_each_shape_is_told_from_the_others(shape: str) -> None:
    assert detect_shape(ROWS[shape]) == shape


@pytest.mark.parametrize(
    "row",
    [
        *(row for shape, row in ROWS.items() if shape not in ("text", "multiple_choice")),
        {"messages": json.dumps(pair("2+2?", "4"))},
        {"messages": str(pair("2+2?", "4"))},
        {"messages": [json.dumps(turn) for turn in pair("2+2?", "4")]},
        {"messages": None, **sharegpt(("human", "2+2?"), ("gpt", "4"))},
        {"dialogue": [{"from": "User", "value": "2+2?"}, {"from": "AI", "value": "4"}]},
        {"messages": [{"role": "user", "content": None, "value": "2+2?"}, {"role": "assistant", "value": "4"}]},
        {"messages": pair("2+2?", "4"), "conversation": "a title"},
        {"instruction": "", "input": "2+2?", "output": "4"},
        {"instruction": "2+2?", "response": 4},
        {"query": "2+2?", "response": "4"},
        {"input": "2+2?", "output": "4"},
        {"input": pair("2+2?", "")[:1], "output": "4", "reasoning": "off"},
        {"problem": "2+2?", "answer": 4},
        {"prompt": pair("2+2?", "")[:1], "completion": pair("", "4")[1:]},
        {"prompt": pair("2+2?", "")[0], "completion": pair("", "4")[1]},
        {"prompt": "2+2?", "completion": "4", "label": True},
        {"prompt": pair("2+2?", "")[:1], "chosen": "4", "rejected": "5"},
        {**sharegpt(("human", "2+2?")),
         "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        {"chosen": pair("2+2?", "4"), "rejected": pair("2+2?", "5")},
        {"prompt": "2+2?", "chosen": pair("2+2?", "4"), "rejected": pair("2+2?", "5")},
        {"instruction": "2+2?", "input": "", "chosen": "4", "rejected": "5"},
        *({"prompt": "2+2?", better: "4", worse: "5"} for better, worse in (
            ("chosen_response", "rejected_response"), ("answer_chosen", "answer_rejected"), ("chosen", "reject"),
            ("preferred", "dispreferred"), ("accepted", "rejected"), ("winner", "loser"))),
        {"input": {"messages": pair("2+2?", "")[:1], "tools": []}, "preferred_output": pair("", "4")[1:],
         "non_preferred_output": pair("", "5")[1:]},
        {"user": "2+2?", "assistant": "4"},
        {"human": "2+2?", "gpt": "4"},
        {"user_prompt": "2+2?", "assistant_response": "4"},
        {"inputs": "2+2?", "targets": "4"},
        {"input_text": "2+2?", "target_text": "4"},
        {"context": "2+2?", "response": "4"},
        {"question": "2+2?", "answers": {"text": ["4"], "answer_start": [0]}},
        {"turns": pair("2+2?", "4")},
        {"data": ["2+2?", "4"]},
        {"prompt": "2+2?", "messages": pair("2+2?", "4")},
        {"chosen": "\n\nHuman: 2+2?\n\nAssistant: 4", "rejected": "\n\nHuman: 2+2?\n\nAssistant: 5"},
        {"prompt": "2+2?", "generation": "4"},
        {"prompt": "2+2?", "content": "4"},
        {"input": pair("2+2?", "")[:1], "ideal": "4"},
        {"question": "2+2?", "answer": ["4"]},
        {"question": "2+2?", "answers": [{"text": "4", "answer_start": 0}]},
        {"question": "2+2?", "solution": "4", "answer": 4},
        {"question": "2+2?", "solution": "", "answer": "4"},
        {"document": "2+2?", "summary": "4"},
        {"text": "2+2?", "summary": "4"},
        {"text": "2+2?", "answer": "4"},
        {"question": "2+2?", "answer": "4", "title": "a", "highlights": "b"},
        {"messages": pair("2+2?", "")[:1], "answer": "4"},
        {**sharegpt(("human", "2+2?")), "output": pair("", "4")[1]},
        {"items": pair("2+2?", "4"), "id": 1},
        {"dialogue": ["2+2?", "4"], "speakers": ["Ann", "Bob"]},
        {"data": ["\u95ee\uff1a2+2?", "\u7b54\uff1a4"]},
        {"conversation": [{"message": "2+2?", "is_human": True}, {"message": "4", "is_human": False}]},
        *({"instruction": "2+2?", "output": "4", "prompt": prompt} for prompt in (
            "2+2?", "Below is a task.\n\n### Instruction:\n2+2?", "### System: Write tasks.\n\n[Code]")),
        *({question: "2+2?", answer: "4", worse: "5"} for question, answer, worse in (
            ("query", "response", "rejected_response"), ("instruction", "output", "rejected"),
            ("prompt", "text", "rejected_text"))),
        {"chosen_conversations": pair("2+2?", "4"), "rejected_conversations": pair("2+2?", "5")},
    ],
)  # fmt: skip
def test_the_same_question_and_answer_are_read_from_every_shape(row: Row) -> None:
    assert messages_of(row) == pair("2+2?", "4")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"a": 1},
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"conversations": "Hello"},
        {"question": "2+2?", "answer": None},
        {"question": "2+2?", "answer": float("nan")},
        {"turns": []},
        {"text": 4},
        {"role": "user", "content": "One message of a chat."},
        {"chosen": "4", "rejected": "5"},
        {"prompt": "2+2?", "response_a": "4", "response_b": "5", "response_c": "6", "winner": "a"},
        {"x": pair("2+2?", "4"), "y": pair("2+2?", "5")},
        {"q": "2+2?", "a": "4", "few_shot_examples": pair("2+3?", "5")},
        {"prompt": "2+2?", "completions": ["2", "4"], "labels": [False, True]},
    ],
)
def test_rows_of_no_known_shape_are_none(row: Row) -> None:
    assert detect_shape(row) is None


def test_columns_that_the_user_named_decide_between_shapes() -> None:
    row = {"messages": pair("Hi", "Hello"), "prompt": "2+2?", "completion": "4"}
    assert detect_shape(row) == "messages"
    assert detect_shape(row, {"prompt", "completion"}) == "prompt_completion"


@pytest.mark.parametrize(
    ("row", "unread"),
    [
        ({"prompt": "a", "completion": "b", "id": 3, "score": 0.0, "note": None, "tags": []}, ["id", "score"]),
        ({"question": "a", "answer": "b", "response": "c", "text": "d"}, ["response", "text"]),
        ({"messages": pair("a", "b"), "conversations": [1]}, ["conversations"]),
        ({"messages": [{**pair("a", "")[0], "name": "Bob"}, {**pair("", "b")[1], "weight": 0.5}]},
         ["messages[].name", "messages[].weight"]),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "margin": 2}, ["margin"]),
        ({"text": "a", "title": "b"}, ["title"]),
        ({"question": "a", "answers": {"text": ["b", "the b"]}}, ["answers[1:]"]),
        ({"prompt": "a", "completion": "b", "reasoning_types": ["deduction", "maths"]}, ["reasoning_types"]),
        ({"text": "a", "code": "en"}, ["code"]),
        ({"text": "Q: 2+2? A: 4", "answer": "4"}, ["answer"]),
        ({"question": "a", "solution": "7", "answer": "It is 7, since 3 and 4 make it."}, ["solution"]),
        ({"text": "a", "answer": "accept"}, ["answer"]),
    ],
)  # fmt: skip
def test_what_is_not_read_is_named(row: Row, unread: list[str]) -> None:
    assert list(read(row).unread) == unread


def test_the_system_message_may_have_a_column_of_its_own() -> None:
    system = {"role": "system", "content": "Be brief."}
    for column in ("system", "system_prompt", "system_message"):
        for row in ROWS.values():
            if detect_shape(row) not in ("turns", "text", "multiple_choice"):
                assert messages_of({**row, column: "Be brief."}) == [system, *pair("2+2?", "4")]
    both = read({**ROWS["preference"], "system": "Be brief."})
    assert both.rejected == [system, *pair("2+2?", "5")]
    assert messages_of({"messages": [system, *pair("2+2?", "4")], "system": "Be brief."})[0] == system
    assert messages_of({"messages": pair("2+2?", "4"), "system": [{"type": "text", "text": "Be brief."}]})[0] == system
    assert messages_of({"messages": pair("2+2?", "4"), "system": "SYSTEM: Be brief."})[0] == system


def test_more_context_follows_the_question() -> None:
    row = {"instruction": "Translate.", "input": "Hund", "output": "dog"}
    assert messages_of(row) == pair("Translate.\n\nHund", "dog")
    assert messages_of({"question": "How many?", "context": "CREATE TABLE a", "answer": "b"})[0]["content"] == (
        "How many?\n\nCREATE TABLE a"
    )
    assert (
        messages_of({"question": "Who?", "document": "A letter.", "answer": "b"})[0]["content"] == "Who?\n\nA letter."
    )
    for nothing in ("<noinput>", "N/A", "nan"):
        assert messages_of({"instruction": "Say hi.", "input": nothing, "output": "Hi"}) == pair("Say hi.", "Hi")
    assert messages_of({"instruction": "Double it.", "input": 21, "output": "42"})[0]["content"] == "Double it.\n\n21"
    assert messages_of({"instruction": "Say hi.", "input": float("nan"), "output": "Hi"}) == pair("Say hi.", "Hi")


@pytest.mark.parametrize(
    "history",
    [
        [["a?", "A."]], pair("a?", "A."), '[["a?", "A."]]', [{"user": "a?", "assistant": "A."}], ["a?", "A."],
        [{"instruction": "a?", "output": "A."}], "Human: a?\nAssistant: A.",
    ],
)  # fmt: skip
@pytest.mark.parametrize("column", ["history", "chat_history", "conversation_history", "previous_turns"])
def test_earlier_turns_beside_a_question_stand_before_it(history: object, column: str) -> None:
    row = {"instruction": "b?", "input": "", "output": "B.", column: history}
    assert messages_of(row) == [*pair("a?", "A."), *pair("b?", "B.")]


@pytest.mark.parametrize("column", ["context", "contexts", "passage", "documents", "knowledge", "dialogue"])
def test_a_list_of_passages_beside_a_question_is_its_context_and_no_conversation(column: str) -> None:
    row = {"question": "Who?", column: ["A letter.", "B wrote it."], "answer": "B"}
    assert messages_of(row) == pair("Who?\n\nA letter.\n\nB wrote it.", "B")


def test_a_context_that_is_a_list_of_turns_stands_before_the_question() -> None:
    row = {"prompt": "b?", "completion": "B.", "context": pair("a?", "A.")}
    assert messages_of(row) == [*pair("a?", "A."), *pair("b?", "B.")]


def test_a_question_beside_an_instruction_is_what_that_is_about() -> None:
    row = {"instruction": "Answer in one word.", "question": "2+2?", "answer": "4"}
    assert messages_of(row) == pair("Answer in one word.\n\n2+2?", "4")


def test_a_task_beside_its_input_stands_before_it() -> None:
    row = {"definition": "Add.", "inputs": "2+2?", "targets": "4"}
    assert messages_of(row) == pair("Add.\n\n2+2?", "4")


def test_an_answer_beside_a_conversation_that_ends_with_a_question_is_the_one_that_is_learned() -> None:
    row = {"messages": [*pair("a?", "A."), *pair("b?", "")[:1]], "reasoning": "hm, b", "answer": "B."}
    _, earlier, _, answer = messages_of(row)
    assert earlier["weight"] == 0
    assert answer == {**pair("", "B.")[1], "reasoning_content": "hm, b"}


def test_functions_may_stand_under_other_names_and_in_a_turn() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    for row in (
        {"messages": pair("a?", "A."), "available_tools": [tool]},
        {"messages": pair("a?", "A."), "tools": {"functions": [tool["function"]]}},
        {"messages": pair("a?", "A."), "tools": tool},
        {"messages": [{**pair("a?", "")[0], "tools": [tool]}, pair("", "A.")[1]]},
        {"messages": [{**pair("a?", "")[0], "functions": json.dumps([tool])}, pair("", "A.")[1]]},
    ):
        assert read(row).tools == [tool]
        assert list(read(row).unread) == []


def test_template_variables_of_a_row_bring_its_system_message_and_functions() -> None:
    tool = {"type": "function", "function": {"name": "f", "parameters": {}}}
    variables = {"custom_instructions": "Be brief.", "enable_thinking": False, "xml_tools": [json.dumps(tool)], "x": 1}
    conversation = read({"messages": pair("a?", "A."), "chat_template_kwargs": variables})
    assert conversation.messages == [{"role": "system", "content": "Be brief."}, *pair("a?", "A.")]
    assert conversation.tools == [tool]
    assert list(conversation.unread) == ["chat_template_kwargs.x"]


def test_an_answer_that_is_calls_is_read_as_such() -> None:
    row = {
        "query": "a?",
        "answers": '[{"name": "f", "arguments": {"x": 1}}]',
        "tools": [{"name": "f", "parameters": {}}],
    }
    (call,) = messages_of(row)[1]["tool_calls"]
    assert call["function"] == {"name": "f", "arguments": {"x": 1}}


def test_each_answer_of_a_preference_may_have_its_own_thinking_column() -> None:
    row = {**ROWS["preference"], "chosen_reasoning": "2 and 2", "rejected_thinking": "2 and 3"}
    conversation = read(row)
    assert conversation.messages[-1]["reasoning_content"] == "2 and 2"
    assert conversation.rejected[-1]["reasoning_content"] == "2 and 3"
    assert list(conversation.unread) == []


def test_thinking_may_have_a_column_of_its_own() -> None:
    thought = {**pair("2+2?", "4")[1], "reasoning_content": "2 and 2"}
    for column in ("reasoning", "thinking", "cot", "complex_cot", "reasoning_content"):
        assert messages_of({**ROWS["question_answer"], column: "2 and 2"})[1] == thought
    switched = read({**ROWS["question_answer"], "reasoning": "on"})
    assert switched.messages == pair("2+2?", "4")
    assert list(switched.unread) == ["reasoning"]


@pytest.mark.parametrize(
    "row",
    [
        {"question": "2+2?", "answer": "<think>\n2 and 2\n</think>\n\n4", "reasoning": "2 and 2"},
        {"prompt": "2+2?", "chosen": "4", "rejected": "5", "rationale": "5 is too much"},
    ],
)
def test_thinking_that_is_there_already_or_is_about_two_answers_is_named_as_not_read(row: dict[str, object]) -> None:
    assert list(read(row).unread) == [list(row)[-1]]


def test_thinking_beside_messages_is_that_of_a_single_answer() -> None:
    row = {"prompt": pair("2+2?", "")[:1], "completion": pair("", "4")[1:], "reasoning": ["2", "and 2"]}
    assert messages_of(row)[1]["reasoning_content"] == "2\nand 2"
    beside = {"messages": pair("2+2?", "4"), "reasoning": "2 and 2"}
    assert messages_of(beside) == [pair("2+2?", "4")[0], {**pair("2+2?", "4")[1], "reasoning_content": "2 and 2"}]
    assert messages_of({**beside, "reasoning": "on"}) == pair("2+2?", "4")
    two = [*pair("a?", "A."), *pair("b?", "B.")]
    with pytest.raises(DroppedRowError, match=r"^thinking_not_read$"):
        read({**beside, "messages": two})
    each = messages_of({"messages": two, "reasoning": ["", "because"]})
    assert [message.get("reasoning_content") for message in each] == [None, None, None, "because"]


def test_of_a_prompt_that_is_a_conversation_only_the_completion_is_learned() -> None:
    row = {"prompt": [*pair("a?", "A."), *pair("b?", "")[:1]], "completion": pair("", "B.")[1:]}
    first, answer, second, learned = messages_of(row)
    assert [answer.get("weight"), learned.get("weight")] == [0, None]
    assert (first["content"], second["content"]) == ("a?", "b?")


def test_gsm8k_answers_end_with_the_final_answer() -> None:
    row = {"question": "How many?", "answer": "16 - 3 = 13\n#### 1,013"}
    assert read(row).answer == "1013"
    assert read({"question": "Who?", "answer": "Louis 14"}).answer is None


@pytest.mark.parametrize(
    "answer",
    [
        "48/2 = <<48/2=24>>24\n#### 72", "So 3.\n#### -5", "It is 0.\n#### 0\n",
        r"So \boxed{7}.\n#### 8", "#### 007", "1\n#### 5\n#### 6",
        "<think>\n#### 4\n</think>\n#### 9", "So.\n#### 3 km", "<answer>4</answer>\n#### 5",
    ],
)  # fmt: skip
def test_a_plain_number_of_gsm8k_is_what_the_general_search_finds(answer: str) -> None:
    assert read({"question": "a", "answer": answer}).answer == final_answer(answer)


@pytest.mark.parametrize("said", ["proof", "notfound", "n/a"])
def test_a_problem_that_ends_with_no_answer_states_none(said: str) -> None:
    assert read({"problem": "a", "solution": "As seen, it holds.", "answer": said}).answer is None


def test_answers_of_a_preference_begin_with_what_they_share() -> None:
    row = {
        "prompt": "2+2?",
        "initial_reason_steps": "Step 1: count.\nStep 2: ",
        "chosen": "It is 4.",
        "rejected": "It is 5.",
    }
    found = read(row)
    assert [found.messages[-1]["content"], found.rejected[-1]["content"]] == [
        "Step 1: count.\nStep 2: It is 4.", "Step 1: count.\nStep 2: It is 5.",
    ]  # fmt: skip
    assert not found.unread


@pytest.mark.parametrize(
    ("row", "answer"),
    [
        ({"problem": "a", "solution": r"So \boxed{7}.", "answer": 8}, "8"),
        ({"problem": "a", "generated_solution": r"So \boxed{7}.", "expected_answer": ""}, "7"),
        ({"problem": "a", "answer": "7"}, "7"),
        ({"question": "a", "solution": "So it is seven.", "answer": "7"}, "7"),
    ],
)
def test_the_final_answer_of_a_problem_is_stated_or_found(row: Row, answer: str) -> None:
    assert read(row).answer == answer


def test_the_passage_that_choices_are_about_stands_before_them() -> None:
    row = {"article": "Ann eats.", "question": "Who?", "options": ["Ann", "Bob"], "answer": "A"}
    assert read(row).messages == pair("Ann eats.\n\nWho?\nA. Ann\nB. Bob", "A")


@pytest.mark.parametrize("rejected", ["No", "true", "1", "Yes"])
def test_yes_and_no_are_answers_of_preferences(rejected: str) -> None:
    conversation = read({"prompt": "Is it?", "chosen": "It is.", "rejected": rejected})
    assert (conversation.messages[-1]["content"], (conversation.rejected or [{}])[-1]["content"]) == (
        "It is.",
        rejected,
    )
    labelled = {"prompt": "a", "completion": "b", "chosen": "True", "rejected": "False"}
    assert detect_shape(labelled) == "prompt_completion"


@pytest.mark.parametrize("worse", ["c", [*pair("a", "c")], pair("a", "c")[1:]])
def test_a_worse_answer_may_stand_beside_a_conversation(worse: Any) -> None:
    conversation = read({"messages": pair("a", "b"), "rejected_response": worse})
    assert (conversation.messages, conversation.rejected) == (pair("a", "b"), pair("a", "c"))


CALL = {"type": "function", "function": {"name": "dim", "arguments": {"room": "hall"}}}
CALLED = [{"role": "assistant", "content": "", "tool_calls": [CALL]}, {"role": "tool", "content": "ok"}]


def test_an_answer_of_several_messages_follows_what_both_answers_share() -> None:
    row: dict[str, Any] = {
        "prompt": pair("Dim the hall.", "")[:1],
        "chosen": [*CALLED, *pair("", "Done.")[1:]],
        "rejected": pair("", "I cannot.")[1:],
    }
    conversation = read(row)
    assert conversation.messages == [*row["prompt"], *CALLED, *pair("", "Done.")[1:]]
    assert conversation.rejected == [*row["prompt"], *pair("", "I cannot.")[1:]]


def test_earlier_turns_stay_before_both_answers_of_a_preference() -> None:
    before = pair("a?", "A.")
    row = {"prompt": "b?", "chosen": [*before, *pair("b?", "B.")], "rejected": [*before, *pair("b?", "C.")]}
    conversation = read(row)
    assert [message["content"] for message in conversation.messages] == ["a?", "A.", "b?", "B."]
    assert [message["content"] for message in conversation.rejected or ()] == ["a?", "A.", "b?", "C."]
    assert conversation.messages[1]["weight"] == 0


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        ({"prompt": "a", "completion": "b", "label": False}, "labelled_bad"),
        ({"messages": pair("a", "b"), "label": "false"}, "labelled_bad"),
        ({"instruction": "a", "output": "b", "kto_tag": 0}, "labelled_bad"),
        ({"problem": "a", "solution": "b", "is_correct": False}, "labelled_bad"),
        ({"prompt": "a", "completion": "b", "label": "rejected"}, "labelled_bad"),
        ({"prompt": "a", "completion": "b", "label": -1}, "labelled_bad"),
        ({"prompt": "a", "completion": "b", "is_desirable": False}, "labelled_bad"),
        ({"prompt": "a", "completion": "b", "chosen": False}, "labelled_bad"),
        ({"prompt": "a", "completion": "b", "is_rejected": True}, "labelled_bad"),
        ({"messages": pair("a", "b"), "train": False}, "excluded_row"),
        ({"instruction": "a", "output": "b", "weight": 0}, "excluded_row"),
        ({"text": "a", "exclude": "true"}, "excluded_row"),
        ({"question": "a", "answer": "b", "deepseek_thinking_trajectory": "hm, b"}, "thinking_not_read"),
        ({"instruction": "a", "output": "b", "my_thoughts": "hm, b"}, "thinking_not_read"),
        ({"messages": [pair("a", "")[0], {**pair("", "b")[1], "reason": "hm, b"}]}, "thinking_not_read"),
        ({"question": "a", "answer": "b", "scratch": "hm, b"}, "thinking_not_read"),
        ({"messages": pair("a", "b"), "images": ["1.jpg"]}, "not_text"),
        *(({"question": "a", "answer": "b", name: "1.jpg"}, "not_text") for name in
          ("photo", "image_base64", "image_1", "imageUrl", "screenshot", "frame_paths", "video_file")),
        ({"messages": pair("a", "b"), "frames": ["1.jpg"]}, "not_text"),
        ({"messages": [{**pair("a", "")[0], "images": ["1.jpg"]}, pair("", "b")[1]]}, "not_text"),
        *(({"prompt": "a", "completion": "b", **mark}, "labelled_bad") for mark in (
            {"binary_label": False}, {"is_good_answer": False}, {"verified": "false"}, {"quality": "bad"},
            {"correctness": "incorrect"}, {"solution_is_valid": "No"}, {"problem_is_valid": "No"}, {"is_safe": False},
            {"rating": "thumbs_down"}, {"response_label": False}, {"isCorrect": False})),
        ({"question": "a", "answer": "b", "audio_path": "1.wav"}, "not_text"),
        ({"question": "a", "answer": "b", "image": {"bytes": b"", "path": "1.jpg"}}, "not_text"),
        ({"instruction": "a", "input": ["b"], "output": "c"}, "not_text"),
        ({"instruction": "a", "input": {"b": 1}, "output": "c"}, "not_text"),
        ({"question": "a", "answer": "b", "context": {"c": 1}}, "not_text"),
        ({"question": "a", "answer": ""}, "no_answer"),
        ({"question": " ", "answer": "b"}, "empty_turn"),
        ({"input": "-", "output": "b"}, "empty_turn"),
        ({"messages": pair("a", "")[:1], "answer": "B", "shown": ["b", "c"]}, "bad_choices"),
        ({"instruction": "a", "output": ["b", "c"]}, "not_text"),
        ({"messages": pair("a", "b"), "resolved": False}, "labelled_bad"),
        ({"question": "a", "answer": "b", "jpg": b"c"}, "not_text"),
        ({"question": "a", "answer": "b", "media": ["1.mp4"]}, "not_text"),
        ({"dialogue": ["a", "b", "c", "d"], "speakers": ["Ann", "Ann", "Bob", "Ann"]}, "role_order"),
        ({"turns": ["a", "b"]}, "no_answer"),
        ({"turns": ["a"], "reference": 5}, "no_answer"),
        ({"turns": ["a"], "reference": [5]}, "no_answer"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "bad_history"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "chosen_is_rejected"),
        ({"prompt": "a", "chosen": pair("b", "c"), "rejected": pair("b", "d")}, "prompt_differs"),
        ({"chosen": [*pair("a", "b"), *pair("c", "d")], "rejected": [*pair("a", "x"), *pair("c", "e")]},
         "histories_differ"),
        ({"prompt": pair("a", "")[0], "completion": "b", "tools": "{"}, "bad_tools"),
    ],
)  # fmt: skip
def test_rows_that_cannot_be_learned_as_they_are_meant_have_a_reason(row: Row, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        read(row)


@pytest.mark.parametrize(
    ("column", "value"),
    [("label", "sports"), ("label", "negative"), ("helpful", 0), ("rating", 0), ("quality", False), ("reward", -1),
     ("speech", "a text"), ("image_id", 7), ("images", "")],
)  # fmt: skip
def test_a_column_that_marks_no_bad_answer_and_no_picture_is_only_not_read(column: str, value: object) -> None:
    conversation = read({"prompt": "a", "completion": "b", column: value})
    assert conversation.messages == pair("a", "b")
    assert list(conversation.unread) == ([column] if value != "" else [])


def test_pictures_that_arrow_writes_as_null_are_none() -> None:
    empty = {"images": [None], "image": {"bytes": None, "path": None}, "audio": {}, "label": None}
    assert list(read({"messages": pair("a", "b"), **empty}).unread) == []


@pytest.mark.parametrize("answer", ["chosen", "completion"])
def test_a_prompt_that_is_a_transcript_is_read_as_its_turns(answer: str) -> None:
    prompt = "\n\nHuman: a?\n\nAssistant: A.\n\nHuman: b?\n\nAssistant:"
    said = [(m["role"], m["content"]) for m in messages_of({"prompt": prompt, answer: " B.", "rejected": " C."})]
    assert said == [("user", "a?"), ("assistant", "A."), ("user", "b?"), ("assistant", " B.")]


def test_rows_too_deep_to_read_have_a_reason() -> None:
    with pytest.raises(DroppedRowError, match=r"^too_deep$"):
        read({"instruction": "a", "output": "b", "history": "[" * 5000 + "]" * 5000})


def test_the_first_question_decides_whatever_follows() -> None:
    longer = sharegpt(("system", "Be brief."), ("human", "2+2?"), ("gpt", "4"), ("human", "Sure?"), ("gpt", "Yes."))
    assert {first_question(read(row)) for row in (ROWS["messages"], ROWS["preference"], longer)} == {"2+2?"}


def test_rows_that_teach_the_same_have_the_same_text_and_others_do_not() -> None:
    think = {"question": "2+2?", "answer": "<think>\n2 and 2\n</think>\n\n4"}
    apart = {"question": "2+2?", "answer": "4", "reasoning": "2 and 2"}
    assert whole_text(read(think)) == whole_text(read(apart))
    different = [
        ROWS["messages"],
        think,
        {**ROWS["messages"], "system": "Be brief."},
        {**ROWS["messages"], "tools": [{"name": "f", "parameters": {}}]},
        ROWS["preference"],
        {**ROWS["preference"], "rejected": "6"},
        {"instruction": "2+2?", "output": "4", "history": [["1+1?", "2"]]},
        {"instruction": "2+2?", "output": "4", "history": [["1+1?", "two"]]},
    ]
    assert len({whole_text(read(row)) for row in different}) == len(different)
