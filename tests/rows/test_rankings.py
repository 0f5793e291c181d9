import json
from typing import Any

import pytest

from finemill.components.data_prep.config import Source
from finemill.components.data_prep.load import name_columns
from finemill.rows.conversation import Conversation
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation

Row = dict[str, Any]
ASKED = {"role": "user", "content": "2+2?"}
TWO = {"prompt": "2+2?", "response_a": "4", "response_b": "5"}
SWAPPED = {"prompt": "2+2?", "response_a": "5", "response_b": "4"}
NUMBERED = {"prompt": "2+2?", "response_0": "5", "response_1": "4"}


def answered(text: str) -> list[Row]:
    return [ASKED, {"role": "assistant", "content": text}]


def read(row: Row) -> Conversation:
    named = name_columns(row, Source(uri="a"))
    assert detect_shape(named) == "preference"
    return to_conversation(named, "preference")


@pytest.mark.parametrize(
    "row",
    [
        *({**TWO, "winner": winner} for winner in ("model_a", "A", "a", "[[A]]", "response_a", "first", "Assistant A")),
        *({**SWAPPED, "winner": winner} for winner in ("model_b", "B", "[[B]]", "response_b", "second", 2)),
        {**SWAPPED, "chosen": "response_b"},
        {**TWO, "winner_model_a": 1, "winner_model_b": 0, "winner_tie": 0},
        {**SWAPPED, "score_a": 2, "score_b": 7.5},
        {**SWAPPED, "rating_a": "2", "rating_b": "7"},
        {"prompt": '["2+2?"]', "response_a": '["4"]', "response_b": '["5"]', "winner": "a"},
        {**NUMBERED, "better_response_id": 1},
        {"instruction": "2+2?", "input": "", "output_1": "4", "output_2": "5", "preference": 1},
        {"context": [ASKED], "response1": "4", "response2": "5", "overall_preference": -2},
        {"prompt": "2+2?", "response_1": "5", "response_2": "4", "preference_strength": 1},
        {"conversation_a": answered("5"), "conversation_b": answered("4"), "winner": "model_b"},
        {"history": "2+2?", "human_ref_A": "4", "human_ref_B": "5", "labels": 1},
        {"question": "2+2?", "response_j": "4", "response_k": "5"},
        {"prompt": "2+2?", "responses": ["5", "4"], "scores": [1, 9]},
        {"prompt": "2+2?", "responses": json.dumps(["5", "4"]), "ranks": "[2, 1]"},
        {"prompt": "2+2?", "responses": [[answered("4")[1]], [answered("5")[1]]], "rewards": [0.5, -1]},
        {"instruction": "2+2?", "completions": [
            {"response": answer, "overall_score": score} for answer, score in (("3", 2), ("4", 8), ("5", 1))]},
        {"prompt": "2+2?", "answers": [
            {"answer": answer, "rank": rank} for answer, rank in (("4", 1.0), ("3", 2.0), ("5", 3.0))]},
        {"prompt": [ASKED], "candidates": [{"text": "4", "score": 0.9}, {"text": "5", "score": 0.1}]},
    ],
)  # fmt: skip
def test_of_several_answers_the_better_and_the_worse_are_told_by_what_the_row_says(row: Row) -> None:
    conversation = read(row)
    assert (conversation.messages, conversation.rejected) == (answered("4"), answered("5"))
    assert list(conversation.unread) == []


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        *(({**TWO, "winner": winner}, "tie") for winner in ("tie", "Tie (bothbad)", "neither", "[[C]]")),
        ({**TWO, "score_a": 3, "score_b": 3}, "tie"),
        ({"prompt": "2+2?", "responses": ["5", "4"], "scores": [3, 3]}, "tie"),
        ({"context": [ASKED], "response1": "4", "response2": "5", "overall_preference": 0}, "tie"),
        ({**TWO, "winner": 1}, "unclear_verdict"),
        ({**TWO, "winner": "gpt-4"}, "unclear_verdict"),
        ({"history": "2+2?", "human_ref_a": "4", "human_ref_b": "5", "labels": 2.5}, "unclear_verdict"),
        ({"prompt": "2+2?", "generations": [{"a": "4"}, "5"], "rating": [9, 1]}, "no_answer"),
        ({"prompt": ["a?", "b?"], "response_a": ["A", "B"], "response_b": ["C", "D"], "winner": "a"},
         "histories_differ"),
    ],
)  # fmt: skip
def test_a_row_that_does_not_say_which_answer_is_better_has_a_reason(row: Row, reason: str) -> None:
    with pytest.raises(DroppedRowError, match=f"^{reason}$"):
        read(row)


def test_what_else_is_said_of_an_answer_is_named_as_not_read() -> None:
    listed = [{"model": "m", "response": "4", "score": 2}, {"model": "n", "response": "5", "score": 1}]
    assert list(read({"prompt": "2+2?", "completions": listed}).unread) == ["completions[].model"]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "2+2?", "responses": ["5", "4"]},
        {"prompt": "2+2?", "response_a": "4", "response_b": "5"},
        {"question": "2+2?", "answers": ["4", "four"], "score": 3},
    ],
)
def test_several_answers_without_a_ranking_are_no_preference(row: Row) -> None:
    assert detect_shape(row) != "preference"
