"""Tracking and registry against a real MLflow server."""

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
from mlflow import MlflowClient

from finemill.components.promote.config import RollbackConfig
from finemill.components.promote.rollback import rollback
from finemill.errors import UserError
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

pytestmark = pytest.mark.slow


@pytest.fixture
def server(
    empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator["subprocess.Popen[bytes]"]:
    """A server on an empty database, set as `MLFLOW_TRACKING_URI`."""
    (tmp_path / "mlflow.db").write_bytes(empty_database.read_bytes())
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    options = ["--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    options += ["--backend-store-uri", f"sqlite:///{tmp_path / 'mlflow.db'}"]
    options += ["--artifacts-destination", str(tmp_path / "artifacts")]
    with (tmp_path / "server.log").open("wb") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "mlflow", "server", *options],
            stdout=log,
            stderr=log,
            env={**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"},
            start_new_session=True,
        )
    uri = f"http://127.0.0.1:{port}"
    for _ in range(600):
        try:
            urllib.request.urlopen(f"{uri}/health", timeout=5).close()
            break
        except OSError:
            assert process.poll() is None, (tmp_path / "server.log").read_text()
            time.sleep(0.2)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    yield process
    stop(process)


def stop(process: "subprocess.Popen[bytes]") -> None:
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def test_line_ends_on_a_server_and_survives_its_loss(
    server: "subprocess.Popen[bytes]",
    s3_store: str,
    folder_store: str,
    trained: Callable[..., dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: Any,
) -> None:
    uri = os.environ["MLFLOW_TRACKING_URI"]
    line = trained("one")
    with pytest.raises(UserError, match=r"server at http://127.* refuses models in file:///.*use an s3:// store"):
        run_step("register", store=folder_store, inputs=line, config={})

    copies = trained("two", store=s3_store)
    version = run_step("register", store=s3_store, inputs=copies, config={}, run_id="workflow-1")
    inputs = {"version": str(version.reference), "evaluation": copies["evaluation"]}
    decision = run_step("promote", store=s3_store, inputs=inputs, config={}, run_id="workflow-1")
    assert run_step("promote", store=s3_store, inputs=inputs, config={}, run_id="workflow-1").reused
    client = MlflowClient(uri)
    champion = client.get_model_version_by_alias("finemill", "champion")
    assert champion.source.startswith(f"{s3_store}/model/")
    with pytest.raises(UserError, match="no previous champion"):
        rollback(RollbackConfig())
    promoted = next(run for run in client.search_runs(["1"]) if run.info.run_name == "promote")
    assert promoted.data.tags["finemill.output"] == str(decision.reference)
    assert sorted(item.path for item in client.list_artifacts(promoted.info.run_id)) == ["decision.json", "decision.md"]

    def lose_server(*, output_dir: Path, **_: object) -> Mapping[str, float]:
        stop(server)
        (output_dir / "data.json").write_text("{}")
        return {"data/rows": 1.0}

    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr("finemill.components.data_prep.step.run", lose_server)
    config = {"sources": [{"uri": "example:reasoning"}]}
    result = run_step("data-prep", store=s3_store, inputs={}, config=config, run_id="workflow-2")
    assert (fetch_artifact(result.reference)[0] / "data.json").is_file()
    said = capsys.readouterr()
    assert "warning: not everything is recorded in MLflow" in said.err
    assert said.out == ""
