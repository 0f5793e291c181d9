"""The proportions of the sources among the examples that training gets, after cutting, unrolling and leaving out."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.artifacts.rows import Mix
from finemill.artifacts.splits import Split
from finemill.errors import UserError

_TOLERANCE = 0.005


def mix_examples(
    sources: NDArray[np.integer[Any]], sizes: NDArray[np.integer[Any]], names: list[str], mix: Mix, split: Split
) -> NDArray[np.int64]:
    """How often each example is taken so that the sources' sizes stand in the proportion of the weights.

    Examples are left out from the end of a source, and repeated from its begin, so that the same ones stay when data is
    added. By rows the shares are exact to one example, by tokens to the length of one.

    Args:
        sources: number of each example's source in `names`, shape (E,).
        sizes: what each example counts: 1, its tokens or its learned tokens; shape (E,).
        names: the sources' names.
        mix: the weights by name, and what to do where the sources do not have their proportions.
        split: only training examples are repeated; proportions that held-out rows do not have are no error.
    Returns: int64, shape (E,).
    Raises: UserError: a weighted source has no example, or the policy is `error` and the shares do not hold.
    """
    amounts = np.bincount(sources, weights=sizes, minlength=len(names))
    wanted = np.array([mix.weights[name] for name in names])
    shares = wanted / wanted.sum()
    for name, amount in zip(names, amounts, strict=True):
        if not amount:
            raise UserError(_no_example(name, split))
    if mix.policy == "error" and split == "train":
        _check_shares(names, amounts / amounts.sum(), shares, mix)
        return np.ones(len(sources), dtype=np.int64)
    total = float((amounts / shares).min())
    if mix.policy == "upsample" and split == "train":
        total = min(float((amounts / shares).max()), mix.max_repeats * total)
    budgets = apportion(total, shares) if mix.by == "rows" else total * shares
    times = np.zeros(len(sources), dtype=np.int64)
    for number, budget in enumerate(budgets):
        of_source = np.flatnonzero(sources == number)
        times[of_source] = _take(sizes[of_source], float(budget))
    return times


def apportion(total: float, shares: NDArray[np.float64]) -> NDArray[np.int64]:
    """Whole numbers that add up to the whole part of `total`, each less than one from its share."""
    exact = int(total + 1e-9) * shares
    counts = np.floor(exact + 1e-9).astype(np.int64)
    missing = round(float(exact.sum())) - int(counts.sum())
    # The largest remainders round up; of equal ones the first.
    counts[np.argsort(counts - exact, kind="stable")[:missing]] += 1
    return counts


def _take(sizes: NDArray[np.integer[Any]], budget: float) -> NDArray[np.int64]:
    """How often to take each example to come as near to `budget` as a part of the last round can, at least one once."""
    whole, rest = divmod(budget + 1e-6, float(sizes.sum()))
    times = np.full(len(sizes), int(whole), dtype=np.int64)
    times[np.cumsum(sizes) <= rest] += 1
    if not times.any():
        times[0] = 1
    return times


def _check_shares(names: list[str], found: NDArray[np.float64], wanted: NDArray[np.float64], mix: Mix) -> None:
    if np.abs(found - wanted).max() <= _TOLERANCE:
        return
    listed = ", ".join(
        f"{name} {share:.1%} instead of {asked:.1%}" for name, share, asked in zip(names, found, wanted, strict=True)
    )
    raise UserError(
        f"the sources' shares by {mix.by.replace('_', ' ')} are {listed}: change the sources or their weights, or set "
        "mix_policy to downsample or upsample"
    )


def _no_example(name: str, split: Split) -> str:
    advice = "" if split == "train" else f", raise {split}_size, or set it to 0"
    return f"{name}: no row in the {split} split, so the sources' weights cannot be kept; add rows{advice}"
