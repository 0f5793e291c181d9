import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from finemill.artifacts.manifest import Reference
from finemill.errors import TemporaryError
from finemill.runtime.kfp_task import TRACKING_PREFIX, run_kfp_task
from finemill.transport import pack_for_kfp

OURS = {"MLFLOW_TRACKING_URI": "http://ours", "MLFLOW_TRACKING_USERNAME": "me", "MLFLOW_TRACKING_PASSWORD": "secret"}


def run_data_prep(folder: Path, config: Mapping[str, Any] | None = None) -> dict[str, float]:
    """Run the step with outputs as the launcher provides them. Returns: the metrics that KFP is told."""
    logged: dict[str, float] = {}
    run_kfp_task(
        "data-prep",
        store=str(folder / "store"),
        inputs={},
        config=config or {"sources": [{"uri": "example:chat", "max_rows": 200}]},
        run_id="run",
        reference_path=str(folder / "rows"),
        manifest=SimpleNamespace(path=str(folder / "manifest"), metadata={}),
        metrics=SimpleNamespace(path=str(folder / "metrics"), log_metric=logged.__setitem__),
    )
    return logged


def test_every_output_is_a_file(tmp_path: Path) -> None:
    logged = run_data_prep(tmp_path)
    reference = Reference.parse((tmp_path / "rows").read_text())
    assert json.loads((tmp_path / "manifest").read_text())["digest"] == reference.digest
    assert json.loads((tmp_path / "metrics").read_text()) == logged
    assert logged


def test_what_was_packed_for_kfp_is_the_step_s_configuration(tmp_path: Path) -> None:
    rows = tmp_path / "$$(HOME) {{rows}}.jsonl"
    rows.write_text('{"prompt": "a question", "completion": "an answer"}\n')
    run_data_prep(tmp_path, pack_for_kfp({"sources": [{"uri": str(rows)}], "test_size": 0, "validation_size": 0}))
    written = json.loads((tmp_path / "manifest").read_text())
    assert written["config"]["sources"][0]["uri"] == str(rows)


@pytest.mark.parametrize(
    ("plugin", "seen"),
    [
        ({}, OURS),
        ({"MLFLOW_TRACKING_URI": "http://plugin"}, {"MLFLOW_TRACKING_URI": "http://plugin"}),
    ],
)
def test_the_server_of_kfp_s_mlflow_plugin_goes_first_and_never_gets_our_credentials(
    plugin: dict[str, str], seen: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    variables: dict[str, str] = {}

    def remember(name: str, **arguments: Any) -> None:
        variables.update({key: value for key, value in os.environ.items() if key in OURS})
        raise TemporaryError("that was all")

    environment = {f"{TRACKING_PREFIX}{name}": value for name, value in OURS.items()} | plugin
    monkeypatch.setattr("finemill.runtime.kfp_task.run_step", remember)
    monkeypatch.setattr(os, "environ", {**os.environ, **environment})
    with pytest.raises(SystemExit):
        run_data_prep(tmp_path)
    assert variables == seen


@pytest.mark.parametrize(
    ("written", "message"),
    [
        ("It costs $5.", r"'data-prep\.data_prep\.sources\.uri' has \$ or \{\{ in it"),
        ("{{x}}", "KFP's pages do not hand on"),
        ("my secret-key is", "holds the value of AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_what_is_typed_on_kfp_s_pages_arrives_as_it_is_or_is_refused(
    written: str, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("KUBERNETES_SERVICE_HOST", "10.0.0.1")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret-key")
    with pytest.raises(SystemExit, match="2"):
        run_data_prep(tmp_path, {"sources": [{"uri": written}]})
    said = capsys.readouterr().err
    assert re.search(message, said)
    assert "secret-key" not in said
    run_data_prep(tmp_path, pack_for_kfp({"sources": [{"uri": "example:chat", "max_rows": 200}]}))
