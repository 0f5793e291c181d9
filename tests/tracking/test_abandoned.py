import subprocess
import sys

from mlflow import MlflowClient

from finemill.tracking.abandoned import PROCESS_TAG, end_abandoned_runs, process_tags


def dead_process() -> str:
    """The tag that a process wrote which has ended."""
    code = f"from finemill.tracking.abandoned import process_tags; print(process_tags()[{PROCESS_TAG!r}])"
    return subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.strip()


def test_only_runs_of_this_machine_s_dead_processes_are_ended(tracking_uri: str) -> None:
    client = MlflowClient(tracking_uri)
    experiment = client.create_experiment("mine")
    own, dead = process_tags()[PROCESS_TAG], dead_process()
    # The id is alive, the process that had it is not.
    reused = f"{own.rpartition(' ')[0]} 1"
    tags = {"own": own, "dead": dead, "reused": reused, "elsewhere": f"other-{dead}", "odd": "x", "none": ""}
    made = {
        name: client.create_run(experiment, tags={PROCESS_TAG: tag} if tag else {}).info.run_id
        for name, tag in tags.items()
    }
    end_abandoned_runs(client, experiment)
    ended = {name for name, run in made.items() if client.get_run(run).info.status == "KILLED"}
    assert ended == {"dead", "reused"}
