"""Questions are the same whatever their case, width and white space; rows whatever the order of their keys."""

import pytest

from finemill.rows.identity import question_key, row_id
from finemill.rows.shapes import to_conversation


@pytest.mark.parametrize("same", ["what  is 2 + 2?", "\uff37hat is 2 + 2\uff1f", "What\nis 2 + 2?"])
def test_a_question_in_another_spelling_is_the_same(same: str) -> None:
    keys = [
        question_key(to_conversation({"question": question, "answer": "4"}, "question_answer"))
        for question in ("What is 2 + 2?", same, "What is 2 + 3?")
    ]
    assert keys[0] == keys[1] != keys[2]


def test_the_order_of_keys_makes_no_other_row() -> None:
    assert row_id({"a": 1, "b": 2}) == row_id({"b": 2, "a": 1}) != row_id({"a": 2, "b": 1})
