"""A thousand promotions with a fault in each, of a worse version or of damaged files: none of them goes through."""

import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

import pytest
from mlflow import MlflowClient
from mlflow.exceptions import MlflowException

from finemill.artifacts.evaluation import Sample, read_samples, write_metrics, write_samples
from finemill.artifacts.manifest import Reference
from finemill.errors import StepError
from finemill.registry.snapshot import read_registered_model
from finemill.runtime.run import run_step
from finemill.storage.base import local_path
from finemill.storage.store import fetch_artifact
from finemill.tracking.settings import Tracking
from tests.faults.conftest import rounds

Trained = Callable[..., dict[str, str]]


@dataclass(frozen=True)
class Drill:
    """What a fault can touch: the inputs of a promotion that must not be made, and those of better ones."""

    store: str
    database: Path
    worse: dict[str, str]
    better: dict[str, str]
    brilliant: dict[str, str]
    publish: Callable[..., str]
    number: int
    rng: Random

    def promote(self, inputs: dict[str, str]) -> None:
        """A promotion of its own: the seed is part of its key."""
        try:
            run_step("promote", store=self.store, inputs=inputs, config={"seed": self.number}, tracking=_tracking())
        except (StepError, MlflowException, OSError):
            return


Fault = Callable[[Drill], None]


def _tracking() -> Tracking:
    return Tracking.of_environment()


def _files(*references: str) -> list[Path]:
    folders = [local_path(Reference.parse(reference).uri) for reference in references]
    return sorted(path for folder in folders for path in folder.iterdir())


@contextmanager
def _changed(path: Path, content: bytes) -> Iterator[None]:
    before = path.read_bytes()
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(before)


def _damage(content: bytes, rng: Random) -> bytes:
    place = rng.randrange(len(content))
    flipped = content[:place] + bytes([content[place] ^ (1 << rng.randrange(8))]) + content[place + 1 :]
    return rng.choice((flipped, content[:place], content + b"\n", b""))


def damaged_file(drill: Drill) -> None:
    path = drill.rng.choice([path for path in _files(*drill.better.values()) if path.name != "manifest.json"])
    with _changed(path, _damage(path.read_bytes(), drill.rng)):
        drill.promote(drill.better)


def damaged_manifest(drill: Drill) -> None:
    path = drill.rng.choice([path for path in _files(*drill.worse.values()) if path.name == "manifest.json"])
    with _changed(path, _damage(path.read_bytes(), drill.rng)):
        drill.promote(drill.worse)


def swapped_file(drill: Drill) -> None:
    """A file of a brilliant evaluation in the place of this one's, the manifest too, now and then."""
    ours, theirs = (Reference.parse(line["evaluation"]).uri for line in (drill.worse, drill.brilliant))
    names = drill.rng.sample(["samples.parquet", "metrics.json", "manifest.json"], drill.rng.randint(1, 3))
    kept = {path: path.read_bytes() for path in _files(drill.worse["evaluation"])}
    try:
        for name in names:
            (local_path(ours) / name).write_bytes((local_path(theirs) / name).read_bytes())
        drill.promote(drill.worse)
    finally:
        for path, content in kept.items():
            path.write_bytes(content)


def stale_evaluation(drill: Drill) -> None:
    drill.promote(drill.worse | {"evaluation": drill.rng.choice((drill.brilliant, drill.better))["evaluation"]})


def another_version(drill: Drill) -> None:
    drill.promote(drill.better | {"version": drill.worse["version"]})


def spoiled_rows(drill: Drill) -> None:
    """A version registered with an evaluation whose rows are not numbers, not all there, or others."""
    folder, manifest = fetch_artifact(Reference.parse(drill.worse["evaluation"]))
    rng, rows = drill.rng, list(read_samples(folder))
    tuned = [row for row in rows if row.model == "tuned"]
    others = [row for row in rows if row.model != "tuned"]
    chosen = set(rng.sample([row.id for row in tuned], rng.randint(1, len(tuned))))

    def better(row: Sample) -> Sample:
        return replace(row, exact_match=True, loss=0.01)

    def spoiled() -> list[Sample]:
        kind = rng.randrange(5)
        if kind == 0:
            return [replace(row, loss=float("nan")) if row.id in chosen else row for row in tuned]
        if kind == 1:
            return [better(row) for row in tuned if row.id not in chosen]
        if kind == 2:
            return [better(replace(row, id=f"{row.id[:-2]}zz{number}")) for number, row in enumerate(tuned)]
        if kind == 3:
            return [*tuned, *(better(row) for row in tuned if row.id in chosen)]
        return [replace(better(row), exact_match=None) if row.id in chosen else row for row in tuned]

    def write(to: Path) -> None:
        write_samples(to, [*others, *spoiled()])
        write_metrics(to, {**manifest.metrics, "eval/tuned/exact_match": 1.0, "eval/tuned/loss": 0.01})

    evaluation = drill.publish("evaluation", {"report.md": "#"}, manifest.parents, manifest.config, write=write)
    line = {name: drill.brilliant[name] for name in ("adapter", "model", "gguf")} | {"evaluation": evaluation}
    try:
        version = run_step("register", store=drill.store, inputs=line, config={}, tracking=_tracking())
    except StepError:
        return
    drill.promote({"version": str(version.reference), "evaluation": evaluation})


def clock_jump(drill: Drill) -> None:
    shift, clock = drill.rng.uniform(-10, 10) * 365 * 86400, time.time
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(time, "time", lambda: clock() + shift)
        drill.promote(drill.worse)


def registry_down(drill: Drill) -> None:
    """From some call on the registry does not answer, or refuses."""
    left = drill.rng.randrange(8)
    error = drill.rng.choice((MlflowException("503"), ConnectionError("refused"), TimeoutError("timed out")))

    def failing(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal left
            left -= 1
            if left < 0:
                raise error
            return method(*args, **kwargs)

        return call

    with pytest.MonkeyPatch.context() as patch:
        for name in ("get_registered_model", "search_model_versions", "set_model_version_tag", "get_model_version"):
            patch.setattr(MlflowClient, name, failing(getattr(MlflowClient, name)))
        drill.promote(drill.worse)


def registry_gone(drill: Drill) -> None:
    """The database is an old copy's beginning while the step runs."""
    kept = drill.database.with_suffix(".kept")
    shutil.copy(drill.database, kept)
    content = kept.read_bytes()
    drill.database.write_bytes(content[: drill.rng.randrange(len(content))])
    try:
        drill.promote(drill.worse)
    finally:
        shutil.move(kept, drill.database)


FAULTS: tuple[Fault, ...] = (
    damaged_file, damaged_manifest, swapped_file, stale_evaluation, another_version, spoiled_rows, clock_jump,
    registry_down, registry_gone,
)  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_no_fault_makes_a_champion(
    fault: Fault,
    tracking_uri: str,
    folder_store: str,
    trained: Trained,
    publish: Callable[..., str],
    rng: Random,
) -> None:
    def registered(name: str, **scores: Any) -> dict[str, str]:
        line = trained(name, **scores)
        version = run_step("register", store=folder_store, inputs=line, config={}, tracking=_tracking())
        return line | {"version": str(version.reference)}

    lines = {
        "worse": registered("worse", right=70, loss=0.6),
        "better": registered("better", loss=0.4),
        "brilliant": trained("brilliant", right=100, loss=0.1),
    }
    champion = registered("champion", loss=0.5)
    inputs = {
        name: {key: line[key] for key in line if key in ("version", "evaluation")} for name, line in lines.items()
    }
    first = {key: champion[key] for key in ("version", "evaluation")}
    run_step("promote", store=folder_store, inputs=first, config={}, tracking=_tracking())
    database = Path(tracking_uri.removeprefix("sqlite:///"))
    for number in range(rounds(1000 // len(FAULTS) + 1)):
        fault(
            Drill(folder_store, database, inputs["worse"], inputs["better"], lines["brilliant"], publish, number, rng)
        )
        model = read_registered_model(tracking_uri, "finemill")
        assert model is not None
        assert model.aliases["champion"] == 3, number
