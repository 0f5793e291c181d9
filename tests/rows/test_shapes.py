import json

import pytest

from finemill.rows.shapes import SHAPES, detect_shape, parse_json_columns, prompt_and_answer

ROWS = {
    "messages": {"messages": [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": "4"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": "4"}]},
    "alpaca": {"instruction": "2+2?", "input": "", "output": "4"},
    "prompt_completion": {"prompt": "2+2?", "completion": "4"},
    "question_answer": {"question": "2+2?", "answer": "4"},
    "reasoning": {"problem": "2+2?", "generated_solution": "4", "expected_answer": "4"},
    "preference": {"prompt": "2+2?", "chosen": "4", "rejected": "5"},
    "turns": {"question_id": 1, "turns": ["2+2?"], "reference": ["4"]},
    "text": {"text": "2+2?"},
}


def test_every_shape_has_an_example_here() -> None:
    assert set(ROWS) == set(SHAPES)


@pytest.mark.parametrize("shape", ROWS)
def test_each_shape_is_told_from_the_others(shape: str) -> None:
    assert detect_shape(ROWS[shape]) == shape


@pytest.mark.parametrize("shape", ROWS)
def test_the_same_question_has_the_same_prompt_in_every_shape(shape: str) -> None:
    prompt, answer = prompt_and_answer(ROWS[shape], shape)
    assert (prompt, answer) == ("2+2?", "" if shape == "text" else "4")


@pytest.mark.parametrize(
    "row",
    [
        {},
        {"a": 1},
        {"messages": []},
        {"messages": [{"content": "no role"}]},
        {"conversations": "Hello"},
        {"question": "2+2?", "answer": None},
        {"turns": []},
        {"text": 4},
        {"chosen": "4", "rejected": "5"},
    ],
)
def test_rows_of_no_known_shape_are_none(row: dict[str, object]) -> None:
    assert detect_shape(row) is None


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [{"role": "user", "content": "2+2?"}], "chosen": "4", "rejected": "5"},
        {"conversations": [{"from": "human", "value": "2+2?"}],
         "chosen": {"from": "gpt", "value": "4"}, "rejected": {"from": "gpt", "value": "5"}},
        {"chosen": [*ROWS["messages"]["messages"]], "rejected": [*ROWS["messages"]["messages"]]},
    ],
)  # fmt: skip
def test_preferences_come_with_strings_turns_or_whole_conversations(row: dict[str, object]) -> None:
    assert detect_shape(row) == "preference"
    assert prompt_and_answer(row, "preference") == ("2+2?", "4")


def test_system_prompts_do_not_make_another_prompt() -> None:
    row = {"messages": [{"role": "system", "content": "Be brief."}, *ROWS["messages"]["messages"]]}
    assert prompt_and_answer(row, "messages") == ("2+2?", "4")


def test_the_prompt_of_a_conversation_is_all_before_its_last_answer() -> None:
    turns = [("human", "Hi"), ("gpt", "Hello"), ("human", "2+2?"), ("gpt", "4")]
    row = {"conversations": [{"from": role, "value": text} for role, text in turns]}
    assert prompt_and_answer(row, "sharegpt") == ("Hi\nHello\n2+2?", "4")


def test_conversations_held_as_json_text_are_read() -> None:
    row = {"conversations": json.dumps(ROWS["sharegpt"]["conversations"])}
    assert detect_shape(parse_json_columns(row)) == "sharegpt"
    assert parse_json_columns({"chosen": "[not JSON]"}) == {"chosen": "[not JSON]"}
