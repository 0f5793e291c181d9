"""First runs, several at once or killed: MLflow's database is made by one of them, and whole or not at all."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from os import kill
from pathlib import Path

import pytest

# Forks a process for each URI that it reads, MLflow's imports of seconds made once, and says how each one ended.
_RUNS = """
import os
import sys

import mlflow.store.tracking.sqlalchemy_store
import mlflow.store.model_registry.sqlalchemy_store
from mlflow import MlflowClient

from finemill.tracking.server import find_experiment, open_client
from finemill.tracking.settings import Tracking

for line in sys.stdin:
    word, value = line.split()
    if word == "end":
        print(os.waitstatus_to_exitcode(os.waitpid(int(value), 0)[1]), flush=True)
    elif run := os.fork():
        print(run, flush=True)
    else:
        client = open_client(value)
        find_experiment(client, Tracking(uri=value))
        client.search_registered_models()
        os._exit(0)
"""


class Runs:
    """Processes that open a database, each its first time."""

    def __init__(self, process: "subprocess.Popen[str]") -> None:
        self._process = process

    def begin(self, database: Path) -> int:
        """Returns: the process id."""
        return self._ask(f"open sqlite:///{database}")

    def end(self, run: int) -> int:
        """Wait. Returns: the exit code."""
        return self._ask(f"end {run}")

    def _ask(self, line: str) -> int:
        assert self._process.stdin
        assert self._process.stdout
        self._process.stdin.write(f"{line}\n")
        self._process.stdin.flush()
        return int(self._process.stdout.readline())


@pytest.fixture(scope="module")
def runs() -> Iterator[Runs]:
    command = [sys.executable, "-c", _RUNS]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        yield Runs(process)


def test_three_first_runs_at_once_open_one_database(runs: Runs, tmp_path: Path) -> None:
    begun = [runs.begin(tmp_path / "mlflow.db") for _ in range(3)]
    assert [runs.end(run) for run in begun] == [0, 0, 0]


def test_a_database_whose_making_was_killed_is_made_anew(runs: Runs, tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    killed = runs.begin(database)
    beside = tmp_path / "mlflow.db.new" / "mlflow.db"
    deadline = time.monotonic() + 300
    while not (beside.exists() and beside.stat().st_size > 100_000):
        assert time.monotonic() < deadline
        time.sleep(0.001)
    kill(killed, signal.SIGKILL)
    assert runs.end(killed) == -signal.SIGKILL
    assert not database.stat().st_size
    assert runs.end(runs.begin(database)) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
