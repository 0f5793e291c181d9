"""The scores of one evaluation: per held-out row where there are some, per model otherwise."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from finemill.errors import UserError

# A row's loss is the mean over its tokens: weighted by them, the mean over rows is the evaluation's loss.
_WEIGHTS = {"loss": "num_tokens"}
# A metric whose rows have a name of their own.
_COLUMNS = {"preference_accuracy": "prefers_chosen"}


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
        self._samples = pq.read_table(folder / "samples.parquet")
        self._metrics: Mapping[str, float] = json.loads((folder / "metrics.json").read_text())

    def rows(self, metric: str, model: str) -> RowScores | None:
        """The rows of `model` (`base`, `tuned`) that have this metric; None if there are none.

        Raises: UserError: a row is there twice.
        """
        column = _COLUMNS.get(metric, metric)
        if column not in self._row_metrics():
            return None
        weight = _WEIGHTS.get(metric)
        columns = ["id", "model", column, *([weight] if weight in self._samples.column_names else [])]
        found = sorted(
            (row["id"], float(row[column]), float(row[weight]) if weight in row else 1.0)
            for row in self._samples.select(columns).to_pylist()
            if row["model"] == model and row[column] is not None
        )
        if not found:
            return None
        ids, values, weights = zip(*found, strict=True)
        if len(set(ids)) < len(ids):
            raise UserError(f"evaluation: samples.parquet has a row of {model} twice; evaluate again")
        return RowScores(ids, np.array(values), np.array(weights))

    def value(self, metric: str, model: str) -> float | None:
        """The evaluation's own value of a metric, None if it has none."""
        return self._metrics.get(f"eval/{model}/{metric}")

    def names(self) -> list[str]:
        """Every metric that a gate can ask for, but standard errors."""
        prefix = "eval/tuned/"
        own = {name.removeprefix(prefix) for name in self._metrics if name.startswith(prefix)}
        return sorted(name for name in self._row_metrics() | own if not name.endswith("_stderr"))

    def _row_metrics(self) -> set[str]:
        return {
            column.name
            for column in self._samples.schema
            if not column.name.startswith("num_")
            and (
                pa.types.is_floating(column.type)
                or pa.types.is_boolean(column.type)
                or pa.types.is_integer(column.type)
            )
        }
