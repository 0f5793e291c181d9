"""The scores of one evaluation: per held-out row where there are some, per model otherwise."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from finemill.artifacts.evaluation import SCORES, read_metrics, read_sample_scores
from finemill.artifacts.files import SAMPLES_FILE
from finemill.artifacts.metrics import METRIC_OF_SCORE, ModelName, is_stderr, metrics_of, model_metric
from finemill.errors import UserError

_SCORE_OF_METRIC = {metric: score for score, metric in METRIC_OF_SCORE.items()}
OF_SOME_ANSWERS = ("think_closed_rate",)
"""Metrics whose rows are those of some answers: of two models they need not be the same rows."""


@dataclass(frozen=True)
class RowScores:
    """One metric of one model; ids sorted, values and weights float64 of shape (N,)."""

    ids: tuple[str, ...]
    values: npt.NDArray[np.float64]
    weights: npt.NDArray[np.float64]

    @property
    def mean(self) -> float:
        """The weighted mean."""
        return float(np.average(self.values, weights=self.weights))


class Scores:
    """An evaluation folder's samples.parquet and metrics.json."""

    def __init__(self, folder: Path) -> None:
        self._samples = read_sample_scores(folder)
        self._metrics = read_metrics(folder)

    def rows(self, metric: str, model: ModelName) -> RowScores | None:
        """The rows of `model` (`base`, `tuned`) that have this metric; None if there are none.

        Raises: UserError: a row is there twice, a score is no number, or a loss is over no tokens.
        """
        field = _SCORE_OF_METRIC.get(metric, metric)
        if field not in SCORES:
            return None
        found = sorted(
            # A row's loss is the mean over its tokens: weighted by them, the mean over rows is the evaluation's loss.
            (sample.id, float(value), float(sample.num_tokens) if metric == "loss" else 1.0)
            for sample in self._samples
            if sample.model == model and (value := getattr(sample, field)) is not None
        )
        if not found:
            return None
        ids, values, weights = zip(*found, strict=True)
        if len(set(ids)) < len(ids):
            raise UserError(f"evaluation: {SAMPLES_FILE} has a row of {model} twice; evaluate again")
        if not (np.isfinite(weights).all() and min(weights) > 0):
            raise UserError(
                f"evaluation: a row of {model} in {SAMPLES_FILE} has a {metric} of no tokens; evaluate again"
            )
        if not np.isfinite(values).all():
            row = ids[int(np.argmin(np.isfinite(values)))]
            raise UserError(f"evaluation: the {metric} of row {row} under {model} is no number; evaluate again")
        return RowScores(ids, np.array(values), np.array(weights))

    def value(self, metric: str, model: ModelName) -> float | None:
        """The evaluation's own value of a metric, None if it has none."""
        return self._metrics.get(model_metric(model, metric))

    def names(self) -> list[str]:
        """Every metric that a gate can ask for, but standard errors."""
        scored = {name for name in SCORES if any(getattr(sample, name) is not None for sample in self._samples)}
        return sorted(name for name in scored | metrics_of(self._metrics, "tuned").keys() if not is_stderr(name))
