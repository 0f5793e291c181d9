"""A version's description and score tags, for people who look at the registry."""

from collections.abc import Mapping

from finemill.registry.snapshot import DIGEST_TAG
from finemill.tracking.describe import is_total, without_credentials

_BASE, _TUNED = "eval/base/", "eval/tuned/"
# MLflow keeps 5000 characters of a description.
_MAX_CHARACTERS = 5000


def score_tags(metrics: Mapping[str, float]) -> dict[str, str]:
    """What base and tuned scored over all rows as tags, `eval/tuned/exact_match` = `0.95`."""
    return {
        name: f"{value:.6g}" for name, value in metrics.items() if name.startswith((_BASE, _TUNED)) and is_total(name)
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
    names = [name.removeprefix(_BASE) for name in metrics if name.startswith(_BASE) and is_total(name)]
    rows = [
        f"| {name} | {metrics[_BASE + name]:.4g} | {metrics[_TUNED + name]:.4g} |"
        for name in names
        if _TUNED + name in metrics
    ]
    return ["| metric | base | tuned |", "|---|---:|---:|", *rows]
