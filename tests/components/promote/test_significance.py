"""Chances against values computed by hand, and against the tests of SciPy."""

from typing import Any

import numpy as np
import pytest
from scipy.stats import binomtest

from finemill.components.promote.significance import holm, mcnemar, p_value

DRAWN: dict[str, Any] = {"num_resamples": 2000, "seed": 0}


@pytest.mark.parametrize(("gained", "lost"), [(3, 0), (0, 3), (10, 4), (0, 0), (40, 20)])
def test_mcnemar_is_the_exact_test_of_the_rows_that_changed(gained: int, lost: int) -> None:
    expected = binomtest(gained, gained + lost, alternative="greater").pvalue if gained + lost else 1.0
    assert mcnemar(gained=gained, lost=lost) == pytest.approx(expected)


def test_right_or_wrong_is_tested_exactly_and_anything_else_by_resamples() -> None:
    gains = np.array([1.0] * 3 + [0.0] * 97)
    assert p_value(gains, np.ones(100), threshold=0.0, **DRAWN) == 0.5**3
    # Every resample is as good as the rows themselves.
    assert p_value(np.full(50, 0.2), np.ones(50), threshold=0.1, **DRAWN) == 1 / 2001
    assert p_value(np.full(50, 0.2), np.ones(50), threshold=0.3, **DRAWN) == 1.0
    symmetric = np.random.default_rng(0).normal(0, 1, 400)
    assert 0.2 < p_value(symmetric - symmetric.mean(), np.ones(400), threshold=0.0, **DRAWN) < 0.8


def test_holm_multiplies_the_smallest_most() -> None:
    assert holm([0.01, 0.04, 0.03]) == pytest.approx([0.03, 0.06, 0.06])
    assert holm([0.9, 0.5]) == [1.0, 1.0]
    assert holm([]) == []
