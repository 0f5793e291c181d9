"""The proportions of the sources within a split."""

from collections.abc import Mapping, Sequence
from itertools import accumulate, cycle, islice

from finemill.components.data_prep.clean import Record
from finemill.components.data_prep.config import DataPrepConfig
from finemill.errors import UserError

Records = Sequence[Record]


def mix_sources(groups: Mapping[int, Records], config: DataPrepConfig, split: str) -> dict[int, list[Record]]:
    """Leave out or repeat rows until the sources' rows, or characters, stand in the proportion of the weights.

    Args:
        groups: the rows of each source in the order in which they are to be preferred.
        config: weights, `mix_by` and `mix_policy`.
        split: its name; only training rows are ever repeated.
    Raises: UserError: a weighted source has no rows.
    """
    weights = [source.weight for source in config.sources]
    if weights[0] is None or not any(groups.values()):
        return {source: list(records) for source, records in groups.items()}
    shares = {number: (weight or 0.0) / sum(w or 0.0 for w in weights) for number, weight in enumerate(weights)}
    for number in shares:
        if not groups.get(number):
            advice = "" if split == "train" else f", raise {split}_size, or set it to 0"
            raise UserError(
                f"{config.sources[number].uri}: no row in the {split} split, so the sources' weights cannot be kept; "
                f"add rows{advice}"
            )
    amounts = {number: _amount(groups[number], config) for number in shares}
    choose = max if config.mix_policy == "upsample" and split == "train" else min
    total = choose(amounts[number] / share for number, share in shares.items())
    if config.mix_by == "rows":
        counts = apportion(int(total + 1e-9), shares)
        return {number: list(islice(cycle(groups[number]), count)) for number, count in counts.items()}
    return {number: _fill(groups[number], total * share) for number, share in shares.items()}


def apportion(total: int, shares: Mapping[int, float]) -> dict[int, int]:
    """Whole numbers that add up to `total`, each less than one from its share (largest remainders round up)."""
    exact = {number: total * share for number, share in shares.items()}
    counts = {number: int(value + 1e-9) for number, value in exact.items()}
    by_remainder = sorted(exact, key=lambda number: counts[number] - exact[number])
    for number in by_remainder[: total - sum(counts.values())]:
        counts[number] += 1
    return counts


def _amount(records: Records, config: DataPrepConfig) -> int:
    if config.mix_by == "rows":
        return len(records)
    return sum(record.num_characters for record in records)


def _fill(records: Records, budget: float) -> list[Record]:
    """Rows, from the first again if they do not suffice, up to the one that reaches `budget` characters."""
    chosen: list[Record] = []
    lengths = accumulate(record.num_characters for record in cycle(records))
    for record, length in zip(cycle(records), lengths, strict=False):
        if length > budget + 1e-6:
            break
        chosen.append(record)
    return chosen or list(records[:1])
