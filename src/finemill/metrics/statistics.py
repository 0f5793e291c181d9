"""Means over rows and their standard errors."""

import math
from collections.abc import Sequence


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Mean per token of values per row, and its standard error with rows as clusters.

    The tokens of a row are not independent of each other: the error is that of a ratio of two sums over rows, to first
    order (Cochran, Sampling Techniques, section 2.11).
    """
    total = sum(weights)
    center = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    spread = sum((weight * (value - center)) ** 2 for value, weight in zip(values, weights, strict=True))
    return center, math.sqrt(spread) / total


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the sample's own spread; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1) / len(values))


def rate_error(values: Sequence[float]) -> float:
    """Standard error of a rate of zeros and ones, from two more of each.

    The sample's own spread would be none when all are right, as if the next could not be wrong (Agresti & Coull, 1998).
    """
    count = len(values) + 4
    rate = (sum(values) + 2) / count
    return math.sqrt(rate * (1 - rate) / count)


def paired_rate_error(differences: Sequence[float]) -> float:
    """Standard error of a rate's change on the same rows, from one more row of either change (Bonett & Price, 2012).

    Args:
        differences: 1, 0 or -1 per row.
    """
    count = len(differences) + 2
    gained, lost = ((sum(value == sign for value in differences) + 1) / count for sign in (1, -1))
    return math.sqrt((gained + lost - (gained - lost) ** 2) / count)


_Z95_ONE_SIDED, _Z80 = 1.645, 0.842
_CHANGING = 0.1


def detectable_change(num_rows: int) -> float:
    """The smallest change of a rate on the same rows that a one-sided test at 95 % sees in four of five cases.

    Where one answer in ten changes, for better or worse, as between two versions of a model (Connor, Biometrics, 1987).
    """
    return min(1.0, (_Z95_ONE_SIDED + _Z80) * math.sqrt(_CHANGING / num_rows))
