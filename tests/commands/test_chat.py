"""A model is asked as users ask it: an adapter, a GGUF file in llama.cpp, an address, a registered version."""

import io
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from finemill.cli import main
from finemill.commands.chat_session import Session
from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.write import write_gguf
from finemill.models.llama_cpp import serve_chats
from finemill.models.reply import End, Piece

QUESTION = "What is 3 + 4?"
BASE = "builtin:tiny-qwen3"


@pytest.fixture(scope="session")
def gguf_file(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("gguf") / "small-Q8_0.gguf"
    write_gguf(SourceModel(tiny_model_dir), path, "Q8_0", "small", 1)
    return path


def ask(capsys: pytest.CaptureFixture[str], *arguments: str) -> dict[str, Any]:
    assert main(["chat", *arguments, "--json"]) == 0, capsys.readouterr().err
    found: dict[str, Any] = json.loads(capsys.readouterr().out)
    return found


def test_a_base_answers_one_question(capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, BASE, QUESTION)
    assert found["answer"].endswith("7.")
    assert found["finished"] is True
    assert found["num_tokens"] > 0
    assert found["sampling"]["temperature"] == 0


def test_a_gguf_file_and_its_address_answer_as_the_model_does(
    gguf_file: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    options = ("--preset", "greedy", "--no-think", "--context-length", "512")
    of_base = ask(capsys, BASE, QUESTION, *options)["answer"]
    assert ask(capsys, str(gguf_file), QUESTION, *options)["answer"] == of_base
    # A folder of GGUF files, too.
    assert ask(capsys, str(gguf_file.parent), QUESTION, *options)["answer"] == of_base
    with serve_chats(gguf_file, 1, 512) as address:
        found = ask(capsys, f"{address}/v1", QUESTION, *options)
    assert found["answer"] == of_base
    assert found["num_tokens"] > 0


def test_a_gguf_file_takes_the_sampling_of_its_family(gguf_file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = ask(capsys, str(gguf_file), QUESTION, "--think", "--max-new-tokens", "1", "--context-length", "512")
    assert found["sampling"] == {"temperature": 0.6, "top_p": 0.95, "top_k": 20, "min_p": 0.0, "seed": 0}
    assert found["finished"] is False


def test_an_adapter_is_put_on_the_base_that_is_given(
    tiny_adapter_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ("Tell me a long story.", "--max-new-tokens", "40")
    found = ask(capsys, str(tiny_adapter_dir), "--base-model", BASE, *arguments)
    assert found["answer"] != ask(capsys, BASE, *arguments)["answer"]


def test_a_question_from_a_pipe_is_answered_on_standard_output(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(f"{QUESTION}\n"))
    assert main(["chat", BASE, "--max-new-tokens", "1"]) == 0
    shown = capsys.readouterr()
    assert "raise --max-new-tokens" in shown.err


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["nothing", "Hi"], "names no model"),
        (["nothing", " "], "names no model"),
        (["absent.gguf", "Hi"], "no such file"),
        ([BASE, "  "], "the question is empty"),
        ([BASE, "Hi", "--temperature", "-1"], "--temperature -1: allowed is 0 to 5"),
        ([BASE, "Hi", "--max-new-tokens", "0"], "allowed is 1 or more"),
        ([BASE, "word " * 3000], "the model takes"),
        (["models:/absent@champion", "Hi"], "no registered model 'absent'"),
        (["models:/absent", "Hi"], "write models:/name@champion or models:/name/3"),
        ([f"file:///x@sha256:{'a' * 64}", "Hi"], "/x"),
        (["http://127.0.0.1:9/v1", "Hi"], "out of reach"),
    ],
)
def test_bad_input_is_one_line(
    arguments: list[str], said: str, tracking_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["chat", *arguments]) in (2, 75)
    error = capsys.readouterr().err.strip()
    assert said in error
    assert len(error.splitlines()) == 1


class Recorder:
    """Answers every chat alike, and remembers what it was asked."""

    def __init__(self) -> None:
        self.asked: list[tuple[list[dict[str, str]], bool | None]] = []

    def __call__(self, messages: Sequence[Mapping[str, str]], thinking: bool | None) -> Iterator[Piece | End]:
        self.asked.append(([dict(message) for message in messages], thinking))
        yield Piece("hm", thinking=True)
        yield Piece("Yes.")
        yield End(finished=True, num_tokens=3)


def test_a_conversation_keeps_answers_without_their_thinking(capsys: pytest.CaptureFixture[str]) -> None:
    record = Recorder()
    session = Session("small", record, "Be brief.", None)
    for line in ("First?", "/no_think", "Second?", "Third? /think", "/reset", "Fourth?", "/system Be long.", "Fifth?"):
        session.take(line)
    system = {"role": "system", "content": "Be brief."}
    said = {"role": "assistant", "content": "Yes."}
    first, second, third = ({"role": "user", "content": text} for text in ("First?", "Second?", "Third?"))
    assert record.asked[0] == ([system, first], None)
    assert record.asked[1] == ([system, first, said, second], False)
    assert record.asked[2] == ([system, first, said, second, said, third], True)
    assert record.asked[3] == ([system, {"role": "user", "content": "Fourth?"}], True)
    assert record.asked[4][0][0]["content"] == "Be long."
    assert "[thinking] hm\n[answer] Yes." in capsys.readouterr().out


def test_an_answer_that_is_stopped_is_no_part_of_the_conversation(capsys: pytest.CaptureFixture[str]) -> None:
    record = Recorder()
    stops = True

    def ask(messages: Sequence[Mapping[str, str]], thinking: bool | None) -> Iterator[Piece | End]:
        yield from record(messages, thinking)
        if stops:
            raise KeyboardInterrupt

    session = Session("small", ask, None, None)
    session.take("First?")
    stops = False
    session.take("Second?")
    assert [message["content"] for message in record.asked[-1][0]] == ["Second?"]
    assert "(stopped)" in capsys.readouterr().out
