import json
from pathlib import Path
from typing import Any

import boto3
import pytest

from finemill.components.data_prep.config import DataPrepConfig, Source
from finemill.components.data_prep.hub import snapshot_dataset
from finemill.components.data_prep.load import load_source, name_columns, source_digests
from finemill.components.data_prep.read import Damaged
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.tracking.settings import NOWHERE

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def config(**source: object) -> DataPrepConfig:
    return parse_config(DataPrepConfig, {"sources": [source]}, "data-prep")


def rows(**source: object) -> list[dict[str, Any]]:
    parsed = config(**source)
    found = list(load_source(parsed.sources[0], parsed.seed))
    assert not any(isinstance(row, Damaged) for row in found)
    return [row for row in found if not isinstance(row, Damaged)]


def write_jsonl(path: Path, *texts: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "main" / "train-00001-of-00002.jsonl", "c")
    write_jsonl(tmp_path / "main" / "train-00000-of-00002.jsonl", "a", "b")
    write_jsonl(tmp_path / "main" / "test.jsonl", "d")
    write_jsonl(tmp_path / "socratic" / "train.jsonl", "e")
    (tmp_path / "README.md").write_text("not data")
    return tmp_path


def texts(**source: object) -> str:
    return "".join(str(row["text"]) for row in rows(**source))


def test_a_folder_gives_its_files_in_order(folder: Path) -> None:
    assert texts(uri=str(folder)) == "dabce"
    assert texts(uri=folder.as_uri()) == "dabce"
    assert texts(uri=str(folder / "main" / "test.jsonl")) == "d"


def test_name_and_split_choose_files(folder: Path) -> None:
    assert texts(uri=str(folder), name="main", split="train") == "abc"
    assert texts(uri=str(folder), split="test") == "d"


def test_max_rows_takes_the_first(folder: Path) -> None:
    assert texts(uri=str(folder), max_rows=2) == "da"


def test_columns_are_read_under_known_names(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage,antwort,note\n1+1?,2,x\n")
    found = rows(uri=str(tmp_path / "a.csv"), columns={"question": "frage", "answer": "antwort"})
    assert found == [{"question": "1+1?", "answer": "2", "note": "x"}]


def test_renaming_keeps_the_other_columns_and_none_is_lost() -> None:
    source = config(uri="a", columns={"messages": "dialog", "prompt": "frage"}, remove_columns=["image"]).sources[0]
    row = {"dialog": [1], "tools": [2], "prompt": "own", "frage": "asked", "image": "a.png", "Instruction": "b"}
    assert name_columns(row, source) == {
        "messages": [1],
        "prompt": "asked",
        "tools": [2],
        "prompt (other)": "own",
        "instruction": "b",
    }


def test_known_columns_are_known_in_any_case_and_spelling() -> None:
    source = config(uri="a").sources[0]
    assert name_columns({"Question": "a", "Complex_CoT": "b", "ID": 1}, source) == {
        "question": "a",
        "complex_cot": "b",
        "ID": 1,
    }
    assert name_columns({"systemPrompt": "a", "Chat History": "b"}, source) == {
        "system_prompt": "a",
        "chat_history": "b",
    }
    assert name_columns({"Text": "a", "text": "b"}, source) == {"Text": "a", "text": "b"}


def test_a_row_may_lack_a_column_that_others_have(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"q": "Hi", "a": "Hello", "sys": "Be kind."}\n{"q": "Bye", "a": "See you"}\n')
    columns = {"prompt": "q", "completion": "a", "system": "sys"}
    assert [set(row) for row in rows(uri=str(tmp_path / "a.jsonl"), columns=columns)] == [
        {"prompt", "completion", "system"},
        {"prompt", "completion"},
    ]


def test_what_lies_beside_the_data_is_not_read(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "train.jsonl", "a")
    write_jsonl(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl", "old")
    beside = ("._train.jsonl", "_part.jsonl", "dataset_info.json", "dataset_infos.json", "data/state.json")
    for name in (*beside, "LICENSE.txt", "README.txt", "requirements-dev.txt", "metadata.json", "sha256sums.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"\x00\x05\x16")
    (tmp_path / "data" / "cache-0123.arrow").write_bytes(b"")
    assert texts(uri=str(tmp_path)) == "a"
    assert texts(uri=str(tmp_path / ".ipynb_checkpoints" / "train-checkpoint.jsonl")) == "old"


def test_a_saved_data_set_is_read_split_by_split(tmp_path: Path) -> None:
    from datasets import Dataset, DatasetDict

    splits = {split: Dataset.from_dict({"text": [split]}) for split in ("train", "test")}
    DatasetDict(splits).save_to_disk(str(tmp_path))
    assert texts(uri=str(tmp_path)) == "testtrain"
    assert texts(uri=str(tmp_path), split="train") == "train"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"uri": "{folder}/none"}, "not found: there is no such file or folder"),
        (
            {"uri": "{folder}", "split": "validation"},
            "no data file of split 'validation' there .found README.md, main/",
        ),
        ({"uri": "ftp://host/data"}, "unknown scheme 'ftp'; allowed are a path, file://, s3://"),
        ({"uri": "example:poems"}, "example:poems is not known"),
        ({"uri": "hf://datasets/"}, "write hf://datasets/org/name@revision"),
        ({"uri": "hf://datasets/org/absent"}, "not in the local hub cache and HF_HUB_OFFLINE is set"),
    ],
)
def test_a_source_that_is_not_there_is_named(folder: Path, source: dict[str, str], message: str) -> None:
    with pytest.raises(UserError, match=message):
        rows(**{key: value.format(folder=folder) for key, value in source.items()})


def test_example_rows_depend_on_seed_and_number_only() -> None:
    first = rows(uri="example:reasoning", max_rows=20)
    assert len(first) == 20
    assert first == rows(uri="example:reasoning", max_rows=20)
    assert source_digests({}, config(uri="example:reasoning", max_rows=20), NOWHERE) != source_digests(
        {}, config(uri="example:reasoning", max_rows=21), NOWHERE
    )


def test_a_changed_file_has_another_digest(folder: Path) -> None:
    before = source_digests({}, config(uri=str(folder)), NOWHERE)
    assert before == source_digests({}, config(uri=str(folder)), NOWHERE)
    write_jsonl(folder / "main" / "test.jsonl", "D")
    after = source_digests({}, config(uri=str(folder)), NOWHERE)
    assert set(before) == set(after)
    assert before != after


def test_s3_prefixes_and_objects_are_sources(s3_store: str) -> None:
    bucket, prefix = s3_store.removeprefix("s3://").split("/", 1)
    for name, text in (("data/train.jsonl", "a"), ("data/test.jsonl", "b"), ("database.jsonl", "c")):
        boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/{name}", Body=json.dumps({"text": text}).encode())
    assert texts(uri=f"{s3_store}/data") == "ba"
    assert texts(uri=f"{s3_store}/data/", split="train") == "a"
    assert texts(uri=f"{s3_store}/database.jsonl") == "c"
    before = source_digests({}, config(uri=f"{s3_store}/data"), NOWHERE)
    boto3.client("s3").put_object(Bucket=bucket, Key=f"{prefix}/data/test.jsonl", Body=b'{"text": "B"}')
    assert source_digests({}, config(uri=f"{s3_store}/data"), NOWHERE) != before


def test_s3_sources_that_are_not_there_are_named(s3_store: str) -> None:
    with pytest.raises(UserError, match="the bucket has no such object or prefix"):
        rows(uri=f"{s3_store}/absent")
    with pytest.raises(UserError, match="there is no such bucket"):
        rows(uri="s3://no-such-bucket-here/data")


def test_hub_data_sets_are_read_from_the_cache_offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    repository = tmp_path / "datasets--org--name"
    snapshot = repository / "snapshots" / COMMIT
    write_jsonl(snapshot / "data" / "train-00000-of-00001.jsonl", "a")
    write_jsonl(snapshot / "data" / "test-00000-of-00001.jsonl", "b")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(COMMIT)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    assert texts(uri="hf://datasets/org/name", split="train") == "a"
    assert texts(uri=f"hf://datasets/org/name@{COMMIT}/data", split="test") == "b"
    assert texts(uri="hf://datasets/org/name@main/data/test-00000-of-00001.jsonl") == "b"


def test_only_files_that_may_be_wanted_are_downloaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """What the hub client is asked for, checked with the client's own filter."""
    from huggingface_hub.utils._paths import filter_repo_objects

    asked: list[str] = []

    def snapshot_download(*_: object, allow_patterns: list[str], **__: object) -> str:
        asked[:] = allow_patterns
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot_download)
    names = ["README.md", "en/train-00000.parquet", "en/test.parquet", "de/train.jsonl.gz", "model.safetensors"]
    expected = {
        (None, None): {"en/train-00000.parquet", "en/test.parquet", "de/train.jsonl.gz"},
        ("en", None): {"en/train-00000.parquet", "en/test.parquet"},
        ("en", "train"): {"en/train-00000.parquet"},
        (None, "train"): {"en/train-00000.parquet", "de/train.jsonl.gz"},
    }
    for (name, split), wanted in expected.items():
        snapshot_dataset("hf://datasets/org/name", name, split)
        assert set(filter_repo_objects(names, allow_patterns=asked)) == wanted


@pytest.mark.parametrize(
    ("split", "numbers"),
    [
        ("train[:30%]", range(3)),
        ("train[-20%:]", range(8, 10)),
        ("train[2:5]", range(2, 5)),
        ("train[-3:]", range(7, 10)),
        ("[25%:75%]", range(2, 8)),
        ("train[:]", range(10)),
    ],
)
def test_a_part_of_a_split_is_taken_in_datasets_way(tmp_path: Path, split: str, numbers: range) -> None:
    (tmp_path / "train.jsonl").write_text("".join(f'{{"text": "{number}"}}\n' for number in range(10)))
    rows = list(load_source(Source(uri=str(tmp_path), split=split), 0))
    assert rows == [{"text": str(number)} for number in numbers]


def test_another_way_to_write_a_part_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "train.jsonl").write_text('{"text": "a"}\n')
    with pytest.raises(UserError, match=r"write a part as train\[:30%\]"):
        list(load_source(Source(uri=str(tmp_path), split="train[:30%]+train[-1:]"), 0))
