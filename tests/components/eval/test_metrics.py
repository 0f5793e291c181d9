"""Each score against a value computed by hand."""

import math

import pytest

from finemill.artifacts.dataset import HeldOutRow
from finemill.artifacts.evaluation import Sample
from finemill.artifacts.metrics import ModelName, metric_parts
from finemill.components.eval.metrics import (
    summarize,
)
from finemill.components.eval.sample import score_answer
from finemill.models.generation import Answer

STOPS = ["<|im_end|>"]


def row(answer: str | None = "7", completion: str = "<think>\n3 + 4\n</think>\n\n\\boxed{7}<|im_end|>") -> HeldOutRow:
    return HeldOutRow(
        id="r1", source="math", input_ids=[1, 2, 3], labels=[-100, 2, 3], prompt="What is 3 + 4?",
        completion=completion, answer=answer,
    )  # fmt: skip


def scored(text: str, row: HeldOutRow, *, finished: bool = True, loss: tuple[float, int] = (3.0, 2)) -> Sample:
    return score_answer(row, "tuned", Answer(text, 9, finished), loss, STOPS)


def sample(
    model: ModelName, right: bool | None, *, loss: float = 1.0, num_tokens: int = 1, source: str = "math"
) -> Sample:
    return Sample(
        id="r", source=source, model=model, prompt="", completion="", reference="", exact_match=right, loss=loss,
        num_tokens=num_tokens, num_generated_tokens=4, finished=True, format_ok=True,
    )  # fmt: skip


def test_an_answer_is_right_when_its_final_value_equals_the_expected_one() -> None:
    assert scored("<think>\nx\n</think>\n\nIt is \\boxed{7.0}", row()).exact_match is True
    assert scored("<think>\n7\n</think>\n\nIt is \\boxed{8}", row()).exact_match is False
    assert scored("I do not know", row()).exact_match is False


def test_a_row_without_a_known_answer_gets_rouge_and_no_exact_match() -> None:
    chat = scored("the cat sat", row(None, "the cat sat on the mat<|im_end|>"))
    # 3 of 3 words found, 3 of 6 words covered: F1 = 2 * 1 * 0.5 / 1.5.
    assert chat.rouge1 == pytest.approx(2 / 3)
    # 2 of 2 pairs found, 2 of 5 covered.
    assert chat.rouge2 == pytest.approx(2 * 1 * 0.4 / 1.4)
    assert chat.exact_match is None
    assert chat.reference == "the cat sat on the mat"
    assert scored("\\boxed{7}", row()).rougeL is None


def test_a_preference_is_a_matter_of_likelihood_per_token() -> None:
    """A longer answer is less likely as a whole: 6 nats over 4 tokens are better than 4 over 2."""
    answer = Answer("7", 2, True)
    preference = [score_answer(row(), "tuned", answer, (6.0, 4), STOPS, worse) for worse in ((4.0, 2), (2.0, 2), None)]
    assert [found.prefers_chosen for found in preference] == [True, False, None]
    metrics = summarize([preference[1], preference[1]], [preference[0], preference[1]])
    assert (metrics["eval/base/preference_accuracy"], metrics["eval/tuned/preference_accuracy"]) == (0.0, 0.5)
    assert metrics["eval/delta/preference_accuracy"] == 0.5
    assert "eval/base/preference_accuracy" not in summarize([preference[2]], [preference[2]])


def test_rouge_leaves_thinking_out() -> None:
    reference = row(None, "<think>\n\n</think>\n\ngood morning<|im_end|>")
    assert scored("<think>\nnothing of it\n</think>\n\ngood morning", reference).rougeL == 1.0


@pytest.mark.parametrize(
    ("text", "finished", "format_ok", "think_closed"),
    [
        ("<think>\na\n</think>\n\n7", True, True, True),
        ("<think>\na\n</think>\n\n7", False, False, True),
        ("<think>\na 7", True, False, False),
        ("<think>\na\n</think>\n\n", True, False, True),
        ("7", True, False, None),
        ("</think>a<think>7", True, False, True),
    ],
)
def test_an_answer_is_well_formed_when_it_thinks_as_the_reference_does(
    text: str, finished: bool, format_ok: bool, think_closed: bool | None
) -> None:
    found = scored(text, row(), finished=finished)
    assert (found.format_ok, found.think_closed) == (format_ok, think_closed)


def test_loss_is_the_mean_over_tokens_and_perplexity_its_exponential() -> None:
    base = [sample("base", None, loss=1.0, num_tokens=1), sample("base", None, loss=3.0, num_tokens=3)]
    metrics = summarize(base, base)
    assert metrics["eval/base/loss"] == pytest.approx(2.5)
    assert metrics["eval/base/perplexity"] == pytest.approx(math.exp(2.5))
    # Deviations 1 * (1 - 2.5) and 3 * (3 - 2.5): sqrt(1.5 ** 2 + 1.5 ** 2) / 4.
    assert metrics["eval/base/loss_stderr"] == pytest.approx(math.sqrt(4.5) / 4)
    assert metrics["eval/delta/loss"] == 0.0


def test_fixed_and_broken_count_problems_of_which_one_model_is_right() -> None:
    base = [sample("base", right) for right in (False, False, False, True, None)]
    tuned = [sample("tuned", right) for right in (True, True, False, False, None)]
    metrics = summarize(base, tuned)
    assert (metrics["eval/fixed"], metrics["eval/broken"]) == (2, 1)
    assert metrics["eval/fixed_rate"] == pytest.approx(2 / 3)
    assert metrics["eval/broken_rate"] == 1.0
    assert metrics["eval/delta/exact_match"] == pytest.approx(0.25)
    # Two gained, one lost of four, and one more of each.
    assert metrics["eval/delta/exact_match_stderr"] == pytest.approx(math.sqrt((3 / 6 + 2 / 6 - (1 / 6) ** 2) / 6))


def test_each_source_has_metrics_of_its_own() -> None:
    base = [sample("base", True, source="example:math"), sample("base", False, source="other data")]
    metrics = summarize(base, base)
    assert metrics["eval/base/example_math/exact_match"] == 1.0
    assert metrics["eval/base/other_data/exact_match"] == 0.0
    assert metrics["eval/base/exact_match"] == 0.5
    assert metric_parts(["hf://org/name"]) == {"hf://org/name": "hf_org_name"}


def test_sources_stay_apart_whatever_their_script() -> None:
    names = ["\u6570\u636e", "\u8d44\u6599", "\u0926\u093f", "a/b", "a b", "A_B", "..", "", "x" * 300]
    parts = metric_parts(names)
    assert len({part.casefold() for part in parts.values()}) == len(names)
    assert parts["\u6570\u636e"] == "\u6570\u636e"
    assert (parts["a/b"], parts["a b"], parts["A_B"]) == ("a_b", "a_b-2", "A_B-3")
    samples = [sample("base", True, source=name) for name in names]
    metrics = summarize(samples, samples)
    assert sum(name.endswith("/exact_match") for name in metrics) == 3 * (len(names) + 1)
    from mlflow.utils.validation import _validate_metric_name

    for name in metrics:
        _validate_metric_name(name)


def test_metrics_are_finite_whatever_the_model_does() -> None:
    hopeless = [sample("base", None, loss=5000.0)]
    metrics = summarize(hopeless, hopeless)
    assert all(math.isfinite(value) for value in metrics.values())
    assert "eval/fixed" not in metrics


def test_tool_calls_of_rows_that_have_some_are_compared_with_the_reference() -> None:
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
    other = call.replace("weather", "time")
    asked = row(None, f"{call}<|im_end|>")
    assert (scored(call, asked).tool_calls, scored(call, asked).tool_names) == (True, 1.0)
    wrong = scored(other, asked)
    assert (wrong.tool_calls, wrong.tool_names, wrong.tool_arguments, wrong.tool_order) == (False, 0.0, 0.0, 0.0)
    assert scored(call, row(None, "It is warm.<|im_end|>")).tool_calls is None
    metrics = summarize([wrong], [scored(call, asked)])
    assert (metrics["eval/base/tool_calls"], metrics["eval/delta/tool_names"]) == (0.0, 1.0)


def test_answers_are_held_against_the_configured_rules() -> None:
    rules = {"schema": '{"type": "object"}', "pattern": r"\{.*\}"}
    found = [
        score_answer(row(None), "tuned", Answer(text, 3, finished), (3.0, 2), STOPS, **rules)  # type: ignore[arg-type]
        for text, finished in (("{}", True), ("[]", True), ("{}", False))
    ]
    assert [(one.schema_ok, one.pattern_ok) for one in found] == [(True, True), (False, False), (False, False)]
    assert summarize(found, found)["eval/tuned/schema_ok_rate"] == pytest.approx(1 / 3)
