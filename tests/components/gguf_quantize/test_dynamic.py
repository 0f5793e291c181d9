"""Types per tensor, chosen by measured error."""

from collections.abc import Mapping, Sequence
from itertools import product
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type

from finemill.artifacts.dataset import read_held_out
from finemill.artifacts.gguf import read_gguf_record
from finemill.artifacts.splits import Split
from finemill.components.gguf_quantize import dynamic
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.dynamic import Option, choose
from finemill.components.gguf_quantize.sensitivity import uses
from finemill.components.gguf_quantize.step import run
from finemill.models.causal_lm import load_causal_lm
from finemill.models.stored_model import StoredModel
from finemill.runtime.context import StepContext


def test_the_predicted_divergence_is_about_the_measured_one(tiny_model_dir: Path, tiny_dataset_dir: Path) -> None:
    splits: tuple[Split, ...] = ("train", "test")
    rows = [row.input_ids for split in splits for row in read_held_out(tiny_dataset_dir, split)]
    stored, source = StoredModel(tiny_model_dir), SourceModel(tiny_model_dir)
    used = uses(stored, source, rows)
    model = load_causal_lm(tiny_model_dir, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    with torch.inference_mode():
        before = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
        predicted = 0.0
        for key, name in source.names().items():
            if name in used:
                parameter = model.get_parameter(key)
                noise = torch.randn(parameter.shape, generator=generator) * parameter.std() * 0.02
                parameter += noise
                all_rows, once = np.arange(len(noise)), np.ones(len(noise), np.float32)
                predicted += sum(use.divergence(noise.numpy(), all_rows, once) for use in used[name])
        after = [model(torch.tensor([row])).logits[0].log_softmax(-1) for row in rows]
    measured = torch.cat([(p.exp() * (p - q)).sum(-1) for p, q in zip(before, after, strict=True)]).mean()
    # The labels are drawn, on few rows; what no part may do is go missing, or count twice.
    assert predicted == pytest.approx(float(measured), rel=0.4)


def test_the_choice_is_the_best_of_all_within_one_step_and_fits() -> None:
    random = Random(0)
    types = (Type.Q3_K, Type.Q4_K, Type.Q6_K)
    options: dict[str, Sequence[Option]] = {
        name: [
            Option(type_, num_bytes, random.random() * 2.0**-num_bytes)
            for type_, num_bytes in zip(types, (3, 4, 6), strict=True)
        ]
        for name in "abcdef"
    }
    for budget in range(18, 37):
        found = _total(options, choose(options, budget))
        totals = [
            _total(options, dict(zip(options, combination, strict=True)))
            for combination in product(types, repeat=len(options))
        ]
        assert found[0] <= budget
        # The knapsack's gap: what the last step that did not fit would have brought.
        assert found[1] <= min(error for size, error in totals if size <= max(18, budget - 3))


def _total(options: Mapping[str, Sequence[Option]], chosen: Mapping[str, Type]) -> tuple[int, float]:
    picked = [next(option for option in of if option.type == chosen[name]) for name, of in options.items()]
    return sum(option.num_bytes for option in picked), sum(option.error for option in picked)


def test_a_dynamic_file_is_no_larger_and_closer_to_the_merged_model(
    tiny_model_dir: Path,
    tiny_dataset_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(dynamic, "_SAMPLED_VALUES", 1 << 13)
    config = GGUFQuantizeConfig.model_validate(
        {"name": "small", "quantizations": ["Q4_K_M", "dynamic-q4_k_m"], "imatrix_rows": 8, "verify_rows": 0}
    )
    metrics = run(
        model=tiny_model_dir, dataset=tiny_dataset_dir, output_dir=tmp_path, config=config, context=step_context
    )
    assert (tmp_path / "small-dynamic-Q4_K_M.gguf").is_file()
    assert metrics["gguf/dynamic_q4_k_m/size_bytes"] <= metrics["gguf/q4_k_m/size_bytes"]
    assert metrics["gguf/dynamic_q4_k_m/kl"] < 0.8 * metrics["gguf/q4_k_m/kl"]
    assert len(read_gguf_record(tmp_path).files["DYNAMIC_Q4_K_M"].tensor_types) > 3
