"""The way from what was trained to what people run, link by link, each compared with the one before it."""

import re
from collections.abc import Sequence

from finemill.artifacts.metrics import Z95
from finemill.artifacts.records import Record

_MEASURED = (
    "kl", "kl_error", "perplexity", "loss_change", "loss_change_error", "same_token", "same_token_error",
    "same_answer", "same_answer_error", "points_change", "points_change_error",
)  # fmt: skip

_OF_ANSWERS = ("same_answer", "same_answer_error", "points_change", "points_change_error")


class ChainLink(Record):
    """One form of the model against another, on the same rows.

    An `_error` is the standard error of the value before it: of a mean over positions with rows as clusters, of a
    paired change for answers. Answers are those to problems, compared where both forms were asked.
    """

    name: str
    against: str
    kl: float
    """KL(the other || this) of next-token distributions, in nats per token."""
    kl_error: float
    perplexity: float
    """Of this form, on the tokens that the rows go on with."""
    loss_change: float
    """Nats per token that this form's loss is above the other's; its logarithm of perplexity, minus the other's."""
    loss_change_error: float
    same_token: float
    """Share of positions with the same likeliest token."""
    same_token_error: float
    positions: int
    same_answer: float | None = None
    same_answer_error: float = 0.0
    points_change: float | None = None
    """Change of exact match, in percentage points."""
    points_change_error: float = 0.0
    answers: int = 0

    @property
    def points_surely_lost(self) -> float:
        """Percentage points that are lost at least, with 97.5 % confidence; 0 where none are known to be."""
        if self.points_change is None:
            return 0.0
        return max(0.0, -self.points_change - Z95 * self.points_change_error)


def chain_table(links: Sequence[ChainLink]) -> dict[str, dict[str, str]]:
    """Rows and columns for a page, each value with the half width of its 95 % interval."""
    return {link.name: _cells(link) for link in links}


def _cells(link: ChainLink) -> dict[str, str]:
    cells = {
        "against": link.against,
        "KL, nats per token": f"{link.kl:.2g} ± {Z95 * link.kl_error:.1g}",
        "perplexity": f"{link.perplexity:.4g}",
        "change of loss": f"{link.loss_change:+.2g} ± {Z95 * link.loss_change_error:.1g}",
        "same likeliest token": _percent(link.same_token, link.same_token_error),
    }
    if link.same_answer is not None:
        cells["same answer"] = _percent(link.same_answer, link.same_answer_error)
    if link.points_change is not None:
        cells["exact match, points"] = f"{link.points_change:+.1f} ± {Z95 * link.points_change_error:.1f}"
    return cells


def _percent(share: float, error: float) -> str:
    return f"{100 * share:.1f} % ± {100 * Z95 * error:.1f} %"


def chain_metrics(links: Sequence[ChainLink]) -> dict[str, float]:
    """Metrics of each link under its name, alike in every step: a value, and its standard error behind it.

    `chain/merged/kl`, `chain/q4_k_m/kl_error` and so on, for MLflow and the manifest.
    """
    return {
        f"chain/{re.sub(r'[^a-z0-9]+', '_', link.name.lower()).strip('_')}/{name}": value
        for link in links
        for name in _MEASURED
        if (value := getattr(link, name)) is not None and (link.answers or name not in _OF_ANSWERS)
    }
