"""Rows of every known shape, damaged at random, under random settings: each one is in the dataset, or has a reason.

FINEMILL_FUZZ_ROWS sets how many rows are drawn; the default is for every run of the tests.
"""

import json
import os
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq
import pytest

from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

ROWS_PER_RUN = 500
NUM_RUNS = max(20, int(os.environ.get("FINEMILL_FUZZ_ROWS", "10000")) // ROWS_PER_RUN)
Row = dict[str, Any]

TEXTS = (
    "Hi", "What is 2 + 2?", "It is 4.", "#### 7/4", "\u597d\u7684", "e\u0301\U0001f642", " ", "\n\tx = 1\n", "",
    "<think>\nhm\n</think>\n\n4", "<think>hm", "</think>", "a </think> b", "<|im_end|>", "<|im_start|>assistant\n",
    "<tool_call>\n{}\n</tool_call>", '<tool_call>\n{"name": "f", "arguments": {"x": 1}}\n</tool_call>',
    "{{ x }}{% if %}", "\\boxed{3", "[INST] a [/INST]", "<image>\nWhat is this?", "\ud800", "\ufdd0", "\x00\u2028",
    "x" * 3000, '{"a": 1}', "[]", "null", "[" * 400,
)  # fmt: skip
VALUES: tuple[Any, ...] = (
    None, True, False, 0, -1.5, float("nan"), float("inf"), 10**400, "", "text", [], {}, [None], [[]], ["a", "b"],
    [1, "x"], {"a": None}, {"role": "user"}, [{"role": "user", "content": "q"}], {"content": ["x"]}, "[1, 2",
    '[{"role": "user"}]', [{"type": "image"}], [{"type": "text", "text": "t"}], [{"type": "text"}],
    {"text": ["a"], "label": [1]},
)  # fmt: skip
KEYS = (
    "role", "content", "from", "value", "tool_calls", "tools", "system", "input", "history", "weight", "train", "label",
    "reasoning", "thinking", "function_call", "name", "chosen", "rejected", "prompt", "messages", "text", "answer",
    "images", "parameters", "required", "properties", "arguments", "id", "choices", "speaker", "author", "utterance",
    "loss_mask", "turns", "conversation", "data", "context", "answers", "user", "assistant", "chosen_response",
    "rejected_response", "parts", "tool_call", "toolCalls", "A", "B", "refusal",
)  # fmt: skip


def text(rng: Random) -> str:
    return "".join(rng.choices(TEXTS, k=rng.choice((1, 1, 1, 2, 3)))) + rng.choice(("", "?", str(rng.random())))


def call(rng: Random) -> Row:
    arguments = {"x": rng.choice((1, "a", None, [1]))}
    return {"type": "function", "function": {"name": "f", "arguments": rng.choice((arguments, json.dumps(arguments)))}}


def messages(rng: Random, *, role: str = "role", content: str = "content") -> list[Row]:
    names = ("human", "gpt", "observation") if role == "from" else ("user", "assistant", "tool")
    turns: list[Row] = [{role: "system", content: text(rng)}] if rng.random() < 0.3 else []
    for _ in range(rng.randint(1, 3)):
        turns.append({role: names[0], content: text(rng)})
        if rng.random() < 0.3:
            turns.append({role: names[1], content: rng.choice((None, text(rng))), "tool_calls": [call(rng)]})
            turns.append({role: names[2], content: text(rng)})
        thinking = {"reasoning_content": text(rng)} if rng.random() < 0.3 else {}
        turns.append({role: names[1], content: text(rng), **thinking})
    return turns


TOOLS = [{"type": "function", "function": {"name": "f", "parameters": {"properties": {"x": {"type": "integer"}}}}}]


def preference(rng: Random) -> Row:
    answer: Callable[[], Any] = lambda: rng.choice((text(rng), [{"role": "assistant", "content": text(rng)}]))  # noqa: E731
    return {"prompt": rng.choice((text(rng), messages(rng)[:-1])), "chosen": answer(), "rejected": answer()}


def chosen_by_letter(rng: Random) -> Row:
    texts = [text(rng) for _ in range(rng.randint(2, 4))]
    listed: Row = {
        "choices": {"choices": rng.choice((texts, str(texts), [{"label": c, "text": c} for c in texts]))},
        "columns": {f"{rng.choice(('option_', 'op', ''))}{'abcd'[place]}": t for place, t in enumerate(texts)},
        "numbered": {f"ending{place}": choice for place, choice in enumerate(texts)},
        "nested": {"question": {"stem": text(rng), "choices": [{"text": t, "label": "A"} for t in texts]}},
        "answers": {"answers": texts},
    }
    return {"question": text(rng), "label": rng.choice(("A", 1, "1", "(B)", [0])), **listed[rng.choice(list(listed))]}


def ranked(rng: Random) -> Row:
    answers = [{"text": text(rng), "score": rng.random()} for _ in range(rng.randint(1, 3))]
    two = {"human_ref_a": text(rng), "human_ref_b": text(rng), "labels": rng.choice((0, 1, 2.5))}
    beside = {"query": text(rng), "response": text(rng), "rejected_response": text(rng)}
    return rng.choice(({"prompt": text(rng), "completions": answers}, {"prompt": text(rng), **two}, beside))


def exported(rng: Random) -> Row:
    said = {"from_name": "response", "value": {"text": [text(rng)]}}
    message = {"author": {"role": "user"}, "content": {"parts": [text(rng)]}}
    return rng.choice(
        (
            {"id": 1, "data": {"prompt": text(rng)}, "annotations": [{"result": [said]}]},
            {"row_idx": 0, "row": {"text": text(rng)}, "truncated_cells": []},
            {"mapping": {"a": {"parent": None, "message": message}}, "current_node": "a"},
            {"messages": messages(rng)[:-1], "answer": text(rng)},
        )
    )


DRAWN: dict[str, Callable[[Random], Row]] = {
    "messages": lambda rng: {"messages": messages(rng), "tools": rng.choice((TOOLS, None, json.dumps(TOOLS)))},
    "sharegpt": lambda rng: {"conversations": messages(rng, role="from", content="value"), "system": text(rng)},
    "preference": preference,
    "alpaca": lambda rng: {"instruction": text(rng), "input": text(rng), "output": text(rng), "history": [["a", "b"]]},
    "prompt_completion": lambda rng: {"prompt": text(rng), "completion": text(rng), "label": rng.choice((True, False))},
    "reasoning": lambda rng: {"problem": text(rng), "generated_solution": text(rng), "expected_answer": text(rng)},
    "question_answer": lambda rng: {"question": text(rng), "answer": text(rng), "reasoning": text(rng)},
    "multiple_choice": lambda rng: {"question": text(rng), "choices": [text(rng), "b"], "answer": rng.choice("AB01")},
    "turns": lambda rng: {"turns": [text(rng), text(rng)], "reference": [text(rng), text(rng)]},
    "text": lambda rng: {"text": text(rng)},
    "ranked": ranked,
    "by letter": chosen_by_letter,
    "exported": exported,
}


def damage(value: Any, rng: Random) -> Any:
    """A copy in which one thing at any depth is missing, renamed, repeated, moved or of another type."""
    keys = value if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else ()
    inner: list[Any] = list(keys)
    if not inner or rng.random() < 0.2:
        return rng.choice(VALUES)
    key = rng.choice(inner)
    if is_container(value[key]) and rng.random() < 0.7:
        changed = value.copy()
        changed[key] = damage(value[key], rng)
        return changed
    return damage_list(value, key, rng) if isinstance(value, list) else damage_object(value, key, rng)


def is_container(value: Any) -> bool:
    return isinstance(value, dict | list)


def damage_object(value: Row, key: Any, rng: Random) -> Row:
    how, rest = rng.randrange(4), {name: item for name, item in value.items() if name != key}
    if how == 0:
        return rest
    if how == 1:
        return {**value, key: rng.choice(VALUES)}
    if how == 2:
        return {**rest, rng.choice(KEYS): value[key]}
    return {**value, rng.choice(KEYS): rng.choice(VALUES)}


def damage_list(value: list[Any], key: int, rng: Random) -> list[Any]:
    how = rng.randrange(4)
    if how == 0:
        return [*value[:key], *value[key + 1 :]]
    if how == 1:
        return [*value[:key], value[key], *value[key:]]
    if how == 2:
        return rng.sample(value, len(value))
    return [*value[:key], rng.choice(VALUES), *value[key + 1 :]]


def row_of(rng: Random) -> Any:
    row: Any = DRAWN[rng.choice(list(DRAWN))](rng)
    for _ in range(rng.choice((0, 0, 1, 1, 2, 4))):
        row = damage(row, rng)
    return row


def write_list(path: Path, rng: Random) -> None:
    path.write_text(json.dumps([row_of(rng) for _ in range(ROWS_PER_RUN)], indent=rng.choice((None, 1))))


def write_lines(path: Path, rng: Random) -> None:
    with path.open("w", encoding="utf-8", errors="surrogateescape") as file:
        file.writelines(damaged_line(row_of(rng), rng) + "\n" for _ in range(ROWS_PER_RUN))


def damaged_line(row: Any, rng: Random) -> str:
    line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode("utf-8", "surrogatepass")
    if rng.random() < 0.02:
        line = line[: rng.randrange(1, len(line) + 1)]
    return line.decode("utf-8", "surrogateescape").replace("\n", " ") or "{"


def settings(rng: Random, path: Path) -> tuple[Row, Row]:
    columns = rng.choice(({}, {}, {"prompt": "text"}, {"messages": "conversations"}))
    prepare = {
        "sources": [{"uri": str(path), "columns": columns, "remove_columns": rng.choice(([], ["weight"]))}],
        "dedup": rng.choice(("none", "exact", "normalized", "minhash")),
        "min_characters": rng.choice((0, 1, 5)),
        "max_characters": rng.choice((None, 4000)),
        "max_damaged_rows": ROWS_PER_RUN,
        "validation_size": rng.choice((0.15, 0.3)),
        "test_size": rng.choice((0, 0.15)),
        "seed": rng.randrange(5),
    }
    form = {
        "enable_thinking": rng.choice((True, False, "mixed")),
        "system_prompt": rng.choice((None, "Be brief.")),
        "assistant_turns": rng.choice(("all", "last")),
        "rewritten_turns": rng.choice(("unroll", "in_place", "skip")),
        "max_length": rng.choice((None, 64, 512)),
        "truncation": rng.choice(("drop", "truncate")),
        "rendered_text": rng.choice(("drop", "tokens")),
    }
    return prepare, form


def read_lines(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def check_reasons(lines: list[Row]) -> None:
    assert all(line["row"] >= 1 and line["reason"] and line["field"] for line in lines)


@pytest.mark.parametrize("seed", range(NUM_RUNS))
def test_every_row_is_in_the_dataset_or_has_a_reason(tmp_path: Path, seed: int) -> None:
    rng, path = Random(seed), tmp_path / ("rows.json" if seed % 4 == 0 else "rows.jsonl")
    (write_list if seed % 4 == 0 else write_lines)(path, rng)
    prepare, form = settings(rng, path)
    store = (tmp_path / "store").as_uri()

    prepared = run_step("data-prep", store=store, inputs={}, config=prepare)
    rows = fetch_artifact(prepared.reference)[0]
    kept = [row for split in rows.glob("*.parquet") for row in pq.read_table(split).to_pylist()]
    rejected = read_lines(rows / "rejected.jsonl")
    assert sorted([*(row["number"] for row in kept), *(line["row"] for line in rejected)]) == list(
        range(1, ROWS_PER_RUN + 1)
    )
    check_reasons(rejected)

    inputs = {"rows": str(prepared.reference), "base_model": "builtin:tiny-qwen3"}
    dataset = fetch_artifact(run_step("chat-format", store=store, inputs=inputs, config=form).reference)[0]
    examples = {row["id"] for split in dataset.glob("*.parquet") for row in pq.read_table(split).to_pylist()}
    rejected = read_lines(dataset / "rejected.jsonl")
    without = {line["row"] for line in rejected}
    assert len(rejected) == len(without)
    formatted = {name.partition("-")[0] for name in examples}
    assert all((row["id"] in formatted) != (row["number"] in without) for row in kept)
    check_reasons(rejected)
