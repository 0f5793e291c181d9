"""Gates: each comparison and bound with its numbers, and whether it passed."""

import math
from collections.abc import Iterator, Mapping

from finemill.artifacts.decision import GateResult
from finemill.artifacts.metrics import ModelName
from finemill.components.promote.bootstrap import lower_bound
from finemill.components.promote.config import Gate, PromoteConfig
from finemill.components.promote.scores import OF_SOME_ANSWERS, Scores
from finemill.components.promote.significance import holm, p_value
from finemill.errors import UserError


def check_gates(challenger: Scores, champion: Scores | None, config: PromoteConfig) -> list[GateResult]:
    """Check every gate of `config`; without a champion only bounds and the base count.

    Raises: UserError: a required metric is not in the evaluation.
    """
    results: list[GateResult] = []
    required: list[int] = []
    for gate in config.gates:
        value = _value(challenger, gate.metric, "tuned")
        if value is None and gate.required:
            raise UserError(
                f"promote: no metric '{gate.metric}' in the evaluation; it has {', '.join(challenger.names())}: "
                "change promote.gates"
            )
        if value is not None:
            results += _bounds(gate, value)
            compared = list(_comparisons(gate, value, challenger, champion, config))
            required += [len(results) + index for index in range(len(compared) if gate.required else 0)]
            results += compared
    return _corrected(results, required, config) if config.correction == "holm" else results


def _corrected(results: list[GateResult], required: list[int], config: PromoteConfig) -> list[GateResult]:
    """The results, of which the `required` ones must also hold by their p-values after Holm's correction."""
    tested = [index for index in required if results[index].p_value is not None]
    corrected = dict(zip(tested, holm([results[index].p_value or 0.0 for index in tested]), strict=True))
    return [
        result.model_copy(
            update={
                "adjusted_p_value": corrected[index],
                "passed": result.passed and corrected[index] <= 1 - config.confidence,
            }
        )
        if index in corrected
        else result
        for index, result in enumerate(results)
    ]


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


def _fewest_rows(confidence: float) -> int:
    """Rows that can show an improvement at all: on fewer, all of them better by chance is likelier than 1 - confidence.

    The bootstrap does not see that: of a single row it draws the same one again and again.
    """
    return math.ceil(math.log2(1 / (1 - confidence)) - 1e-9)


def _compare(
    gate: Gate, value: float, challenger: Scores, other: Scores, model: ModelName, name: str, config: PromoteConfig
) -> GateResult:
    sign = 1.0 if gate.direction == "higher" else -1.0
    other_value = _value(other, gate.metric, model)
    if other_value is None:
        raise UserError(f"promote: the evaluation of the {name} has no metric '{gate.metric}': change promote.gates")
    difference, bound, num_rows, chance = sign * (value - other_value), None, None, None
    ours, theirs = challenger.rows(gate.metric, "tuned"), other.rows(gate.metric, model)
    same_rows = ours is not None and theirs is not None and ours.ids == theirs.ids
    if ours is not None and theirs is not None and (same_rows or gate.metric not in OF_SOME_ANSWERS):
        if not same_rows:
            raise UserError(
                f"promote: {len(ours.ids)} rows of the new version and {len(theirs.ids)} of the {name} have "
                f"'{gate.metric}', and they are not the same rows: evaluate both on the same dataset"
            )
        num_rows = len(ours.ids)
        differences = sign * (ours.values - theirs.values)
        drawn = {"num_resamples": config.num_resamples, "seed": config.seed}
        bound = lower_bound(differences, ours.weights, confidence=config.confidence, **drawn)
        threshold = gate.min_delta if gate.min_delta is not None else -(gate.max_regression or 0.0)
        chance = p_value(differences, ours.weights, threshold=threshold, **drawn)
    sure = difference if bound is None else bound
    if gate.min_delta is not None:
        enough = num_rows is None or num_rows >= _fewest_rows(config.confidence)
        passed = enough and sure > gate.min_delta
        rule = f"better than {name}" + (f" by more than {gate.min_delta:g}" if gate.min_delta else "")
        rule += "" if enough else f" on {_fewest_rows(config.confidence)} rows or more"
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
        p_value=chance,
    )
