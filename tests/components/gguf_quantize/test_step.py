import math
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from finemill.artifacts.dataset import read_held_out, spread
from finemill.artifacts.gguf import read_gguf_record
from finemill.artifacts.model import MergeRecord, write_merge
from finemill.components.gguf_quantize.config import GGUFQuantizeConfig
from finemill.components.gguf_quantize.convert import SourceModel
from finemill.components.gguf_quantize.imatrix import channel_importance
from finemill.components.gguf_quantize.step import _other_tokens, default_name
from finemill.components.gguf_quantize.step import run as quantize_gguf
from finemill.components.gguf_quantize.verify import (
    Comparison,
    chat_room,
    check_chats,
    check_tokenization,
    exact_match,
    kl_divergence,
)
from finemill.components.gguf_quantize.write import write_gguf
from finemill.errors import GateFailedError, StepError, UserError
from finemill.metrics.chain import AnsweredProblem, Position, chain_link
from finemill.models.causal_lm import load_causal_lm
from finemill.models.generation import Answer
from finemill.models.llama_cpp import serve, serve_chats
from finemill.models.stored_model import StoredModel
from finemill.runtime.context import StepContext

SMALL: dict[str, Any] = {"verify_rows": 4, "kl_rows": 3, "kl_positions": 3, "max_new_tokens": 24, "num_threads": 1}


MERGED = MergeRecord(
    base_model="builtin:tiny-qwen3", base_known_by="same digest", adapter="", scale=1.0, dtype="bfloat16", kl=0.0,
    max_abs_diff=0.0, top1_agreement=1.0, max_kl=0.001, min_top1_agreement=0.95, share_landed=1.0, min_share_landed=1.0,
    tensors=(),
)  # fmt: skip


def run(model: Path, dataset: Path, output: Path, context: StepContext, **config: Any) -> Mapping[str, float]:
    return quantize_gguf(
        model=model,
        dataset=dataset,
        output_dir=output,
        config=GGUFQuantizeConfig(**{**SMALL, **config}),
        context=context,
    )


@pytest.fixture(scope="module")
def quantized(
    tiny_model_dir: Path, tiny_dataset_dir: Path, step_context: StepContext, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Mapping[str, float]]:
    folder = tmp_path_factory.mktemp("gguf")
    return folder, run(tiny_model_dir, tiny_dataset_dir, folder, step_context, name="small", imatrix=True)


def test_every_file_is_written_run_and_recorded(quantized: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = quantized
    names = {
        "small-F16.gguf",
        "small-Q8_0.gguf",
        "small-Q4_K_M.gguf",
        "Modelfile",
        "gguf.json",
        "imatrix.gguf",
        "README.md",
    }
    assert {path.name for path in folder.iterdir()} == names
    record = read_gguf_record(folder)
    assert record.files["Q4_K_M"].metrics["kl"] == metrics["gguf/q4_k_m/kl"]
    assert record.files["Q8_0"].size_bytes == (folder / "small-Q8_0.gguf").stat().st_size
    assert all(math.isfinite(value) for value in metrics.values())


def test_the_model_card_has_metadata_lines_to_run_and_a_row_per_file(
    quantized: tuple[Path, Mapping[str, float]],
) -> None:
    text = (quantized[0] / "README.md").read_text()
    data = ModelCard(text).data.to_dict()
    assert (data["library_name"], data["pipeline_tag"]) == ("gguf", "text-generation")
    assert "llama-server -m small-Q4_K_M.gguf --jinja" in text
    assert "ollama create small -f Modelfile" in text
    for quantization in ("F16", "Q8_0", "Q4_K_M"):
        assert f"| small-{quantization}.gguf |" in text


def test_fewer_bits_are_smaller_and_further_from_the_merged_model(
    quantized: tuple[Path, Mapping[str, float]],
) -> None:
    metrics = quantized[1]
    kl = [metrics[f"gguf/{name}/kl"] for name in ("f16", "q8_0", "q4_k_m")]
    size = [metrics[f"gguf/{name}/size_bytes"] for name in ("f16", "q8_0", "q4_k_m")]
    assert kl == sorted(kl)
    assert size == sorted(size, reverse=True)
    assert kl[0] < 1e-4
    # The adapter of the tests is noise: its answers hang on the last bit of a weight.
    assert kl[2] < 0.3
    assert metrics["gguf/f16/same_answer_rate"] == 1.0
    assert metrics["gguf/f16/exact_match"] == metrics["gguf/merged/exact_match"]
    assert metrics["gguf/f16/tokenization_match"] == 1.0
    assert metrics["gguf/q8_0/chat_prompt_match"] == 1.0


def test_llama_cpp_answers_what_the_merged_model_answers(
    quantized: tuple[Path, Mapping[str, float]], tiny_model_dir: Path
) -> None:
    from finemill.models.generation import generate_answers, stop_token_ids

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    stops = stop_token_ids(tokenizer, tiny_model_dir)
    prompts = [
        tokenizer(f"<|im_start|>user\n{q}<|im_end|>\n<|im_start|>assistant\n")["input_ids"] for q in ("Hi!", "2 + 3")
    ]
    model = load_causal_lm(tiny_model_dir, dtype=torch.float32)
    expected = generate_answers(model, tokenizer, prompts, stop_token_ids=stops, max_new_tokens=20)
    counts: list[int] = []
    with serve(quantized[0] / "small-F16.gguf", 1, 64) as server:
        found = server.answers(
            prompts,
            stop_texts=tokenizer.convert_ids_to_tokens(stops),
            max_new_tokens=20,
            on_progress=counts.append,
        )
    assert found == expected
    assert counts == [1, 2]


def test_a_mixture_of_experts_answers_in_llama_cpp_as_it_does_here(
    qwen3_moe_dir: Path, tiny_dataset_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "quantizations": ["F32", "Q4_K_M", "MXFP4"], "imatrix": True, "max_kl": {"Q4_K_M": 5, "MXFP4": 5},
    }  # fmt: skip
    metrics = run(qwen3_moe_dir, tiny_dataset_dir, tmp_path, step_context, **options)
    assert metrics["gguf/f32/same_answer_rate"] == 1.0
    assert metrics["gguf/f32/kl"] < 5e-5 < metrics["gguf/q4_k_m/kl"]
    assert metrics["gguf/f32/max_tensor_error"] == 0 < metrics["gguf/q4_k_m/max_tensor_error"] < 0.1
    assert 0.05 < metrics["gguf/mxfp4_moe/max_tensor_error"] < 0.2
    shapes = {tensor.name: list(tensor.shape) for tensor in gguf.GGUFReader(tmp_path / "imatrix.gguf").tensors}
    assert shapes["blk.1.ffn_down_exps.weight.in_sum2"] == [64, 6]
    assert shapes["blk.1.ffn_down_exps.weight.counts"] == [1, 6]
    assert "--jinja --cpu-moe" in (tmp_path / "README.md").read_text()


def test_a_type_for_experts_is_refused_for_a_dense_model(
    tiny_model_dir: Path, tiny_dataset_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="MXFP4_MOE rounds experts, and the model"):
        run(tiny_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["mxfp4_moe"])


def test_probabilities_are_the_models_own_even_where_the_likeliest_token_is_half_a_character(
    quantized: tuple[Path, Mapping[str, float]], tiny_model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    ids = tokenizer("日本")["input_ids"][:-1]
    with serve(quantized[0] / "small-F16.gguf", 1, 64) as server:
        found = server.next_token_log_probabilities(ids, 1536)
    assert len(found) == 1536
    assert sum(math.exp(value) for value in found.values()) == pytest.approx(1.0, abs=1e-4)


def test_a_file_that_loses_too_many_points_fails_under_strict_or_beyond_chance(
    short_model_dir: Path,
    tiny_dataset_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    from finemill.components.gguf_quantize import step

    positions = [Position(row, 0.01, 1.0, 1.1, agrees=True) for row in range(3)]

    def worse(name: str, *_: Any, num_problems: int = 1, **__: Any) -> Comparison:
        problems = [AnsweredProblem(same=False, right_before=True, right=False)] * num_problems
        return Comparison({"kl": 0.01, "exact_match": -0.5}, chain_link(name, "merged", positions, problems))

    monkeypatch.setattr(step, "compare", worse)
    run(short_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["Q8_0"])
    assert "Q8_0 loses" in caplog.text
    with pytest.raises(GateFailedError, match=r"loses .* points of exact match"):
        run(short_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["Q8_0"], strict=True)
    monkeypatch.setattr(step, "compare", partial(worse, num_problems=100))
    with pytest.raises(
        GateFailedError, match=r"Q8_0 loses 100\.0 points of exact match .* surely 9\d\.\d \(allowed 5\)"
    ):
        run(short_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["Q8_0"])
    # What two bits cost is known.
    run(short_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["Q2_K"])


def test_the_chain_goes_from_the_merged_model_to_each_file(quantized: tuple[Path, Mapping[str, float]]) -> None:
    folder, metrics = quantized
    links = {link.name: link for link in read_gguf_record(folder).chain}
    assert list(links) == ["F16", "Q8_0", "Q4_K_M"]
    assert {link.against for link in links.values()} == {"merged"}
    assert links["Q4_K_M"].kl == metrics["gguf/q4_k_m/kl"] > links["Q4_K_M"].kl_error == metrics["gguf/q4_k_m/kl_error"]
    assert abs(links["F16"].loss_change) < 0.01
    assert (links["F16"].positions, links["F16"].answers, links["F16"].same_answer) == (9, 4, 1.0)
    assert "| F16 | merged | " in (folder / "README.md").read_text()


def test_a_file_that_differs_from_the_merged_model_is_not_published(
    tiny_model_dir: Path, tiny_dataset_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    with pytest.raises(StepError, match=r"Q4_K_M in llama\.cpp differs .* \(KL; allowed 1e-06\): choose a type with"):
        run(tiny_model_dir, tiny_dataset_dir, tmp_path, step_context, max_kl={"Q4_K_M": 1e-6})


def test_files_that_do_not_fit_on_the_disk_are_not_begun(
    tiny_model_dir: Path,
    tiny_dataset_dir: Path,
    step_context: StepContext,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    usage = shutil._ntuple_diskusage(10**9, 10**9 - 10**6, 10**6)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"writing the GGUF files takes 0\.0\d GB"):
        run(tiny_model_dir, tiny_dataset_dir, tmp_path, step_context)
    assert not list(tmp_path.iterdir())


def test_a_file_that_llama_cpp_cannot_load_is_an_error_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "broken.gguf").write_bytes(b"GGUF" + bytes(64))
    with pytest.raises(StepError, match=r"does not load broken\.gguf") as ours, serve(tmp_path / "broken.gguf", 1, 64):
        pass
    with pytest.raises(UserError, match=r"does not load broken\.gguf"), serve_chats(tmp_path / "broken.gguf", 1, 64):
        pass
    assert ours.value.exit_code == 1  # the step wrote it


def test_a_dataset_of_another_tokenizer_and_one_without_short_answers_are_refused(
    llama_dir: Path, tiny_model_dir: Path, tiny_dataset_dir: Path, step_context: StepContext, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"token id \d+, the model only 312 tokens: it was made for another tokenizer"):
        run(llama_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["F16"])
    with pytest.raises(UserError, match="has an answer within 4 tokens"):
        run(tiny_model_dir, tiny_dataset_dir, tmp_path, step_context, quantizations=["F16"], context_length=4)


def test_what_llama_cpp_splits_otherwise_is_said() -> None:
    assert _other_tokens({"F16": {"tokenization_match": 1.0}}) == []
    (line,) = _other_tokens({"F16": {"tokenization_match": 0.75}})
    assert "other tokens of 25.0% of the texts" in line


def test_a_tokenizer_that_differs_is_caught(tiny_model_dir: Path, llama_dir: Path, tmp_path: Path) -> None:
    write_gguf(SourceModel(llama_dir), tmp_path / "llama.gguf", "F16", "llama", 1)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with serve(tmp_path / "llama.gguf", 1, 64) as server, pytest.raises(StepError, match=r"llama\.cpp splits"):
        check_tokenization(server, tokenizer, [])


def test_a_chat_template_that_llama_cpp_runs_otherwise_is_said(
    quantized: tuple[Path, Mapping[str, float]], tiny_model_dir: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    with serve(quantized[0] / "small-F16.gguf", 1, chat_room(tokenizer)) as server:
        chat = [{"role": "user", "content": "Hi"}]
        assert all(server.chat(chat, thinking=on, max_new_tokens=4) for on in (True, False))
        assert check_chats(server, tokenizer) == {"chat_prompt_match": 1.0}
        # Without thinking it is another one.
        tokenizer.chat_template = tokenizer.chat_template.replace("enable_thinking", "no_such_value")
        assert check_chats(server, tokenizer) == {"chat_prompt_match": 0.5}
        tokenizer.chat_template = AutoTokenizer.from_pretrained(tiny_model_dir).chat_template.replace(
            "# Tools", "Tools"
        )
        assert check_chats(server, tokenizer) == {"chat_prompt_match": 0.5}
        tokenizer.chat_template = None
        assert check_chats(server, tokenizer) == {}


def test_channel_weights_are_the_mean_square_of_each_input(tiny_model_dir: Path, tiny_dataset_dir: Path) -> None:
    rows = [row.input_ids for row in read_held_out(tiny_dataset_dir, "train")]
    model = load_causal_lm(tiny_model_dir, dtype=torch.float32)
    inputs: list[torch.Tensor] = []
    handle = model.model.layers[1].mlp.down_proj.register_forward_pre_hook(lambda _, args: inputs.append(args[0][0]))
    for row in rows:
        model(torch.tensor([row]))
    handle.remove()
    weights = channel_importance(StoredModel(tiny_model_dir), SourceModel(tiny_model_dir), rows)
    expected = torch.cat(inputs).square().mean(0)
    torch.testing.assert_close(torch.from_numpy(weights["blk.1.ffn_down.weight"].weights), expected)
    # The output matrix is the embedding.
    assert weights.keys() - {"token_embd.weight"} == {name for name in weights if name.startswith("blk.")}
    assert len(weights) == 6 * 7 + 1


def test_channel_weights_are_published_as_llama_cpp_reads_them(
    quantized: tuple[Path, Mapping[str, float]], tiny_model_dir: Path, tiny_dataset_dir: Path
) -> None:
    rows = [row.input_ids for row in spread(read_held_out(tiny_dataset_dir, "train"), 64)]
    importance = channel_importance(StoredModel(tiny_model_dir), SourceModel(tiny_model_dir), rows)
    reader = gguf.GGUFReader(quantized[0] / "imatrix.gguf")
    assert reader.fields["general.type"].contents() == "imatrix"
    assert reader.fields["imatrix.chunk_count"].contents() == len(rows)
    assert reader.fields["imatrix.chunk_size"].contents() == max(len(row) for row in rows)
    assert isinstance(reader.fields["imatrix.datasets"].contents(), list)
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    for name, found in importance.items():
        sums, counts, expected = tensors.pop(f"{name}.in_sum2"), tensors.pop(f"{name}.counts"), found.weights
        assert list(sums.shape) == [len(expected), 1]
        assert list(counts.shape) == [1, 1]
        np.testing.assert_allclose(sums.data[0] / counts.data[0], expected, rtol=1e-6)
    assert not tensors


@pytest.mark.parametrize(
    ("given", "meant"),
    [("q4_k_m", "Q4_K_M"), ("iq2-xxs", "IQ2_XXS"), ("quantized", "Q4_K_M"), ("fast_quantized", "Q8_0"),
     ("not_quantized", "F16"), ("q5_k", "Q5_K_M"), ("bf16", "BF16"),
     ("dynamic-q4_k", "DYNAMIC_Q4_K_M")],
)  # fmt: skip
def test_names_of_any_case_and_aliases_mean_llama_cpps_types(given: str, meant: str) -> None:
    config = GGUFQuantizeConfig.model_validate({"quantizations": [given], "max_kl": {given: 0.125}})
    assert config.quantizations == (meant,)
    assert config.allowed_kl(config.quantizations[0]) == 0.125


def test_one_type_under_two_names_is_refused() -> None:
    with pytest.raises(ValueError, match="each quantization once, found Q4_K_M, Q4_K_M"):
        GGUFQuantizeConfig.model_validate({"quantizations": ["q4_k_m", "quantized"]})


def test_a_type_that_needs_an_imatrix_gets_one() -> None:
    assert GGUFQuantizeConfig.model_validate({"quantizations": ["Q8_0", "IQ2_XS"]}).needs_imatrix
    assert not GGUFQuantizeConfig().needs_imatrix


def test_divergence_over_all_tokens_and_with_a_rest() -> None:
    p = torch.tensor([0.5, 0.25, 0.125, 0.125], dtype=torch.float64).log()
    q = {0: math.log(0.25), 1: math.log(0.5), 2: math.log(0.125), 3: math.log(0.125)}
    expected = 0.5 * math.log(2) - 0.25 * math.log(2)
    assert kl_divergence(p, q) == pytest.approx(expected)
    assert kl_divergence(p, {0: q[0], 1: q[1]}) == pytest.approx(expected)
    assert kl_divergence(p, {**q, 3: -math.inf}) == pytest.approx(expected + 0.125 * (100 + math.log(0.125)))


def test_exact_match_counts_rows_with_a_known_answer(tiny_dataset_dir: Path) -> None:
    rows = read_held_out(tiny_dataset_dir, "test")
    answers = [Answer(f"It is \\boxed{{{row.answer}}}", 3, finished=True) for row in rows]
    assert exact_match(rows, answers) == 1.0
    assert exact_match(rows, [Answer("no idea", 2, finished=True)] * len(rows)) == 0.0
    assert exact_match(rows[3:4], answers[3:4]) is None
    assert [row.id for row in spread(rows, 2)] == ["test-0", "test-4"]


def test_files_are_named_after_the_base(tmp_path: Path) -> None:
    names = {"builtin:tiny-qwen3": "tiny-qwen3", "hf://Qwen/Qwen3-8B@abc": "Qwen3-8B", "file:///models/mine/": "mine"}
    for reference, name in names.items():
        write_merge(tmp_path, MERGED.model_copy(update={"base_model": reference}))
        assert default_name(tmp_path) == f"{name}-tuned"


def test_a_failed_measurement_leaves_no_hook_on_the_model(tiny_model_dir: Path) -> None:
    stored = StoredModel(tiny_model_dir)
    with pytest.raises(IndexError):
        channel_importance(stored, SourceModel(tiny_model_dir), [[10**6]])
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in stored.model.modules())
