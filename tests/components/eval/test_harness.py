import json
from pathlib import Path

import pytest
import yaml

from finemill.artifacts.metrics import ModelName
from finemill.components.eval.answer import switches
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.harness import read_tasks, score_tasks, summarize_tasks
from finemill.components.eval.model_state import model_state
from finemill.errors import UserError
from finemill.tracking.settings import Tracking

CAPITALS: dict[str, object] = {
    "task": "capitals",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "capitals.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "Question: {{question}}\nAnswer:",
    "doc_to_choice": "{{choices}}",
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc"}],
}
SUMS: dict[str, object] = {
    "task": "sums",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": "sums.jsonl"},
    "test_split": "train",
    "output_type": "generate_until",
    "doc_to_text": "{{question}}",
    "doc_to_target": "{{answer}}",
    "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
    "filter_list": [
        {"name": "last", "filter": [{"function": "regex", "regex_pattern": "([0-9]+)"}, {"function": "take_first"}]}
    ],
    "metric_list": [{"metric": "exact_match"}],
}


@pytest.fixture
def task_paths(tmp_path: Path) -> list[str]:
    """Two tasks with their rows."""
    rows: dict[str, list[dict[str, object]]] = {
        "capitals": [
            {"question": f"{number}?", "choices": ["Rome", "Paris"], "answer": number % 2} for number in range(4)
        ],
        "sums": [{"question": f"{number} + 1 =", "answer": str(number + 1)} for number in range(3)],
    }
    for name, lines in rows.items():
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    for task in (CAPITALS, SUMS):
        (tmp_path / f"{task['task']}.yaml").write_text(yaml.safe_dump(task))
    return [str(tmp_path / f"{name}.yaml") for name in rows]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_base_and_tuned_answer_the_tasks_of_a_user_without_a_hub(
    task_paths: list[str], short_model_dir: Path, tiny_model_dir: Path
) -> None:
    pytest.importorskip("lm_eval")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(short_model_dir, dtype=torch.float32)
    tuned = get_peft_model(base, LoraConfig(r=2, target_modules="all-linear")).eval()
    metrics = score_tasks(
        read_tasks(task_paths),
        tuned,
        AutoTokenizer.from_pretrained(tiny_model_dir),
        switches(tuned),
        batch_size=4,
        limit=2,
        chat=False,
    )
    # An adapter that was just made changes nothing.
    assert metrics["eval/base/lm_eval/capitals/acc"] == metrics["eval/tuned/lm_eval/capitals/acc"] == 0.5
    assert metrics["eval/delta/lm_eval/capitals/acc"] == 0
    assert {name for name in metrics if "sums" in name and "tuned" in name} == {
        "eval/tuned/lm_eval/sums/exact_match_last",
        "eval/tuned/lm_eval/sums/exact_match_last_stderr",
    }


def test_changes_of_a_task_are_paired() -> None:
    scores: dict[ModelName, dict[str, dict[int, float]]] = {
        "base": {"t/acc": {0: 0.0, 1: 1.0, 2: 0.0, 3: 0.0}},
        "tuned": {"t/acc": {3: 1.0, 2: 0.0, 1: 1.0, 0: 1.0}},
    }
    metrics = summarize_tasks(scores)
    assert metrics["eval/tuned/lm_eval/t/acc"] == 0.75
    assert metrics["eval/delta/lm_eval/t/acc"] == 0.5
    assert metrics["eval/delta/lm_eval/t/acc_stderr"] > 0


def test_other_rows_are_another_evaluation(task_paths: list[str]) -> None:
    config = EvalConfig(lm_eval_tasks=task_paths)
    before = model_state({}, config, Tracking.of_environment())
    (Path(task_paths[1]).parent / "sums.jsonl").write_text('{"question": "1 + 1 =", "answer": "2"}\n')
    assert model_state({}, config, Tracking.of_environment()) != before


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"dataset_path": "openai/gsm8k"}, "nothing is fetched"),
        ({"dataset_kwargs": {"data_files": "gone.jsonl"}}, "no file .*gone.jsonl"),
        ({"include": "other.yaml"}, "uses include"),
        ({"task": None}, "has no name under `task`"),
    ],
)
def test_a_task_that_cannot_be_answered_offline_is_one_line(
    change: dict[str, object], said: str, task_paths: list[str]
) -> None:
    Path(task_paths[0]).write_text(yaml.safe_dump(CAPITALS | change))
    with pytest.raises(UserError, match=said):
        read_tasks(task_paths)


def test_a_task_with_python_code_is_refused(task_paths: list[str]) -> None:
    path = Path(task_paths[0])
    path.write_text(path.read_text() + "process_results: !function utils.process\n")
    with pytest.raises(UserError, match="names no Python code"):
        read_tasks(task_paths)
