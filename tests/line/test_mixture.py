"""The whole line on a mixture of experts, from rows to a promoted version and a GGUF file."""

import re
from pathlib import Path

import pytest

from finemill.artifacts.gguf import read_gguf_record
from finemill.artifacts.model import read_merge
from tests.line.commands import LINE, SHORT, finemill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_every_expert_is_trained_merged_and_exported(tiny_mixture_dir: Path, tmp_path: Path) -> None:
    rows = ["--data-prep.sources", '[{uri: "example:reasoning", max_rows: 40}]']
    few = [*rows, "--eval.max-rows", "4", "--eval.max-new-tokens", "8", "--gguf-quantize.verify-rows", "0"]
    command = ["run", "finetune", "--store", "store", "--base-model", str(tiny_mixture_dir), *SHORT, *few]
    result = finemill(*command, cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"))
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^\[\d/8\] (\S+) +done", result.stderr, re.MULTILINE) == LINE
    assert re.search(r"^registry .*version 1.*@champion", result.stdout, re.MULTILINE)
    (merged,), (gguf,) = ((tmp_path / "store").glob(f"{step}/*/manifest.json") for step in ("merge", "gguf-quantize"))
    record = read_merge(merged.parent)
    assert record
    changes = {tensor.name: tensor.experts for tensor in record.tensors if tensor.experts}
    assert len(changes) == 4
    assert all(len(experts) == 4 and min(experts) > 0 for experts in changes.values())
    file = read_gguf_record(gguf.parent).files["Q8_0"]
    assert 0 < file.metrics["max_tensor_error"] < 0.01
    assert file.metrics["kl"] < 0.02
