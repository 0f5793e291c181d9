from collections.abc import Iterator, Mapping, Sequence

import pytest

from finemill.artifacts.comparison import ComparedAnswer
from finemill.asking.open_model import OpenModel
from finemill.comparison.ask import Plan, ask, score_reply
from finemill.comparison.questions import Question
from finemill.comparison.summary import summarize
from finemill.models.reply import End, Piece, Reply
from finemill.models.sampling import Sampling


def question(number: int, *, answer: str | None = "7", thinking: bool | None = None) -> Question:
    chat = ({"role": "user", "content": f"Question {number}"},)
    return Question(f"{number}", "own", chat, f"The answer is {answer}.", answer, thinking)


class Model:
    """Answers by a table of question and seed, and remembers how it was asked."""

    def __init__(self, says: Mapping[int, str]) -> None:
        self.says = says
        self.asked: list[tuple[str, Sampling, bool | None]] = []

    def stream(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        sampling: Sampling,
        max_new_tokens: int,
        thinking: bool | None = None,
    ) -> Iterator[Piece | End]:
        self.asked.append((messages[-1]["content"], sampling, thinking))
        if thinking:
            yield Piece("Is it 8?\n", thinking=True)
        yield Piece(self.says.get(sampling.seed // 1_000_003, "The answer is 7."))
        yield End(finished=True, num_tokens=5)


def answers(model: Model, questions: Sequence[Question], **changes: object) -> list[ComparedAnswer]:
    values = {"modes": ("template",), "num_samples": 1, "preset": "greedy", "overrides": {}, "max_new_tokens": 9}
    plan = Plan(**{**values, **changes})  # type: ignore[arg-type]
    return ask(OpenModel("m", model, "qwen3"), "m", questions, plan, lambda text: None)


def test_both_modes_are_asked_with_the_sampling_of_the_family() -> None:
    model = Model({})
    found = answers(model, [question(1)], modes=("thinking", "plain"), preset="recommended")
    assert [asked[1:] for asked in model.asked] == [(Sampling(0.6, 0.95, 20), True), (Sampling(0.7, 0.8, 20), False)]
    assert [answer.mode for answer in found] == ["thinking", "plain"]
    assert [(answer.thinking_state, answer.thinking_agrees) for answer in found] == [("closed", False), ("none", None)]


def test_a_row_is_asked_as_it_was_formatted_and_answers_keep_the_order() -> None:
    model = Model({})
    rows = [question(1, thinking=True), question(2, thinking=False), question(3, thinking=True), question(4)]
    found = answers(model, rows)
    assert {text: thinking for text, _, thinking in model.asked} == {
        "Question 1": True, "Question 2": False, "Question 3": True, "Question 4": None
    }  # fmt: skip
    assert [answer.id for answer in found] == ["1", "2", "3", "4"]


def test_samples_have_seeds_of_their_own_and_are_counted_together() -> None:
    model = Model({0: "The answer is 7.", 1: "The answer is 8.", 2: "It is \\boxed{7.0}.", 3: "I do not know."})
    (line,) = summarize(answers(model, [question(1)], num_samples=4, preset="recommended"))
    assert len({sampling.seed for _, sampling, _ in model.asked}) == 4
    assert line.scores["exact_match"].mean == 0.5
    assert line.scores["pass@4"].mean == 1.0
    assert line.scores["majority"].mean == 1.0
    assert line.seed_spread == pytest.approx(0.577, abs=1e-3)


@pytest.mark.parametrize(
    ("reply", "outcome", "state"),
    [
        (Reply("6 + 1", "The answer is 7.", True, 9), "right", "closed"),
        (Reply("The answer is 7", "", False, 9), "cut_off", "cut"),
        (Reply("", "The answer is 7", False, 9), "cut_off", "none"),
        (Reply("", "", True, 0), "wrong", "none"),
        (Reply("7", "The answer is 8.", True, 9), "wrong", "closed"),
    ],
)
def test_an_answer_that_was_cut_is_neither_right_nor_wrong(reply: Reply, outcome: str, state: str) -> None:
    found = score_reply(question(1), reply, "m", "thinking", 0)
    assert (found.outcome, found.thinking_state) == (outcome, state)


def test_the_change_from_the_first_model_is_row_by_row() -> None:
    rows = [question(number) for number in range(10)]
    first = answers(Model({}), rows)
    worse = [score_reply(row, Reply("", "The answer is 8.", True, 5), "w", "template", 0) for row in rows]
    lines = summarize([*first, *worse])
    assert lines[0].change is None
    assert lines[1].change is not None
    assert (lines[1].change.mean, lines[1].change.rows) == (-1.0, 10)


def test_rows_without_a_known_answer_are_compared_by_their_text() -> None:
    (line,) = summarize(answers(Model({}), [question(1, answer=None)]))
    assert line.compared == "rougeL"
    assert "exact_match" not in line.scores
    assert line.scores["rougeL"].mean > 0.5
