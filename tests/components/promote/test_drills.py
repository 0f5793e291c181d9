"""A version that is worse than the champion, with faults in its evaluation: none makes it champion.

`tests/faults/test_promotions.py` has a thousand of them come to the step itself.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from finemill.artifacts.evaluation import Sample, write_metrics, write_samples
from finemill.artifacts.metrics import ModelName
from finemill.components.promote.config import PromoteConfig
from finemill.components.promote.gates import check_gates
from finemill.components.promote.scores import Scores
from finemill.config import parse_config
from finemill.errors import UserError

_ROWS = 60
_ROUNDS = 25
"""Of each fault."""
_GATES = [
    {"metric": "loss", "direction": "lower", "min_delta": 0.0},
    {"metric": "exact_match", "direction": "higher", "min_delta": 0.0},
]
_CONFIG = parse_config(PromoteConfig, {"gates": _GATES, "num_resamples": 100}, "promote")
Fault = Callable[[Path, list[Sample], Random], None]


def samples(right: int, loss: float) -> list[Sample]:
    models: dict[ModelName, tuple[int, float]] = {"base": (5, 3.0), "tuned": (right, loss)}
    return [
        Sample(
            id=f"{index:04d}", source="own", model=model, prompt="", completion="", reference="",
            exact_match=index < count, loss=mean + index / 1000, num_tokens=5, num_generated_tokens=5, finished=True,
            format_ok=True,
        )
        for model, (count, mean) in models.items()
        for index in range(_ROWS)
    ]  # fmt: skip


def write(folder: Path, rows: list[Sample]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    write_samples(folder, rows)
    tuned = [row for row in rows if row.model == "tuned"]
    write_metrics(folder, {"eval/tuned/loss": sum(row.loss or 0.0 for row in tuned) / max(1, len(tuned))})
    return folder


def of_tuned(rows: list[Sample], rng: Random, share: float) -> set[int]:
    tuned = [number for number, row in enumerate(rows) if row.model == "tuned"]
    return set(rng.sample(tuned, max(1, int(share * len(tuned)))))


def not_a_number(folder: Path, rows: list[Sample], rng: Random) -> None:
    chosen = of_tuned(rows, rng, rng.random())
    write(folder, rows)
    bad = [replace(row, loss=float("nan")) if number in chosen else row for number, row in enumerate(rows)]
    write_samples(folder, bad)


def missing_rows(folder: Path, rows: list[Sample], rng: Random) -> None:
    """The wrong ones vanish first, as where an evaluation stops at a difficult row."""
    chosen = {number for number in of_tuned(rows, rng, 0.99) if not rows[number].exact_match}
    write(folder, [row for number, row in enumerate(rows) if number not in chosen])


def relabelled_rows(folder: Path, rows: list[Sample], rng: Random) -> None:
    """Other rows of the same number, all of them easy."""
    write(folder, [replace(row, id=f"x{row.id}", exact_match=True, loss=0.01) for row in rows])


def rows_twice(folder: Path, rows: list[Sample], rng: Random) -> None:
    write(folder, [*rows, *(row for row in rows if row.model == "tuned" and row.exact_match)])


def scores_left_out(folder: Path, rows: list[Sample], rng: Random) -> None:
    chosen = {number for number in range(len(rows)) if not rows[number].exact_match and rng.random() < 0.9}
    write(folder, [replace(row, exact_match=None) if number in chosen else row for number, row in enumerate(rows)])


def claimed_metrics(folder: Path, rows: list[Sample], rng: Random) -> None:
    """metrics.json of a better model beside the rows of this one."""
    write(folder, rows)
    write_metrics(folder, {"eval/tuned/loss": rng.random() / 100, "eval/tuned/exact_match": 1.0})


def damaged_metrics(folder: Path, rows: list[Sample], rng: Random) -> None:
    write(folder, rows)
    text = rng.choice(('{"eval/tuned/loss": NaN}', "{", "[]", '{"eval/tuned/loss": "low"}', ""))
    (folder / "metrics.json").write_text(text)


def damaged_samples(folder: Path, rows: list[Sample], rng: Random) -> None:
    write(folder, rows)
    path = folder / "samples.parquet"
    table = pq.read_table(path)
    keep = [name for name in table.column_names if name != rng.choice(("loss", "exact_match", "id", "model"))]
    pq.write_table(table.select(keep), path)


def no_rows(folder: Path, rows: list[Sample], rng: Random) -> None:
    write(folder, rows)
    path = folder / "samples.parquet"
    pq.write_table(pq.read_table(path).slice(0, 0), path)


def only_the_other_model(folder: Path, rows: list[Sample], rng: Random) -> None:
    write(folder, [row for row in rows if row.model == "base"])


FAULTS: tuple[Fault, ...] = (
    not_a_number,
    missing_rows,
    relabelled_rows,
    rows_twice,
    scores_left_out,
    claimed_metrics,
    damaged_metrics,
    damaged_samples,
    no_rows,
    only_the_other_model,
)


def passes(folder: Path, champion: Scores) -> bool:
    """Whether every gate passes; an evaluation that is refused passes none."""
    try:
        return all(result.passed for result in check_gates(Scores(folder), champion, _CONFIG))
    except UserError:
        return False


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_promotes_a_worse_version(fault: Fault, tmp_path: Path) -> None:
    champion = Scores(write(tmp_path / "champion", samples(50, 0.5)))
    for number in range(_ROUNDS):
        rng = Random(number)
        folder = tmp_path / "challenger"
        fault(folder, samples(rng.randint(20, 45), 0.5 + 0.5 * rng.random() + 0.01), rng)
        assert not passes(folder, champion), number


def test_without_a_fault_a_better_version_passes_and_a_worse_one_does_not(tmp_path: Path) -> None:
    """Otherwise the drills would prove nothing."""
    champion = Scores(write(tmp_path / "champion", samples(40, 0.5)))
    assert passes(write(tmp_path / "better", samples(55, 0.3)), champion)
    assert not passes(write(tmp_path / "worse", samples(30, 0.7)), champion)
