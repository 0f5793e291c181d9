"""A tensor or an expert that is not the merged model's is found in the file."""

from pathlib import Path

import gguf
import pytest

from finemill.components.gguf_quantize.config import Quantization
from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.decoded import check_decoded
from finemill.components.gguf_quantize.write import write_gguf
from finemill.errors import StepError


@pytest.mark.parametrize(("quantization", "error"), [("F16", 5e-4), ("Q4_0", 0.15)])
def test_an_expert_that_is_another_one_is_named(
    quantization: Quantization, error: float, qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    source = SourceModel(qwen3_moe_dir)
    written = write_gguf(source, tmp_path / "m.gguf", quantization, "m", 1)
    assert 0 < check_decoded(source, {quantization: written}, 1)[quantization] < error
    stack = next(t for t in gguf.GGUFReader(written.path, "r+").tensors if t.name == "blk.1.ffn_up_exps.weight")
    stack.data[4] = stack.data[3]
    with pytest.raises(
        StepError, match=rf"{quantization}: blk\.1\.ffn_up_exps\.weight, expert 4, differs from the merged"
    ):
        check_decoded(source, {quantization: written}, 1)


def test_a_tensor_that_lost_a_few_rows_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    source = SourceModel(tiny_model_dir)
    written = write_gguf(source, tmp_path / "m.gguf", "Q8_0", "m", 1)
    tensor = next(t for t in gguf.GGUFReader(written.path, "r+").tensors if t.name == "blk.2.attn_q.weight")
    tensor.data[:2] = 0
    with pytest.raises(StepError, match=r"Q8_0: blk\.2\.attn_q\.weight differs from the merged model's by 0\.\d+"):
        check_decoded(source, {"Q8_0": written}, 1)
