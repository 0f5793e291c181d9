"""Scores of many samples: means, their standard errors, and what changed from base to tuned."""

import math
from collections.abc import Iterable, Mapping, Sequence

from finemill.artifacts.evaluation import Sample
from finemill.artifacts.metrics import (
    BROKEN,
    BROKEN_RATE,
    FIXED,
    FIXED_RATE,
    MEANS,
    METRIC_OF_SCORE,
    MODELS,
    RATES,
    ROWS,
    Score,
    delta_metric,
    metric_parts,
    model_metric,
    stderr_of,
)
from finemill.metrics.statistics import mean, paired_rate_error, rate_error, standard_error, weighted_mean


def summarize(base: Sequence[Sample], tuned: Sequence[Sample]) -> dict[str, float]:
    """All metrics, flat and finite. `base` and `tuned` hold the same rows in the same order.

    `eval/<model>/<metric>` over all rows and `eval/<model>/<source>/<metric>` per source, with `<metric>_stderr`;
    `eval/delta/<metric>`, tuned less base, with the standard error of the paired difference; `eval/fixed` and
    `eval/broken`: problems that only the tuned model answers, and only the base, each also as the rate of those that
    base fails and of those that it answers. A metric that no row has a value for is left out.
    """
    metrics: dict[str, float] = {ROWS: len(base)}
    for model, samples in zip(MODELS, (base, tuned), strict=True):
        metrics |= {model_metric(model, name): value for name, value in score(samples).items()}
        for source, part in metric_parts(sources(samples)).items():
            of_source = [sample for sample in samples if sample.source == source]
            metrics |= {model_metric(model, f"{part}/{name}"): value for name, value in score(of_source).items()}
    metrics |= {delta_metric(name): value for name, value in deltas(base, tuned).items()}
    for source, part in metric_parts(sources(base)).items():
        pairs = [pair for pair in zip(base, tuned, strict=True) if pair[0].source == source]
        changes = deltas(*zip(*pairs, strict=True))
        metrics |= {delta_metric(f"{part}/{name}"): value for name, value in changes.items()}
    return metrics | _changes(base, tuned)


def sources(samples: Iterable[Sample]) -> list[str]:
    """The sources in order of their names."""
    return sorted({sample.source for sample in samples})


def score(samples: Sequence[Sample]) -> dict[str, float]:
    """Metrics of one model on some rows."""
    scores: dict[str, float] = {}
    for name in MEANS:
        values = [float(value) for sample in samples if (value := getattr(sample, name)) is not None]
        if values:
            metric = METRIC_OF_SCORE.get(name, name)
            scores[metric] = mean(values)
            error = rate_error if name in RATES else standard_error
            scores[stderr_of(metric)] = error(values)
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
        stderr_of("loss"): stderr,
        "perplexity": math.exp(min(loss, 700.0)),
        "num_tokens": sum(count for _, count in pairs),
    }


def deltas(base: Sequence[Sample], tuned: Sequence[Sample]) -> Mapping[str, float]:
    """Tuned less base, from row-by-row differences: both share what makes a row hard, so that the error is smaller."""
    deltas: dict[str, float] = {}
    names: tuple[Score, ...] = (*MEANS, "loss")
    for name in names:
        pairs = [
            (float(after) - float(before), one.num_tokens)
            for one, other in zip(base, tuned, strict=True)
            if (before := getattr(one, name)) is not None and (after := getattr(other, name)) is not None
        ]
        if not pairs:
            continue
        differences, num_tokens = [list(column) for column in zip(*pairs, strict=True)]
        key = METRIC_OF_SCORE.get(name, name)
        if name == "loss":
            deltas[key], deltas[stderr_of(key)] = weighted_mean(differences, num_tokens)
        else:
            error = paired_rate_error if name in RATES else standard_error
            deltas[key], deltas[stderr_of(key)] = mean(differences), error(differences)
    return deltas


def _changes(base: Sequence[Sample], tuned: Sequence[Sample]) -> dict[str, float]:
    pairs = [
        (one.exact_match, other.exact_match)
        for one, other in zip(base, tuned, strict=True)
        if one.exact_match is not None
    ]
    if not pairs:
        return {}
    fixed, broken = pairs.count((False, True)), pairs.count((True, False))
    failed = sum(not right for right, _ in pairs)
    changes: dict[str, float] = {FIXED: fixed, BROKEN: broken}
    if failed:
        changes[FIXED_RATE] = fixed / failed
    if failed < len(pairs):
        changes[BROKEN_RATE] = broken / (len(pairs) - failed)
    return changes
