"""One model's answer to one held-out row, scored."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from finemill.artifacts.dataset import HeldOutRow
from finemill.metrics.maths import Outcome, judge
from finemill.models.generation import Answer
from finemill.rows.answers import THINK_CLOSE, THINK_OPEN, inside_thinking, with_opening


@dataclass(frozen=True)
class Sample:
    """A row of samples.parquet. None where a score does not apply: exact match without a known answer, and so on."""

    id: str
    source: str
    model: str
    prompt: str
    completion: str
    reference: str
    answer: str | None
    """The right final answer."""
    final_answer: str | None
    """The completion's final answer; looked for only where there is a right one."""
    exact_match: bool | None
    rouge1: float | None
    """F1 of common words, without case; rouge2 of common word pairs, rougeL of the longest common subsequence. On rows
    without a known answer: where the text itself is what was asked for."""
    rouge2: float | None
    rougeL: float | None  # noqa: N815 the metric's name
    loss: float | None
    """Mean negative log-likelihood of the reference's assistant tokens, nats."""
    num_tokens: int
    """Assistant tokens that `loss` is over."""
    num_generated_tokens: int
    finished: bool
    """The model ended its turn by itself."""
    format_ok: bool
    """Finished, thinking where and only where the reference thinks, every thinking block closed, and text after it."""
    think_closed: bool | None
    """Whether the thinking block that the completion opens is closed; None if it opens none."""
    rejected: str | None = None
    """A worse answer than the reference, of rows that have one."""
    prefers_chosen: bool | None = None
    """Whether the reference is likelier than the worse answer, per token."""
    outcome: Outcome | None = None
    """Of rows with a known answer: `right`, `wrong`, or `cut_off` where the answer was cut before it gave one."""

    @property
    def cut_off(self) -> bool | None:
        """Whether the answer was cut before it gave one; None for rows without a known answer."""
        return None if self.outcome is None else self.outcome == "cut_off"


def score_answer(
    row: HeldOutRow,
    model: str,
    answer: Answer,
    loss: tuple[float, int],
    stops: Sequence[str],
    rejected_loss: tuple[float, int] | None = None,
) -> Sample:
    """Compare a model's `answer` to `row` with the reference.

    Args:
        model: `base` or `tuned`.
        loss: sum of negative log-likelihoods and number of tokens.
        stops: texts of the tokens that end a turn, which a reference ends with and an answer does not.
        rejected_loss: as `loss`, with the row's worse answer; None if it has none.
    """
    reference = _without_stop(row.completion, stops)
    text, right_text = (with_opening(row.prompt, said) for said in (answer.text, reference))
    verdict = judge(row.answer, text, finished=answer.finished) if row.answer is not None else None
    rouge = {} if verdict else rouge_scores(_after_thinking(right_text), _after_thinking(text))
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
        loss=loss[0] / loss[1] if loss[1] else None,
        num_tokens=loss[1],
        num_generated_tokens=answer.num_tokens,
        finished=answer.finished,
        format_ok=answer.finished and _well_formed(text, thinks=THINK_OPEN in right_text),
        think_closed=text.count(THINK_OPEN) <= text.count(THINK_CLOSE) if THINK_OPEN in text else None,
        rejected=_without_stop(row.rejected, stops) if row.rejected is not None else None,
        prefers_chosen=_mean(loss) < _mean(rejected_loss) if rejected_loss is not None else None,
        outcome=verdict.outcome if verdict else None,
    )


def _mean(loss: tuple[float, int]) -> float:
    total, count = loss
    return total / count


def _well_formed(text: str, *, thinks: bool) -> bool:
    blocks = int(thinks)
    if (text.count(THINK_OPEN), text.count(THINK_CLOSE)) != (blocks, blocks):
        return False
    return bool(_after_thinking(text)) and text.find(THINK_OPEN) <= text.find(THINK_CLOSE)


def _after_thinking(text: str) -> str:
    return "" if inside_thinking(text) else text.rpartition(THINK_CLOSE)[2].strip()


def _without_stop(text: str, stops: Sequence[str]) -> str:
    text = text.rstrip("\n")
    return next((text.removesuffix(stop) for stop in stops if text.endswith(stop)), text)


def rouge_scores(reference: str, completion: str) -> dict[str, float]:
    """F1 of ROUGE-1, ROUGE-2 and ROUGE-L, without stemming (Lin, 2004)."""
    scores = _rouge_scorer().score(reference, completion)
    return {name: float(score.fmeasure) for name, score in scores.items()}


@cache
def _rouge_scorer() -> Any:
    from rouge_score.rouge_scorer import RougeScorer

    return RougeScorer(["rouge1", "rouge2", "rougeL"], use_stemmer=False)
