import json
from pathlib import Path

import pytest

from finemill.artifacts.comparison import read_answers
from finemill.cli import main

BASE = "builtin:tiny-qwen3"


@pytest.fixture
def rows(tmp_path: Path) -> str:
    path = tmp_path / "rows.jsonl"
    lines = [{"problem": f"What is 3 + {n}?", "solution": f"{3 + n}.", "expected_answer": f"{3 + n}"} for n in range(4)]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_models_are_compared_on_a_file_of_the_users_own(
    rows: str, tiny_adapter_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "out"
    models = [f"base={BASE}", f"tuned={tiny_adapter_dir}", "--base-model", BASE]
    options = ["--rows", rows, "--max-new-tokens", "24", "--thinking", "both", "--output", str(output)]
    assert main(["compare", *models, *options]) == 0
    shown = capsys.readouterr()
    assert [line.split()[:2] for line in shown.out.splitlines()[1:]] == [
        ["base", "thinking"], ["base", "plain"], ["tuned", "thinking"], ["tuned", "plain"]
    ]  # fmt: skip
    assert "4 of 4" in shown.err
    answers = read_answers(output)
    assert len(answers) == 2 * 2 * 4
    metrics = json.loads((output / "metrics.json").read_text())
    assert metrics[1]["scores"]["exact_match"]["rows"] == 4
    assert metrics[1]["scores"]["exact_match"]["mean"] > 0
    page = (output / "report.html").read_text()
    assert "base, tuned" in page
    assert page.count("<article") == 4


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rows", "nowhere.jsonl"], "no such file"),
        (["--samples", "4", "--preset", "greedy"], "all would be equal"),
        (["--samples", "0"], "allowed is 1 or more"),
        ([BASE], f"two models are called {BASE}"),
        (["other=http://127.0.0.1:9/v1"], "out of reach"),
        (["--judge", "http://127.0.0.1:9/v1", "--judge-name", "j"], "name a second one"),
        ([f"other={BASE}", "--judge", "http://127.0.0.1:9/v1"], "out of reach"),
    ],
)
def test_bad_input_is_one_line(arguments: list[str], said: str, rows: str, capsys: pytest.CaptureFixture[str]) -> None:
    options = [] if "--rows" in arguments else ["--rows", rows]
    assert main(["compare", BASE, *arguments, *options, "--max-new-tokens", "1"]) in (2, 75)
    assert said in capsys.readouterr().err.splitlines()[-1]
