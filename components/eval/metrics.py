"""Scores of many samples: means, their standard errors, and what changed from base to tuned."""

import math
import re
from collections.abc import Iterable, Mapping, Sequence

from finemill.artifacts.evaluation import Sample

_RATES = ("exact_match", "cut_off", "prefers_chosen", "format_ok", "think_closed", "finished")
MEANS = (*_RATES, "rouge1", "rouge2", "rougeL")
# Rates other than the field's own word carry it in their name.
_NAMES = {
    "cut_off": "cut_off_rate",
    "prefers_chosen": "preference_accuracy",
    "format_ok": "format_ok_rate",
    "think_closed": "think_closed_rate",
    "finished": "finished_rate",
}


def summarize(base: Sequence[Sample], tuned: Sequence[Sample]) -> dict[str, float]:
    """All metrics, flat and finite. `base` and `tuned` hold the same rows in the same order.

    `eval/<model>/<metric>` over all rows and `eval/<model>/<source>/<metric>` per source, with `<metric>_stderr`;
    `eval/delta/<metric>`, tuned less base, with the standard error of the paired difference; `eval/fixed` and
    `eval/broken`: problems that only the tuned model answers, and only the base, each also as the rate of those that
    base fails and of those that it answers. A metric that no row has a value for is left out.
    """
    metrics: dict[str, float] = {"eval/rows": len(base)}
    for model, samples in (("base", base), ("tuned", tuned)):
        metrics |= {f"eval/{model}/{name}": value for name, value in score(samples).items()}
        for source in sources(samples):
            of_source = [sample for sample in samples if sample.source == source]
            prefix = f"eval/{model}/{metric_part(source)}"
            metrics |= {f"{prefix}/{name}": value for name, value in score(of_source).items()}
    metrics |= {f"eval/delta/{name}": value for name, value in _deltas(base, tuned).items()}
    metrics |= {f"eval/{name}": value for name, value in _changes(base, tuned).items()}
    return metrics


def sources(samples: Iterable[Sample]) -> list[str]:
    """The sources in order of their names."""
    return sorted({sample.source for sample in samples})


def metric_part(source: str) -> str:
    """A source's name as part of a metric's: MLflow takes letters, digits, `_`, `.` and `-`."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", source)


def score(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of one model on some rows."""
    scores: dict[str, float] = {}
    for name in MEANS:
        values = [float(value) for sample in samples if (value := getattr(sample, name)) is not None]
        if values:
            scores[_NAMES.get(name, name)] = mean(values)
            error = rate_error if name in _RATES else standard_error
            scores[f"{_NAMES.get(name, name)}_stderr"] = error(values)
    scores |= _loss(samples)
    scores["generated_tokens"] = mean([float(sample.num_generated_tokens) for sample in samples])
    return scores


def _loss(samples: Sequence[Sample]) -> dict[str, float]:
    """Mean loss per token, its standard error, and the perplexity."""
    pairs = [(sample.loss, sample.num_tokens) for sample in samples if sample.loss is not None]
    if not pairs:
        return {}
    loss, stderr = weighted_mean([value for value, _ in pairs], [count for _, count in pairs])
    return {
        "loss": loss,
        "loss_stderr": stderr,
        "perplexity": math.exp(min(loss, 700.0)),
        "num_tokens": sum(count for _, count in pairs),
    }


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Mean per token of values per row, and its standard error with rows as clusters.

    The tokens of a row are not independent of each other: the error is that of a ratio of two sums over rows, to first
    order (Cochran, Sampling Techniques, section 2.11).
    """
    total = sum(weights)
    center = sum(value * weight for value, weight in zip(values, weights, strict=True)) / total
    spread = sum((weight * (value - center)) ** 2 for value, weight in zip(values, weights, strict=True))
    return center, math.sqrt(spread) / total


def mean(values: Sequence[float]) -> float:
    """Arithmetic mean."""
    return sum(values) / len(values)


def standard_error(values: Sequence[float]) -> float:
    """Of the mean, from the sample's own spread; 0 for a single value."""
    if len(values) < 2:
        return 0.0
    center = mean(values)
    return math.sqrt(sum((value - center) ** 2 for value in values) / (len(values) - 1) / len(values))


def rate_error(values: Sequence[float]) -> float:
    """Standard error of a rate of zeros and ones, from two more of each.

    The sample's own spread would be none when all are right, as if the next could not be wrong (Agresti & Coull, 1998).
    """
    count = len(values) + 4
    rate = (sum(values) + 2) / count
    return math.sqrt(rate * (1 - rate) / count)


def paired_rate_error(differences: Sequence[float]) -> float:
    """Standard error of a rate's change on the same rows, from one more row of either change (Bonett & Price, 2012).

    Args:
        differences: 1, 0 or -1 per row.
    """
    count = len(differences) + 2
    gained, lost = ((sum(value == sign for value in differences) + 1) / count for sign in (1, -1))
    return math.sqrt((gained + lost - (gained - lost) ** 2) / count)


def _deltas(base: Sequence[Sample], tuned: Sequence[Sample]) -> Mapping[str, float]:
    """Tuned less base, from row-by-row differences: both share what makes a row hard, so that the error is smaller."""
    deltas: dict[str, float] = {}
    for name in ("exact_match", "rougeL", "prefers_chosen", "format_ok", "loss"):
        pairs = [
            (float(after) - float(before), one.num_tokens)
            for one, other in zip(base, tuned, strict=True)
            if (before := getattr(one, name)) is not None and (after := getattr(other, name)) is not None
        ]
        if not pairs:
            continue
        differences, num_tokens = [list(column) for column in zip(*pairs, strict=True)]
        key = _NAMES.get(name, name)
        if name == "loss":
            deltas[key], deltas[f"{key}_stderr"] = weighted_mean(differences, num_tokens)
        else:
            error = paired_rate_error if name in _RATES else standard_error
            deltas[key], deltas[f"{key}_stderr"] = mean(differences), error(differences)
    return deltas


def _changes(base: Sequence[Sample], tuned: Sequence[Sample]) -> Mapping[str, float]:
    pairs = [
        (one.exact_match, other.exact_match)
        for one, other in zip(base, tuned, strict=True)
        if one.exact_match is not None
    ]
    if not pairs:
        return {}
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    failed = sum(not right for right, _ in pairs)
    changes: dict[str, float] = {"fixed": fixed, "broken": broken}
    if failed:
        changes["fixed_rate"] = fixed / failed
    if failed < len(pairs):
        changes["broken_rate"] = broken / (len(pairs) - failed)
    return changes
