from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemill.artifacts.evaluation import Sample, write_metrics, write_samples
from finemill.artifacts.metrics import ModelName, model_metric
from finemill.components.promote.bootstrap import lower_bound
from finemill.components.promote.config import PromoteConfig
from finemill.components.promote.gates import check_gates
from finemill.components.promote.scores import Scores
from finemill.config import parse_config
from finemill.errors import UserError


def scores(folder: Path, samples: list[Sample], metrics: dict[str, float] | None = None) -> Scores:
    folder.mkdir()
    write_samples(folder, samples)
    write_metrics(folder, metrics or {})
    return Scores(folder)


def sample(model: ModelName, index: int, loss: float | None, num_tokens: int = 1) -> Sample:
    return Sample(
        id=str(index), source="math", model=model, prompt="", completion="", reference="", loss=loss,
        num_tokens=num_tokens, num_generated_tokens=1, finished=True, format_ok=True,
    )  # fmt: skip


def rows(model: ModelName, values: Sequence[float | None], tokens: list[int] | None = None) -> list[Sample]:
    tokens = tokens or [1] * len(values)
    return [sample(model, index, *scored) for index, scored in enumerate(zip(values, tokens, strict=True))]


def only(gate: dict[str, Any], **config: Any) -> PromoteConfig:
    control = {"metric": "loss", "direction": "lower", "min_delta": 0, "compare_with": ["base"]}
    return parse_config(PromoteConfig, {"gates": [control, gate], **config}, "promote")


def test_bound_agrees_with_the_normal_interval_of_many_rows() -> None:
    differences = np.random.default_rng(0).normal(0.1, 1.0, 4000)
    bound = lower_bound(differences, np.ones(4000), confidence=0.95, num_resamples=4000, seed=0)
    expected = differences.mean() - 1.645 * differences.std() / np.sqrt(4000)
    assert bound == pytest.approx(expected, abs=0.002)


def test_bound_repeats_with_its_seed_whatever_the_memory_it_may_take(monkeypatch: pytest.MonkeyPatch) -> None:
    differences, weights = np.random.default_rng(0).normal(0, 1, (2, 50))
    arguments: dict[str, Any] = {"confidence": 0.9, "num_resamples": 300, "seed": 4}
    first = lower_bound(differences, np.abs(weights), **arguments)
    monkeypatch.setattr("finemill.components.promote.bootstrap._MAX_DRAWS", 70)
    assert lower_bound(differences, np.abs(weights), **arguments) == first
    assert lower_bound(differences, np.abs(weights), **{**arguments, "seed": 5}) != first


def test_rows_are_paired_so_a_small_steady_gain_is_sure(tmp_path: Path) -> None:
    hard = list(np.random.default_rng(0).uniform(0, 10, 60))
    challenger = scores(
        tmp_path / "new", [*rows("base", [20.0] * 60), *rows("tuned", [value - 0.01 for value in hard])]
    )
    champion = scores(tmp_path / "old", rows("tuned", hard))
    gate = {"metric": "loss", "direction": "lower", "min_delta": 0, "compare_with": ["champion"]}
    result = check_gates(challenger, champion, only(gate))[-1]
    assert result.passed
    assert (result.difference, result.lower_bound) == (pytest.approx(0.01), pytest.approx(0.01))


def test_gain_within_the_noise_is_not_enough(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    ours, theirs = random.normal(1.0, 1, 60), random.normal(1.02, 1, 60)
    challenger = scores(tmp_path / "new", [*rows("base", [20.0] * 60), *rows("tuned", list(ours))])
    champion = scores(tmp_path / "old", rows("tuned", list(theirs)))
    result = check_gates(challenger, champion, PromoteConfig())[-1]
    assert (result.rule, result.passed) == ("better than champion", False)


@pytest.mark.parametrize(("num_rows", "passed"), [(1, False), (4, False), (5, True)])
def test_a_gain_on_fewer_rows_than_can_show_one_is_not_enough(tmp_path: Path, num_rows: int, passed: bool) -> None:
    evaluation = scores(tmp_path / "new", [*rows("base", [2.0] * num_rows), *rows("tuned", [1.0] * num_rows)])
    result = check_gates(evaluation, None, PromoteConfig())[0]
    assert (result.passed, "5 rows or more" in result.rule) == (passed, not passed)


def test_a_loss_over_no_tokens_is_named(tmp_path: Path) -> None:
    evaluation = scores(tmp_path / "new", [*rows("base", [2.0] * 6), *rows("tuned", [1.0] * 6, [0] * 6)])
    with pytest.raises(UserError, match=r"a row of tuned in samples\.parquet has a loss of no tokens"):
        check_gates(evaluation, None, PromoteConfig())


def test_loss_of_rows_is_weighted_by_their_tokens(tmp_path: Path) -> None:
    tokens = [1, 99]
    samples = [*rows("base", [3.0, 3.0], tokens), *rows("tuned", [1.0, 2.0], tokens)]
    result = check_gates(scores(tmp_path / "new", samples), None, PromoteConfig())[0]
    assert (result.value, result.difference) == (pytest.approx(1.99), pytest.approx(1.01))


def test_rows_without_a_value_do_not_count(tmp_path: Path) -> None:
    samples = [*rows("base", [3.0, None, 3.0]), *rows("tuned", [1.0, None, 1.0])]
    assert check_gates(scores(tmp_path / "new", samples), None, PromoteConfig())[0].num_rows == 2


def test_other_rows_are_no_comparison(tmp_path: Path) -> None:
    challenger = scores(tmp_path / "new", [*rows("base", [3.0] * 3), *rows("tuned", [1.0] * 3)])
    champion = scores(tmp_path / "old", rows("tuned", [1.0] * 2))
    with pytest.raises(UserError, match="not the same rows: evaluate both on the same dataset"):
        check_gates(challenger, champion, PromoteConfig())


def test_metric_without_rows_is_compared_by_its_values(tmp_path: Path) -> None:
    samples = [*rows("base", [3.0]), *rows("tuned", [1.0])]
    challenger = scores(tmp_path / "new", samples, {"eval/tuned/kl": 0.2, "eval/base/kl": 0.5})
    gate = {"metric": "kl", "direction": "lower", "min_delta": 0.1, "compare_with": ["base"]}
    result = check_gates(challenger, None, only(gate))[-1]
    assert (result.passed, result.difference, result.lower_bound) == (True, pytest.approx(0.3), None)


@pytest.mark.parametrize(
    ("gate", "line"),
    [
        ({"min_delta": 0, "max_regression": 0}, "give min_delta .* or max_regression"),
        ({"compare_with": []}, "give min_delta, max_regression, min_value or max_value"),
        ({"min_value": 0.5}, "compare_with needs min_delta or max_regression"),
        ({"min_delta": 0.1, "compare_with": []}, "compare_with needs min_delta or max_regression"),
        ({"min_delta": 0.1, "compare_with": ["champion"]}, "a version has to beat its base"),
    ],
)
def test_gate_that_says_too_little_or_too_much_is_refused(gate: dict[str, Any], line: str) -> None:
    with pytest.raises(UserError, match=line):
        parse_config(PromoteConfig, {"gates": [{"metric": "loss", "direction": "lower", **gate}]}, "promote")


@pytest.mark.parametrize(
    ("metric", "score"),
    [("preference_accuracy", "prefers_chosen"), ("format_ok_rate", "format_ok"), ("think_closed_rate", "think_closed")],
)
def test_a_rate_is_compared_row_by_row(tmp_path: Path, metric: str, score: str) -> None:
    shares: dict[ModelName, int] = {"base": 12, "tuned": 20}
    samples = [
        replace(sample(model, index, 1.0), **{score: right})  # type: ignore[arg-type]
        for model, share in shares.items()
        for index, right in enumerate([True] * share + [False] * (20 - share))
    ]
    metrics = {model_metric("base", metric): 0.6, model_metric("tuned", metric): 1.0}
    gate = {"metric": metric, "direction": "higher", "min_delta": 0.0, "compare_with": ["base"]}
    config = parse_config(PromoteConfig, {"gates": [gate]}, "promote")
    (result,) = check_gates(scores(tmp_path / "new", samples, metrics), None, config)
    assert (result.passed, result.num_rows, result.difference) == (True, 20, pytest.approx(0.4))
    assert result.lower_bound is not None
    assert 0 < result.lower_bound < 0.4


def test_with_holms_correction_a_narrow_gain_among_several_gates_is_not_sure(tmp_path: Path) -> None:
    def right(model: ModelName, number: int) -> list[Sample]:
        loss = 1.0 if model == "base" else 0.5
        return [replace(sample(model, index, loss), exact_match=index < number) for index in range(100)]

    challenger = scores(tmp_path / "new", [*right("base", 40), *right("tuned", 45)])
    gate = {"metric": "exact_match", "direction": "higher", "min_delta": 0, "compare_with": ["base"]}
    plain = check_gates(challenger, None, only(gate))
    corrected = check_gates(challenger, None, only(gate, correction="holm"))
    # Five gained, none lost: 1/32, which is sure alone and not as one of two.
    assert [(one.passed, one.adjusted_p_value) for one in plain] == [(True, None), (True, None)]
    assert plain[1].p_value == 1 / 32
    assert [one.passed for one in corrected] == [True, True]
    assert corrected[1].adjusted_p_value == pytest.approx(1 / 32)
    third = {**gate, "metric": "finished_rate", "min_delta": None, "max_regression": 0.1}
    config = parse_config(PromoteConfig, {"gates": [gate, gate, third], "correction": "holm"}, "promote")
    assert [one.passed for one in check_gates(challenger, None, config)] == [False, False, True]


THINKING: dict[ModelName, tuple[int, ...]] = {"base": (0, 1), "tuned": (1, 2)}


def test_a_rate_of_some_answers_is_compared_by_value_where_they_are_of_other_rows(tmp_path: Path) -> None:
    samples = [
        replace(sample(model, index, 1.0), think_closed=True if index in thinking else None)
        for model, thinking in THINKING.items()
        for index in range(3)
    ]
    metrics = {model_metric("base", "think_closed_rate"): 0.5, model_metric("tuned", "think_closed_rate"): 1.0}
    gate = {"metric": "think_closed_rate", "direction": "higher", "min_delta": 0.0, "compare_with": ["base"]}
    config = parse_config(PromoteConfig, {"gates": [gate]}, "promote")
    (result,) = check_gates(scores(tmp_path / "new", samples, metrics), None, config)
    assert (result.passed, result.num_rows) == (True, None)
