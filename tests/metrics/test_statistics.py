import math

import pytest

from finemill.metrics.statistics import detectable_change, paired_rate_error, rate_error, standard_error, weighted_mean


def test_weighted_mean_with_equal_weights_has_the_usual_error() -> None:
    center, error = weighted_mean([1.0, 2.0, 3.0], [5, 5, 5])
    assert center == 2.0
    assert error == pytest.approx(math.sqrt(2) / 3)


def test_standard_error_of_a_mean() -> None:
    assert standard_error([1, 0, 0, 1]) == pytest.approx(math.sqrt(1 / 3 / 4))
    assert standard_error([1]) == 0.0


def test_a_perfect_rate_is_not_certain() -> None:
    # Ten of ten: as if 12 of 14.
    assert rate_error([1] * 10) == pytest.approx(math.sqrt(12 / 14 * 2 / 14 / 14))
    # All eight gained: as if nine of ten, and one lost.
    assert paired_rate_error([1] * 8) == pytest.approx(math.sqrt((1.0 - 0.8**2) / 10))


@pytest.mark.parametrize(("rows", "points"), [(144, 7), (1000, 2), (10_000, 1), (1, 79)])
def test_more_rows_show_smaller_changes(rows: int, points: int) -> None:
    assert round(100 * detectable_change(rows)) == points
