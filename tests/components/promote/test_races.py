"""Two promotions at once, on SQLite and on PostgreSQL: one of them wins, and the aliases tell of it."""

import threading

import pytest
from mlflow import MlflowClient

from finemill.artifacts.decision import Decision
from finemill.components.promote.step import apply_decision
from finemill.errors import TemporaryError, UserError
from finemill.registry.snapshot import LOCK_TAG, ensure_registered_model, locked, read_registered_model

ROUNDS = 8


def decision(version: int) -> Decision:
    return Decision(
        registered_model_name="raced", version=version, champion_before=None, promoted=True, summary="better",
        confidence=0.95, gates=(), evaluation="", champion_evaluation=None, decided="2026-11-30T00:00:00+00:00",
    )  # fmt: skip


def race(uri: str, store: str) -> None:
    """Round after round two new versions, each compared with the same champion, are promoted at the same moment."""
    client = MlflowClient(uri, uri)
    ensure_registered_model(uri, "raced")
    for _ in range(ROUNDS):
        numbers = [int(client.create_model_version("raced", "s3://bucket/model").version) for _ in range(2)]
        model = read_registered_model(uri, "raced")
        assert model is not None
        before = model.aliases.get("champion")
        together = threading.Barrier(2, timeout=60)
        won: list[int] = []
        lost: list[int] = []

        def attempt(number: int, model=model, before=before, together=together, won=won, lost=lost) -> None:  # type: ignore[no-untyped-def]
            together.wait()
            try:
                with locked(client, model, store):
                    apply_decision(client, uri, decision(number), str(before) if before else "none")
                won.append(number)
            except TemporaryError:
                lost.append(number)

        threads = [threading.Thread(target=attempt, args=(number,)) for number in numbers]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert (len(won), len(lost)) == (1, 1)
        after = read_registered_model(uri, "raced")
        assert after is not None
        assert after.aliases["champion"] == won[0]
        assert after.aliases.get("previous_champion") == before


@pytest.mark.parametrize("tag", ["", "yes", "locks/raced.lock", "s3://bucket.lock", "https://host/a.lock"])
def test_a_tag_that_names_no_lock_is_no_lock(tag: str, tracking_uri: str, folder_store: str) -> None:
    client = MlflowClient(tracking_uri, tracking_uri)
    ensure_registered_model(tracking_uri, "raced")
    client.set_registered_model_tag("raced", LOCK_TAG, tag)
    model = read_registered_model(tracking_uri, "raced")
    assert model is not None
    with (
        pytest.raises(UserError, match=r"tag finemill\.lock, '.*', names no lock"),
        locked(client, model, folder_store),
    ):
        pass


def test_one_of_two_promotions_wins_on_sqlite(tracking_uri: str, folder_store: str) -> None:
    race(tracking_uri, folder_store)


@pytest.mark.slow
def test_one_of_two_promotions_wins_on_postgresql(postgres: str, folder_store: str) -> None:
    race(postgres, folder_store)
