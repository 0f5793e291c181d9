"""Fixtures that several folders of tests share."""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Nothing in the tests may reach a model hub, report usage, or read the developer's own cache or credentials.
os.environ.update(HF_HUB_OFFLINE="1", MLFLOW_DISABLE_TELEMETRY="true", MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING="false")


@pytest.fixture(autouse=True)
def clean_environment(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    """A cache of the test session's own, and none of the variables that steps react to."""
    monkeypatch.setenv("FINEMILL_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    for name in [name for name in os.environ if name.startswith(("AWS_", "MLFLOW_TRACKING", "MLFLOW_RUN"))]:
        monkeypatch.delenv(name)
    monkeypatch.delenv("FINEMILL_EVENTS", raising=False)


@pytest.fixture(scope="session")
def s3_endpoint() -> Iterator[str]:
    """The address of an S3 server that runs as long as the tests do."""
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    yield f"http://{host}:{port}"
    server.stop()


@pytest.fixture
def s3_store(s3_endpoint: str, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """The URI of an empty prefix in a bucket on that server, credentials set."""
    import boto3

    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_endpoint)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "test-key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "test-secret")
    monkeypatch.setenv("AWS_DEFAULT_REGION", "us-east-1")
    boto3.client("s3").create_bucket(Bucket="finemill-test")
    return f"s3://finemill-test/{abs(hash(request.node.nodeid)):x}"


@pytest.fixture
def folder_store(tmp_path: Path) -> str:
    """The URI of an empty folder."""
    return (tmp_path / "store").as_uri()


@pytest.fixture(params=["folder_store", "s3_store"])
def store(request: pytest.FixtureRequest) -> str:
    """Each kind of store in turn."""
    uri: str = request.getfixturevalue(request.param)
    return uri
