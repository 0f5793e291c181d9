from typing import Any

import pytest

from finemill.rows.conversation import Conversation
from finemill.rows.reasons import DroppedRowError
from finemill.rows.shapes import detect_shape, to_conversation

Row = dict[str, Any]


def pair(question: str, answer: str) -> list[Row]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def read(row: Row) -> Conversation:
    shape = detect_shape(row)
    assert shape == "multiple_choice"
    return to_conversation(row, shape)


@pytest.mark.parametrize(
    ("row", "listed", "answer"),
    [
        ({"choices": ["3", "4"], "answer": 1}, "A. 3\nB. 4", "B"),
        ({"choices": ["three", "four"], "answer": "four"}, "A. three\nB. four", "B"),
        ({"choices": {"text": ["3", "4"], "label": ["1", "2"]}, "answerKey": "2"}, "1. 3\n2. 4", "2"),
        ({"options": {"A": "3", "B": "4"}, "answer": "B"}, "A. 3\nB. 4", "B"),
        ({"options": ["A) 3", "B) 4"], "answer": "B"}, "A) 3\nB) 4", "B"),
        ({"options": '["3", "4"]', "answer_idx": "1"}, "A. 3\nB. 4", "B"),
        ({"A": "3", "B": "4", "answer": "B"}, "A. 3\nB. 4", "B"),
        ({"option_a": "3", "option_b": "4", "answer": "B"}, "A. 3\nB. 4", "B"),
        ({"option1": "3", "option2": "4", "answer": 2}, "1. 3\n2. 4", "2"),
        ({"choices": ["3", "4"], "correct_answer": "4"}, "A. 3\nB. 4", "B"),
        ({"choices": ["3", "4"], "gold": 1}, "A. 3\nB. 4", "B"),
        *(({"choices": ["three", "four"], "answer": stated}, "A. three\nB. four", "B")
          for stated in ("b", "(B)", "B.", "B. four", "b) Four", "Four")),
        ({"choices": "['three', 'four']", "answer": 1}, "A. three\nB. four", "B"),
        ({"options": "a ) 3 , b ) 4", "correct": "b"}, "a ) 3 , b ) 4", "b"),
        ({"choices": [{"label": "A", "text": "3"}, {"label": "B", "text": "4"}], "answerKey": "B"}, "A. 3\nB. 4", "B"),
        ({"options": [{"A": "3"}, {"B": "4"}], "answer": "B"}, "A. 3\nB. 4", "B"),
        ({"choices": [{"text": "3", "correct": False}, {"text": "4", "correct": True}]}, "A. 3\nB. 4", "B"),
        ({"choices": ["A. niger", "E. coli"], "answer": "E. coli"}, "A. niger\nB. E. coli", "B"),
        ({"opa": "3", "opb": "4", "cop": 1}, "A. 3\nB. 4", "B"),
        ({"answer0": "3", "answer1": "4", "answer2": "5", "label": 1}, "A. 3\nB. 4\nC. 5", "B"),
        ({"answerA": "3", "answerB": "4", "answerC": "5", "label": "B"}, "A. 3\nB. 4\nC. 5", "B"),
        ({"answers": ["3", "4"], "label": 1}, "A. 3\nB. 4", "B"),
        ({"options": ["3", "4"], "answer": "4", "answer_idx": "B"}, "A. 3\nB. 4", "B"),
    ],
)  # fmt: skip
def test_choices_are_listed_and_the_answer_is_a_letter(row: Row, listed: str, answer: str) -> None:
    conversation = read({"question": "2+2?", **row})
    assert conversation.messages == pair(f"2+2?\n{listed}", answer)
    assert conversation.answer == answer
    assert list(conversation.unread) == []


LISTED = "A. 3\nB. 4"


@pytest.mark.parametrize(
    "row",
    [
        {"question": {"stem": "2+2?", "choices": [{"text": "3", "label": "A"}, {"text": "4", "label": "B"}]},
         "answerKey": "B"},
        {"question_stem": "2+2?", "choices": {"text": ["3", "4"], "label": ["A", "B"]}, "answerKey": "B"},
        {"ctx": "2+2?", "endings": ["3", "4"], "label": "1"},
        {"startphrase": "2+2?", "ending0": "3", "ending1": "4", "label": 1},
        {"goal": "2+2?", "sol1": "3", "sol2": "4", "label": 1},
        {"query": "2+2?", "options": ["3", "4"], "correct_option": 1},
        {"prompt": "2+2?", "options": ["3", "4"], "answer": "B"},
        {"instruction": "2+2?", "choices": ["3", "4"], "answer": "B"},
        {"question": "2+2?", "option": {"A": "3", "B": "4"}, "answer": "B"},
        {"sentence": "2+2?", "options": {"A": "3", "B": "4"}, "answer": "B"},
    ],
)  # fmt: skip
def test_the_question_stands_where_each_benchmark_has_it(row: Row) -> None:
    assert read(row).messages == pair(f"2+2?\n{LISTED}", "B")


def test_the_reasons_for_a_choice_are_its_thinking() -> None:
    row = {"question": "2+2?", "options": ["3", "4"], "rationale": "2 and 2 are 4.", "correct": "B"}
    assert read(row).messages[-1] == {"role": "assistant", "content": "B", "reasoning_content": "2 and 2 are 4."}


def test_several_right_choices_are_all_said() -> None:
    for stated in (["A", "B"], "A, B"):
        conversation = read({"question": "Even?", "options": ["2", "4", "5"], "answer": stated})
        assert (conversation.messages[-1]["content"], conversation.answer) == ("A, B", None)


@pytest.mark.parametrize(
    "row",
    [
        {"choices": ["b", "c"], "answer": 3},
        {"choices": ["b", "c"], "answer": -1},
        {"choices": ["b", "c"], "answer": "d"},
        {"choices": ["b", ""], "answer": 0},
        {"choices": ["2", "1", "0"], "answer": 2},
        {"choices": "['b' 'c']", "answer": 1},
        {"A": "b", "B": "c", "answer": 1},
        {"choice1": "b", "choice2": "c", "label": 1},
        {"opa": "b", "opb": "c", "cop": -1},
        {"choices": ["b", "c"], "answer": "A. c"},
    ],
)
def test_a_choice_that_cannot_be_told_leaves_the_row_out(row: Row) -> None:
    with pytest.raises(DroppedRowError, match=r"^bad_choices$"):
        read({"question": "a", **row})


@pytest.mark.parametrize("row", [{"opa": "b", "opb": "c", "cop": 2}, {"choices": ["b", "c"], "answer": 2}])
def test_a_number_after_the_last_choice_is_told_from_other_wrong_ones(row: Row) -> None:
    with pytest.raises(DroppedRowError, match=r"^choice_beyond_last$"):
        read({"question": "a", **row})


def test_an_answer_that_is_a_letter_is_not_learned_without_the_choices_that_may_stand_beside_it() -> None:
    for beside in (["b", "c"], {"A": "b", "B": "c"}):
        row: Row = {"question": "a", "answer": "B", "alternatives_shown": beside}
        with pytest.raises(DroppedRowError, match=r"^bad_choices$"):
            to_conversation(row, "question_answer")
    for answer, column in (("B", "tags"), ("Bob", "heard")):
        row = {"question": "a", "answer": answer, column: ["b", "c"]}
        assert to_conversation(row, "question_answer").messages == pair("a", answer)
    shown = to_conversation({"question": "A) b B) c", "answer": "B", "heard": ["b", "c"]}, "question_answer")
    assert shown.messages[-1]["content"] == "B"


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "a", "answer": "b", "options": {"temperature": 0.5, "stop": "c"}},
        {"prompt": "a", "answer": "b", "choices": [{"message": {"content": "b"}}, {"message": {"content": "c"}}]},
        {"question": "a", "answers": ["b", "the b"], "label": "people"},
    ],
)
def test_settings_answers_and_classes_are_no_choices(row: Row) -> None:
    assert detect_shape(row) in ("prompt_completion", "question_answer")
