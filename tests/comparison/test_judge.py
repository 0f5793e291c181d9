from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from finemill.artifacts.comparison import ComparedAnswer
from finemill.comparison.judge import VERDICTS_FILE, WinRate, judge_all, write_verdicts
from finemill.comparison.pointwise import SCORES_FILE, mean_scores, score_all, write_scores
from finemill.errors import TemporaryError
from finemill.models.endpoint import Endpoint
from finemill.models.reply import End, Piece


def answer(model: str, text: str, number: int = 0) -> ComparedAnswer:
    return ComparedAnswer(
        id=f"{number}", source="own", question="Which?", reference="", model=model, mode="template", sample=0,
        thinking="", completion=text, thinking_state="none", thinking_characters=0, finished=True,
    )  # fmt: skip


class Judge:
    """Says the same about everything, or what it is told about an answer shown first."""

    def __init__(self, says: str, *, finished: bool = True, error: Exception | None = None) -> None:
        self.says, self.finished, self.error = says, finished, error
        self.asked = 0

    def stream(self, messages: Sequence[Mapping[str, str]], **options: Any) -> Iterator[Piece | End]:
        self.asked += 1
        if self.error:
            raise self.error
        said = self.says
        if said == "good":
            said = '{"better": "A"}' if "<answer_a>\ngood" in messages[-1]["content"] else '{"better": "B"}'
        yield Piece(said)
        yield End(self.finished)


def judged(judge: Judge, first: str, other: str) -> WinRate:
    return judge_all(cast(Endpoint, judge), [answer("base", first), answer("tuned", other)])[1][0]


def test_who_is_better_in_both_orders_wins() -> None:
    assert judged(Judge("good"), "bad", "good").rate == 1.0
    assert judged(Judge("good"), "good", "bad").rate == 0.0


@pytest.mark.parametrize("letter", ["A", "B"])
def test_a_judge_that_looks_at_the_order_decides_nothing(letter: str) -> None:
    found = judged(Judge(f'{{"better": "{letter}"}}'), "one", "two")
    assert (found.rate, found.position_bias) == (0.5, 1.0)


@pytest.mark.parametrize("empty", ["", "  \n", "."])
def test_an_empty_answer_never_wins_and_no_judge_is_asked(empty: str) -> None:
    judge = Judge('{"better": "B"}')
    assert judged(judge, "an answer", empty).rate == 0.0
    assert judged(judge, empty, "an answer").rate == 1.0
    assert judged(judge, empty, empty).rate == 0.5
    assert judge.asked == 0


@pytest.mark.parametrize(
    "judge",
    [
        Judge("I like both."),
        Judge('{"better": "C"}'),
        Judge('The second answer tells me to say {"better": "B"}. I cannot tell.'),
        Judge('{"better": "A"}', finished=False),
        Judge("", error=TemporaryError("out of reach")),
    ],
)
def test_a_judge_that_is_down_or_talks_garbage_is_a_missing_metric_and_never_zero(judge: Judge) -> None:
    found = judged(judge, "one", "two")
    assert (found.rate, found.judged, found.missing) == (None, 0, 1)


def test_a_judge_counts_by_its_last_word() -> None:
    assert judged(Judge('First {"better": "A"}, no: {"better": "tie"}'), "one", "two").rate == 0.5


@pytest.mark.parametrize(
    "said", ['```json\n{"better": "tie"}\n```', '{"reason": "both", "better": "tie"}', "**{'better': 'tie'}**."]
)
def test_a_verdict_is_read_however_its_json_is_dressed(said: str) -> None:
    assert judged(Judge(said), "one", "two").judged == 1


def test_verdicts_are_kept_with_their_reasons(tmp_path: Path) -> None:
    verdicts, _ = judge_all(cast(Endpoint, Judge("good")), [answer("base", "bad"), answer("tuned", "good")])
    write_verdicts(tmp_path, verdicts)
    (line,) = (tmp_path / VERDICTS_FILE).read_text().splitlines()
    assert '"winner": "other", "reason": "judged"' in line


@pytest.mark.parametrize(
    ("judge", "score", "reason"),
    [
        (Judge('Good. {"score": 7}'), 7.0, "judged"),
        (Judge('{"score": 11}'), None, "unreadable"),
        (Judge("seven"), None, "unreadable"),
        (Judge('{"score": 7}', finished=False), None, "unreadable"),
        (Judge("", error=TemporaryError("out of reach")), None, "out of reach"),
    ],
)
def test_a_score_is_what_the_judge_said_or_missing(judge: Judge, score: float | None, reason: str) -> None:
    (found,) = score_all(cast(Endpoint, judge), [answer("base", "an answer")])
    assert (found.score, found.reason) == (score, reason)
    assert mean_scores([found]) == {} or mean_scores([found])["base", "template"].mean == score


def test_an_empty_answer_has_the_lowest_score_and_scores_are_stored(tmp_path: Path) -> None:
    judge = Judge('{"score": 9}')
    found = score_all(cast(Endpoint, judge), [answer("base", ""), answer("base", "an answer", 1)])
    assert judge.asked == 1
    assert mean_scores(found)["base", "template"].mean == 5.0
    write_scores(tmp_path, found)
    assert len((tmp_path / SCORES_FILE).read_text().splitlines()) == 2
