"""The paired bootstrap: how sure is it that one model is better than another on the same rows?

Rows are drawn with replacement, both models' scores of a row together, and the difference of means is taken each time
(Efron & Tibshirani, An Introduction to the Bootstrap, 1993, chapter 13; for language models Koehn, EMNLP 2004). Pairing
removes what makes a row hard for both.
"""

import numpy as np
import numpy.typing as npt

# Resamples times rows held in memory at once: 8 bytes each for the drawn indices.
_MAX_DRAWS = 2_000_000


def lower_bound(
    differences: npt.NDArray[np.float64],
    weights: npt.NDArray[np.float64],
    *,
    confidence: float,
    num_resamples: int,
    seed: int,
) -> float:
    """The value that the mean difference exceeds with the given confidence (one-sided percentile interval).

    Args:
        differences: per row, shape (N,); positive is better.
        weights: of the rows, shape (N,), positive.
    """
    means = resampled_means(differences, weights, num_resamples=num_resamples, seed=seed)
    return float(np.quantile(means, 1 - confidence))


def resampled_means(
    differences: npt.NDArray[np.float64], weights: npt.NDArray[np.float64], *, num_resamples: int, seed: int
) -> npt.NDArray[np.float64]:
    """The mean difference of each resample, shape (num_resamples,); arguments as for `lower_bound`."""
    random = np.random.default_rng(seed)
    num_rows = len(differences)
    weighted = differences * weights
    means: list[npt.NDArray[np.float64]] = []
    left = num_resamples
    while left:
        count = min(left, max(1, _MAX_DRAWS // num_rows))
        drawn = random.integers(0, num_rows, size=(count, num_rows))
        means.append(weighted[drawn].sum(axis=1) / weights[drawn].sum(axis=1))
        left -= count
    return np.concatenate(means)
