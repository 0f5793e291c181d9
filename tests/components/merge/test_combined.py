"""Several adapters in one merge, against PEFT's own merge of each."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from finemill.artifacts.adapter import TrainingRecord, write_training
from finemill.artifacts.manifest import Producer, Reference, new_manifest
from finemill.artifacts.model import read_merge
from finemill.components.merge.combined import write_combined
from finemill.components.merge.config import MergeConfig
from finemill.errors import UserError
from finemill.runtime.context import StepContext
from finemill.storage.store import publish_artifact, staging_folder
from tests.components.merge.test_merged import adapter_dir, base_dir, merge, peft_merge

PLAIN = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"], rank_pattern={"q_proj": 2})
OTHER = LoraConfig(r=6, lora_alpha=3, target_modules=["q_proj", "up_proj"], use_rslora=True)
EXPERTS: dict[str, Any] = {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}


def published(adapter: Path) -> str:
    uri = f"{adapter.parent.as_uri()}/published/{adapter.name}"
    staging = staging_folder(uri)
    for path in adapter.iterdir():
        (staging / path.name).write_bytes(path.read_bytes())
    manifest = new_manifest("adapter", staging, Producer(step="train-qlora", version="0", code="t"))
    return str(Reference(uri, publish_artifact(staging, uri, manifest).digest))


@pytest.mark.parametrize(
    ("family", "first", "second"),
    [
        ("qwen2", PLAIN, OTHER),
        ("qwen2", LoraConfig(r=2, target_modules=["embed_tokens"]), LoraConfig(r=4, target_modules=["embed_tokens"])),
        ("qwen3_moe", LoraConfig(r=2, target_modules=["q_proj"], **EXPERTS), LoraConfig(r=3, **EXPERTS)),
    ],
)
def test_every_adapter_is_added_with_its_own_factor(
    family: str, first: LoraConfig, second: LoraConfig, tiny_model_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = base_dir(family, tiny_model_dir, tmp_path / "base", tied=False)
    adapters = [adapter_dir(base, tmp_path / name, config) for name, config in (("a", first), ("b", second))]
    further = [{"adapter": published(adapters[1]), "scale": -0.25}]
    output = merge(
        base, adapters[0], tmp_path / "m", step_context, scale=0.5, dtype="float32", further_adapters=further
    )
    record = read_merge(output)
    assert record
    assert [adapter.scale for adapter in record.further_adapters] == [-0.25]
    assert " x 0.5 and `" in (output / "README.md").read_text()
    tuned = [peft_merge(base, adapter) for adapter in adapters]
    before, written = whole(base), whole(output)
    for name, values in written.items():
        changes = [own[name].float() - before[name] for own in tuned]
        torch.testing.assert_close(values, before[name] + 0.5 * changes[0] - 0.25 * changes[1], msg=name)
    assert any(not torch.equal(written[name], before[name]) for name in before)


def whole(folder: Path) -> dict[str, torch.Tensor]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    state: dict[str, torch.Tensor] = model.state_dict()
    return state


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (LoraConfig(r=2, target_modules=["q_proj"], use_dora=True), "q_proj"),
        (LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["norm"]), r"norm\.weight"),
        (LoraConfig(r=2, target_modules=["q_proj"], bias="all"), "bias"),
        (LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices={"embed_tokens": [3]}), "embed_tokens"),
    ],
)
def test_what_is_more_than_a_sum_is_merged_by_itself(
    config: LoraConfig, named: str, tiny_model_dir: Path, tmp_path: Path
) -> None:
    base = base_dir("qwen2", tiny_model_dir, tmp_path / "base")
    plain, other = (adapter_dir(base, tmp_path / name, of) for name, of in (("a", PLAIN), ("b", config)))
    with pytest.raises(UserError, match=rf"{named}.* of the adapter in .*b is no product of two factors"):
        write_combined(base, [(plain, 1.0), (other, 1.0)], tmp_path)


def test_adapters_that_are_not_of_one_model_are_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    scaled = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "scaled"))
    positions = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 512}
    write_training(scaled, TrainingRecord(max_steps=1, log_history=(), rope_parameters=positions))
    with pytest.raises(UserError, match=r"scaled was trained with rope_scaling yarn x 2, the first one with none"):
        write_combined(tiny_model_dir, [(tiny_adapter_dir, 1.0), (scaled, 1.0)], tmp_path)
    other = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "other"))
    config = json.loads((other / "adapter_config.json").read_text())
    (other / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": "org/another"}))
    with pytest.raises(UserError, match=r"names org/another, which is not found here: nothing shows"):
        merge(
            tiny_model_dir, tiny_adapter_dir, tmp_path / "m", step_context, force=False,
            further_adapters=[{"adapter": published(other)}],
        )  # fmt: skip


@pytest.mark.parametrize(
    ("further", "message"),
    [
        ({"adapter": "adapters/a"}, "'adapters/a' is no artifact reference"),
        ({"adapter": f"file:///a@sha256:{'a' * 64}", "scale": 0}, "scale 0 leaves the adapter out"),
    ],
)
def test_a_further_adapter_is_a_reference_with_a_factor(further: dict[str, object], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        MergeConfig.model_validate({"further_adapters": [further]})
