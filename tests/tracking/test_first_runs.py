"""Several first runs at once: MLflow's database is made by one of them."""

import subprocess
import sys
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
