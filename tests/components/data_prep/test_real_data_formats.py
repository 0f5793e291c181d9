"""Real rows of every shape through data-prep and chat-format."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer

from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

DATA = Path(__file__).parents[2] / "data"
BACKEND = Tokenizer.from_file(str(BUILTIN_MODELS["builtin:tiny-qwen3"] / "tokenizer.json"))
SETS: dict[str, tuple[str, dict[str, int]]] = {
    "gsm8k.jsonl": ("question_answer", {}),
    "alpaca.json": ("alpaca", {}),
    "glaive.json": ("sharegpt", {}),
    "dpo.json": ("preference", {}),
    "c4.jsonl": ("text", {}),
    "mt_bench.jsonl": ("turns", {"no_answer": 3, "empty_turn": 1}),
}
"""File, shape, and the rows that must be left out: three of MT-bench's have no answer, and one has half of it."""


def run_line(folder: Path, uri: str, **fields: object) -> tuple[Path, Path, dict[str, Any]]:
    """The folders of rows and dataset, and dataset.json."""
    store = folder.as_uri()
    # Ten rows are too few for every split to get some.
    config = {"sources": [{"uri": uri}], "test_size": 0, "validation_size": 0, **fields}
    prepared = run_step("data-prep", store=store, inputs={}, config=config)
    inputs = {"rows": str(prepared.reference), "base_model": "builtin:tiny-qwen3"}
    result = run_step("chat-format", store=store, inputs=inputs, config={"max_length": None})
    dataset = fetch_artifact(result.reference)[0]
    return fetch_artifact(prepared.reference)[0], dataset, json.loads((dataset / "dataset.json").read_text())


def examples(dataset: Path) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = pq.read_table(dataset / "train.parquet").to_pylist()
    return rows


@pytest.mark.parametrize("name", SETS)
def test_a_real_data_set_goes_through(tmp_path: Path, name: str) -> None:
    shape, left_out = SETS[name]
    rows, dataset, counts = run_line(tmp_path, str(DATA / name), dedup="exact")
    source = json.loads((rows / "data.json").read_text())["sources"][0]
    assert source["shapes"] == {shape: source["read"]}
    dropped = {reason: number for reason, number in source["dropped"].items() if reason != "duplicate"}
    for split in counts["splits"].values():
        for reason, number in split["rows_dropped"].items():
            dropped[reason] = dropped.get(reason, 0) + number
    assert dropped == left_out
    assert counts["end_of_turn_tokens"] == {} or set(counts["end_of_turn_tokens"]) == {"<|im_end|>"}
    for row in examples(dataset):
        ids, labels = np.array(row["input_ids"]), np.array(row["labels"])
        assert ((labels == ids) | (labels == -100)).all()
        learned = BACKEND.decode(labels[labels != -100].tolist(), skip_special_tokens=False)
        assert learned.endswith(row["completion"])


def test_gsm8k_rows_have_their_final_answers(tmp_path: Path) -> None:
    _, dataset, _ = run_line(tmp_path, str(DATA / "gsm8k.jsonl"))
    answers = {row["answer"] for row in examples(dataset)}
    assert None not in answers
    assert {"18", "3", "70000"} <= answers


def test_every_answer_and_tool_call_of_the_real_training_rows_is_learned_once(tmp_path: Path) -> None:
    _, dataset, _ = run_line(tmp_path, str(DATA / "glaive.json"))
    rows = pq.read_table(dataset / "train.parquet").to_pylist()
    learned: dict[str, list[str]] = {}
    for row in rows:
        text = BACKEND.decode([label for label in row["labels"] if label != -100], skip_special_tokens=False)
        learned.setdefault(row["id"].partition("-")[0], []).append(text)
    calls = 0
    for row in rows:
        if row["id"] not in learned:
            continue
        said = [message for message in json.loads(row["messages"]) if message["role"] == "assistant"]
        assert sum(text.count("<|im_end|>") for text in learned[row["id"]]) == len(said)
        for message in said:
            parts = [message["content"].strip()]
            parts += [json.dumps(c["function"]["arguments"], ensure_ascii=False) for c in message.get("tool_calls", ())]
            assert any(all(part in text for part in parts) for text in learned[row["id"]])
            calls += len(parts) - 1
    assert calls >= 8


def test_real_preferences_keep_a_worse_answer(tmp_path: Path) -> None:
    _, dataset, _ = run_line(tmp_path, str(DATA / "dpo.json"))
    assert all(row["rejected"] and row["rejected"] != row["completion"] for row in examples(dataset))
