"""Two forms of a model on the same positions and problems: a link of the chain, with its errors."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from finemill.artifacts.chain import ChainLink
from finemill.metrics.statistics import mean, paired_rate_error, rate_error, weighted_mean


@dataclass(frozen=True)
class Position:
    """What two forms expect at one position of a row.

    `kl` is KL(the other || this), `loss_before` and `loss` the other's and this one's on the token that follows, all
    in nats; `agrees` says whether both find the same token likeliest.
    """

    row: int
    kl: float
    loss_before: float
    loss: float
    agrees: bool


@dataclass(frozen=True)
class AnsweredProblem:
    """Whether two forms say the same, and whether each is right; None for a problem without a known answer."""

    same: bool
    right_before: bool | None
    right: bool | None


def chain_link(
    name: str, against: str, positions: Sequence[Position], problems: Sequence[AnsweredProblem] = ()
) -> ChainLink:
    """Compare the form `name` with the form `against`, on one position or more."""
    rows: dict[int, list[Position]] = {}
    for position in positions:
        rows.setdefault(position.row, []).append(position)

    def clustered(values: Sequence[Sequence[float]]) -> tuple[float, float]:
        return weighted_mean([mean(row) for row in values], [len(row) for row in values])

    kl, kl_error = clustered([[one.kl for one in row] for row in rows.values()])
    change, change_error = clustered([[one.loss - one.loss_before for one in row] for row in rows.values()])
    same, _ = clustered([[float(one.agrees) for one in row] for row in rows.values()])
    scored = [one for one in problems if one.right is not None and one.right_before is not None]
    differences = [float(one.right or 0) - float(one.right_before or 0) for one in scored]
    said = [float(one.same) for one in problems]
    return ChainLink(
        name=name,
        against=against,
        kl=max(kl, 0.0),
        kl_error=kl_error,
        perplexity=math.exp(min(mean([one.loss for one in positions]), 700.0)),
        loss_change=change,
        loss_change_error=change_error,
        same_token=same,
        same_token_error=rate_error([float(one.agrees) for one in positions]),
        positions=len(positions),
        same_answer=mean(said) if said else None,
        same_answer_error=rate_error(said) if said else 0.0,
        points_change=100 * mean(differences) if scored else None,
        points_change_error=100 * paired_rate_error(differences) if scored else 0.0,
        answers=len(problems),
    )
