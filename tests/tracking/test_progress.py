"""What a step says of itself: lines for people, or an object a line for programs."""

import json

import pytest

from finemill.errors import UserError
from finemill.tracking.progress import FORMAT_VARIABLE, Progress
from finemill.tracking.step import StepRun


def say(step: str) -> None:
    run = StepRun(Progress(step))
    run.progress.emit("started")
    run.log_metrics({"train/loss": 2.5, "train/mfu": 0.4}, 5)
    run.log_progress("step 5/10, loss 2.5")


def test_people_read_lines(capsys: pytest.CaptureFixture[str]) -> None:
    say("train-qlora")
    assert capsys.readouterr().err.splitlines() == ["train-qlora: started", "train-qlora: step 5/10, loss 2.5"]


def test_programs_read_an_object_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "json")
    say("train-qlora")
    events = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
    assert [event["event"] for event in events] == ["started", "metrics", "progress"]
    assert {event["step"] for event in events} == {"train-qlora"}
    assert events[1]["metrics"] == {"train/loss": 2.5, "train/mfu": 0.4}
    assert (events[1]["training_step"], events[2]["text"]) == (5, "step 5/10, loss 2.5")


def test_another_format_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(FORMAT_VARIABLE, "xml")
    with pytest.raises(UserError, match="FINEMILL_PROGRESS is 'xml': set it to lines or json"):
        Progress("train-qlora")
