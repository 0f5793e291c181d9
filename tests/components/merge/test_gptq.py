"""The merged model in GPTQ's format beside the one in 16 bits."""

import dataclasses
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from finemill.artifacts.manifest import Producer, new_manifest
from finemill.artifacts.model import read_merge
from finemill.components.merge import gptq
from finemill.components.merge.config import MergeConfig
from finemill.components.merge.step import run
from finemill.errors import StepError, UserError
from finemill.runtime.context import StepContext

ROWS = [[5, 17, 200, 333], [7, 8, 9]]
GROUP = 128


def pack(codes: torch.Tensor) -> torch.Tensor:
    """Eight 4-bit numbers of the last dimension in one."""
    shifts = torch.arange(0, 32, 4)
    return (codes.to(torch.int64).view(*codes.shape[:-1], -1, 8) << shifts).sum(-1).to(torch.int32)


class Rounded:
    """What AutoRound is to the step: to the nearest of 15 values, written as it writes them."""

    def __init__(self, model: Any, tokenizer: object, *, dataset: Sequence[dict[str, torch.Tensor]], **_: Any) -> None:
        assert dataset[1]["input_ids"].tolist() == [[7, 8, 9, 9]]
        assert dataset[1]["attention_mask"].tolist() == [[1, 1, 1, 0]]
        self._model = model

    def quantize_and_save(self, folder: str, format: str) -> None:  # noqa: A002 as the library has it
        assert format == "auto_gptq"
        tensors = {}
        for name, tensor in self._model.state_dict().items():
            layer = name.removesuffix(".weight")
            if not name.endswith("_proj.weight"):
                tensors[name] = tensor
                continue
            groups = tensor.float().unflatten(1, (-1, GROUP))
            scales = (groups.abs().amax(-1) / 7).half()
            codes = (groups / scales.float()[..., None]).round().clamp(-8, 7).flatten(1) + 8
            tensors[f"{layer}.qweight"] = pack(codes).T.contiguous()
            tensors[f"{layer}.qzeros"] = pack(torch.full_like(scales.T, 7))
            tensors[f"{layer}.scales"] = scales.T.contiguous()
        tensors.pop("lm_head.weight")
        written = Path(folder) / "model-w4g128"
        written.mkdir()
        save_file(tensors, written / "model.safetensors", metadata={"format": "pt"})
        (written / "config.json").write_text("{}")


@pytest.fixture
def known(step_context: StepContext, tiny_adapter_dir: Path, monkeypatch: pytest.MonkeyPatch) -> StepContext:
    """A context that knows the adapter's data set, and AutoRound installed."""
    monkeypatch.setitem(sys.modules, "auto_round", SimpleNamespace(AutoRound=Rounded))
    monkeypatch.setattr(gptq, "fetch_artifact", lambda reference: (Path(reference.uri), None))
    rows = [SimpleNamespace(input_ids=ids) for ids in ROWS]
    monkeypatch.setattr(gptq, "read_held_out", lambda _dataset, split: rows if split == "train" else [])
    manifest = new_manifest(
        "adapter", tiny_adapter_dir, Producer(step="train-qlora", version="0", code="test"),
        parents={"dataset": f"file:///rows@sha256:{'d' * 64}"},
    )  # fmt: skip
    return dataclasses.replace(step_context, manifests={"adapter": manifest})


def test_the_result_says_what_a_server_computes_and_what_that_costs(
    tiny_model_dir: Path, tiny_adapter_dir: Path, known: StepContext, tmp_path: Path
) -> None:
    config = MergeConfig(merged_gptq=True, force=True)
    metrics = run(
        base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config, context=known
    )
    record = read_merge(tmp_path)
    assert record
    assert (record.chain[-1].against, record.chain[-1].name) == ("merged", "merged, GPTQ")
    assert metrics["merge/merged_gptq_kl"] == record.chain[-1].kl > metrics["merge/kl"]
    assert metrics["merge/merged_gptq_size_bytes"] < 0.6 * metrics["merge/size_bytes"]
    tensors = load_file(tmp_path / "merged_gptq/model.safetensors")
    layer = "model.layers.1.mlp.down_proj"
    weight = load_file(tmp_path / "model.safetensors")[f"{layer}.weight"].float()
    found = gptq.decode(*(tensors[f"{layer}.{part}"] for part in ("qweight", "qzeros", "scales")))
    steps = tensors[f"{layer}.scales"].float().T.repeat_interleave(GROUP, 1)
    assert ((found - weight).abs() <= 0.51 * steps + 1e-6).all()
    assert "| merged, GPTQ | merged |" in (tmp_path / "merged_gptq/README.md").read_text()
    assert {path.name for path in tmp_path.iterdir() if path.is_dir()} == {"merged_gptq"}
    with pytest.raises(StepError, match=r"in GPTQ's format the merged model differs by .* allowed 1e-09"):
        run(
            base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path / "again",
            config=config.model_copy(update={"max_gptq_kl": 1e-9}), context=known,
        )  # fmt: skip


def test_what_it_needs_is_said_before_anything_is_merged(
    tiny_model_dir: Path, tiny_adapter_dir: Path, known: StepContext, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def merge(context: StepContext) -> None:
        config = MergeConfig(merged_gptq=True, force=True)
        run(base_model=tiny_model_dir, adapter=tiny_adapter_dir, output_dir=tmp_path, config=config, context=context)

    with pytest.raises(UserError, match="the adapter does not say which: pass one of train-qlora"):
        merge(dataclasses.replace(known, manifests={}))
    monkeypatch.setitem(sys.modules, "auto_round", None)
    with pytest.raises(UserError, match=r"rounded by AutoRound .*: pip install 'finemill\[gptq\]', or leave it out"):
        merge(known)
    assert not list(tmp_path.glob("*.safetensors"))
