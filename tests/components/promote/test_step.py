import io
import re
import sqlite3
import threading
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from mlflow import MlflowClient

from finemill.artifacts.decision import Decision, read_decision
from finemill.artifacts.manifest import Reference
from finemill.cli import main
from finemill.components.promote.config import RollbackConfig
from finemill.components.promote.rollback import rollback
from finemill.errors import GateFailedError, StepError, TemporaryError, UserError
from finemill.registry.snapshot import read_registered_model
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact
from finemill.tracking.settings import Tracking

Trained = Callable[..., dict[str, str]]
Line = Callable[..., dict[str, str]]


@pytest.fixture
def registered(tracking_uri: str, folder_store: str, trained: Trained) -> Line:
    """Inputs of `promote` for a new version; arguments as for `trained`."""

    def registered(name: str, **scores: Any) -> dict[str, str]:
        line = trained(name, **scores)
        version = run_step("register", store=folder_store, inputs=line, config={}, tracking=Tracking.of_environment())
        return {"version": str(version.reference), "evaluation": line["evaluation"]}

    return registered


def promote(store: str, inputs: dict[str, str], **config: object) -> StepResult:
    return run_step("promote", store=store, inputs=inputs, config=config, tracking=Tracking.of_environment())


def decision(result: StepResult) -> Decision:
    return read_decision(fetch_artifact(result.reference)[0])


def decision_at(reference: str) -> Decision:
    return read_decision(fetch_artifact(Reference.parse(reference))[0])


def aliases() -> dict[str, int]:
    model = read_registered_model(Tracking.of_environment().registry, "finemill")
    assert model is not None
    return dict(model.aliases)


def test_first_version_that_beats_its_base_becomes_champion(folder_store: str, registered: Line) -> None:
    result = promote(folder_store, registered("one"))
    found = decision(result)
    assert (found.promoted, found.summary, found.champion_before) == (True, "@champion, the first", None)
    assert [gate.rule for gate in found.gates] == ["better than base", "at most 0.02 worse than base"]
    assert result.manifest.metrics == {"promote/promotion_passed": 1.0, "promote/version": 1.0}
    assert aliases() == {"champion": 1}
    assert "| yes | loss | better than base |" in (fetch_artifact(result.reference)[0] / "decision.md").read_text()


def test_version_that_does_not_beat_its_base_stays_challenger(folder_store: str, registered: Line) -> None:
    result = promote(folder_store, registered("one", loss=2.0))
    assert decision(result).summary.startswith("not promoted: loss ")
    assert result.manifest.metrics["promote/promotion_passed"] == 0
    assert aliases() == {"challenger": 1}


def test_better_version_takes_over_and_worse_does_not(folder_store: str, registered: Line) -> None:
    promote(folder_store, registered("one", loss=0.5))
    worse = promote(folder_store, registered("two", loss=0.6))
    assert aliases() == {"champion": 1, "challenger": 2}
    better = promote(folder_store, registered("three", loss=0.4))
    assert aliases() == {"champion": 3, "previous_champion": 1}
    assert (decision(worse).champion_before, decision(better).champion_before) == (1, 1)
    assert decision(better).summary == "@champion in place of version 1"


def test_guarded_metric_must_not_regress(folder_store: str, registered: Line) -> None:
    promote(folder_store, registered("one", right=90, loss=0.5))
    result = promote(folder_store, registered("two", right=70, loss=0.3))
    assert "exact_match 0.7 is not at most 0.02 worse than champion (0.9; -0.2, bound" in decision(result).summary


def test_bounds_hold_whatever_the_champion(folder_store: str, registered: Line) -> None:
    gates = [
        {"metric": "loss", "direction": "lower", "min_delta": 0, "compare_with": ["base"]},
        {"metric": "perplexity", "direction": "lower", "max_value": 1.5, "compare_with": []},
    ]
    result = promote(folder_store, registered("one"), gates=gates)
    assert decision(result).summary == "not promoted: perplexity 1.6 is not at most 1.5"


def test_strict_turns_a_no_into_a_failure_that_publishes_nothing(folder_store: str, registered: Line) -> None:
    inputs = registered("one", loss=2.0)
    with pytest.raises(GateFailedError, match="finemill version 1 not promoted: loss"):
        promote(folder_store, inputs, strict=True)
    assert not list(Path(folder_store.removeprefix("file://"), "promote").glob("*/manifest.json"))


def test_missing_metric_is_named_with_those_there_are(folder_store: str, registered: Line) -> None:
    gates = [{"metric": "bleu", "direction": "higher", "min_delta": 0}]
    with pytest.raises(
        UserError,
        match="no metric 'bleu' in the evaluation; it has exact_match, finished, format_ok, loss, perplexity:",
    ):
        promote(folder_store, registered("one"), gates=gates)


def test_same_promotion_is_reused_even_after_it_made_itself_champion(folder_store: str, registered: Line) -> None:
    first, second = registered("one", loss=0.5), registered("two", loss=0.4)
    results = [promote(folder_store, inputs) for inputs in (first, first, second, second)]
    assert [result.reused for result in results] == [False, True, False, True]


def test_no_damaged_file_and_no_stale_input_makes_a_champion(
    folder_store: str, registered: Line, trained: Trained
) -> None:
    """Through the step itself: bytes that are flipped, cut or swapped in what it reads, and inputs of another line."""
    good = registered("one", loss=0.5)
    promote(folder_store, good)
    inputs, stale = registered("two", loss=0.4), trained("three", loss=0.1)
    files = [
        path
        for reference in inputs.values()
        for path in Path(Reference.parse(reference).uri.removeprefix("file://")).iterdir()
        if path.name != "manifest.json"
    ]
    rng = Random(0)
    for number in range(16):
        path = files[number % len(files)]
        before = path.read_bytes()
        place = rng.randrange(len(before))
        flipped = before[:place] + bytes([before[place] ^ (1 << rng.randrange(8))]) + before[place + 1 :]
        path.write_bytes(rng.choice((flipped, before[:place], before + b"\n", b"")))
        try:
            with pytest.raises(StepError):
                promote(folder_store, inputs, seed=number)
        finally:
            path.write_bytes(before)
    for swapped in (good | {"evaluation": inputs["evaluation"]}, inputs | {"evaluation": stale["evaluation"]}):
        with pytest.raises(StepError, match="another evaluation"):
            promote(folder_store, swapped)
    assert aliases() == {"champion": 1, "challenger": 2}
    assert promote(folder_store, inputs).manifest.metrics["promote/promotion_passed"] == 1


def test_a_new_champion_and_a_rollback_are_told(
    folder_store: str, registered: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[tuple[Any, ...]] = []
    for step in ("step", "rollback"):
        monkeypatch.setattr(f"finemill.components.promote.{step}.send_champion", lambda *event: told.append(event))
    url = "http://127.0.0.1:9/hook"
    promote(folder_store, registered("one", loss=0.5), webhook_url=url)
    promote(folder_store, registered("two", loss=0.6), webhook_url=url)
    promote(folder_store, registered("three", loss=0.4), webhook_url=url)
    rollback(RollbackConfig(webhook_url=url), Tracking.of_environment().registry)
    assert [event[:4] for event in told] == [(url, "finemill", number, "champion") for number in (1, 3, 1)]
    assert told[0][4].keys() == {"adapter", "model", "gguf", "evaluation"}


def test_new_champion_means_a_new_decision(folder_store: str, registered: Line) -> None:
    promote(folder_store, registered("one", loss=0.5))
    second = registered("two", loss=0.5)
    promote(folder_store, second)
    promote(folder_store, registered("three", loss=0.4))
    again = promote(folder_store, second)
    assert (again.reused, decision(again).champion_before) == (False, 3)


def test_a_decision_is_kept_under_the_champion_that_it_was_made_against(
    folder_store: str, registered: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Version 3 beats 1 and not 2, which becomes champion while 3's promotion starts and is rolled back after it."""
    promote(folder_store, registered("one", loss=0.5))
    second, third = registered("two", loss=0.3), registered("three", loss=0.4)

    def overtaken(store: str) -> None:
        patch.undo()
        promote(folder_store, second)

    with monkeypatch.context() as patch:
        patch.setattr("finemill.runtime.run.check_writable", overtaken)
        with pytest.raises(TemporaryError, match="changed from version 1 to 2 meanwhile"):
            promote(folder_store, third)
    rollback(RollbackConfig(registered_model_name="finemill"), Tracking.of_environment().registry)
    again = promote(folder_store, third)
    assert (again.reused, decision(again).promoted, decision(again).champion_before) == (False, True, 1)


@pytest.mark.parametrize("crash_after", range(6))
def test_interrupted_promotion_is_finished_by_the_next_attempt(
    crash_after: int, folder_store: str, registered: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(folder_store, registered("one", loss=0.5))
    inputs = registered("two", loss=0.4)
    calls = 0

    def crashing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal calls
            calls += 1
            if calls > crash_after:
                raise KeyboardInterrupt
            return method(*args, **kwargs)

        return call

    with monkeypatch.context() as patch:
        for name in ("set_model_version_tag", "set_registered_model_alias", "delete_registered_model_alias"):
            patch.setattr(MlflowClient, name, crashing(getattr(MlflowClient, name)))
        if crash_after < 5:
            with pytest.raises(KeyboardInterrupt):
                promote(folder_store, inputs)
    result = promote(folder_store, inputs)
    assert decision(result).promoted
    assert aliases() == {"champion": 2, "previous_champion": 1}


def test_two_promotions_at_once_have_one_winner(
    folder_store: str, registered: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(folder_store, registered("one", loss=0.5))
    lines = [registered("two", loss=0.4), registered("three", loss=0.4001)]
    together = threading.Barrier(2, timeout=60)
    monkeypatch.setattr("finemill.components.promote.step.locked", _waiting(together))
    outcomes: list[object] = [None, None]

    def attempt(index: int) -> None:
        try:
            outcomes[index] = promote(folder_store, lines[index]).manifest.metrics["promote/promotion_passed"]
        except StepError as error:
            outcomes[index] = error

    threads = [threading.Thread(target=attempt, args=(index,)) for index in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    winner = next(index for index in range(2) if outcomes[index] == 1.0)
    loser = outcomes[1 - winner]
    assert isinstance(loser, TemporaryError)
    assert "changed from version 1 to " in str(loser)
    assert aliases()["champion"] == winner + 2
    assert aliases()["previous_champion"] == 1
    monkeypatch.undo()


def _waiting(together: threading.Barrier) -> Callable[..., Any]:
    from finemill.registry.snapshot import locked

    def locked_together(*args: Any) -> Any:
        together.wait()
        return locked(*args)

    return locked_together


def test_rollback_restores_the_previous_champion_once(folder_store: str, registered: Line) -> None:
    first, second = registered("one", loss=0.5), registered("two", loss=0.4)
    promote(folder_store, first)
    promote(folder_store, second)
    result = rollback(RollbackConfig(), Tracking.of_environment().registry)
    assert (result.champion, result.rolled_back) == (1, 2)
    assert aliases() == {"champion": 1}
    with pytest.raises(UserError, match="'finemill' has no previous champion: version 1 stays champion"):
        rollback(RollbackConfig(), Tracking.of_environment().registry)


def test_version_that_was_rolled_back_is_not_promoted_again(folder_store: str, registered: Line) -> None:
    first, second = registered("one", loss=0.5), registered("two", loss=0.4)
    promote(folder_store, first)
    promote(folder_store, second)
    rollback(RollbackConfig(), Tracking.of_environment().registry)
    again = promote(folder_store, second)
    assert not again.reused
    assert decision(again).summary.startswith("not promoted: it was champion and was rolled back on ")
    assert aliases() == {"champion": 1}
    assert promote(folder_store, first).reused


@pytest.mark.usefixtures("tracking_uri")
def test_rollback_of_an_unknown_model_says_so() -> None:
    with pytest.raises(UserError, match="has no model 'finemill'"):
        rollback(RollbackConfig(), Tracking.of_environment().registry)


def test_rollback_without_a_champion_says_so(registered: Line) -> None:
    registered("one")
    with pytest.raises(UserError, match="'finemill' has no champion"):
        rollback(RollbackConfig(), Tracking.of_environment().registry)


def test_a_deleted_champion_blocks_nothing(tracking_uri: str, folder_store: str, registered: Line) -> None:
    lines = [registered("one", loss=0.5), registered("two", loss=0.4), registered("three", loss=0.6)]
    promote(folder_store, lines[0])
    promote(folder_store, lines[1])
    MlflowClient(tracking_uri).delete_model_version("finemill", "2")
    keep_alias_of_deleted(tracking_uri, "champion", 2)
    result = rollback(RollbackConfig(), Tracking.of_environment().registry)
    assert (result.champion, result.rolled_back) == (1, None)
    MlflowClient(tracking_uri).delete_model_version("finemill", "1")
    keep_alias_of_deleted(tracking_uri, "champion", 1)
    assert decision(promote(folder_store, lines[2])).summary == "@champion, the first"
    assert aliases() == {"champion": 3}


def test_a_version_that_was_made_anew_under_the_same_number_is_not_promoted(
    tracking_uri: str, folder_store: str, registered: Line
) -> None:
    inputs = registered("one")
    MlflowClient(tracking_uri).set_model_version_tag("finemill", "1", "finemill.digest", "f" * 64)
    with pytest.raises(UserError, match="is not the one that was registered: it was made anew"):
        promote(folder_store, inputs)
    assert aliases() == {"challenger": 1}


def test_a_champion_whose_predecessor_was_deleted_is_decided_anew(
    tracking_uri: str, folder_store: str, registered: Line
) -> None:
    lines = [registered("one", loss=0.5), registered("two", loss=0.4)]
    for inputs in lines:
        promote(folder_store, inputs)
    MlflowClient(tracking_uri).delete_model_version("finemill", "1")
    keep_alias_of_deleted(tracking_uri, "previous_champion", 1)
    again = promote(folder_store, lines[1])
    assert (again.reused, decision(again).promoted, decision(again).champion_before) == (False, True, None)
    with pytest.raises(UserError, match="no previous champion: version 2 stays champion"):
        rollback(RollbackConfig(), Tracking.of_environment().registry)


def keep_alias_of_deleted(tracking_uri: str, alias: str, number: int) -> None:
    """As MLflow's stores left it that did not delete aliases along with a version."""
    with closing(sqlite3.connect(tracking_uri.removeprefix("sqlite:///"))) as database:
        row = (alias, number, "finemill")
        database.execute("REPLACE INTO registered_model_aliases (alias, version, name) VALUES (?, ?, ?)", row)
        database.commit()


def test_who_rolled_back_and_why_is_said(tracking_uri: str, folder_store: str, registered: Line, capsys: Any) -> None:
    first, second = registered("one", loss=0.5), registered("two", loss=0.4)
    promote(folder_store, first)
    promote(folder_store, second)
    assert main(["rollback", "--by", "ann", "--why", "too many complaints"]) == 0
    assert capsys.readouterr().out == "finemill: version 1 is champion, 2 is rolled back\n"
    assert decision(promote(folder_store, second)).summary.endswith(" by ann: too many complaints")
    assert MlflowClient(tracking_uri).get_model_version("finemill", "2").tags["finemill.rolled_back_by"] == "ann"


def test_a_version_waits_for_approval_where_that_is_asked(folder_store: str, registered: Line, capsys: Any) -> None:
    inputs = registered("one")
    waiting = decision(promote(folder_store, inputs, require_approval=True))
    assert waiting.summary.startswith("not promoted: it waits for approval: finemill approve 1 --by NAME")
    assert main(["approve", "1", "--by", "ann", "--why", "read 20 answers"]) == 0
    assert capsys.readouterr().out == "finemill: version 1 is approved by ann\n"
    result = promote(folder_store, inputs, require_approval=True)
    assert (result.reused, decision(result).promoted) == (False, True)
    assert str(decision(result).approved).endswith(" by ann: read 20 answers")


def test_a_reason_of_several_lines_stays_one(folder_store: str, registered: Line) -> None:
    inputs = registered("one")
    assert main(["approve", "1", "--by", "ann", "--why", "read\n20\x00answers"]) == 0
    found = decision(promote(folder_store, inputs, require_approval=True))
    assert str(found.approved).endswith(" by ann: read 20 answers")


def test_a_champion_whose_tag_names_no_evaluation_is_named_or_scored_again(
    tracking_uri: str, folder_store: str, registered: Line
) -> None:
    promote(folder_store, registered("one", loss=0.5))
    client = MlflowClient(tracking_uri)
    for port in ("evaluation", "adapter"):
        client.set_model_version_tag("finemill", "1", f"finemill.artifact.{port}", "by hand")
    with pytest.raises(UserError, match=r"version 1 in the registry, tag finemill\.artifact\.adapter: 'by hand' is no"):
        promote(folder_store, registered("two", loss=0.4))
    assert aliases() == {"champion": 1, "challenger": 2}


def test_only_a_version_that_is_there_can_be_approved(registered: Line, capsys: Any) -> None:
    registered("one")
    assert main(["approve", "7"]) == 2
    assert "'finemill' has no version 7; its versions are 1" in capsys.readouterr().err


@pytest.mark.parametrize("where", ["metrics.json", "samples.parquet"])
def test_a_score_that_is_no_number_is_never_compared(
    where: str, tracking_uri: str, folder_store: str, publish: Callable[..., str], trained: Trained
) -> None:
    line = trained("one")
    folder, manifest = fetch_artifact(Reference.parse(line["evaluation"]))
    files: dict[str, Any] = {path.name: path.read_bytes() for path in folder.iterdir() if path.name in manifest.files}
    if where == "metrics.json":
        files[where] = re.sub(rb'"eval/tuned/exact_match": [\d.]+', b'"eval/tuned/exact_match": NaN', files[where])
    else:
        table = pq.read_table(folder / where)
        column = table.column_names.index("loss")
        losses = [float("nan"), *table["loss"].to_pylist()[1:]]
        buffer = io.BytesIO()
        pq.write_table(table.set_column(column, "loss", pa.array(losses, pa.float64())), buffer)
        files[where] = buffer.getvalue()
    line["evaluation"] = publish("evaluation", files, manifest.parents, manifest.config, manifest.metrics)
    version = run_step("register", store=folder_store, inputs=line, config={}, tracking=Tracking.of_environment())
    inputs = {"version": str(version.reference), "evaluation": line["evaluation"]}
    with pytest.raises(UserError, match=r"no number|no list of metrics"):
        promote(folder_store, inputs)
    assert "champion" not in aliases()


def test_a_decision_is_replayed_from_its_digests(
    tracking_uri: str, folder_store: str, registered: Line, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    promote(folder_store, registered("one", loss=0.5))
    result = promote(folder_store, registered("two", right=70, loss=0.4))
    monkeypatch.delenv("MLFLOW_TRACKING_URI")
    assert main(["replay", str(result.reference)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:5] for line in lines[:-2]] == ["same "] * 4
    assert lines[-1] == "the same verdict"
    monkeypatch.setattr("finemill.components.promote.gates.lower_bound", lambda *_, **__: 1.0)
    assert main(["replay", str(result.reference)]) == 3
    assert "OTHER  exact_match 0.7 is not at most 0.02 worse than champion" in capsys.readouterr().out


def test_a_decision_is_replayed_in_a_store_that_was_moved_and_not_from_an_altered_file(
    folder_store: str, registered: Line, tmp_path: Path, capsys: Any
) -> None:
    promote(folder_store, registered("one", loss=0.5))
    result = promote(folder_store, registered("two", loss=0.4))
    (tmp_path / "store").rename(tmp_path / "moved")
    moved = str(result.reference).replace(folder_store, (tmp_path / "moved").as_uri())
    assert main(["replay", moved]) == 0
    evaluation = Reference.parse(decision_at(moved).evaluation).uri.replace(folder_store, "")
    samples = tmp_path / "moved" / evaluation.lstrip("/") / "samples.parquet"
    samples.chmod(0o644)
    samples.write_bytes(samples.read_bytes()[:-1] + b"x")
    assert main(["replay", moved]) == 2
    assert "samples.parquet" in capsys.readouterr().err


def test_only_a_decision_can_be_replayed(trained: Trained, capsys: Any) -> None:
    assert main(["replay", trained("one")["evaluation"]]) == 2
    assert "is an artifact of kind evaluation" in capsys.readouterr().err
