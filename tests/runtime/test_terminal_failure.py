import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemill.errors import TemporaryError
from finemill.runtime.kfp_task import ATTEMPT_VARIABLE, run_kfp_task
from finemill.runtime.terminal_failure import TerminalFailure


def attempt(store: str, folder: Path, config: dict[str, Any], run_id: str = "run") -> None:
    manifest = SimpleNamespace(path=str(folder / "manifest"), metadata={})
    metrics = SimpleNamespace(path=str(folder / "metrics"), log_metric=lambda key, value: None)
    run_kfp_task(
        "preflight",
        store=store,
        inputs={},
        config=config,
        run_id=run_id,
        reference_path=str(folder / "plan"),
        manifest=manifest,
        metrics=metrics,
    )


def fail(store: str, folder: Path, capsys: pytest.CaptureFixture[str], **options: str) -> str:
    with pytest.raises(SystemExit) as ended:
        attempt(store, folder, {"steps": {"training": {}}}, **options)
    assert ended.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_the_next_attempt_of_a_hopeless_call_ends_at_once(
    store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """KFP makes 1 of every exit code, and retries on any."""
    monkeypatch.setenv(ATTEMPT_VARIABLE, "0")
    first = fail(store, tmp_path, capsys)
    assert "no step reads the section training" in first
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    monkeypatch.setitem(sys.modules, "finemill.components.preflight.step", None)  # the step itself must not run
    assert fail(store, tmp_path, capsys) == f"{first} (not tried again)"


def test_a_person_s_retry_and_another_run_start_afresh(
    folder_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail(folder_store, tmp_path, capsys)
    assert "not tried again" not in fail(folder_store, tmp_path, capsys)
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    assert "not tried again" not in fail(folder_store, tmp_path, capsys, run_id="another")


def test_the_note_of_an_earlier_round_does_not_count(
    folder_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A person mends what was missing and retries the run: its attempts count from 0 again, and one may be lost."""
    monkeypatch.setenv(ATTEMPT_VARIABLE, "0")
    fail(folder_store, tmp_path, capsys)
    with monkeypatch.context() as patch:
        patch.setattr("finemill.runtime.kfp_task.run_step", lost)
        with pytest.raises(SystemExit) as ended:
            attempt(folder_store, tmp_path, {"steps": {"training": {}}})
    assert ended.value.code == 75
    monkeypatch.setenv(ATTEMPT_VARIABLE, "1")
    assert "not tried again" not in fail(folder_store, tmp_path, capsys)


def lost(name: str, **arguments: Any) -> None:
    raise TemporaryError("the node goes down")


def test_a_failure_that_may_pass_leaves_no_note(folder_store: str, tmp_path: Path) -> None:
    config: dict[str, Any] = {"steps": {"promote": {}}}
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:1")
        with pytest.raises(SystemExit) as ended:
            attempt(folder_store, tmp_path, config)
    assert ended.value.code == 75
    failure = TerminalFailure.of_call("preflight", store=folder_store, inputs={}, config=config, run_id="run")
    failure.raise_if_noted()


def test_a_store_that_refuses_the_note_does_not_hide_the_failure(tmp_path: Path) -> None:
    TerminalFailure("preflight", "s3:///no-bucket/failures/x").note("line", 2)
