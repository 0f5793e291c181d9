from pathlib import Path

from finemill.artifacts.chain import ChainLink
from finemill.artifacts.gguf import GGUFRecord, write_gguf_record
from finemill.artifacts.model import MergeRecord, write_merge
from finemill.asking.find_model import FoundModel
from finemill.components.eval.others import read_chain


def link(name: str, against: str) -> ChainLink:
    return ChainLink(
        name=name, against=against, kl=0.1, kl_error=0.01, perplexity=2.0, loss_change=0.0, loss_change_error=0.01,
        same_token=0.9, same_token_error=0.01, positions=9,
    )  # fmt: skip


def test_the_chain_begins_where_the_training_ended(tmp_path: Path) -> None:
    merged, files = tmp_path / "model", tmp_path / "gguf"
    merged.mkdir()
    files.mkdir()
    record = MergeRecord(
        base_model="b", base_known_by="digest", adapter="a", scale=1, dtype="bfloat16", kl=0, max_abs_diff=0,
        top1_agreement=1, max_kl=0, min_top1_agreement=1, share_landed=1, min_share_landed=1, tensors=(),
        chain=(link("16-bit", "NF4"), link("merged", "16-bit")),
    )  # fmt: skip
    write_merge(merged, record)
    quantized = GGUFRecord(
        name="m", merged_exact_match=None, kl_positions=9, answers=0, files={}, warnings=(),
        chain=(link("Q8_0", "merged"), link("Q4_K_M", "merged")),
    )  # fmt: skip
    write_gguf_record(files, quantized)
    asked = [
        FoundModel("q4", gguf=files / "m-Q4_K_M.gguf"),
        FoundModel("q8", gguf=files / "m-Q8_0.gguf"),
        FoundModel("merged", folder=merged),
        FoundModel("adapter", folder=merged, adapter=tmp_path),
        FoundModel("endpoint", url="http://localhost"),
    ]
    assert [one.name for one in read_chain(asked)] == ["16-bit", "merged", "Q8_0", "Q4_K_M"]
    assert read_chain([FoundModel("other", gguf=tmp_path / "other.gguf")]) == []
