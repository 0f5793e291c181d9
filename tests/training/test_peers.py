"""Processes that train something else are refused, and one that is lost or hangs is named."""

import json
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
from torch.distributed import TCPStore  # type: ignore[attr-defined]
from torch.distributed.distributed_c10d import Store

from finemill.errors import StepError, TemporaryError, UserError
from finemill.training.peers import SILENCE_S, Watch, compare

SAME = {"dataset": "a", "config.learning_rate": "0.1", "version of torch": "2"}


@pytest.fixture
def store() -> Store:
    made: Store = TCPStore("127.0.0.1", 0, 1, is_master=True, timeout=timedelta(seconds=2))
    return made


def errors_of(store: Store, identities: list[dict[str, str]], processes: int) -> list[StepError]:
    """What each of several processes raises when they compare; one that finds nothing raises nothing."""

    def run(rank: int) -> StepError | None:
        try:
            compare(store.clone(), identities[rank], rank, processes)
        except StepError as error:
            return error
        return None

    with ThreadPoolExecutor(len(identities)) as pool:
        return [error for error in pool.map(run, range(len(identities))) if error]


def test_processes_that_train_the_same_find_nothing(store: Store) -> None:
    assert errors_of(store, [SAME, SAME], 2) == []


@pytest.mark.parametrize("name", SAME)
def test_every_process_refuses_to_start_beside_one_that_differs(name: str, store: Store) -> None:
    found = errors_of(store, [SAME, SAME | {name: "other"}], 2)
    assert [type(error) for error in found] == [UserError, UserError]
    line = f"process 1 trains something else than process 0: {name} is other, there {SAME[name]}; give all the same"
    assert all(str(error).startswith(line) for error in found)


def test_a_process_that_does_not_come_is_waited_for_no_longer_than_the_limit(store: Store) -> None:
    (error,) = errors_of(store, [SAME], 2)
    assert isinstance(error, TemporaryError)


@pytest.fixture
def watch(store: Store) -> Watch:
    """Of process 0 of three, that is in step 7 and waits."""
    watch = Watch(store, 0, 3, patience=60)
    watch._mine.step, watch._mine.ticks, watch._progress = 7, 20, time.monotonic()
    return watch


def beat(store: Store, rank: int, **values: int | bool) -> None:
    beats = {"count": 1, "ticks": 20, "step": 7, "finished": False}
    store.set(f"beat/{rank}", json.dumps(beats | values))
    # Setting does not wait for the server, and the watch has a connection of its own.
    store.get(f"beat/{rank}")


def test_processes_that_keep_step_are_left_alone(watch: Watch, store: Store) -> None:
    beat(store, 1)
    beat(store, 2)
    watch._exchange()
    assert watch._problem(time.monotonic() + SILENCE_S / 2) is None


def test_a_process_that_falls_silent_is_named_with_its_step(watch: Watch, store: Store) -> None:
    beat(store, 1, finished=True)
    beat(store, 2, step=6)
    watch._exchange()
    problem = watch._problem(time.monotonic() + SILENCE_S + 1)
    assert problem == "process 2 was lost at step 6: nothing was heard of it for 30 s"


@pytest.mark.parametrize(
    ("ticks", "problem"),
    [(19, "process 1 hangs at step 7: the others have waited"), (20, "no process has come further than step 7")],
)
def test_a_process_that_stays_behind_is_named_after_the_limit(
    ticks: int, problem: str, watch: Watch, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finemill.training.peers.SILENCE_S", 1e6)
    beat(store, 1, ticks=ticks)
    beat(store, 2)
    watch._exchange()
    assert str(watch._problem(time.monotonic() + 61)).startswith(problem)
