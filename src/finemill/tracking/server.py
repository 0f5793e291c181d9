"""The MLflow server or database: where it is, whether it answers, and the client for it.

Importing MLflow takes seconds of CPU. This module imports it in `open_client` only, after what can be checked without.
"""

import http.client
import os
import re
import shutil
import sqlite3
import ssl
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import closing, contextmanager
from importlib.metadata import entry_points
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from finemill.credentials import without_credentials
from finemill.errors import TemporaryError, UserError
from finemill.tracking.settings import REGISTRY_VARIABLE, TRACKING_VARIABLE, Tracking

if TYPE_CHECKING:
    from mlflow import MlflowClient

REACH_TIMEOUT_S = 10.0
_LOCK_TIMEOUT_S = 120.0
_DATABASES = ("sqlite", "postgresql", "mysql", "mssql")
_HOSTED = ("databricks", "databricks-uc", "uc")
_PLUGINS = ("mlflow.tracking_store", "mlflow.model_registry_store")
"""Entry points by which packages bring schemes of their own, as SageMaker's and Azure's do."""
_NEVER = "credential configuration failed|not in a valid JSON format|is not supported in the current version"
"""Regular expression of what MLflow's client says without a server's code, and would say again."""
_ALLOWED = (
    "http(s)://host, sqlite:///folder/mlflow.db, another database URI that MLflow takes, or one of an installed plug-in"
)
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


def check_reachable(uri: str) -> None:
    """Find out in seconds, without importing MLflow, whether anything can be recorded at `uri`.

    Raises: UserError: no such kind of place, or a folder that cannot be written. TemporaryError: nothing answers.
    """
    scheme = _scheme(uri)
    if scheme in ("http", "https"):
        _check_answers(uri)
    elif scheme == "sqlite" and "://" in uri:
        _check_sqlite(uri)
    elif scheme in _DATABASES:
        if "://" not in uri:
            raise _no_server(uri)
    elif scheme not in _HOSTED and scheme not in _plugin_schemes():
        raise _no_server(uri)


def _scheme(uri: str) -> str:
    try:
        parts = urlsplit(uri)
        # Reading the port checks it. A database's URI may hold several.
        if parts.scheme in ("http", "https") and (parts.port == 0 or not parts.hostname):
            raise _no_server(uri)
    except ValueError:
        raise _no_server(uri) from None
    return (parts.scheme or uri).partition("+")[0]


def _plugin_schemes() -> set[str]:
    return {point.name for group in _PLUGINS for point in entry_points(group=group)}


def _no_server(uri: str) -> UserError:
    # What is left of an address without its password looks like one that would do.
    escaped = "; a password's / ? # @ are written %2F %3F %23 %40 in an address" if "@" in uri else ""
    return UserError(
        f"{_variable_of(uri)}='{without_credentials(uri)}' is no tracking server: give {_ALLOWED}{escaped}"
    )


def _variable_of(uri: str) -> str:
    return REGISTRY_VARIABLE if os.environ.get(REGISTRY_VARIABLE) == uri else TRACKING_VARIABLE


def _check_answers(uri: str) -> None:
    """Any answer will do: whether it is MLflow's, and whether we may ask, the first request of MLflow's client tells.

    So does whether certificates are trusted: the client has its own settings for that.
    """
    parts = urlsplit(uri)
    place = parts._replace(netloc=parts.netloc.rpartition("@")[2], path=f"{parts.path.rstrip('/')}/health")
    try:
        with urllib.request.urlopen(place.geturl(), timeout=REACH_TIMEOUT_S):
            pass
    except (urllib.error.HTTPError, http.client.BadStatusLine):
        return
    except (http.client.InvalidURL, UnicodeError):  # a host's part that is empty, or longer than 63 characters
        raise _no_server(uri) from None
    except OSError as error:
        reason = getattr(error, "reason", error)
        if isinstance(reason, ssl.SSLError):
            return
        line = f"MLflow at {without_credentials(uri)} is out of reach ({reason})"
        if "407" in str(reason):
            raise UserError(f"{line}: write the proxy's password into HTTPS_PROXY") from None
        raise TemporaryError(
            f"{line}: correct {_variable_of(uri)}, start the server, or unset the variable to record nothing"
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
        raise UserError(f"{_variable_of(uri)}: {path} cannot be used as a database ({error})") from None


def sqlite_path(uri: str) -> Path | None:
    """The file of an SQLite URI; None for a database in memory or of another kind."""
    if not uri.startswith("sqlite:///") or uri == "sqlite:///:memory:":
        return None
    return Path(unquote(uri.removeprefix("sqlite:///").partition("?")[0])).absolute()


def open_client(uri: str, registry_uri: str | None = None) -> "MlflowClient":
    """Import MLflow and connect to a place of runs, and to a registry, which is there too unless another is given.

    Raises: UserError, TemporaryError: as `check_reachable` and `readable_errors` say.
    """
    check_reachable(uri)
    for name, value in _CLIENT_SETTINGS.items():
        os.environ.setdefault(name, value)
    from mlflow import MlflowClient

    with readable_errors(uri), _known_driver(), _alone(uri), _alone(registry_uri or uri):
        client = MlflowClient(tracking_uri=uri, registry_uri=registry_uri or uri)
        if registry_uri and sqlite_path(registry_uri):
            client.search_registered_models(max_results=1)
    return client


@contextmanager
def _known_driver() -> Iterator[None]:
    """Raises: UserError: SQLAlchemy has no driver of that name."""
    try:
        yield
    except Exception as error:
        if type(error).__name__ != "NoSuchModuleError":
            raise
        raise UserError(
            f"a database's address names a driver that is not there ({error}): correct {TRACKING_VARIABLE} or "
            f"{REGISTRY_VARIABLE}"
        ) from None


@contextmanager
def _alone(uri: str) -> Iterator[None]:
    """Let one process at a time open an SQLite database: MLflow makes its tables then, and no two may."""
    path = sqlite_path(uri)
    if path is None:
        yield
        return
    try:
        with FileLock(f"{path}.lock", timeout=_LOCK_TIMEOUT_S, is_singleton=True):
            if not path.exists() or path.stat().st_size == 0:
                _make_database(path)
            yield
    except Timeout:
        raise TemporaryError(
            f"{path} is being made by another process for {_LOCK_TIMEOUT_S:.0f} s: try again"
        ) from None


def _make_database(path: Path) -> None:
    """Have MLflow make its tables beside the file's place, and put it there whole: half of them, MLflow cannot mend."""
    from mlflow import MlflowClient

    folder = path.with_name(f"{path.name}.new")
    shutil.rmtree(folder, ignore_errors=True)  # of a process that was killed here
    folder.mkdir()
    MlflowClient(tracking_uri=f"sqlite:///{folder / path.name}").search_experiments(max_results=1)
    (folder / path.name).replace(path)
    folder.rmdir()


def find_experiment(client: "MlflowClient", tracking: Tracking) -> str:
    """The id of the experiment that is set, by id or by name; created if there is none of that name."""
    from mlflow.exceptions import MlflowException

    if tracking.experiment_id:
        return tracking.experiment_id
    name = tracking.experiment_name
    found = client.get_experiment_by_name(name)
    if found is None:
        try:
            return str(client.create_experiment(name, _artifact_location(tracking.runs), tags=_EXPERIMENT_TAGS))
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise
            found = client.get_experiment_by_name(name)
    if found is None:
        raise UserError(f"MLflow experiment '{name}' was deleted: restore it, or set MLFLOW_EXPERIMENT_NAME to another")
    if not found.experiment_id:
        raise UserError(
            f"what answers at {without_credentials(tracking.runs)} is not MLflow (an experiment without an id): "
            f"correct {TRACKING_VARIABLE}"
        )
    return str(found.experiment_id)


def _artifact_location(uri: str) -> str | None:
    """Beside an SQLite file, where MLflow would take the working folder; a server knows its own place."""
    path = sqlite_path(uri)
    return (path.parent / "mlflow-artifacts").as_uri() if path else None


@contextmanager
def readable_errors(uri: str) -> Iterator[None]:
    """Turn MLflow's exceptions into one line: the caller's to mend, or worth another attempt."""
    from mlflow.exceptions import MlflowException, RestException

    place = f"MLflow at {without_credentials(uri)}"
    try:
        yield
    except MlflowException as error:
        # Of a request that got no answer, what is behind the exceptions of two libraries.
        line = without_credentials(" ".join(str(error).split())).rpartition("(Caused by ")[2][:300]
        status: int = error.get_http_status_code()  # type: ignore[no-untyped-call]
        # A proxy that says no in JSON of its own: MLflow forgets the code that came with it, and repeats what may pass.
        not_from_mlflow = isinstance(error, RestException) and "error_code" not in error.json
        if status in (401, 403) or not_from_mlflow:
            raise UserError(
                f"{place} refuses the credentials{' or is not MLflow' if not_from_mlflow else ''} ({line}): check "
                "MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN"
            ) from None
        # A connection that was cut while it was agreed on ends so, too.
        if line.startswith("SSLError") and "EOF" not in line:
            raise UserError(
                f"{place}: no trusted connection ({line}): name the file of its certificate's authority in "
                "MLFLOW_TRACKING_SERVER_CERT_PATH or REQUESTS_CA_BUNDLE; write http:// if it has none"
            ) from None
        if re.search(_NEVER, line):
            raise UserError(f"{place}: {line}: correct {_variable_of(uri)}, or what stands before the server") from None
        if status in (400, 404, 409):
            raise UserError(f"{place}: {line}") from None
        raise TemporaryError(f"{place}: {line}") from None
