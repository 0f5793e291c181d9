import json
from collections.abc import Sequence
from pathlib import Path
from random import Random

import pyarrow.parquet as pq
import pytest

from finemill.artifacts.splits import SPLITS
from finemill.errors import UserError
from finemill.rows.conversation import first_question
from finemill.rows.identity import normalize_text
from finemill.rows.shapes import to_conversation
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact

Row = dict[str, object]


def prepare(store: str, sources: Sequence[object], **fields: object) -> StepResult:
    listed = [{"uri": str(source)} if isinstance(source, Path) else source for source in sources]
    return run_step("data-prep", store=store, inputs={}, config={"sources": listed, **fields})


def folder_of(result: StepResult) -> Path:
    return fetch_artifact(result.reference)[0]


def split_rows(result: StepResult) -> dict[str, list[dict[str, str]]]:
    return {split: pq.read_table(folder_of(result) / f"{split}.parquet").to_pylist() for split in SPLITS}


def write_rows(path: Path, rows: Sequence[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def sums(numbers: range) -> list[Row]:
    return [{"question": f"What is {n} + {n}?", "answer": f"It is {2 * n}."} for n in numbers]


def test_weights_wait_for_the_examples_and_all_rows_stay(folder_store: str) -> None:
    sources = [
        {"uri": "example:reasoning", "weight": 75, "max_rows": 300},
        {"uri": "example:chat", "weight": 25, "max_rows": 200},
    ]
    result = prepare(folder_store, sources, test_size=0.2, validation_size=0.1, mix_by="tokens")
    data = json.loads((folder_of(result) / "data.json").read_text())
    assert sum(len(rows) for rows in split_rows(result).values()) == sum(source["read"] for source in data["sources"])
    weights = {"example:reasoning": 75, "example:chat": 25}
    assert data["mix"] == {"by": "tokens", "policy": "downsample", "max_repeats": 4, "weights": weights}
    assert [source["rows"] for source in data["splits"]["train"]["sources"]] == [
        sum(row["source"] == name for row in split_rows(result)["train"]) for name in weights
    ]
    assert "chat-format mixes them by tokens" in (folder_of(result) / "report.md").read_text()


def test_rows_come_out_as_they_went_in(folder_store: str, tmp_path: Path) -> None:
    rows = sums(range(60))
    splits = split_rows(prepare(folder_store, [write_rows(tmp_path / "a.jsonl", rows)]))
    out = [json.loads(row["row"]) for split in SPLITS for row in splits[split]]
    assert sorted(map(str, out)) == sorted(map(str, rows))
    assert {row["shape"] for split in SPLITS for row in splits[split]} == {"question_answer"}


def test_rows_of_different_sources_are_shuffled_together(folder_store: str, tmp_path: Path) -> None:
    sums_file = write_rows(tmp_path / "a.jsonl", sums(range(100)))
    texts_file = write_rows(tmp_path / "b.jsonl", [{"text": f"Text {n}"} for n in range(100)])
    train = split_rows(prepare(folder_store, [sums_file, texts_file]))["train"]
    shapes = [row["shape"] for row in train]
    assert 20 < shapes[: len(shapes) // 2].count("text") < len(shapes) // 2 - 20


def test_the_same_inputs_give_the_same_bytes(tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", sums(range(100)))
    first, second = (prepare((tmp_path / name).as_uri(), [source], seed=4) for name in ("one", "two"))
    assert not second.reused
    assert first.reference.digest == second.reference.digest


def test_a_second_run_reuses_and_a_changed_file_does_not(folder_store: str, tmp_path: Path) -> None:
    source = write_rows(tmp_path / "a.jsonl", sums(range(60)))
    assert not prepare(folder_store, [source]).reused
    assert prepare(folder_store, [source]).reused
    write_rows(source, sums(range(61)))
    assert not prepare(folder_store, [source]).reused


def test_more_rows_move_no_row_to_another_split(folder_store: str, tmp_path: Path) -> None:
    rows = sums(range(300))
    Random(0).shuffle(rows)
    placed: dict[str, str] = {}
    for count in (100, 200, 300):
        # In another order each time, in front of and behind the old rows.
        some = rows[300 - count :] if count == 200 else rows[:count]
        source = write_rows(tmp_path / f"{count}.jsonl", some)
        for split, split_rows_ in split_rows(prepare(folder_store, [source], test_size=0.2)).items():
            for row in split_rows_:
                assert placed.setdefault(row["id"], split) == split
    assert len(placed) == 300


def test_nothing_held_out_is_in_train_whatever_its_shape(folder_store: str, tmp_path: Path) -> None:
    rows: list[Row] = []
    for number in range(120):
        question = f"What is {number} times {number}?"
        rows += [
            {"question": question, "answer": "first answer"},
            {"instruction": question.upper(), "input": "", "output": "second answer"},
            {"prompt": f"  {question}\n", "completion": "third answer"},
            {"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": question},
                               {"from": "gpt", "value": "fourth answer"}]},
        ]  # fmt: skip
    splits = split_rows(prepare(folder_store, [write_rows(tmp_path / "a.jsonl", rows)], test_size=0.3))
    prompts = {
        split: {
            normalize_text(first_question(to_conversation(json.loads(row["row"]), row["shape"])))
            for row in splits[split]
        }
        for split in SPLITS
    }
    assert sum(len(splits[split]) for split in SPLITS) == 480
    assert not prompts["train"] & (prompts["test"] | prompts["validation"])
    assert not prompts["test"] & prompts["validation"]


def test_rows_of_no_known_shape_are_left_out_and_counted(folder_store: str, tmp_path: Path) -> None:
    rows: list[Row] = [*sums(range(60)), {"foo": 1}, {"bar": 2}]
    rows.insert(3, {"foo": 0})
    result = prepare(folder_store, [write_rows(tmp_path / "a.jsonl", rows)])
    source = json.loads((folder_of(result) / "data.json").read_text())["sources"][0]
    assert source["dropped"] == {"unknown_shape": 3}
    assert source["first_unknown_rows"] == [4, 62, 63]
    assert result.manifest.metrics["data/rows_dropped"] == 3
    assert "first rows 4, 62, 63" in (folder_of(result) / "report.md").read_text()


def test_unusable_rows_are_counted_by_reason(folder_store: str, tmp_path: Path) -> None:
    rows: list[Row] = [
        *sums(range(60)),
        {"question": " ", "answer": "4"},
        {"question": "2+2?", "answer": ""},
        {"question": "2?", "answer": "2"},
        {"question": "long" * 100, "answer": "4"},
        {"question": "broken \ud800 text", "answer": "and nothing else"},
        *sums(range(1)),
    ]
    source = write_rows(tmp_path / "a.jsonl", rows)
    result = prepare(folder_store, [source], min_characters=5, max_characters=200)
    counts = json.loads((folder_of(result) / "data.json").read_text())["sources"][0]
    reasons = {"empty_turn": 1, "no_answer": 1, "too_short": 1, "too_long": 1, "not_unicode": 1, "duplicate": 1}
    assert counts["dropped"] == reasons
    (warning,) = result.manifest.warnings
    assert all(f"{reason} 1" in warning for reason in reasons)
    assert counts["read"] == 66


def test_a_weighted_source_without_rows_in_a_split_is_an_error(folder_store: str, tmp_path: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", sums(range(300)))
    few = write_rows(tmp_path / "few.jsonl", [{"text": "One text"}])
    sources = [{"uri": str(many), "weight": 1}, {"uri": str(few), "weight": 1}]
    with pytest.raises(UserError, match=r"few.jsonl: no row in the validation split, .* raise validation_size"):
        prepare(folder_store, sources)


def test_a_test_file_of_ones_own_is_the_test_split_and_is_not_trained_on(folder_store: str, tmp_path: Path) -> None:
    train = write_rows(tmp_path / "train.jsonl", sums(range(100)))
    held_out: list[Row] = [
        {"messages": [{"role": "user", "content": f"What is {n} + {n}?"}, {"role": "assistant", "content": f"{n + n}"}]}
        for n in range(90, 110)
    ]
    test = write_rows(tmp_path / "test.jsonl", [*held_out, *sums(range(5, 6))])
    result = prepare(folder_store, [train, {"uri": str(test), "into": "test"}], validation_size=0.1)
    splits = split_rows(result)
    assert {row["source"] for row in splits["test"]} == {str(test)}
    assert len(splits["test"]) == 21
    assert {row["source"] for split in ("train", "validation") for row in splits[split]} == {str(train)}
    sources = json.loads((folder_of(result) / "data.json").read_text())["sources"]
    assert sources[0]["dropped"] == {"held_out_question": 10, "duplicate": 1}
    assert len(splits["train"]) + len(splits["validation"]) == 89


def test_a_random_share_of_a_source_stays_the_same_when_rows_come(folder_store: str, tmp_path: Path) -> None:
    ids = []
    for count in (200, 300):
        source = write_rows(tmp_path / f"{count}.jsonl", sums(range(count)))
        splits = split_rows(prepare(folder_store, [{"uri": str(source), "sample": 0.3}]))
        ids.append({row["id"] for rows in splits.values() for row in rows})
    assert ids[0] < ids[1]
    assert 40 < len(ids[0]) < 80


def test_a_column_that_is_not_there_is_named(folder_store: str, tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("frage\n1+1?\n")
    with pytest.raises(UserError, match="no column 'query'; the rows have frage"):
        prepare(folder_store, [{"uri": str(tmp_path / "a.csv"), "columns": {"question": "query"}}])


def test_every_row_that_is_left_out_is_listed_with_reason_and_field(folder_store: str, tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "image"}]}]
    rows = [
        *sums(range(60)),
        {"foo": 1},
        *sums(range(1)),
        {"question": "a", "answer": {"a": 1}},
        {"messages": turns},
        {"messages": [turns[0], {"role": "assistant", "content": " "}]},
        {"prompt": "a", "completion": "<think>b"},
        {"messages": '[{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "b"}]'},
    ]
    source = tmp_path / "a.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows) + "not JSON\n")
    result = prepare(folder_store, [source])
    lines = [json.loads(line) for line in (folder_of(result) / "rejected.jsonl").read_text().splitlines()]
    assert {line["source"] for line in lines} == {str(source)}
    assert [(line["row"], line["reason"], line["field"]) for line in lines] == [
        (61, "unknown_shape", "columns foo"),
        (62, "duplicate", "row 1"),
        (63, "not_text", "answer"),
        (64, "not_text", "messages[1]"),
        (65, "empty_turn", "turn 2"),
        (66, "unclosed_thinking", "completion"),
        (67, "not_unicode", "row"),
        (68, "damaged", f"{source}, line 68: not valid JSON (Expecting value at column 1)"),
    ]


def test_columns_that_nothing_is_made_of_are_named(
    folder_store: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows: list[Row] = [{**row, "id": n, "note": "" if n else "x"} for n, row in enumerate(sums(range(60)))]
    result = prepare(folder_store, [write_rows(tmp_path / "a.jsonl", rows)])
    data = json.loads((folder_of(result) / "data.json").read_text())
    assert data["sources"][0]["unread_columns"] == {"id": 60, "note": 1}
    assert f"| {tmp_path / 'a.jsonl'} | note | 1 |" in (folder_of(result) / "report.md").read_text()
    (warning,) = result.manifest.warnings
    assert warning.endswith("a.jsonl: columns that are not read: id (60 rows), note (1 rows)")


@pytest.mark.parametrize(
    ("text", "fields", "message"),
    [
        ("", {}, "a.jsonl: no rows in it"),
        ('{"foo": 1}\n' * 7, {}, r"7 of 7 rows have no known shape .first: row 1, 2, 3, 4, 5; columns foo.; known "),
        (
            "".join(f'{{"question": "a{n}", "opa": "b", "opb": "c", "cop": {n}}}\n' for n in (1, 2, 1)), {},
            "1 of 3 rows number a choice after the last .first: row 2.: they count from 1, and from 0 ",
        ),
        ('{"text": "a"}\n{"foo": 1}\n', {"unknown_rows": "error"}, "1 of 2 rows have no known shape .first: row 2"),
        ('{"text": "a"}\n', {"min_characters": 9}, "no row is left of 1 read .left out: too_short 1"),
        ('{"text": "a"}\n{"text": "b"}\n', {}, "the validation split got none of 2 rows; add rows, or raise"),
        ('{"text": "a"}\n{"text"\n', {"max_damaged_rows": 0}, "a.jsonl, line 2: not valid JSON .* raise max_dam"),
    ],
)  # fmt: skip
def test_bad_input_is_one_clear_line_and_leaves_nothing(
    tmp_path: Path, folder_store: str, text: str, fields: dict[str, object], message: str
) -> None:
    (tmp_path / "a.jsonl").write_text(text)
    with pytest.raises(UserError, match=message) as error:
        prepare(folder_store, [tmp_path / "a.jsonl"], **fields)
    assert "\n" not in str(error.value)
    assert not [path for path in (tmp_path / "store").rglob("*") if path.is_file()]
