"""First runs, several at once or killed: MLflow's database is made by one of them, and whole or not at all."""

import signal
import subprocess
import sys
import time
from pathlib import Path

_OPEN = """
import sys

import mlflow.store.tracking.sqlalchemy_store
import mlflow.store.model_registry.sqlalchemy_store

from finemill.tracking.server import find_experiment, open_client
from finemill.tracking.settings import Tracking

uri = sys.argv[1]
print("ready", flush=True)
sys.stdin.readline()
client = open_client(uri)
find_experiment(client, Tracking(uri=uri))
client.search_registered_models()
"""


def test_three_first_runs_at_once_open_one_database(tmp_path: Path) -> None:
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    runs = [
        subprocess.Popen(
            [sys.executable, "-c", _OPEN, uri],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for _ in range(3)
    ]
    for run in runs:
        assert run.stdout
        assert run.stdout.readline() == "ready\n"
    for run in runs:
        assert run.stdin
        run.stdin.write("\n")
        run.stdin.flush()
    ends = [(run.communicate()[1], run.returncode) for run in runs]
    assert [code for _, code in ends] == [0, 0, 0], ends


def test_a_database_whose_making_was_killed_is_made_anew(tmp_path: Path) -> None:
    database = tmp_path / "mlflow.db"
    command = [sys.executable, "-c", _OPEN, f"sqlite:///{database}"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True) as killed:
        assert killed.stdin
        killed.stdin.write("\n")
        killed.stdin.flush()
        beside = tmp_path / "mlflow.db.new" / "mlflow.db"
        while not (beside.exists() and beside.stat().st_size > 100_000):
            assert killed.poll() is None
            time.sleep(0.001)
        killed.send_signal(signal.SIGKILL)
    assert not database.stat().st_size
    again = subprocess.run(command, input="\n", text=True, capture_output=True)
    assert again.returncode == 0, again.stderr
    assert {path.name for path in tmp_path.iterdir()} == {"mlflow.db", "mlflow.db.lock"}
