"""A version's description and score tags, for people who look at the registry."""

from collections.abc import Mapping

from finemill.artifacts.metrics import MODELS, is_total, metrics_of, model_metric
from finemill.credentials import without_credentials
from finemill.registry.snapshot import DIGEST_TAG

# MLflow keeps 5000 characters of a description.
_MAX_CHARACTERS = 5000


def score_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """What base and tuned scored over all rows as tags, `eval/tuned/exact_match` = `0.95`."""
    return {
        model_metric(model, name): f"{value:.6g}"
        for model in MODELS
        for name, value in metrics_of(metrics, model).items()
        if is_total(model_metric(model, name))
    }


def describe_version(metrics: Mapping[str, float], tags: Mapping[str, str], references: Mapping[str, str]) -> str:
    """Markdown: base against tuned, what it was made from, and where its files are."""
    made_from = [
        ("base model", " ".join(filter(None, (tags.get("base_model.id"), tags.get("base_model.revision"))))),
        ("dataset", tags.get("dataset.digest", "")),
        ("artifacts", tags[DIGEST_TAG]),
    ]
    lines = [
        *score_table(metrics),
        "",
        *(f"- {name}: `{value}`" for name, value in made_from if value),
        *(f"- {port}: `{without_credentials(reference)}`" for port, reference in references.items()),
    ]
    return "\n".join(lines)[:_MAX_CHARACTERS]


def score_table(metrics: Mapping[str, float]) -> list[str]:
    """A Markdown table of every metric that base and tuned share."""
    base, tuned = (metrics_of(metrics, model) for model in MODELS)
    rows = [
        f"| {name} | {value:.4g} | {tuned[name]:.4g} |"
        for name, value in base.items()
        if name in tuned and is_total(model_metric("base", name))
    ]
    return ["| metric | base | tuned |", "|---|---:|---:|", *rows]
