import json
from pathlib import Path

import gguf
import pytest

from finemill.artifacts.model import MergeRecord, write_merge
from finemill.components.gguf_quantize.origin import add_origin


def fields(folder: Path, base_model: str, **generation: object) -> dict[str, object]:
    """What is written for a model merged from `base_model`, by key."""
    record = MergeRecord(
        base_model=base_model, base_known_by="", adapter="", scale=1.0, dtype="bfloat16", kl=0.0, max_abs_diff=0.0,
        top1_agreement=1.0, max_kl=0.001, min_top1_agreement=0.95, share_landed=1.0, min_share_landed=1.0, tensors=(),
    )  # fmt: skip
    write_merge(folder, record)
    (folder / "generation_config.json").write_text(json.dumps(generation))
    writer = gguf.GGUFWriter(folder / "x.gguf", "llama")
    add_origin(writer, folder)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    return {key: field.contents() for key, field in gguf.GGUFReader(folder / "x.gguf").fields.items()}


def test_a_base_on_the_hub_is_named_and_sampling_kept(tmp_path: Path) -> None:
    found = fields(tmp_path, "hf://Qwen/Qwen3-8B@main", do_sample=True, temperature=0.5, top_k=20, top_p=0.75)
    assert found["general.base_model.0.repo_url"] == "https://huggingface.co/Qwen/Qwen3-8B"
    assert found["general.base_model.0.organization"] == "Qwen"
    assert found["general.sampling.temp"] == 0.5
    assert found["general.sampling.top_k"] == 20
    assert found["general.sampling.top_p"] == pytest.approx(0.75)
    assert "general.sampling.min_p" not in found


def test_greedy_decoding_is_temperature_zero(tmp_path: Path) -> None:
    found = fields(tmp_path, "builtin:tiny-qwen3", do_sample=False)
    assert found["general.sampling.temp"] == 0.0
    assert "general.base_model.count" not in found


@pytest.mark.parametrize("temperature", ["0.7", True, -1, float("nan"), [1]])
def test_a_value_that_no_sampler_could_use_is_left_out(temperature: object, tmp_path: Path) -> None:
    assert "general.sampling.temp" not in fields(tmp_path, "builtin:tiny-qwen3", temperature=temperature)
