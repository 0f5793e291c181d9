from pathlib import Path
from typing import Any

import pytest

from finemill.components.synthesize.client import BudgetSpentError, Client, Journal, RequestFailedError
from finemill.components.synthesize.config import SynthesizeConfig
from finemill.errors import TemporaryError
from finemill.models.reply import End, Piece
from finemill.rows.reasons import DroppedRowError


class Endpoint:
    """Gives the events of a list, a request each; raises those that are errors."""

    model = "writer"

    def __init__(self, *replies: Any) -> None:
        self.replies = list(replies)

    def stream(self, *_: Any, **__: Any) -> Any:
        reply = self.replies.pop(0)
        if isinstance(reply, Exception):
            raise reply
        return reply


def said(text: str, *, finished: bool = True) -> list[Any]:
    return [Piece(text), End(finished, 5, 7)]


def later(seconds: float | None = None) -> TemporaryError:
    error = TemporaryError("busy")
    error.retry_after_s = seconds
    return error


def client(folder: Path, endpoint: Endpoint, **fields: Any) -> tuple[Client, list[float]]:
    waits: list[float] = []
    config = SynthesizeConfig(url="http://x/v1", task="rewrite", **fields)
    return Client(endpoint, config, Journal(folder), waits.append), waits  # type: ignore[arg-type]


def test_waits_double_or_are_what_the_server_asks_for(tmp_path: Path) -> None:
    asked, waits = client(tmp_path, Endpoint(later(), later(), later(17), said("yes")))
    assert asked.ask("task", "text") == "yes"
    assert 0.5 <= waits[0] <= 1 <= waits[1] <= 2
    assert waits[2] == 17
    assert asked.spent.retries == 3


def test_a_request_that_always_fails_says_how_often_it_was_tried(tmp_path: Path) -> None:
    asked, _ = client(tmp_path, Endpoint(later(), later()), max_retries=1)
    with pytest.raises(RequestFailedError, match=r"busy \(2 attempts\)"):
        asked.ask("task", "text")


@pytest.mark.parametrize(("reply", "reason"), [(said("a", finished=False), "reply_cut"), (said(" "), "reply_empty")])
def test_replies_that_say_too_little_are_no_answers(tmp_path: Path, reply: list[Any], reason: str) -> None:
    asked, _ = client(tmp_path, Endpoint(reply))
    with pytest.raises(DroppedRowError, match=reason):
        asked.ask("task", "text")
    assert asked.spent.reply_tokens == 5


def test_the_journal_answers_what_was_asked_before_and_survives_a_cut_line(tmp_path: Path) -> None:
    asked, _ = client(tmp_path, Endpoint(said("one")))
    asked.ask("task", "text")
    with (tmp_path / "journal.jsonl").open("a") as file:
        file.write('{"request": "ab')
    again, _ = client(tmp_path, Endpoint())
    assert again.ask("task", "text") == "one"
    assert again.spent.requests == 0


def test_requests_keep_the_rate_and_the_budget(tmp_path: Path) -> None:
    asked, waits = client(tmp_path, Endpoint(*[said(str(n)) for n in range(3)]), requests_per_minute=1, max_tokens=30)
    for number in range(3):
        asked.ask("task", str(number))
    assert waits == [pytest.approx(60, abs=1), pytest.approx(120, abs=2)]
    with pytest.raises(BudgetSpentError, match=r"max_tokens 30 are spent \(36\)"):
        asked.ask("task", "more")
