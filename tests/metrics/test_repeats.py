import pytest

from finemill.metrics.repeats import majority, pass_at_k


@pytest.mark.parametrize(
    ("right", "k", "expected"), [(0, 3, 0.0), (4, 1, 1.0), (1, 1, 0.25), (1, 4, 1.0), (2, 2, 5 / 6)]
)
def test_pass_at_k_is_the_chance_that_one_of_k_is_right(right: int, k: int, expected: float) -> None:
    assert pass_at_k(4, right, k) == pytest.approx(expected)


@pytest.mark.parametrize("k", [0, 5])
def test_more_than_all_samples_cannot_be_drawn(k: int) -> None:
    with pytest.raises(ValueError, match="allowed is 1 to 4"):
        pass_at_k(4, 1, k)


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        (["1/2", "3", "0.5"], "1/2"),
        (["3", "4"], "3"),
        ([None, None, "4"], "4"),
        ([None], None),
        ([], None),
    ],
)
def test_the_majority_counts_equal_values_together_and_no_silence(
    answers: list[str | None], expected: str | None
) -> None:
    assert majority(answers) == expected
