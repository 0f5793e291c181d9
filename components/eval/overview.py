"""What the report says before its details: the verdict in a sentence, where errors are, what to read first."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

from finemill.artifacts.evaluation import Sample
from finemill.artifacts.metrics import BROKEN, FIXED, Z95, delta_metric, model_metric, stderr_of
from finemill.components.eval.metrics import sources

_COMMIT = re.compile(r"(?P<name>[^/]+@[0-9a-f]{8})[0-9a-f]{32}(?:/(?P<part>.+))?$")
_MINUS = "\N{MINUS SIGN}"
# What a reader looks at first.
_ORDER = {"broken": 0, "wrong": 1, "unscored": 2, "fixed": 3, "right": 4}
Pair = tuple[Sample, Sample]


@dataclass(frozen=True)
class Cell:
    """The rows of one source and one length of prompts."""

    rows: int
    wrong: int
    """Rows that the tuned model fails."""

    @property
    def share(self) -> float:
        """Of wrong rows; 0 of none."""
        return self.wrong / self.rows if self.rows else 0.0


@dataclass(frozen=True)
class HeatMap:
    """Where the tuned model fails, by source and by length of the prompt in characters."""

    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


def verdict(metrics: Mapping[str, float]) -> str:
    """What tuning has done, in a sentence."""
    name, what, unit = "exact_match", "answers", "points"
    if delta_metric(name) not in metrics:
        name, what = "rougeL", "ROUGE-L"
    if delta_metric(name) not in metrics:
        name, what, unit = "loss", "loss", "nats"
    delta = metrics.get(delta_metric(name))
    if delta is None:
        return "Nothing was scored for both models."
    factor = 1 if name == "loss" else 100
    margin = Z95 * metrics.get(stderr_of(delta_metric(name)), 0.0)
    better = (delta < 0) == (name == "loss")
    if abs(delta) <= margin:
        said = "Tuning makes no difference that these rows can show"
    else:
        said = "Tuning helps" if better else "Tuning does harm"
    before, after = (metrics[model_metric(model, name)] for model in ("base", "tuned"))
    if name == "exact_match":
        values = f"{100 * after:.1f} % of answers are right, {100 * before:.1f} % before"
    else:
        values = f"{what} is {factor * after:.3g}, {factor * before:.3g} before"
    sign = "+" if delta >= 0 else _MINUS
    change = f"{sign}{abs(factor * delta):.3g} ± {factor * margin:.2g} {unit}"
    fixed = f"; {metrics[FIXED]:.0f} problems fixed, {metrics[BROKEN]:.0f} broken" if FIXED in metrics else ""
    return f"{said}: {values} ({change}){fixed}."


def worst_first(pairs: Sequence[Pair]) -> list[Pair]:
    """Problems that tuning broke, then those that it leaves wrong, texts by how much they lost, the rest."""

    def key(pair: Pair) -> tuple[int, float]:
        base, tuned = pair
        lost = (tuned.rougeL or 0.0) - (base.rougeL or 0.0)
        if tuned.rougeL is None and tuned.loss is not None and base.loss is not None:
            lost = base.loss - tuned.loss
        return _ORDER[change(base.exact_match, tuned.exact_match)], lost

    return sorted(pairs, key=key)


def change(base: bool | None, tuned: bool | None) -> str:
    """What became of a problem: `fixed`, `broken`, `right`, `wrong`; `unscored` for a row that is none."""
    if base is None or tuned is None:
        return "unscored"
    return {(False, True): "fixed", (True, False): "broken", (True, True): "right", (False, False): "wrong"}[
        base, tuned
    ]


def heat_map(tuned: Sequence[Sample]) -> HeatMap | None:
    """None where no row has a known answer, or there are too few to be told apart."""
    scored = [sample for sample in tuned if sample.exact_match is not None]
    if len(scored) < 12:
        return None
    lengths = sorted(len(sample.prompt) for sample in scored)
    bounds = sorted({lengths[len(lengths) * part // 4] for part in (1, 2, 3)})
    texts = [str(bound) for bound in bounds]
    columns = (f"under {texts[0]}", *(f"{a} to {b}" for a, b in pairwise(texts)), f"{texts[-1]} on")
    rows = []
    for source in sources(scored):
        cells = [[0, 0] for _ in columns]
        for sample in scored:
            if sample.source == source:
                cell = cells[sum(len(sample.prompt) >= bound for bound in bounds)]
                cell[0] += 1
                cell[1] += not sample.exact_match
        rows.append((source, tuple(Cell(*cell) for cell in cells)))
    return HeatMap(columns, tuple(rows))


def short_name(source: str) -> str:
    """A source as people speak of it: the last part of a path; of a repository at a commit, its name and what in it."""
    commit = _COMMIT.search(source)
    if commit:
        return f"{commit['name']} {commit['part']}" if commit["part"] else commit["name"]
    return source.rstrip("/").rpartition("/")[2] or source
