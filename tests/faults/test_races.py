"""Two promotions at once, again and again: one winner over one champion, and the loser is told."""

import threading
from collections.abc import Callable
from random import Random

import pytest
from mlflow import MlflowClient

from finemill.artifacts.decision import read_decision
from finemill.artifacts.manifest import Reference
from finemill.errors import StepError, TemporaryError
from finemill.registry.snapshot import read_registered_model
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.settings import Tracking
from tests.faults.conftest import rounds

Trained = Callable[..., dict[str, str]]


@pytest.fixture
def sqlite(tracking_uri: str) -> str:
    """The registry in a file."""
    return tracking_uri


@pytest.fixture
def postgresql(postgres: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """The registry in a PostgreSQL server."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", postgres)
    MlflowClient(postgres).search_experiments()
    return postgres


@pytest.mark.parametrize(
    ("registry", "kind", "full"), [("sqlite", "folder", 40), ("sqlite", "s3", 30), ("postgresql", "s3", 30)]
)
def test_races_have_one_winner(
    registry: str, kind: str, full: int, request: pytest.FixtureRequest, trained: Trained, rng: Random
) -> None:
    request.getfixturevalue(registry)
    store: str = request.getfixturevalue(f"{kind}_store")
    tracking = Tracking.of_environment()

    def registered(name: str, loss: float) -> dict[str, str]:
        line = trained(name, loss=loss, store=store)
        version = run_step("register", store=store, inputs=line, config={}, tracking=tracking)
        return {"version": str(version.reference), "evaluation": line["evaluation"]}

    def promote(inputs: dict[str, str]) -> StepResult:
        return run_step("promote", store=store, inputs=inputs, config={}, tracking=tracking)

    promote(registered("first", 1.0))
    champion = 1
    for number in range(rounds(full)):
        # Each of the two would win over the champion, and their order between them is open.
        loss = 1.0 * 0.9 ** (number + 1)
        lines = [registered(f"{number}-{index}", loss * (1 - index / 100)) for index in range(2)]
        outcomes = raced([lambda line=line: promote(line) for line in lines], rng)  # type: ignore[misc]
        against = []
        for index, outcome in enumerate(outcomes):
            if isinstance(outcome, BaseException):
                assert isinstance(outcome, StepError), repr(outcome)
                assert isinstance(outcome, TemporaryError), str(outcome)
                outcomes[index] = promote(lines[index])  # what an orchestrator does with exit code 75
        for outcome in outcomes:
            assert isinstance(outcome, StepResult)
            made = read_decision(fetch_artifact(Reference(outcome.reference.uri, outcome.reference.digest))[0])
            if made.promoted:
                against.append(made.champion_before)
        model = read_registered_model(tracking.registry, "finemill")
        assert model is not None
        assert against
        assert len(set(against)) == len(against), f"two winners over version {against[0]}"
        assert champion in against
        assert model.aliases["champion"] in (2 * number + 2, 2 * number + 3)
        champion = model.aliases["champion"]


def raced(calls: list[Callable[[], StepResult]], rng: Random) -> list[StepResult | BaseException]:
    """What each call gives, or raises, when they start within some milliseconds."""
    outcomes: list[StepResult | BaseException] = [RuntimeError("never ended")] * len(calls)
    start = threading.Barrier(len(calls))
    pauses = [rng.uniform(0, 0.05) for _ in calls]

    def run(index: int) -> None:
        start.wait()
        threading.Event().wait(pauses[index])
        try:
            outcomes[index] = calls[index]()
        except Exception as error:
            outcomes[index] = error

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return outcomes
