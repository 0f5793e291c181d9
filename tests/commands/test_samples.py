import json
from pathlib import Path
from typing import Any

import pytest

from finemill.artifacts.evaluation import Sample, write_samples
from finemill.cli import main
from finemill.rows.shapes import detect_shape, to_conversation

PROMPT = "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWhat is 3 + 4?<|im_end|>\n<|im_start|>assistant\n"


@pytest.fixture
def evaluation(tmp_path: Path) -> str:
    samples = [
        Sample(
            id=row, source="own", model=model, prompt=PROMPT, completion=f"It is {said}.", reference="It is 7.",
            answer="7", final_answer=said, outcome="right" if said == "7" else "wrong", exact_match=said == "7",
            loss=0.5, num_tokens=3, num_generated_tokens=4, finished=True, format_ok=True,
        )
        for model, said in (("base", "8"), ("tuned", "7"))
        for row in ("a", "b")
    ]  # fmt: skip
    write_samples(tmp_path, samples)
    return str(tmp_path)


def lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_what_was_evaluated_is_scored_again(
    evaluation: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["samples", evaluation, "--model", "tuned"]) == 0
    file = tmp_path / "rows.jsonl"
    file.write_text(capsys.readouterr().out)
    assert main(["score", str(file), "--metrics", "maths", "--json"]) == 0
    found = lines(capsys)[-1]["means"]["exact_match"]
    assert (found["mean"], found["rows"]) == (1.0, 2)


def test_evalscope_gets_each_question_once(evaluation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", evaluation, "--format", "evalscope"]) == 0
    assert lines(capsys) == [{"system": "Be brief.", "query": "What is 3 + 4?", "response": "7"}] * 2


def test_a_longer_chat_keeps_its_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    turns = [("user", "What is 3 + 4?"), ("assistant", "7"), ("user", "And doubled?")]
    prompt = "".join(f"<|im_start|>{role}\n{text}<|im_end|>\n" for role, text in turns) + "<|im_start|>assistant\n"
    said = Sample(
        id="a", source="own", model="tuned", prompt=prompt, completion="15", reference="14", num_tokens=1,
        num_generated_tokens=1, finished=True, format_ok=True,
    )  # fmt: skip
    write_samples(tmp_path, [said])
    messages = [{"role": role, "content": text} for role, text in turns]
    assert main(["samples", str(tmp_path), "--format", "evalscope"]) == 0
    assert lines(capsys) == [{"messages": messages, "response": "14"}]
    assert main(["samples", str(tmp_path), "--format", "preferences"]) == 0
    assert lines(capsys)[0]["prompt"] == messages


def test_weave_s_logger_takes_the_lines(evaluation: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With the signature of `weave.EvaluationLogger.log_example`, as documented."""
    logged: list[dict[str, Any]] = []

    def log_example(inputs: dict[str, Any], output: Any, scores: dict[str, float | bool]) -> None:
        logged.append(scores)

    assert main(["samples", evaluation, "--format", "weave"]) == 0
    for line in lines(capsys):
        line.pop("model")
        log_example(**line)
    assert [scores["exact_match"] for scores in logged] == [False, False, True, True]
    assert logged[0] == {"cut_off": False, "exact_match": False, "finished": True, "format_ok": True, "loss": 0.5}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # MLflow's own, of its type hints and of what it deprecates
def test_mlflows_own_evaluation_judges_the_answers(
    evaluation: str, tracking_uri: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from mlflow.genai import evaluate
    from mlflow.genai.scorers import scorer

    @scorer
    def right(outputs: str, expectations: dict[str, str]) -> bool:
        return expectations["answer"] in outputs

    assert main(["samples", evaluation, "--format", "mlflow"]) == 0
    assert evaluate(data=lines(capsys), scorers=[right]).metrics == {"right/mean": 0.5}


def test_answers_that_differ_from_the_reference_become_preferences_that_data_prep_reads(
    evaluation: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """A round of SPIN: the model's own answers are rejected; what it says as the reference does teaches nothing."""
    assert main(["samples", evaluation, "--format", "preferences"]) == 0
    found = lines(capsys)
    assert len(found) == 2
    assert detect_shape(found[0]) == "preference"
    conversation = to_conversation(found[0], "preference")
    assert [message["content"] for message in conversation.messages] == ["Be brief.", "What is 3 + 4?", "It is 7."]
    assert conversation.rejected is not None
    assert conversation.rejected[-1]["content"] == "It is 8."


def test_what_is_no_evaluation_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", str(tmp_path / "nothing")]) == 2
    assert "no such file or folder; give the reference, <uri>@sha256:<digest>, that eval" in capsys.readouterr().err


def test_a_model_that_is_not_there_is_said(evaluation: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["samples", evaluation, "--model", "q4"]) == 2
    assert "no model 'q4' in the evaluation; it has base, tuned" in capsys.readouterr().err
