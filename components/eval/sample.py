"""One model's answer to one held-out row, scored."""

from collections.abc import Sequence

from finemill.artifacts.dataset import HeldOutRow
from finemill.artifacts.evaluation import Sample
from finemill.metrics.maths import judge
from finemill.metrics.rules import keeps_pattern, keeps_schema
from finemill.metrics.text import bleu, chrf, rouge_scores
from finemill.metrics.tool_calls import read_tool_calls, score_tool_calls
from finemill.models.generation import Answer
from finemill.rows.answers import THINK_CLOSE, THINK_OPEN, after_thinking, with_opening


def score_answer(
    row: HeldOutRow,
    model: str,
    answer: Answer,
    loss: tuple[float, int],
    stops: Sequence[str],
    rejected_loss: tuple[float, int] | None = None,
    *,
    schema: str | None = None,
    pattern: str | None = None,
) -> Sample:
    """Compare a model's `answer` to `row` with the reference.

    Args:
        model: `base`, `tuned`, or the name of another one.
        loss: sum of negative log-likelihoods and number of tokens.
        stops: texts of the tokens that end a turn, which a reference ends with and an answer does not.
        rejected_loss: as `loss`, with the row's worse answer; None if it has none.
        schema: JSON schema, as text, that every answer should keep.
        pattern: regular expression that every answer should match as a whole.
    """
    reference = _without_stop(row.completion, stops)
    text, right_text = (with_opening(row.prompt, said) for said in (answer.text, reference))
    verdict = None
    if row.answer is not None:
        verdict = judge(row.answer, text, prompt=row.prompt, finished=answer.finished)
    texts = None if verdict else (after_thinking(right_text), after_thinking(text))
    rouge = rouge_scores(*texts) if texts else {}
    calls = read_tool_calls(right_text)
    tools = score_tool_calls(calls, read_tool_calls(text)) if calls else None
    return Sample(
        id=row.id,
        source=row.source,
        model=model,
        prompt=row.prompt,
        completion=answer.text,
        reference=reference,
        answer=row.answer,
        final_answer=verdict.final_answer if verdict else None,
        exact_match=verdict.outcome == "right" if verdict else None,
        rouge1=rouge.get("rouge1"),
        rouge2=rouge.get("rouge2"),
        rougeL=rouge.get("rougeL"),
        bleu=bleu(*texts) if texts else None,
        chrf=chrf(*texts) if texts else None,
        tool_calls=tools.exact if tools else None,
        tool_names=tools.names if tools else None,
        tool_arguments=tools.arguments if tools else None,
        tool_order=tools.order if tools else None,
        schema_ok=answer.finished and keeps_schema(text, schema) if schema else None,
        pattern_ok=answer.finished and keeps_pattern(text, pattern) if pattern else None,
        loss=loss[0] / loss[1] if loss[1] else None,
        num_tokens=loss[1],
        num_generated_tokens=answer.num_tokens,
        finished=answer.finished,
        format_ok=answer.finished and _well_formed(text, thinks=THINK_OPEN in right_text),
        think_closed=text.count(THINK_OPEN) <= text.count(THINK_CLOSE) if THINK_OPEN in text else None,
        rejected=_without_stop(row.rejected, stops) if row.rejected is not None else None,
        prefers_chosen=_mean(loss) < _mean(rejected_loss) if rejected_loss and loss[1] and rejected_loss[1] else None,
        outcome=verdict.outcome if verdict else None,
    )


def _mean(loss: tuple[float, int]) -> float:
    total, count = loss
    return total / count


def _well_formed(text: str, *, thinks: bool) -> bool:
    blocks = int(thinks)
    if (text.count(THINK_OPEN), text.count(THINK_CLOSE)) != (blocks, blocks):
        return False
    return bool(after_thinking(text)) and text.find(THINK_OPEN) <= text.find(THINK_CLOSE)


def _without_stop(text: str, stops: Sequence[str]) -> str:
    text = text.rstrip("\n")
    return next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)
