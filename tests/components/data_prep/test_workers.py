import csv
import json
from collections.abc import Generator, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemill.components.data_prep import workers
from finemill.components.data_prep.benchmark import Benchmarks
from finemill.components.data_prep.clean import CleanBatch
from finemill.components.data_prep.config import DataPrepConfig
from finemill.components.data_prep.load import source_files
from finemill.components.data_prep.read import UnreadRow
from finemill.components.data_prep.workers import CleanWork, batches_of, clean_source
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.runtime.workers import in_turns

ROWS: list[dict[str, Any]] = [
    *({"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in range(50)),
    {"foo": "1"},
    {"question": "a", "answer": ""},
    *({"question": f"Say {n} \u4f60\u597d", "answer": f"<|im_end|> {n}"} for n in range(20)),
]


def write_rows(folder: Path, name: str) -> Path:
    path = folder / name
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in ROWS) + "{\n")
    elif path.suffix == ".json":
        path.write_text(json.dumps(ROWS))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(ROWS), path, row_group_size=30)
    else:
        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, ["question", "answer", "foo"])
            writer.writeheader()
            writer.writerows(ROWS)
    return path


def config_of(path: Path, num_proc: int, **fields: object) -> DataPrepConfig:
    sources = [{"uri": str(path), "sample": 0.5}]
    return parse_config(
        DataPrepConfig, {"sources": sources, "dedup": "minhash", "num_proc": num_proc, **fields}, "data-prep"
    )


def clean(config: DataPrepConfig) -> list[CleanBatch]:
    with source_files(config.sources[0], config.seed) as files:
        return list(clean_source(files, 0, config, Benchmarks(DataPrepConfig(sources=config.sources))))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many further processes each call has started."""
    numbers: list[int] = []

    def counted(own: Iterator[CleanBatch], others: Sequence[CleanWork]) -> Generator[CleanBatch, None, None]:
        numbers.append(len(others))
        return in_turns(own, others)

    monkeypatch.setattr(workers, "in_turns", counted)
    return numbers


@pytest.fixture
def _small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(workers, "_PROCESS_BYTES", 1)
    monkeypatch.setattr(workers, "_BATCH_ROWS", 7)


@pytest.mark.usefixtures("_small_batches")
@pytest.mark.parametrize("name", ["a.jsonl", "a.json", "a.csv", "a.parquet"])
def test_any_number_of_processes_gives_the_batches_of_one_in_their_order(
    name: str, tmp_path: Path, started: list[int]
) -> None:
    path = write_rows(tmp_path, name)
    one, three = (clean(config_of(path, num_proc)) for num_proc in (1, 3))
    assert started == [0, 2]
    assert three == one
    assert len(one) > 9
    assert sum(batch.counts.read for batch in one) == len(ROWS) + (name == "a.jsonl")


def test_small_sources_are_read_in_one_process(tmp_path: Path, started: list[int]) -> None:
    clean(config_of(write_rows(tmp_path, "a.jsonl"), 2))
    assert started == [0]


@pytest.mark.usefixtures("_small_batches")
def test_a_users_mistake_in_another_process_is_one_here(tmp_path: Path) -> None:
    gone = str(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match=r"gone\.jsonl"):
        clean(config_of(write_rows(tmp_path, "a.jsonl"), 2, benchmarks=[gone]))


def test_a_batch_ends_with_a_long_row() -> None:
    found = [UnreadRow(size, dict) for size in (1, 5 << 20, 3 << 20, 1 << 20, 1, 1, 1)]
    batches = [[row.size for row in batch] for batch in batches_of(found, batch_rows=2)]
    assert batches == [[1, 5 << 20], [3 << 20, 1 << 20], [1, 1], [1]]
