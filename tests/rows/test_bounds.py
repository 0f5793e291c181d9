import pytest

from finemill.rows.answers import final_answer
from finemill.rows.bounds import spelled_bound


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("She needs at least 4 boxes.", "at least 4"),
        ("The answer is 4 or more.", "4 or more"),
        ("Es sind mindestens 4.", "mindestens 4"),
        ("She needs at least 4 boxes, so she buys 5.", "5"),
        ("He earned $20 over 4 weeks", "4 weeks"),
    ],
)
def test_a_bound_is_taken_with_its_words(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("answer", "relation"),
    [
        ("no fewer than 4", r"\ge 4"),
        ("4 or less", r"\le 4"),
        ("greater than or equal to 4", r"\ge 4"),
        ("最多4", r"\le 4"),
        ("4", "4"),
        ("over the moon", "over the moon"),
    ],
)
def test_a_bound_is_spelled_as_a_relation(answer: str, relation: str) -> None:
    assert spelled_bound(answer) == relation
