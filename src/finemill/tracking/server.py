"""The MLflow server or database: where it is, whether it answers, and the client for it.

Importing MLflow takes seconds of CPU. This module imports it in `open_client` only, after what can be checked without.
"""

import os
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from finemill.errors import TemporaryError, UserError
from finemill.tracking.describe import without_credentials

if TYPE_CHECKING:
    from mlflow import MlflowClient

TRACKING_VARIABLE = "MLFLOW_TRACKING_URI"
DEFAULT_EXPERIMENT = "finemill"
REACH_TIMEOUT_S = 10.0
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_ALLOWED = "http(s)://host, sqlite:///folder/mlflow.db, or another database URI that MLflow takes"
# MLflow's pages show an experiment's runs with charts, or traces of an application, by this.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
# A server that stays away may cost a training minutes, not hours. MLflow's own defaults are 7 retries of 120 s.
_CLIENT_SETTINGS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "15",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "3",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_LOGGING_LEVEL": "WARNING",
    # A step's standard output is the reference of what it wrote, nothing else.
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}


def tracking_uri() -> str | None:
    """`$MLFLOW_TRACKING_URI`, None if nothing is to be recorded."""
    return os.environ.get(TRACKING_VARIABLE) or None


def check_reachable(uri: str) -> None:
    """Find out in seconds, without importing MLflow, whether anything can be recorded at `uri`.

    Raises: UserError: no such kind of place, or a folder that cannot be written. TemporaryError: nothing answers.
    """
    scheme = urlsplit(uri).scheme.partition("+")[0]
    if scheme in ("http", "https"):
        _check_answers(uri)
    elif scheme == "sqlite":
        _check_sqlite(uri)
    elif scheme not in _DATABASES and not scheme.startswith("databricks"):
        raise UserError(f"{TRACKING_VARIABLE}='{without_credentials(uri)}' is no tracking server: give {_ALLOWED}")


def _check_answers(uri: str) -> None:
    """Any answer will do: whether it is MLflow's, and whether we may ask, the first request tells."""
    try:
        with urllib.request.urlopen(f"{uri.rstrip('/')}/health", timeout=REACH_TIMEOUT_S):
            pass
    except urllib.error.HTTPError:
        return
    except (OSError, ValueError) as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLCertVerificationError):
            return
        raise TemporaryError(
            f"MLflow at {without_credentials(uri)} is out of reach ({reason}): correct {TRACKING_VARIABLE}, "
            "start the server, or unset the variable to record nothing"
        ) from None


def _check_sqlite(uri: str) -> None:
    path = sqlite_path(uri)
    if path is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with closing(sqlite3.connect(path)) as database:
            database.execute("SELECT name FROM sqlite_master LIMIT 1")
            database.execute("BEGIN IMMEDIATE")
            database.rollback()
    except (OSError, sqlite3.Error) as error:
        if "locked" in str(error):
            return
        raise UserError(f"{TRACKING_VARIABLE}: {path} cannot be used as a database ({error})") from None


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for a database in memory or of another kind."""
    if not uri.startswith("sqlite:///") or uri == "sqlite:///:memory:":
        return None
    return Path(uri.removeprefix("sqlite:///").partition("?")[0]).absolute()


def open_client(uri: str) -> "MlflowClient":
    """Import MLflow and connect.

    Raises: UserError, TemporaryError: as `check_reachable` and `readable_errors` say.
    """
    check_reachable(uri)
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    with readable_errors(uri):
        return MlflowClient(tracking_uri=uri, registry_uri=os.environ.get("MLFLOW_REGISTRY_URI") or uri)


def find_experiment(client: "MlflowClient", uri: str) -> str:
    """The id of `$MLFLOW_EXPERIMENT_ID`, or of `$MLFLOW_EXPERIMENT_NAME` (default `finemill`), created if missing."""
    from mlflow.exceptions import MlflowException

    configured = os.environ.get("MLFLOW_EXPERIMENT_ID")
    if configured:
        return configured
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME") or DEFAULT_EXPERIMENT
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(uri), tags=_EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None:
        raise UserError(f"MLflow experiment '{name}' was deleted: restore it, or set MLFLOW_EXPERIMENT_NAME to another")
    return str(found.experiment_id)


def _artifact_location(uri: str) -> str | None:
    """Beside an SQLite file, where MLflow would take the working folder; a server knows its own place."""
    path = sqlite_path(uri)
    return (path.parent / "mlflow-artifacts").as_uri() if path else None


@contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into one line: the caller's to mend, or worth another attempt."""
    from mlflow.exceptions import MlflowException

    place = f"MLflow at {without_credentials(uri)}"
    try:
        yield
    except MlflowException as error:
        line = without_credentials(" ".join(str(error).split()))[:300]
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        if status in (401, 403):
            raise UserError(
                f"{place} refuses the credentials ({line}): check MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        if status in (400, 404, 409):
            raise UserError(f"{place}: {line}") from None
        raise TemporaryError(f"{place}: {line}") from None
