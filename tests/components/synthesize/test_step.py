"""The step against a server that answers as a model does, and against one that fails in every way."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.write import write_gguf
from finemill.components.synthesize.step import _copy_held_out
from finemill.errors import TemporaryError, UserError
from finemill.models.llama_cpp import serve_chats
from finemill.runtime.run import StepResult, run_step
from finemill.storage.store import fetch_artifact
from tests.serving import serving

Row = dict[str, Any]
# A status to answer with (200 for an answer), or a body that is no answer, or None for a connection that breaks off.
Failure = int | bytes | None


class Server(ThreadingHTTPServer):
    """Answers by what the request asks for; `failures` come first, one a request."""

    failures: list[Failure]
    asked: int = 0
    fails_always = False


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        self.reply(200, {"data": [{"id": "writer"}]})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.asked += 1
        if self.server.fails_always:
            self.reply(503, {"error": {"message": "overloaded"}})
        elif self.server.failures and (failure := self.server.failures.pop(0)) != 200:
            self.fail(failure)
        else:
            text = answer(body["messages"][0]["content"], body["messages"][1]["content"])
            choice = {"message": {"role": "assistant", "content": text}, "finish_reason": "stop"}
            self.reply(200, {"choices": [choice], "usage": {"prompt_tokens": 100, "completion_tokens": 10}})

    def fail(self, failure: Failure) -> None:
        if failure is None:
            self.close_connection = True
            self.connection.close()
        elif isinstance(failure, int):
            self.reply(failure, {"error": {"message": "no"}})
        else:
            self.send(200, failure)

    def reply(self, status: int, value: Row) -> None:
        self.send(status, json.dumps(value).encode())

    def send(self, status: int, body: bytes) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Retry-After", "0")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None:
        """Nothing on the screen."""


def answer(task: str, text: str) -> str:
    if "questions that" in task:
        pairs = [{"question": f"{n}. What of {text}?", "answer": f"{n}: {text}"} for n in range(2)]
        return f"Here they are:\n```json\n{json.dumps(pairs)}\n```"
    if "Translate" in task:
        return json.dumps([f"[{word}]" for word in json.loads(text)])
    if "may ask next" in task:
        return json.dumps({"question": "And then?", "answer": "Nothing."})
    if "Score" in task:
        return 'Good.\n{"score": 9}' if "1" in text else 'Bad.\n{"score": 2}'
    return "What is it?" if "question or task" in task else "Another answer."


@pytest.fixture
def server() -> Iterator[Server]:
    with serving(Server(("127.0.0.1", 0), Handler)) as running:
        running.failures = []
        yield running


@pytest.fixture
def synthesize(server: Server, folder_store: str, tmp_path: Path) -> Callable[..., StepResult]:
    """Runs the step on twelve chats, or on as many documents."""

    def run(task: str, *, documents: bool = False, **fields: Any) -> StepResult:
        rows = [
            {"text": f"Paper {n} is long."} if documents else {"question": f"What is {n}?", "answer": f"It is {n}."}
            for n in range(12)
        ]
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        sources = {"sources": [{"uri": str(path)}], "validation_size": 0, "test_size": 0.2}
        prepared = run_step("data-prep", store=folder_store, inputs={}, config=sources)
        url = f"http://127.0.0.1:{server.server_port}/v1"
        config = {"url": url, "task": task, "max_retries": 0, "parallel": 2, **fields}
        return run_step("synthesize", store=folder_store, inputs={"rows": str(prepared.reference)}, config=config)

    return run


def folder(result: StepResult) -> Path:
    return fetch_artifact(result.reference)[0]


def lines(result: StepResult, name: str) -> list[Row]:
    return [json.loads(line) for line in (folder(result) / name).read_text().splitlines()]


def train(result: StepResult) -> list[Row]:
    rows: list[Row] = pq.read_table(folder(result) / "train.parquet").to_pylist()
    return rows


@pytest.mark.parametrize(
    ("task", "documents", "fields", "keys"),
    [
        ("question_answer", True, {}, {"question", "answer"}),
        ("rewrite", False, {}, {"messages"}),
        ("extend", False, {}, {"messages"}),
        ("translate", False, {"language": "German"}, {"messages"}),
        ("translate", True, {"language": "German"}, {"text"}),
        ("back_translate", True, {}, {"prompt", "chosen", "rejected"}),
        ("judge", False, {}, {"question", "answer"}),
    ],
)
def test_every_task_makes_rows_that_keep_their_source(
    synthesize: Callable[..., StepResult], task: str, documents: bool, fields: Row, keys: set[str]
) -> None:
    result = synthesize(task, documents=documents, **fields)
    made, origins = lines(result, "synthetic.jsonl"), lines(result, "origins.jsonl")
    assert made
    assert all(set(row) == keys for row in made)
    assert [json.loads(row["row"]) for row in train(result)] == made
    assert [row["id"] for row in train(result)] == [origin["id"] for origin in origins]
    assert {row["source"] for row in train(result)} == {origin["source"] for origin in origins}
    assert pq.read_table(folder(result) / "test.parquet").num_rows > 0
    assert result.manifest.metrics["synthesize/rows_written"] == len(made)


def test_what_the_replies_say_is_what_the_rows_hold(synthesize: Callable[..., StepResult]) -> None:
    (row, *_) = lines(synthesize("extend", max_rows=1), "synthetic.jsonl")
    assert [turn["content"] for turn in row["messages"]][2:] == ["And then?", "Nothing."]
    judged = synthesize("judge")
    assert all("1" in row["question"] for row in lines(judged, "synthetic.jsonl"))
    assert {line["reason"] for line in lines(judged, "rejected.jsonl")} == {"score_too_low"}


def test_chat_format_takes_the_rows_and_data_prep_the_file(
    synthesize: Callable[..., StepResult], folder_store: str
) -> None:
    result = synthesize("rewrite", keep_source_rows=True)
    inputs = {"rows": str(result.reference), "base_model": "builtin:tiny-qwen3"}
    assert (
        run_step("chat-format", store=folder_store, inputs=inputs, config={}).manifest.metrics["dataset/train_examples"]
        == 2 * (result.manifest.metrics["synthesize/rows_written"])
    )
    sources = {"sources": [{"uri": str(folder(result) / "synthetic.jsonl")}], "validation_size": 0, "test_size": 0}
    again = run_step("data-prep", store=folder_store, inputs={}, config=sources)
    assert again.manifest.metrics["data/train_rows"] == result.manifest.metrics["synthesize/rows_written"]


def test_every_failure_is_tried_again_or_has_a_reason(server: Server, synthesize: Callable[..., StepResult]) -> None:
    server.failures = [200, 503, 429, None, b"<html>", b'{"choices": [null, {"delta": 1}], "usage": 7}', 400]
    server.failures += [b'{"choices": 5}', b"[]", 408, 409, 500]
    server.failures += [b'{"choices": [{"message": {"content": "cut"}, "finish_reason": "length"}]}']
    result = synthesize("rewrite", max_retries=1, parallel=1)
    rejected = {line["reason"] for line in lines(result, "rejected.jsonl")}
    assert rejected == {"request_failed", "request_refused", "reply_cut"}
    assert result.manifest.metrics["synthesize/retries"] > 1
    assert (
        result.manifest.metrics["synthesize/rows_written"] + len(lines(result, "rejected.jsonl"))
        == (result.manifest.metrics["synthesize/rows_read"])
    )


@pytest.mark.parametrize(("status", "error"), [(401, UserError), (400, UserError), (503, TemporaryError)])
def test_a_server_that_never_answers_ends_the_run_in_one_line(
    server: Server, synthesize: Callable[..., StepResult], status: int, error: type[Exception]
) -> None:
    server.failures = [status] * 99
    with pytest.raises(error, match=r"127\.0\.0\.1"):
        synthesize("rewrite", max_failures=2)


def test_a_run_that_ends_early_goes_on_where_it_was(server: Server, synthesize: Callable[..., StepResult]) -> None:
    with pytest.raises(UserError, match=r"max_tokens 300 are spent \(\d+\): \d+ replies are kept"):
        synthesize("rewrite", max_tokens=300, parallel=1)
    asked = server.asked
    server.fails_always = True
    with pytest.raises(TemporaryError):
        synthesize("rewrite", max_failures=1, parallel=1)
    server.fails_always = False
    result = synthesize("rewrite")
    assert asked == 3
    assert result.manifest.metrics["synthesize/requests"] == result.manifest.metrics["synthesize/rows_read"] - asked
    assert synthesize("rewrite", max_cost=1, price_per_million_reply_tokens=1).reused


def test_cost_is_counted_by_the_prices(synthesize: Callable[..., StepResult]) -> None:
    result = synthesize(
        "rewrite", max_rows=2, price_per_million_prompt_tokens=1000, price_per_million_reply_tokens=5000
    )
    assert result.manifest.metrics["synthesize/cost"] == pytest.approx(2 * (100 * 1000 + 10 * 5000) / 1e6)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"task": "translate"}, "language"),
        ({"task": "rewrite", "language": "German"}, "language"),
        ({"task": "rewrite", "max_cost": 1}, "max_cost"),
    ],
)
def test_settings_that_do_not_fit_together_are_refused(fields: Row, message: str) -> None:
    with pytest.raises(UserError, match=message):
        run_step("synthesize", store="unused", inputs={"rows": "x"}, config={"url": "http://x/v1", **fields})


def test_llama_cpp_s_server_writes_rows(
    tiny_model_dir: Path, tmp_path: Path, synthesize: Callable[..., StepResult]
) -> None:
    """A small model's own words: rows of them, or a reason for each that says too little."""
    write_gguf(SourceModel(tiny_model_dir), tmp_path / "small.gguf", "Q8_0", "small", 1)
    with serve_chats(tmp_path / "small.gguf", 1, 1024, parallel=2) as address:
        result = synthesize("back_translate", url=f"{address}/v1", documents=True, max_rows=4, max_new_tokens=48)
    metrics, rejected = result.manifest.metrics, lines(result, "rejected.jsonl")
    assert metrics["synthesize/rows_written"] + len(rejected) == metrics["synthesize/rows_read"] == 4
    assert {line["reason"] for line in rejected} <= {"reply_cut", "reply_empty", "empty_turn"}
    assert metrics["synthesize/reply_tokens"] > 0
    for row in lines(result, "synthetic.jsonl"):
        assert row["chosen"].startswith("Paper")
        assert row["prompt"]
        assert row["rejected"]


def test_answers_that_are_labelled_bad_are_held_out_with_their_questions(tmp_path: Path) -> None:
    row = {"prompt": "Is 3 even?", "completion": "yes", "label": False}
    source = tmp_path / "rows.jsonl"
    source.write_text(
        "".join(json.dumps(row | {"prompt": f"Is {n} even?"}) + "\n" for n in range(20)), encoding="utf-8"
    )
    config = {"sources": [{"uri": str(source)}], "labelled_bad": "keep", "validation_size": 0.4, "test_size": 0}
    prepared = run_step("data-prep", store=tmp_path.as_uri(), inputs={}, config=config)
    output = tmp_path / "output"
    output.mkdir()
    assert len(_copy_held_out(fetch_artifact(prepared.reference)[0], output)) > 2
