"""Every model asked the same questions, in each mode, as often as is wanted."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from finemill.artifacts.comparison import ComparedAnswer, Mode, ThinkingState
from finemill.asking.open_model import OpenModel, Preset
from finemill.comparison.questions import Question
from finemill.metrics.maths import equal_answers, judge
from finemill.metrics.text import chrf, rouge_scores
from finemill.models.reply import Reply
from finemill.rows.answers import final_answer

THINKING: dict[Mode, bool | None] = {"template": None, "thinking": True, "plain": False}
"""What each mode asks a chat template for."""


@dataclass(frozen=True)
class Plan:
    """How all models are asked."""

    modes: Sequence[Mode]
    num_samples: int
    preset: Preset
    overrides: dict[str, Any]
    max_new_tokens: int


def ask(
    model: OpenModel, name: str, questions: Sequence[Question], plan: Plan, on_progress: Callable[[str], None]
) -> list[ComparedAnswer]:
    """The model's answers, scored: by mode, then by sample, then in the order of the questions."""
    found: list[ComparedAnswer] = []
    for mode in plan.modes:
        for sample in range(plan.num_samples):
            where = f"{name}, {mode}" + (f", sample {sample + 1} of {plan.num_samples}" if plan.num_samples > 1 else "")
            # A seed of its own for each sample, far from those of the next batch.
            replies = _replies(model, questions, mode, plan, 1_000_003 * sample, _Progress(where, on_progress))
            found += [
                score_reply(question, reply, name, mode, sample)
                for question, reply in zip(questions, replies, strict=True)
            ]
    return found


def _replies(
    model: OpenModel,
    questions: Sequence[Question],
    mode: Mode,
    plan: Plan,
    added_seed: int,
    on_progress: Callable[[int, int], None],
) -> list[Reply]:
    """The replies in the order of the questions; those that are asked alike are asked together."""
    replies: dict[int, Reply] = {}
    asked = [question.thinking if mode == "template" else THINKING[mode] for question in questions]
    for thinking in dict.fromkeys(asked):
        indices = [index for index, other in enumerate(asked) if other is thinking]
        sampling = model.sampling(plan.preset, thinking, plan.overrides)
        before = len(replies)

        def progress(done: int, before: int = before) -> None:
            on_progress(before + done, len(questions))

        found = model.answers(
            [questions[index].messages for index in indices],
            sampling=replace(sampling, seed=sampling.seed + added_seed),
            max_new_tokens=plan.max_new_tokens,
            thinking=thinking,
            on_progress=progress,
        )
        replies.update(zip(indices, found, strict=True))
    return [replies[index] for index in range(len(questions))]


class _Progress:
    """Says every tenth of the way."""

    def __init__(self, where: str, say: Callable[[str], None]) -> None:
        self._where, self._say, self._said = where, say, 0

    def __call__(self, done: int, total: int) -> None:
        tenth = 10 * done // total
        if tenth > self._said:
            self._said = tenth
            self._say(f"{self._where}: {done} of {total}")


def score_reply(question: Question, reply: Reply, model: str, mode: Mode, sample: int) -> ComparedAnswer:
    """Compare a model's reply with what the row has."""
    verdict = None
    if question.answer is not None:
        asked = question.messages[-1]["content"]
        verdict = judge(question.answer, reply.text, prompt=asked, finished=reply.finished)
    text = None if verdict else reply.answer
    inner = final_answer(reply.thinking) if reply.thinking and reply.answer else None
    said = verdict.final_answer if verdict else None
    return ComparedAnswer(
        id=question.id,
        source=question.source,
        question=question.messages[-1]["content"],
        reference=question.reference,
        answer=question.answer,
        model=model,
        mode=mode,
        sample=sample,
        thinking=reply.thinking,
        completion=reply.answer,
        final_answer=said,
        outcome=verdict.outcome if verdict else None,
        exact_match=verdict.outcome == "right" if verdict else None,
        rougeL=rouge_scores(question.reference, text)["rougeL"] if text is not None else None,
        chrf=chrf(question.reference, text) if text is not None else None,
        thinking_state=_state(reply),
        thinking_characters=len(reply.thinking),
        thinking_agrees=equal_answers(said, inner) if said is not None and inner is not None else None,
        num_tokens=reply.num_tokens,
        finished=reply.finished,
    )


def _state(reply: Reply) -> ThinkingState:
    if not reply.thinking:
        return "none"
    return "cut" if reply.is_cut else "closed"
