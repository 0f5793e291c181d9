"""How likely the rows are under the opposite of what a gate asks for, and what several gates at once make of that."""

import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from finemill.components.promote.bootstrap import resampled_means


def p_value(
    differences: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    *,
    threshold: float,
    num_resamples: int,
    seed: int,
) -> float:
    """One-sided p-value of a mean difference that is no more than `threshold`.

    Of yes-or-no scores and a threshold of zero the exact McNemar test; otherwise the share of bootstrap resamples at or
    under the threshold, which is never zero (Davison & Hinkley, Bootstrap Methods and their Application, 1997, 4.2).

    Args:
        differences: per row, shape (N,); positive is better.
        weights: of the rows, shape (N,), positive.
    """
    is_binary = bool(np.isin(differences, (-1.0, 0.0, 1.0)).all()) and bool((weights == weights[0]).all())
    if threshold == 0 and is_binary:
        return mcnemar(gained=int((differences > 0).sum()), lost=int((differences < 0).sum()))
    means = resampled_means(differences, weights, num_resamples=num_resamples, seed=seed)
    return (1 + int((means <= threshold).sum())) / (1 + num_resamples)


def mcnemar(*, gained: int, lost: int) -> float:
    """Chance of at least `gained` of all changed rows changing for the better, if both ways were equally likely.

    Rows that did not change say nothing (McNemar, Psychometrika, 1947; exact, one-sided).
    """
    changed = gained + lost
    return float(sum(math.comb(changed, count) for count in range(gained, changed + 1)) / 2**changed)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values adjusted for being several: each at most the level, all together are wrong at most that often.

    From the smallest: times the number of those not yet looked at, and never less than one before it (Holm,
    Scandinavian Journal of Statistics, 1979).
    """
    adjusted = [0.0] * len(p_values)
    largest = 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda index: p_values[index])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = largest
    return adjusted
