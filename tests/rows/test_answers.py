import pytest

from finemill.rows.answers import final_answer, normalize_answer


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"<think>\n2 + 2 = 4\n</think>\n\nThe answer is \boxed{4} apples.", "4"),
        (r"First \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        ("Natalia sold 48 + 24 = 72 clips.\n#### 1,072", "1072"),
        ("The answer is 7.0.", "7"),
        ("So 3 of 12 remain", "12"),
        (r"an unclosed \boxed{4 and 9", "9"),
        ("no number at all", None),
        ("<think>\nstill thinking about 5", None),
        ("", None),
    ],
)
def test_final_answer(text: str, answer: str | None) -> None:
    assert final_answer(text.replace(r"\n", "\n")) == answer


def test_equal_numbers_are_spelled_alike() -> None:
    assert {normalize_answer(text) for text in ("1000", "1,000", " $1000$ ", "1000.", "1000.00", "+1000")} == {"1000"}
