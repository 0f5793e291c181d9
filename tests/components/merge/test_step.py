import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from peft.tuners.lora.layer import Linear
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from finemill.artifacts.manifest import Producer, new_manifest
from finemill.artifacts.model import read_merge
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.parity import compare_logits, probe_prompts
from finemill.components.merge.step import run as merge_adapter
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.errors import StepError, UserError
from finemill.models.adapter import WEIGHTS_NAME
from finemill.models.generation import stop_token_ids
from finemill.models.nf4.encode import round_trip
from finemill.runtime.context import StepContext


@pytest.fixture(scope="module")
def merged(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, float]]:
    folder = tmp_path_factory.mktemp("merged")
    metrics = merge_adapter(
        base_model=tiny_model_dir,
        adapter=tiny_adapter_dir,
        output_dir=folder,
        config=MergeConfig(max_shard_size="3MB"),
        context=step_context,
    )
    return folder, metrics


def test_each_weight_is_base_plus_scaled_product_rounded_once(
    merged: tuple[Path, Mapping[str, float]], tiny_model_dir: Path, tiny_adapter_dir: Path
) -> None:
    base = load_file(tiny_model_dir / "model.safetensors")
    adapter = load_file(tiny_adapter_dir / "adapter_model.safetensors")
    model = AutoModelForCausalLM.from_pretrained(merged[0], dtype=torch.bfloat16)
    key = "model.layers.3.mlp.down_proj"
    low_rank = adapter[f"base_model.model.{key}.lora_B.weight"] @ adapter[f"base_model.model.{key}.lora_A.weight"]
    expected = (base[f"{key}.weight"].float() + 8 / 4 * low_rank).bfloat16()
    assert torch.equal(model.state_dict()[f"{key}.weight"], expected)
    assert torch.equal(model.state_dict()["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_the_written_model_is_16_bit_sharded_and_tied(merged: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = merged
    shards = sorted(folder.glob("*.safetensors"))
    assert len(shards) > 1
    for shard in shards:
        with safe_open(shard, framework="pt") as file:
            assert "lm_head.weight" not in file.keys()  # noqa: SIM118 safe_open is no mapping
            assert {file.get_slice(key).get_dtype() for key in file.keys()} == {"BF16"}  # noqa: SIM118
    assert metrics["merge/size_bytes"] == sum(shard.stat().st_size for shard in shards)


def test_parity_is_measured_and_recorded(merged: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = merged
    record = json.loads((folder / "merge.json").read_text())
    assert record["base_model"] == "builtin:tiny-qwen3"
    assert record["kl"] == metrics["merge/kl"]
    assert 0 < metrics["merge/kl"] < 1e-3
    assert metrics["merge/top1_agreement"] > 0.95
    assert metrics["merge/max_abs_diff"] > 0


def test_tokenizer_and_chat_template_are_the_adapters_byte_for_byte(
    merged: tuple[Path, Mapping[str, float]], tiny_adapter_dir: Path
) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        assert (merged[0] / name).read_bytes() == (tiny_adapter_dir / name).read_bytes()
    chat = [{"role": "user", "content": "Hi"}]
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (tiny_adapter_dir, merged[0]))
    for thinking in (True, False):
        options = {"add_generation_prompt": True, "enable_thinking": thinking, "tokenize": False}
        assert before.apply_chat_template(chat, **options) == after.apply_chat_template(chat, **options)


def test_generation_ends_at_the_end_of_the_turn(merged: tuple[Path, Mapping[str, float]]) -> None:
    tokenizer = AutoTokenizer.from_pretrained(merged[0])
    stops = json.loads((merged[0] / "generation_config.json").read_text())["eos_token_id"]
    assert tokenizer.convert_ids_to_tokens(stops) == ["<|im_end|>", "<|endoftext|>"]


@pytest.fixture
def trained_in_4_bits(step_context: StepContext, tiny_adapter_dir: Path) -> StepContext:
    """What the harness says of an adapter that `train-qlora` made."""
    settings = TrainQLoRAConfig().model_dump(mode="json")
    made_by = Producer(step="train-qlora", version="0", code="test")
    manifest = new_manifest("adapter", tiny_adapter_dir, made_by, config=settings)
    return dataclasses.replace(step_context, manifests={"adapter": manifest})


def test_the_result_says_how_far_the_base_is_from_the_one_in_4_bits_that_was_trained_on(
    tiny_model_dir: Path, tiny_adapter_dir: Path, trained_in_4_bits: StepContext, tmp_path: Path
) -> None:
    metrics = merge(tiny_model_dir, tiny_adapter_dir, tmp_path, trained_in_4_bits)
    record = read_merge(tmp_path)
    assert record is not None
    shift, merged = record.chain
    assert (shift.against, shift.name) == ("4-bit base + adapter", "16-bit base + adapter")
    assert (merged.against, merged.name) == ("16-bit base + adapter", "merged")
    assert metrics["merge/trained_base_kl"] == shift.kl > 1e-3 > merged.kl
    assert shift.positions == merged.positions > 100
    assert "| 16-bit base + adapter | 4-bit base + adapter |" in (tmp_path / "README.md").read_text()


def test_a_dequantized_base_gives_the_model_that_was_trained(
    tiny_model_dir: Path, tiny_adapter_dir: Path, trained_in_4_bits: StepContext, tmp_path: Path
) -> None:
    merge(tiny_model_dir, tiny_adapter_dir, tmp_path, trained_in_4_bits, base="dequantized")
    record = read_merge(tmp_path)
    assert record is not None
    assert (record.base, record.chain[-1].against) == ("dequantized", "4-bit base + adapter")
    base, adapter = load_file(tiny_model_dir / "model.safetensors"), load_file(tiny_adapter_dir / WEIGHTS_NAME)
    key = "model.layers.3.mlp.down_proj"
    change = adapter[f"base_model.model.{key}.lora_B.weight"] @ adapter[f"base_model.model.{key}.lora_A.weight"]
    expected = (round_trip(base[f"{key}.weight"], torch.bfloat16) + 2 * change).bfloat16()
    written = load_file(tmp_path / "model.safetensors")
    assert torch.equal(written[f"{key}.weight"], expected)
    assert torch.equal(written["model.embed_tokens.weight"], base["model.embed_tokens.weight"])


def test_a_base_that_4_bits_change_too_much_and_one_that_nothing_is_known_of_are_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, trained_in_4_bits: StepContext, step_context: StepContext,
    tmp_path: Path,
) -> None:  # fmt: skip
    with pytest.raises(StepError, match=r"differs from the 4-bit base that was trained on by .* allowed 0\.0001"):
        merge(tiny_model_dir, tiny_adapter_dir, tmp_path / "a", trained_in_4_bits, max_trained_base_kl=1e-4)
    with pytest.raises(UserError, match="base 'dequantized' needs an adapter that train-qlora"):
        merge(tiny_model_dir, tiny_adapter_dir, tmp_path / "b", step_context, base="dequantized")


def test_a_wrong_merge_is_caught(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    correct = Linear.get_delta_weight
    width = json.loads((tiny_model_dir / "config.json").read_text())["intermediate_size"]

    def drop_down_projections(adapter: Linear, name: str) -> torch.Tensor:
        change: torch.Tensor = correct(adapter, name)
        return change * int(adapter.lora_A[name].in_features != width)

    monkeypatch.setattr(Linear, "get_delta_weight", drop_down_projections)
    with pytest.raises(StepError, match=r"layers\.0\.mlp\.down_proj\.weight is not written as base and adapter"):
        merge(tiny_model_dir, tiny_adapter_dir, tmp_path, step_context)


def test_other_logits_than_base_and_adapter_have_are_caught(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    config = MergeConfig(max_kl=1e-9)
    with pytest.raises(StepError, match="differs from base and adapter"):
        merge_adapter(
            base_model=tiny_model_dir,
            adapter=tiny_adapter_dir,
            output_dir=tmp_path,
            config=config,
            context=step_context,
        )


def test_a_quantized_base_is_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = tmp_path / "base"
    shutil.copytree(tiny_model_dir, base)
    config = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps({**config, "quantization_config": {"quant_method": "bitsandbytes"}}))
    with pytest.raises(UserError, match=r"quantized \(bitsandbytes\)"):
        merge(base, tiny_adapter_dir, tmp_path / "out", step_context)


def test_an_adapter_of_another_model_is_refused(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    adapter = tmp_path / "adapter"
    shutil.copytree(tiny_adapter_dir, adapter)
    weights = load_file(adapter / "adapter_model.safetensors")
    wider = {key: torch.cat([value, value], 1) if "lora_A" in key else value for key, value in weights.items()}
    save_file(wider, adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match="does not fit the base model"):
        merge(tiny_model_dir, adapter, tmp_path / "out", step_context)


def merge(base_model: Path, adapter: Path, output: Path, context: StepContext, **config: Any) -> Mapping[str, float]:
    return merge_adapter(
        base_model=base_model, adapter=adapter, output_dir=output, config=MergeConfig(**config), context=context
    )


def test_logits_are_compared_by_difference_divergence_and_likeliest_token() -> None:
    even, skewed = torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 1.0986122886681098]])
    parity = compare_logits([skewed, skewed], [skewed, even])
    # KL((1/4, 3/4) || (1/2, 1/2)) = 1/4 log 1/2 + 3/4 log 3/2, at one of two tokens.
    assert parity["kl"] == pytest.approx((0.25 * -0.6931471805599453 + 0.75 * 0.4054651081081644) / 2)
    assert parity["max_abs_diff"] == pytest.approx(1.0986122886681098)
    assert parity["top1_agreement"] == 0.5


def test_the_merged_model_is_no_base_for_its_own_adapter(
    merged: tuple[Path, Mapping[str, float]],
    tiny_adapter_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    references = {**step_context.references, "base_model": str(merged[0])}
    context = dataclasses.replace(step_context, references=references)
    with pytest.raises(UserError, match=r"another digest.*--force true merges them all the same"):
        merge(merged[0], tiny_adapter_dir, tmp_path / "twice", context)
    config = MergeConfig(force=True)
    merge_adapter(base_model=merged[0], adapter=tiny_adapter_dir, output_dir=tmp_path, config=config, context=context)
    record = read_merge(tmp_path)
    assert record
    assert record.base_known_by.startswith("forced: the adapter was trained on")
    assert "forced" in caplog.text


def test_named_templates_are_the_adapters_too(
    tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    adapter = Path(shutil.copytree(tiny_adapter_dir, tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(adapter)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}"}
    tokenizer.save_pretrained(adapter)
    merge(tiny_model_dir, adapter, tmp_path / "merged", step_context)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").chat_template == tokenizer.chat_template


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('a system message comes first') }}",
        "{{ 1 / 0 }}",
        "{{ messages[7] }}",
        "{% macro again() %}{{ again() }}{% endmacro %}{{ again() }}",
        "{# writes nothing #}",
        "{% for",
    ],
)
def test_a_template_that_wants_another_chat_is_no_reason_to_stop(template: str, tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    tokenizer.chat_template = template
    assert stop_token_ids(tokenizer, tiny_model_dir)
    assert tokenizer.decode(probe_prompts(tokenizer)[0]) == "What is 17 plus 25?"


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        ({"temperature": 0.9, "top_p": 0.6, "pad_token_id": 0}, {"temperature": 0.9, "do_sample": True}),
        ({"do_sample": False, "temperature": 0.9, "max_length": 99}, {"do_sample": False, "max_length": 99}),
        ({"early_stopping": "maybe", "pad_token_id": 7}, {"pad_token_id": 7}),
        ({"temperature": "0.7", "eos_token_id": True}, {"eos_token_id": [1512, 1510]}),
        ("{", {}),
        ([], {}),
    ],
)
def test_loose_generation_defaults_are_mended(
    found: object,
    expected: dict[str, object],
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    text = found if isinstance(found, str) else json.dumps(found)
    (base / "generation_config.json").write_text(text)
    merge_adapter(
        base_model=base,
        adapter=tiny_adapter_dir,
        output_dir=tmp_path / "merged",
        config=MergeConfig(force=True),
        context=step_context,
    )
    written = json.loads((tmp_path / "merged/generation_config.json").read_text())
    assert written.items() >= expected.items()
    assert ("temperature" in written) == ("temperature" in expected)
    assert "early_stopping" not in written
    # transformers takes it, and writes it again.
    GenerationConfig.from_pretrained(tmp_path / "merged").save_pretrained(tmp_path / "again")


def test_what_does_not_fit_on_the_disk_is_said_before_anything_is_written(
    tiny_model_dir: Path,
    tiny_adapter_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"the merged model takes 0\.\d\d GB, and .* has 0\.00 GB left"):
        merge(tiny_model_dir, tiny_adapter_dir, tmp_path / "out", step_context)
    assert not list((tmp_path / "out").iterdir())


def test_files_can_be_read_by_whom_the_umask_allows(merged: tuple[Path, Mapping[str, float]]) -> None:
    mask = os.umask(0)
    os.umask(mask)
    assert {path.stat().st_mode & 0o777 for path in merged[0].iterdir()} == {0o666 & ~mask}


@pytest.mark.parametrize("missing", ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"])
def test_a_missing_shard_of_the_base_is_named(
    missing: str, tiny_model_dir: Path, tiny_adapter_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    (base / "model.safetensors").unlink()
    model.save_pretrained(base, max_shard_size="6MB")
    assert len(list(base.glob("*.safetensors"))) == 2
    (base / missing).unlink()
    config = MergeConfig(force=True)
    with pytest.raises(UserError, match=f"{missing} is missing"):
        merge_adapter(
            base_model=base, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config, context=step_context
        )
