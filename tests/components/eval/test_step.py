import math
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from finemill.artifacts.dataset import dataset_writer, read_held_out
from finemill.artifacts.evaluation import read_metrics, read_samples
from finemill.components.eval.config import EvalConfig
from finemill.components.eval.step import run as evaluate
from finemill.errors import UserError
from finemill.models.adapter import load_adapter
from finemill.runtime.context import StepContext

CONFIG = EvalConfig(max_new_tokens=24, models={"again": "builtin:tiny-qwen3"}, regression=True)


@pytest.fixture(scope="module")
def evaluated(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    tiny_dataset_dir: Path,
    step_context: StepContext,
    tmp_path_factory: pytest.TempPathFactory,
) -> tuple[Path, Mapping[str, float]]:
    folder = tmp_path_factory.mktemp("evaluation")
    metrics = evaluate(
        dataset=tiny_dataset_dir,
        base_model=tiny_model_dir,
        adapter=tiny_adapter_dir,
        output_dir=folder,
        config=CONFIG,
        context=step_context,
    )
    return folder, metrics


def test_metrics_are_flat_finite_and_written(evaluated: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = evaluated
    assert read_metrics(folder) == metrics
    assert all(math.isfinite(value) for value in metrics.values())
    assert metrics["eval/rows"] == 8
    assert {"eval/base/preference_accuracy_stderr", "eval/delta/preference_accuracy"} <= metrics.keys()
    assert "eval/base/example_reasoning/preference_accuracy" not in metrics
    assert {"eval/base/exact_match", "eval/tuned/perplexity", "eval/tuned/example_chat/rougeL"} <= metrics.keys()


def test_samples_hold_every_row_for_both_models(
    evaluated: tuple[Path, Mapping[str, float]], tiny_dataset_dir: Path
) -> None:
    samples = read_samples(evaluated[0])
    ids = [row.id for row in read_held_out(tiny_dataset_dir, "test")]
    assert [sample.id for sample in samples] == ids * 3
    assert [sample.model for sample in samples] == ["base"] * 8 + ["tuned"] * 8 + ["again"] * 8
    assert [sample.exact_match is None for sample in samples[:8]] == [False, False, False, True] * 2


def test_a_further_model_stands_beside_both(evaluated: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = evaluated
    # The same model again, asked in chats: the same answers.
    assert metrics["eval/again/exact_match"] == metrics["eval/base/exact_match"]
    assert metrics["eval/again/delta/rougeL"] == 0.0
    assert "eval/again/loss" not in metrics
    assert {"eval/tuned/regression/accuracy", "eval/delta/regression/reading_stderr"} <= metrics.keys()
    assert "| Kept abilities |" in (folder / "report.md").read_text()
    assert "| again | 8 |" in (folder / "report.md").read_text()
    assert "Other models on the same rows" in (folder / "report.html").read_text()


def test_base_is_the_base_and_tuned_is_base_with_adapter(
    evaluated: tuple[Path, Mapping[str, float]], tiny_model_dir: Path, tiny_adapter_dir: Path, tiny_dataset_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    rows = read_held_out(tiny_dataset_dir, "test")
    assert evaluated[1]["eval/base/loss"] == pytest.approx(plain_loss(base, rows), rel=1e-5)
    assert evaluated[1]["eval/tuned/loss"] == pytest.approx(
        plain_loss(load_adapter(base, tiny_adapter_dir), rows), rel=1e-5
    )
    assert abs(evaluated[1]["eval/delta/loss"]) > 0.01


def test_a_model_prefers_the_answer_that_is_likelier_per_token(
    evaluated: tuple[Path, Mapping[str, float]], tiny_model_dir: Path, tiny_dataset_dir: Path
) -> None:
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32)
    samples = {sample.id: sample for sample in read_samples(evaluated[0])[:8]}
    for row in read_held_out(tiny_dataset_dir, "test"):
        worse = row.with_rejected
        expected = plain_loss(base, [row]) < plain_loss(base, [worse]) if worse else None
        assert samples[row.id].prefers_chosen == expected
    assert [sample.rejected for sample in samples.values() if sample.rejected] == ["Day the is nice a."] * 2
    assert "Day the is nice a." in (evaluated[0] / "report.html").read_text()
    assert "| Preference accuracy |" in (evaluated[0] / "report.md").read_text()


@torch.inference_mode()
def plain_loss(model: Any, rows: Sequence[Any]) -> float:
    """One row at a time, by transformers' own loss."""
    losses = [float(model(torch.tensor([r.input_ids]), labels=torch.tensor([r.labels])).loss) for r in rows]
    counts = [sum(label != -100 for label in row.labels) for row in rows]
    return float(np.average(losses, weights=counts))


def test_answers_do_not_depend_on_the_batch_they_are_in(tiny_model_dir: Path, tiny_dataset_dir: Path) -> None:
    from transformers import AutoTokenizer

    from finemill.models.generation import generate_answers, stop_token_ids

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_dir, dtype=torch.float32).eval()
    prompts = [tokenizer(row.prompt)["input_ids"] for row in read_held_out(tiny_dataset_dir, "test")]
    prompts[0] = prompts[0][-5:]
    stops = stop_token_ids(tokenizer, tiny_model_dir)
    together, alone = (
        generate_answers(model, tokenizer, prompts, stop_token_ids=stops, max_new_tokens=24, batch_size=size)
        for size in (8, 1)
    )
    assert together == alone
    assert any(answer.finished for answer in together)


def _evaluate(
    tiny_model_dir: Path, adapter: Path, dataset: Path, folder: Path, context: StepContext, **config: Any
) -> Mapping[str, float]:
    return evaluate(
        dataset=dataset,
        base_model=tiny_model_dir,
        adapter=adapter,
        output_dir=folder,
        config=EvalConfig(max_rows=2, max_new_tokens=4, **config),
        context=context,
    )


def test_an_empty_split_is_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tmp_path: Path, step_context: StepContext
) -> None:
    with dataset_writer(tmp_path, "test"):
        pass
    with pytest.raises(UserError, match="holds no rows"):
        evaluate(
            dataset=tmp_path,
            base_model=tiny_model_dir,
            adapter=tiny_adapter_dir,
            output_dir=tmp_path,
            config=CONFIG,
            context=step_context,
        )


def test_a_dataset_of_another_tokenizer_is_refused(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    tiny_dataset_dir: Path,
    tmp_path: Path,
    step_context: StepContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = [replace(row, input_ids=[*row.input_ids, 90_000]) for row in read_held_out(tiny_dataset_dir, "test")]
    monkeypatch.setattr("finemill.components.eval.step.read_held_out", lambda *_: rows)
    with pytest.raises(
        UserError, match=r"token id 90000, the model only \d+ tokens: it was made for another tokenizer"
    ):
        _evaluate(tiny_model_dir, tiny_adapter_dir, tiny_dataset_dir, tmp_path, step_context)


def test_a_missing_adapter_is_said_in_one_line(
    tiny_model_dir: Path, tiny_dataset_dir: Path, tmp_path: Path, step_context: StepContext
) -> None:
    with pytest.raises(UserError, match=r"adapter_config\.json not found"):
        evaluate(
            dataset=tiny_dataset_dir,
            base_model=tiny_model_dir,
            adapter=tmp_path,
            output_dir=tmp_path,
            config=CONFIG,
            context=step_context,
        )


def test_a_base_in_4_bits_scores_a_little_other_than_in_16(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    tiny_dataset_dir: Path,
    tmp_path: Path,
    step_context: StepContext,
) -> None:
    losses = [
        _evaluate(tiny_model_dir, tiny_adapter_dir, tiny_dataset_dir, tmp_path, step_context, device="cpu", **config)[
            "eval/tuned/loss"
        ]
        for config in ({"dtype": "float32"}, {"dtype": "bfloat16"}, {"load_in_4bit": True})
    ]
    assert 0 < abs(losses[1] - losses[0]) < 0.02 * losses[0]
    assert 0 < abs(losses[2] - losses[0]) < 0.5 * losses[0]


def test_another_base_than_the_adapters_own_is_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tiny_dataset_dir: Path, tmp_path: Path, step_context: StepContext
) -> None:
    other = Path(shutil.copytree(tiny_model_dir, tmp_path / "other"))
    (other / "generation_config.json").write_text('{"eos_token_id": 1}')
    context = replace(step_context, references={**step_context.references, "base_model": str(other)})
    with pytest.raises(UserError, match=r"eval: the adapter was trained on .*another digest.*--force true"):
        _evaluate(other, tiny_adapter_dir, tiny_dataset_dir, tmp_path, context)
    assert _evaluate(other, tiny_adapter_dir, tiny_dataset_dir, tmp_path, context, force=True)


def test_a_missing_gpu_is_named(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    tiny_dataset_dir: Path,
    tmp_path: Path,
    step_context: StepContext,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="device is cuda, and PyTorch finds no GPU"):
        _evaluate(tiny_model_dir, tiny_adapter_dir, tiny_dataset_dir, tmp_path, step_context, device="cuda")


def test_a_loss_that_is_no_number_is_said_in_one_line(
    tiny_model_dir: Path, tiny_adapter_dir: Path, tiny_dataset_dir: Path, tmp_path: Path, step_context: StepContext
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    weights = load_file(adapter / "adapter_model.safetensors")
    # Finite, and too large for the products of two layers.
    save_file({name: tensor * 1e30 for name, tensor in weights.items()}, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=r"tuned model's loss is no number on 2 of 2 rows, first on test-"):
        _evaluate(tiny_model_dir, adapter, tiny_dataset_dir, tmp_path, step_context, device="cpu")
