"""Gates: each comparison and bound with its numbers, and whether it passed."""

from collections.abc import Iterator, Mapping

from finemill.artifacts.decision import GateResult
from finemill.artifacts.metrics import ModelName
from finemill.components.promote.bootstrap import lower_bound
from finemill.components.promote.config import Gate, PromoteConfig
from finemill.components.promote.scores import Scores
from finemill.errors import UserError


def check_gates(challenger: Scores, champion: Scores | None, config: PromoteConfig) -> list[GateResult]:
    """Check every gate of `config`; without a champion only bounds and the base count.

    Raises: UserError: a required metric is not in the evaluation.
    """
    results: list[GateResult] = []
    for gate in config.gates:
        value = _value(challenger, gate.metric, "tuned")
        if value is None and gate.required:
            raise UserError(
                f"promote: no metric '{gate.metric}' in the evaluation; it has {', '.join(challenger.names())}: "
                "change promote.gates"
            )
        if value is not None:
            results += [*_bounds(gate, value), *_comparisons(gate, value, challenger, champion, config)]
    return results


def _value(scores: Scores, metric: str, model: ModelName) -> float | None:
    """The evaluation's own value; the mean over rows for a metric that only rows have."""
    value = scores.value(metric, model)
    if value is None:
        rows = scores.rows(metric, model)
        value = rows.mean if rows else None
    return value


def _bounds(gate: Gate, value: float) -> Iterator[GateResult]:
    if gate.min_value is not None:
        passed, rule = value >= gate.min_value, f"at least {gate.min_value:g}"
        yield GateResult(metric=gate.metric, rule=rule, passed=passed, value=value)
    if gate.max_value is not None:
        passed, rule = value <= gate.max_value, f"at most {gate.max_value:g}"
        yield GateResult(metric=gate.metric, rule=rule, passed=passed, value=value)


def _comparisons(
    gate: Gate, value: float, challenger: Scores, champion: Scores | None, config: PromoteConfig
) -> Iterator[GateResult]:
    """Against the base as scored with the challenger, and against the champion as tuned model of its evaluation."""
    others: Mapping[str, tuple[Scores, ModelName] | None] = {
        "base": (challenger, "base"),
        "champion": (champion, "tuned") if champion else None,
    }
    for name in gate.compare_with:
        other = others[name]
        if other is not None:
            yield _compare(gate, value, challenger, *other, name, config)


def _compare(
    gate: Gate, value: float, challenger: Scores, other: Scores, model: ModelName, name: str, config: PromoteConfig
) -> GateResult:
    sign = 1.0 if gate.direction == "higher" else -1.0
    other_value = _value(other, gate.metric, model)
    if other_value is None:
        raise UserError(f"promote: the evaluation of the {name} has no metric '{gate.metric}': change promote.gates")
    difference, bound, num_rows = sign * (value - other_value), None, None
    ours, theirs = challenger.rows(gate.metric, "tuned"), other.rows(gate.metric, model)
    if ours is not None and theirs is not None:
        if ours.ids != theirs.ids:
            raise UserError(
                f"promote: {len(ours.ids)} rows of the new version and {len(theirs.ids)} of the {name} have "
                f"'{gate.metric}', and they are not the same rows: evaluate both on the same dataset"
            )
        num_rows = len(ours.ids)
        bound = lower_bound(
            sign * (ours.values - theirs.values),
            ours.weights,
            confidence=config.confidence,
            num_resamples=config.num_resamples,
            seed=config.seed,
        )
    sure = difference if bound is None else bound
    if gate.min_delta is not None:
        passed, rule = (
            sure > gate.min_delta,
            f"better than {name}" + (f" by more than {gate.min_delta:g}" if gate.min_delta else ""),
        )
    else:
        passed, rule = sure >= -(gate.max_regression or 0), f"at most {gate.max_regression:g} worse than {name}"
    return GateResult(
        metric=gate.metric,
        rule=rule,
        passed=passed,
        value=value,
        other=other_value,
        difference=difference,
        lower_bound=bound,
        num_rows=num_rows,
    )
