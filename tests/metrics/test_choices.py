import math
from statistics import mean, stdev

import pytest

from finemill.metrics.choices import macro_f1, macro_f1_rows, read_label

LETTERS = ["A", "B", "C", "D"]
LABELS = ["positive", "negative", "neutral", "very negative"]


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("B", "B"),
        ("(b)", "B"),
        ("The answer is (C).", "C"),
        ("**Answer: D**", "D"),
        (r"\boxed{\text{A}}", "A"),
        ("<think>\nIt may be A.\n</think>\n\nB. Because of the second law.", "B"),
        ("The correct answer is B) 12 apples", "B"),
        ("I would say it is A dog", None),
        ("I think it's B.", "B"),
        ("Option B is correct.", "B"),
        ("B is the correct answer", "B"),
        ("Not A. The answer is B.", "B"),
        ("Between A and C, the answer is C", "C"),
        ("A and B", None),
        ("选B", "B"),
        ("La respuesta correcta es C.", "C"),
        ("정답은 C입니다.", "C"),
        ("答えはCです。", "C"),
        ("Answer\nC", "C"),
        ('{"answer": "C"}', "C"),
        ("E", None),
        ("", None),
        ("<think>\nIt is B", None),
    ],
)
def test_letters_of_choices(text: str, label: str | None) -> None:
    assert read_label(text, LETTERS) == label


@pytest.mark.parametrize(
    ("text", "label"),
    [
        ("Positive", "positive"),
        ("The sentiment of this review is negative.", "negative"),
        ("It is very negative.", "very negative"),
        ("It is neither positive nor negative.", None),
        ("It is nonnegative.", None),
        ("It is not positive, it is negative.", "negative"),
        ("It isn't positive", None),
    ],
)
def test_labels_are_words(text: str, label: str | None) -> None:
    assert read_label(text, LABELS) == label


def test_macro_f1_is_the_mean_over_the_labels() -> None:
    gold, said = ["a", "a", "a", "b"], ["a", "a", "b", "b"]
    # a: 2 hits of 3 right and 2 said; b: 1 of 1 and 2.
    assert macro_f1(gold, said) == pytest.approx((4 / 5 + 2 / 3) / 2)
    assert macro_f1(gold, [None] * 4) == 0.0


def test_a_row_counts_by_what_is_lost_without_it() -> None:
    gold = ["a", "b", "a", "b", "c", "a", "c", "b"]
    said = ["a", "b", "b", "b", "c", None, "a", "c"]
    total, size = macro_f1(gold, said), len(gold)
    without = [macro_f1(gold[:i] + gold[i + 1 :], said[:i] + said[i + 1 :]) for i in range(size)]
    assert macro_f1_rows(gold, said) == pytest.approx([size * total - (size - 1) * other for other in without])
    assert math.isfinite(mean(macro_f1_rows(gold, said)) + stdev(macro_f1_rows(gold, said)))
