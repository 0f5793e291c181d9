import json
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.comparison import ComparedAnswer, write_answers
from finemill.cli import main
from finemill.comparison.vote_server import Ballot, open_server
from finemill.comparison.votes import VOTES_FILE, pairs_of, read_votes, vote_rates
from finemill.errors import UserError
from tests.serving import serving


def answer(model: str, text: str, number: int) -> ComparedAnswer:
    return ComparedAnswer(
        id=f"{number}", source="own", question=f"Question {number}?", reference="", model=model, mode="template",
        sample=0, thinking="", completion=text, thinking_state="none", thinking_characters=0, finished=True, rougeL=0.5,
    )  # fmt: skip


ANSWERS = [
    *(answer("base", f"first {number}", number) for number in range(4)),
    *(answer("tuned", f"other {number}" if number else "first 0", number) for number in range(4)),
]


@pytest.fixture
def page(tmp_path: Path) -> Iterator[str]:
    with serving(open_server(Ballot(tmp_path, pairs_of(ANSWERS), "Ann"), 0)) as server:
        yield f"http://127.0.0.1:{server.server_port}"


def fetch(address: str, body: Any = None, **headers: str) -> Any:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(address, data, {"Content-Type": "application/json", **headers})
    with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request) as response:
        return json.loads(response.read())


def vote_for_other(page: str, state: Any) -> Any:
    side = "left" if state["pair"]["left"].startswith("other") else "right"
    return fetch(f"{page}/vote", {"number": state["pair"]["number"], "side": side})


def test_votes_are_blind_kept_and_counted(page: str, tmp_path: Path) -> None:
    state = fetch(f"{page}/state")
    # Equal answers are no pair.
    assert (state["done"], state["all"]) == (0, 3)
    assert not {"base", "tuned"} & set(json.dumps(state).split('"'))
    state = vote_for_other(page, vote_for_other(page, state))
    assert len(read_votes(tmp_path)) == 2
    state = fetch(f"{page}/vote", {"number": 0, "side": "undo"})
    assert state["done"] == 1
    vote_for_other(page, fetch(f"{page}/vote", {"number": state["pair"]["number"], "side": "tie"}))
    votes = read_votes(tmp_path)
    assert {vote.by for vote in votes.values()} == {"Ann"}
    (rate,) = vote_rates(pairs_of(ANSWERS), votes)
    assert (rate.model, rate.judged, rate.missing) == ("tuned", 3, 0)
    assert rate.rate == pytest.approx(2.5 / 3)
    # Another start goes on where this one ended.
    assert Ballot(tmp_path, pairs_of(ANSWERS), "Ben").state()["pair"] is None


@pytest.mark.parametrize(
    ("path", "body", "headers", "status"),
    [
        ("/state", None, {"Host": "evil.example:80"}, 403),
        ("/vote", {"number": 0, "side": "left"}, {"Content-Type": "text/plain"}, 400),
        ("/vote", {"number": 9, "side": "left"}, {}, 400),
        ("/vote", {"number": 0, "side": "both"}, {}, 400),
        ("/nowhere", None, {}, 404),
    ],
)
def test_what_is_no_vote_is_refused(path: str, body: Any, headers: dict[str, str], status: int, page: str) -> None:
    with pytest.raises(urllib.error.HTTPError) as caught:
        fetch(page + path, body, **headers)
    caught.value.close()
    assert caught.value.code == status


def test_the_result_is_in_the_table_and_on_the_page(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write_answers(tmp_path, ANSWERS)
    for pair, side in zip(pairs_of(ANSWERS), ("left", "left", "tie"), strict=True):
        Ballot(tmp_path, [pair], "Ann").vote(0, side)
    assert main(["vote", str(tmp_path), "--show"]) == 0
    shown = capsys.readouterr().out
    assert "votes win" in shown.splitlines()[0]
    assert "on 3 of 3 rows" in shown
    assert "votes win" in (tmp_path / "report.html").read_text()


def test_one_model_and_a_broken_file_are_said(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="ask a second one"):
        pairs_of(ANSWERS[:4])
    (tmp_path / VOTES_FILE).write_text("{}\n")
    with pytest.raises(UserError, match="line 1 is no vote"):
        read_votes(tmp_path)
