import logging

import pytest

from finemill.tracking.progress import Progress
from finemill.tracking.warning_lines import heard_warnings

OURS = logging.getLogger("finemill.components.merge.step")


def test_each_warning_is_said_once_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with heard_warnings(Progress("merge")) as heard:
        for _ in range(2):
            OURS.warning("%d rows\ncut", 3)
        OURS.info("nothing of interest")
        logging.getLogger("transformers.modeling").warning("not ours")
        heard.say("read from https://me:secret@host/x")
    assert heard.lines == ["3 rows cut", "read from https://host/x"]
    said = capsys.readouterr().err.splitlines()
    assert [line for line in said if line.startswith("merge: ")] == [f"merge: warning: {line}" for line in heard.lines]


def test_libraries_that_set_the_root_logger_do_not_hide_or_repeat_a_warning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = logging.getLogger()
    level = root.level
    root.addHandler(echo := logging.StreamHandler())
    root.setLevel(logging.ERROR)
    try:
        with heard_warnings(Progress("merge")) as heard:
            OURS.warning("a fallback")
        assert not OURS.isEnabledFor(logging.WARNING)
    finally:
        root.removeHandler(echo)
        root.setLevel(level)
    assert heard.lines == ["a fallback"]
    assert capsys.readouterr().err.count("a fallback") == 1


def test_a_process_that_another_one_speaks_for_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    with heard_warnings(None):
        OURS.warning("a fallback")
    assert capsys.readouterr().err == ""
