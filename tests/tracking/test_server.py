"""Tracking and registry against a real MLflow server, and what stands in front of one."""

import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from finemill.components.promote.config import RollbackConfig
from finemill.components.promote.rollback import rollback
from finemill.errors import TemporaryError, UserError
from finemill.registry.snapshot import read_registered_model
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.server import check_reachable, find_experiment, readable_errors
from finemill.tracking.settings import Tracking
from tests.tracking.front import registry_front, write_certificate


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


@pytest.mark.slow
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
        run_step("register", store=folder_store, inputs=line, config={}, tracking=Tracking.of_environment())

    copies = trained("two", store=s3_store)
    version = run_step(
        "register", store=s3_store, inputs=copies, config={}, run_id="workflow-1", tracking=Tracking.of_environment()
    )
    inputs = {"version": str(version.reference), "evaluation": copies["evaluation"]}
    decision = run_step(
        "promote", store=s3_store, inputs=inputs, config={}, run_id="workflow-1", tracking=Tracking.of_environment()
    )
    assert run_step(
        "promote", store=s3_store, inputs=inputs, config={}, run_id="workflow-1", tracking=Tracking.of_environment()
    ).reused
    client = MlflowClient(uri)
    champion = client.get_model_version_by_alias("finemill", "champion")
    assert champion.source
    assert champion.source.startswith(f"{s3_store}/model/")
    with pytest.raises(UserError, match="no previous champion"):
        rollback(RollbackConfig(), Tracking.of_environment().registry)
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
    result = run_step(
        "data-prep", store=s3_store, inputs={}, config=config, run_id="workflow-2", tracking=Tracking.of_environment()
    )
    assert (fetch_artifact(result.reference)[0] / "data.json").is_file()
    said = capsys.readouterr()
    assert "warning: not everything is recorded in MLflow" in said.err
    assert said.out == ""


CREDENTIALS = "Basic dXNlcjpwYXNz"


def ask(uri: str, monkeypatch: pytest.MonkeyPatch, **variables: str) -> None:
    """Look into the registry as a step does."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setenv("MLFLOW_REGISTRY_URI", uri)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert read_registered_model(Tracking.of_environment().registry, "finemill") is None


@pytest.mark.parametrize(
    ("authorization", "variables"),
    [
        (None, {}),
        (CREDENTIALS, {"MLFLOW_TRACKING_USERNAME": "user", "MLFLOW_TRACKING_PASSWORD": "pass"}),
        ("Bearer secret", {"MLFLOW_TRACKING_TOKEN": "secret"}),
    ],
)
@pytest.mark.parametrize("prefix", ["", "/behind/a/path"])
def test_a_front_is_passed_as_mlflow_s_client_does(
    prefix: str, authorization: str | None, variables: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with registry_front(authorization=authorization, prefix=prefix) as uri:
        ask(uri, monkeypatch, **variables)


def test_credentials_in_the_uri_are_used_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    with registry_front(authorization=CREDENTIALS) as uri:
        ask(uri.replace("://", "://user:pass@"), monkeypatch)
        with pytest.raises(UserError, match="refuses the credentials") as error:
            ask(uri.replace("://", "://user:wrong-one@"), monkeypatch)
    assert "wrong-one" not in str(error.value)


def test_a_certificate_of_its_own_is_trusted_where_it_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    certificate = write_certificate(tmp_path)
    with registry_front(certificate=certificate) as uri:
        with pytest.raises(UserError, match=r"no trusted connection .*CERTIFICATE_VERIFY_FAILED.*REQUESTS_CA_BUNDLE"):
            ask(uri, monkeypatch)
        ask(uri, monkeypatch, MLFLOW_TRACKING_SERVER_CERT_PATH=str(certificate))


def test_a_server_without_tls_is_not_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    with registry_front() as uri, pytest.raises(UserError, match=r"no trusted connection .*WRONG_VERSION_NUMBER"):
        ask(uri.replace("http:", "https:"), monkeypatch)


@pytest.mark.parametrize(
    "uri",
    [
        "http://host:x",
        "http://[::1",
        "http://",
        "http://host:80 /x",
        "http://a..b:5000",
        "./mlruns",
        "arn:a:b",
        "sqlite:/x.db",
        "mysql:db",
    ],
)
def test_what_is_no_server_is_named_with_its_variable(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=f"MLFLOW_REGISTRY_URI='{re.escape(uri)}' is no tracking server: give http"):
        ask(uri, monkeypatch)


def test_a_driver_that_there_is_not_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"names a driver that is not there .*mysql.none.*correct MLFLOW_TRACKING"):
        ask("mysql+none://host/db", monkeypatch)


def test_an_answer_without_an_experiment_is_no_mlflow_s() -> None:
    client: Any = SimpleNamespace(get_experiment_by_name=lambda _: SimpleNamespace(experiment_id=""))
    with pytest.raises(UserError, match="what answers at http://gateway is not MLflow"):
        find_experiment(client, Tracking("http://gateway"))


@pytest.mark.parametrize("mark", "/?#")
def test_a_sign_in_a_password_that_must_be_escaped_is_said_without_it(
    mark: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="are written %2F %3F %23 %40") as caught:
        ask(f"http://ann:pass{mark}word@127.0.0.1:5000", monkeypatch)
    assert "word" not in str(caught.value).replace("password", "")


def test_a_scheme_that_a_plug_in_brings_is_left_to_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = tmp_path / "sagemaker_mlflow-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: sagemaker-mlflow\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[mlflow.tracking_store]\narn = sagemaker_mlflow.store:Store\n")
    monkeypatch.syspath_prepend(tmp_path)
    check_reachable("arn:aws:sagemaker:eu-west-1:1:mlflow-tracking-server/x")


@pytest.mark.parametrize("uri", ["databricks", "databricks://profile", "postgresql+psycopg2://a:1,b:2/mlflow"])
def test_hosted_servers_and_databases_are_left_to_mlflow(uri: str) -> None:
    check_reachable(uri)


@pytest.mark.parametrize(
    "text",
    [
        "the response body was not in a valid JSON format. Response body: '<html>login</html>'",
        "Setting the tracking URI to a Unity Catalog backend is not supported in the current version of the client",
    ],
)
def test_what_never_answers_otherwise_is_not_tried_again(text: str) -> None:
    with pytest.raises(UserError, match="correct MLFLOW_TRACKING_URI"), readable_errors("http://host"):
        raise MlflowException(text)


def test_a_server_out_of_reach_may_come_back() -> None:
    with pytest.raises(TemporaryError, match=r"127\.0\.0\.1:1 is out of reach"):
        check_reachable("http://127.0.0.1:1")
