"""Files of each family, loaded back by llama.cpp and compared with transformers."""

import json
import math
import shutil
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from finemill.components.gguf_quantize import ggml
from finemill.components.gguf_quantize.config import Quantization
from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.imatrix import Importance, channel_importance
from finemill.components.gguf_quantize.mixture import ModelShape, tensor_type
from finemill.components.gguf_quantize.verify import check_tokenization, kl_divergence
from finemill.components.gguf_quantize.vocabulary import check_vocabulary, pre_tokenizer_name
from finemill.components.gguf_quantize.write import Target, WrittenFile, write_gguf, write_ggufs
from finemill.errors import StepError, UserError
from finemill.models.causal_lm import load_causal_lm
from finemill.models.llama_cpp import serve
from finemill.models.stored_model import StoredModel

Files = dict[Quantization, WrittenFile]
TEXT = "Ann has 12 apples and gives 345 away; how many are left of 1000000? It's fine."


def write(folder: Path, path: Path, quantization: Quantization) -> WrittenFile:
    return write_gguf(SourceModel(folder), path, quantization, "test", 2)


@cache
@torch.inference_mode()
def expected(folder: Path) -> tuple[Any, list[int], torch.Tensor]:
    """The tokenizer, the tokens of `TEXT`, and what transformers says to each, asked once for all files of a model."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    input_ids = tokenizer(TEXT)["input_ids"]
    return (
        tokenizer,
        input_ids,
        load_causal_lm(folder, dtype=torch.float32)(torch.tensor([input_ids])).logits[0].double(),
    )


def mean_kl(folder: Path, path: Path) -> float:
    """KL(transformers || llama.cpp) at several positions of `TEXT`, after checking that both read the same tokens."""
    tokenizer, input_ids, logits_TV = expected(folder)
    positions = range(3, len(input_ids), len(input_ids) // 5)
    with serve(path, 1, 256) as server:
        assert check_tokenization(server, tokenizer, [TEXT]) == 1.0
        return float(
            np.mean(
                [
                    kl_divergence(
                        logits_TV[position - 1].log_softmax(-1),
                        server.next_token_log_probabilities(input_ids[:position], logits_TV.shape[1]),
                    )
                    for position in positions
                ]
            )
        )


@pytest.mark.parametrize(
    "family",
    [
        "tiny_model_dir",
        "qwen2_dir",
        "llama_dir",
        "mistral_dir",
        "nemo_dir",
        "gemma2_dir",
        "gemma3_dir",
        "phi4_dir",
        "phi4_mini_dir",
        "smollm_dir",
        "qwen3_moe_dir",
        "qwen2_moe_dir",
        "mixtral_dir",
    ],
)
def test_llama_cpp_computes_what_transformers_does(family: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    folder = request.getfixturevalue(family)
    write(folder, tmp_path / "f16.gguf", "F16")
    write(folder, tmp_path / "q8_0.gguf", "Q8_0")
    f16, q8_0 = mean_kl(folder, tmp_path / "f16.gguf"), mean_kl(folder, tmp_path / "q8_0.gguf")
    assert f16 < 1e-4
    # Random routers are undecided: a rounding error now and then sends a token to another expert.
    assert f16 < q8_0 < (0.2 if SourceModel(folder).num_experts else 2e-2)


def test_rows_of_another_length_fall_back_as_in_llama_cpp(qwen2_dir: Path, tmp_path: Path) -> None:
    written = write(qwen2_dir, tmp_path / "q4.gguf", "Q4_K_M")
    assert written.fallbacks["blk.0.attn_q.weight"] == "Q4_K -> Q5_0"
    assert written.fallbacks["output.weight"] == "Q6_K -> Q8_0"
    assert written.tensor_types.keys() == {"F32", "Q5_0", "Q8_0"}
    assert mean_kl(qwen2_dir, tmp_path / "q4.gguf") < 0.5


def test_q4_k_m_of_the_small_base_needs_no_fallback(tiny_model_dir: Path, tmp_path: Path) -> None:
    written = write(tiny_model_dir, tmp_path / "q4.gguf", "Q4_K_M")
    assert not written.fallbacks
    assert written.num_parameters == sum(np.prod(shape) for _, shape in SourceModel(tiny_model_dir).shapes())
    assert 4.5 < written.bits_per_weight < 6
    assert mean_kl(tiny_model_dir, tmp_path / "q4.gguf") < 0.1


@pytest.fixture(scope="module")
def weights(short_model_dir: Path) -> dict[str, Array]:
    rows = [AutoTokenizer.from_pretrained(short_model_dir)(TEXT * 4)["input_ids"]]
    importance = channel_importance(StoredModel(short_model_dir), SourceModel(short_model_dir), rows)
    return {name: found.weights for name, found in importance.items()}


# llama.cpp's types, by the number of bits and the largest divergence that they may cost here.
SIZES: tuple[tuple[Quantization, float, float], ...] = (
    ("F32", 32.3, 1e-5), ("BF16", 16.4, 1e-4), ("Q6_K", 6.9, 0.005), ("Q5_K_M", 6.2, 0.01), ("Q5_1", 6.5, 0.01),
    ("Q5_0", 6.1, 0.02), ("Q4_1", 5.8, 0.05), ("Q4_0", 5.4, 0.05), ("IQ4_NL", 5.4, 0.05), ("IQ4_XS", 5.2, 0.05),
    ("Q3_K_M", 4.9, 0.1), ("IQ3_S", 4.6, 0.1), ("Q2_K", 4.2, 0.2), ("IQ2_XXS", 3.3, 0.5), ("TQ2_0", 3.6, 20.0),
    ("TQ1_0", 3.3, 20.0),
)  # fmt: skip
# For these the library makes tables, which takes seconds.
SLOW: tuple[tuple[Quantization, float, float], ...] = (
    ("IQ3_XXS", 4.0, 0.2), ("IQ2_M", 3.8, 0.2), ("IQ2_XS", 3.5, 0.5), ("IQ1_M", 3.1, 2.0),
)  # fmt: skip
# Their tensors have types that llama.cpp runs in the files above.
MIXTURES: tuple[tuple[Quantization, float], ...] = (
    ("Q5_K_S", 6.1), ("Q4_K_S", 5.4), ("Q3_K_L", 5.2), ("Q3_K_S", 4.6), ("IQ3_M", 4.7), ("IQ3_XS", 4.5),
    ("Q2_K_L", 4.7), ("Q2_K_S", 4.0),
)  # fmt: skip
SLOW_MIXTURES: tuple[tuple[Quantization, float], ...] = (
    ("IQ2_S", 3.6), ("IQ1_S", 3.0),
)  # fmt: skip


@pytest.fixture(scope="module")
def quick_files(short_model_dir: Path, weights: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Files:
    return write_all([*SIZES, *MIXTURES], short_model_dir, weights, tmp_path_factory.mktemp("quick"))


@pytest.fixture(scope="module")
def slow_files(short_model_dir: Path, weights: dict[str, Array], tmp_path_factory: pytest.TempPathFactory) -> Files:
    """All at once: whenever llama.cpp lets go of a model, it lets go of those tables, too."""
    return write_all([*SLOW, *SLOW_MIXTURES], short_model_dir, weights, tmp_path_factory.mktemp("slow"))


def write_all(rows: Sequence[tuple[Any, ...]], base: Path, weights: dict[str, Array], folder: Path) -> Files:
    targets = [Target(folder / f"{quantization}.gguf", quantization) for quantization, *_ in rows]
    written = write_ggufs(SourceModel(base), targets, "test", 2, weights)
    return {target.quantization: file for target, file in zip(targets, written, strict=True)}


@pytest.fixture
def written(quantization: Quantization, request: pytest.FixtureRequest) -> WrittenFile:
    slow = request.node.get_closest_marker("slow")
    files: Files = request.getfixturevalue("slow_files" if slow else "quick_files")
    return files[quantization]


@pytest.mark.parametrize(
    ("quantization", "bits", "kl"), [*SIZES, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW)]
)
def test_every_type_is_written_and_run(
    quantization: Quantization, bits: float, kl: float, written: WrittenFile, short_model_dir: Path
) -> None:
    check_written(written, quantization, bits)
    assert mean_kl(short_model_dir, written.path) < kl


@pytest.mark.parametrize(
    ("quantization", "bits"), [*MIXTURES, *(pytest.param(*row, marks=pytest.mark.slow) for row in SLOW_MIXTURES)]
)
def test_every_mixture_of_types_is_written(quantization: Quantization, bits: float, written: WrittenFile) -> None:
    check_written(written, quantization, bits)


def check_written(written: WrittenFile, quantization: Quantization, bits: float) -> None:
    assert not written.fallbacks
    assert bits - 0.2 < written.bits_per_weight < bits
    file_type = gguf.LlamaFileType(gguf.GGUFReader(written.path).fields["general.file_type"].contents())
    assert file_type.name.partition("_")[2] == quantization.replace("Q2_K_L", "Q2_K")


@pytest.mark.parametrize(
    ("quantization", "name", "expected"),
    [
        # Four heads share a value matrix.
        ("Q2_K", "blk.5.attn_v.weight", Type.Q4_K), ("Q2_K", "blk.5.ffn_down.weight", Type.Q3_K),
        ("Q2_K_L", "token_embd.weight", Type.Q8_0), ("Q3_K_M", "blk.1.attn_v.weight", Type.Q5_K),
        ("Q3_K_M", "blk.2.attn_v.weight", Type.Q4_K), ("Q3_K_L", "blk.2.attn_output.weight", Type.Q5_K),
        ("IQ3_XXS", "blk.2.attn_q.weight", Type.IQ2_S), ("IQ3_XS", "blk.0.ffn_up.weight", Type.IQ3_S),
        ("IQ3_XS", "blk.5.ffn_up.weight", Type.IQ3_XXS), ("IQ4_XS", "blk.5.attn_v.weight", Type.Q5_K),
        ("IQ2_M", "output.weight", Type.Q5_K), ("IQ2_S", "token_embd.weight", Type.IQ3_S),
        ("IQ1_S", "blk.5.attn_output.weight", Type.IQ2_XXS), ("IQ1_S", "blk.0.ffn_down.weight", Type.Q2_K),
        ("Q4_0", "blk.0.ffn_down.weight", Type.Q4_1), ("Q5_0", "blk.2.ffn_down.weight", Type.Q5_0),
        ("TQ1_0", "token_embd.weight", Type.Q4_K), ("BF16", "output.weight", Type.BF16),
        ("Q8_0", "output.weight", Type.Q8_0), ("Q5_K_S", "output.weight", Type.Q6_K),
    ],
)  # fmt: skip
def test_every_mixture_is_llama_cpps(quantization: Quantization, name: str, expected: Type) -> None:
    model = ModelShape(16, heads_per_kv_head=4, ties_embeddings=False, has_imatrix=True)
    assert tensor_type(name, (512, 512), quantization, model).type == expected


@pytest.mark.parametrize(("layer", "expected"), [(0, Type.Q4_K), (1, Type.IQ3_S), (3, Type.Q4_K), (7, Type.Q4_K)])
def test_beside_eight_experts_more_layers_of_iq3_m_have_four_bits(layer: int, expected: Type) -> None:
    for part in ("ffn_down_exps", "ffn_down_shexp"):
        name = f"blk.{layer}.{part}.weight"
        assert tensor_type(name, (512, 512), "IQ3_M", ModelShape(8, 2, False, num_experts=8)).type == expected
    name = f"blk.{layer}.ffn_down.weight"
    of_dense = tensor_type(name, (512, 512), "IQ3_M", ModelShape(8, 2, False))
    assert of_dense.type == (Type.Q4_K if layer == 0 else Type.IQ3_S)


@pytest.mark.parametrize(("quantization", "expected"), [("Q3_K_L", Type.Q3_K), ("Q3_K_M", Type.Q5_K)])
def test_beside_eight_experts_attention_has_its_output_matrix_as_in_llama_cpp(
    quantization: Quantization, expected: Type
) -> None:
    model = ModelShape(8, 2, False, num_experts=8)
    assert tensor_type("blk.3.attn_output.weight", (512, 512), quantization, model).type == expected


@pytest.mark.parametrize(
    ("quantization", "expected", "of_output"),
    [
        ("IQ2_XXS", Type.IQ4_NL, Type.Q8_0),
        ("IQ3_XXS", Type.IQ4_NL, Type.Q8_0),
        ("Q2_K", Type.Q4_0, Type.Q8_0),
        ("Q3_K_S", Type.Q4_0, Type.Q8_0),
        ("Q5_K_S", Type.Q5_1, Type.Q8_0),
        ("Q6_K", Type.Q8_0, Type.Q8_0),
        ("TQ1_0", Type.Q4_0, Type.Q8_0),
    ],
)
def test_rows_of_96_have_llama_cpps_type_in_every_mixture(
    quantization: Quantization, expected: Type, of_output: Type
) -> None:
    model = ModelShape(16, heads_per_kv_head=1, ties_embeddings=False)
    assert tensor_type("blk.5.ffn_gate.weight", (512, 96), quantization, model).type == expected
    assert tensor_type("output.weight", (512, 96), quantization, model).type == of_output


def test_metadata_names_template_end_of_turn_and_pre_tokenizer(tiny_model_dir: Path, tmp_path: Path) -> None:
    write(tiny_model_dir, tmp_path / "m.gguf", "F16")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")

    def field(name: str) -> object:
        return reader.fields[name].contents()

    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    assert field("general.architecture") == "qwen3"
    assert field("tokenizer.ggml.pre") == "qwen2"
    assert field("tokenizer.chat_template") == tokenizer.chat_template
    assert field("tokenizer.ggml.eos_token_id") == tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert field("tokenizer.ggml.eot_token_id") == tokenizer.convert_tokens_to_ids("<|endoftext|>")
    assert field("tokenizer.ggml.add_bos_token") is False


def test_a_first_token_is_declared(llama_dir: Path, tmp_path: Path) -> None:
    write(llama_dir, tmp_path / "m.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.ggml.add_bos_token"].contents() is True
    assert fields["tokenizer.ggml.pre"].contents() == "llama-bpe"


@pytest.mark.parametrize(
    ("name", "shape", "layers", "expected"),
    [
        ("output_norm.weight", (256,), 8, Type.F32),
        ("token_embd.weight", (1000, 256), 8, Type.Q6_K),
        ("blk.0.attn_q.weight", (256, 256), 8, Type.Q4_K),
        # Of eight layers: the first, the last, and every third after the first.
        ("blk.0.attn_v.weight", (256, 256), 8, Type.Q6_K),
        ("blk.1.attn_v.weight", (256, 256), 8, Type.Q4_K),
        ("blk.3.ffn_down.weight", (256, 512), 8, Type.Q6_K),
        ("blk.6.ffn_down.weight", (256, 512), 8, Type.Q6_K),
        ("blk.7.ffn_down.weight", (256, 512), 8, Type.Q6_K),
        ("blk.5.ffn_down.weight", (256, 512), 8, Type.Q4_K),
        ("blk.11.attn_v.weight", (1024, 8192), 80, Type.Q5_K),
        ("blk.0.ffn_gate.weight", (512, 96), 8, Type.Q5_0),
        ("blk.0.ffn_gate.weight", (512, 40), 8, Type.F16),
    ],
)
def test_q4_k_m_mixes_types_as_llama_cpp_does(name: str, shape: tuple[int, ...], layers: int, expected: Type) -> None:
    model = ModelShape(layers, heads_per_kv_head=1, ties_embeddings=True)
    assert tensor_type(name, shape, "Q4_K_M", model).type == expected


def test_an_output_matrix_of_its_own_leaves_the_embedding_to_four_bits() -> None:
    model = ModelShape(8, heads_per_kv_head=1, ties_embeddings=False)
    assert tensor_type("token_embd.weight", (9, 256), "Q4_K_M", model).type == Type.Q4_K
    assert tensor_type("output.weight", (9, 256), "Q4_K_M", model).type == Type.Q6_K


@pytest.mark.parametrize(("type_", "bits"), [(Type.Q4_K, 4), (Type.Q6_K, 6), (Type.Q8_0, 8), (Type.Q5_0, 5)])
def test_rounding_keeps_values_within_a_step(type_: Type, bits: int) -> None:
    values = np.random.default_rng(0).normal(size=(5000, 256)).astype(np.float32)
    rounded = gguf.quants.dequantize(ggml.quantize(values, type_, 2, None), type_)
    assert np.abs(values - rounded).max() < np.abs(values).max() * 2.0 ** (1 - bits)
    assert np.array_equal(ggml.quantize(values, type_, 1, None), ggml.quantize(values, type_, 3, None))


def test_without_the_library_q8_0_is_the_same_and_k_quants_say_what_is_missing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    values = np.random.default_rng(0).normal(size=(3, 256)).astype(np.float32)
    with_library = ggml.quantize(values, Type.Q8_0, 1, None)
    monkeypatch.setattr(ggml, "_ggml_quantize_chunk", lambda: None)
    assert np.array_equal(ggml.quantize(values, Type.Q8_0, 1, None), with_library)
    with pytest.raises(StepError, match="Q4_K needs"):
        ggml.quantize(values, Type.Q4_K, 1, None)


def test_an_unknown_architecture_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_model_dir, tmp_path / "m")
    config = json.loads((tmp_path / "m/config.json").read_text())
    (tmp_path / "m/config.json").write_text(json.dumps({**config, "architectures": ["GPT2LMHeadModel"]}))
    with pytest.raises(UserError, match=r"GPT2LMHeadModel .* is not supported; supported are LlamaForCausalLM"):
        write(tmp_path / "m", tmp_path / "x.gguf", "F16")


def test_an_unknown_split_or_tokenizer_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    definition = json.loads((tiny_model_dir / "tokenizer.json").read_text())
    assert pre_tokenizer_name(definition) == "qwen2"
    definition["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] = r"\w+"
    with pytest.raises(UserError, match="splits text by"):
        pre_tokenizer_name(definition)
    definition["model"] = {"type": "Unigram", "vocab": [["a", 0.0]], "unk_id": 0, "byte_fallback": False}
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match="Unigram; supported is BPE, byte-level"):
        check_vocabulary(SourceModel(folder))


def test_a_token_that_is_there_twice_is_named(tiny_model_dir: Path, tmp_path: Path) -> None:
    """llama.cpp ends the whole process at it, without an error that could be caught."""
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    definition = json.loads((folder / "tokenizer.json").read_text())
    definition["added_tokens"][-1]["content"] = "a"
    (folder / "tokenizer.json").write_text(json.dumps(definition))
    with pytest.raises(UserError, match=r"token ids \d+ and 1535 of the tokenizer are both 'a'"):
        check_vocabulary(SourceModel(folder))


def configured(folder: Path, target: Path, **values: object) -> SourceModel:
    """A copy of a model with another configuration; None leaves a value out."""
    shutil.copytree(folder, target)
    config = {**json.loads((target / "config.json").read_text()), **values}
    (target / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return SourceModel(target)


def test_both_spellings_of_rope_mean_the_same(qwen2_dir: Path, tmp_path: Path) -> None:
    new = {"rope_parameters": {"rope_theta": 5e5, "rope_type": "linear", "factor": 2.0}}
    old = {"rope_parameters": None, "rope_theta": 5e5, "rope_scaling": {"type": "linear", "factor": 2.0}}
    for name, values in (("old", old), ("new", new)):
        rope = configured(qwen2_dir, tmp_path / name, **values).config["rope_parameters"]
        assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (5e5, "linear", 2.0)


def test_experts_lie_in_stacks_with_their_numbers_in_the_metadata(qwen2_moe_dir: Path, tmp_path: Path) -> None:
    write(qwen2_moe_dir, tmp_path / "m.gguf", "Q4_K_M")
    reader = gguf.GGUFReader(tmp_path / "m.gguf")
    numbers = {
        key: reader.fields[f"qwen2moe.{key}"].contents()
        for key in (
            "expert_count",
            "expert_used_count",
            "expert_feed_forward_length",
            "expert_shared_feed_forward_length",
        )
    }
    assert list(numbers.values()) == [4, 2, 64, 128]
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    assert list(tensors["blk.0.ffn_down_exps.weight"].shape) == [64, 96, 4]
    assert list(tensors["blk.0.ffn_gate_exps.weight"].shape) == [96, 64, 4]
    # Routers keep all their bits.
    assert {tensors[f"blk.1.ffn_gate_inp{of}.weight"].tensor_type for of in ("", "_shexp")} == {Type.F32}


@pytest.mark.parametrize(
    ("quantization", "name", "num_experts", "expected"),
    [
        ("Q4_K_M", "blk.0.ffn_down_exps.weight", 64, Type.Q6_K), ("Q4_K_M", "blk.5.ffn_up_exps.weight", 64, Type.Q4_K),
        ("Q3_K_M", "blk.5.ffn_down_shexp.weight", 60, Type.Q4_K), ("Q4_K_M", "blk.5.attn_v.weight", 8, Type.Q8_0),
        ("Q4_K_M", "blk.5.attn_output.weight", 8, Type.Q5_K), ("Q5_K_M", "blk.5.attn_output.weight", 8, Type.Q5_K),
        ("IQ2_XS", "blk.5.attn_v.weight", 128, Type.Q4_K), ("IQ2_XS", "blk.5.attn_k.weight", 8, Type.Q4_K),
        ("MXFP4_MOE", "blk.5.ffn_up_exps.weight", 128, Type.MXFP4), ("MXFP4_MOE", "output.weight", 128, Type.Q8_0),
        ("MXFP4_MOE", "blk.5.attn_v.weight", 8, Type.Q8_0), ("MXFP4_MOE", "blk.5.ffn_up_shexp.weight", 4, Type.Q8_0),
    ],
)  # fmt: skip
def test_mixtures_of_experts_have_llama_cpps_rules(
    quantization: Quantization, name: str, num_experts: int, expected: Type
) -> None:
    model = ModelShape(16, heads_per_kv_head=2, ties_embeddings=False, num_experts=num_experts)
    assert tensor_type(name, (512, 512), quantization, model).type == expected


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob False is not supported; llama.cpp computes as with True"),
        ({"mlp_only_layers": [1]}, "layers without experts"),
        (
            {"num_experts": 7, "num_local_experts": None},
            r"has 6 experts of blk\.0\.ffn_\w+_exps\.weight, .* says 7",
        ),
    ],
)
def test_mixtures_that_llama_cpp_does_not_compute_are_named(
    values: dict[str, object], message: str, qwen3_moe_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        configured(qwen3_moe_dir, tmp_path / "m", **values).check()


@torch.inference_mode()
def test_each_expert_has_an_importance_of_its_own(qwen3_moe_dir: Path) -> None:
    rows = [AutoTokenizer.from_pretrained(qwen3_moe_dir)(text)["input_ids"] for text in (TEXT, "Ann")]
    found = channel_importance(StoredModel(qwen3_moe_dir), SourceModel(qwen3_moe_dir), rows)
    model = load_causal_lm(qwen3_moe_dir, dtype=torch.float32)
    calls: list[tuple[torch.Tensor, ...]] = []
    model.model.layers[1].mlp.experts.register_forward_pre_hook(lambda _, inputs: calls.append(inputs))
    for row in rows:
        model(torch.tensor([row]))
    experts = model.model.layers[1].mlp.experts
    for expert in range(6):
        own = torch.cat([values[(chosen == expert).any(-1)] for values, chosen, _ in calls])
        first, second = (own @ experts.gate_up_proj[expert].T).chunk(2, dim=-1)
        inner = torch.nn.functional.silu(first) * second
        for name, values in (("ffn_up_exps", own), ("ffn_gate_exps", own), ("ffn_down_exps", inner)):
            importance = found[f"blk.1.{name}.weight"]
            assert importance.counts[expert] == len(own)
            expected = values.double().square().sum(0)
            torch.testing.assert_close(torch.from_numpy(importance.sums[expert]), expected, rtol=1e-3, atol=1e-3)


def test_an_expert_that_no_token_came_to_weighs_its_channels_alike() -> None:
    importance = Importance(np.array([[2.0, 8.0], [0.0, 0.0]]), np.array([2.0, 0.0]), is_stack=True)
    assert importance.weights.tolist() == [[1, 4], [1, 1]]


YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 32}


LLAMA_3 = {
    "rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}  # fmt: skip


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"head_dim": 64}, r"4 heads of width 64 are not supported: llama\.cpp wants hidden_size \(96\)"),
        ({"quantization_config": {"quant_method": "bitsandbytes"}}, "the weights are quantized"),
        ({"rope_parameters": {**YARN, "attention_factor": 1.0}}, r"YaRN's attention_factor 1\.0 is not supported"),
        ({"rope_parameters": {**YARN, "beta_fast": 4.0}}, r"YaRN's beta_fast 4\.0"),
        ({"rope_parameters": {**YARN, "truncate": False}}, "YaRN's truncate False"),
        ({"rope_parameters": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}}, "rope type 'dynamic'"),
        (
            {"rope_parameters": LLAMA_3},
            "rope type 'llama3' is not supported; supported in this family are default, lin",
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}}, "partial_"),
        (
            {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 1, "layer_types": None},
            "sliding_window 16 is not supported.* set context_length to 16",
        ),
    ],
)
def test_what_llama_cpp_does_not_compute_is_named(
    values: dict[str, object], message: str, qwen2_dir: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        configured(qwen2_dir, tmp_path / "m", **values).check()


@pytest.mark.parametrize(
    "values",
    [
        {"hidden_size": -1}, {"intermediate_size": -1}, {"max_position_embeddings": -1}, {"head_dim": -1},
        {"num_key_value_heads": -1}, {"num_attention_heads": 0}, {"dtype": [1, 2]}, {"dtype": []},
        {"architectures": -1}, {"vocab_size": 0}, {"rope_parameters": []}, {"rms_norm_eps": [1]},
    ],
)  # fmt: skip
def test_a_configuration_of_no_model_is_one_line(
    values: dict[str, object], tiny_model_dir: Path, tmp_path: Path
) -> None:
    source = configured(tiny_model_dir, tmp_path / "m", **values)

    def open_it() -> StoredModel:
        source.check()
        return StoredModel(source.folder)

    with pytest.raises(UserError, match=r"config\.json"):
        open_it()


@pytest.mark.parametrize(
    "values",
    [
        {"rope_parameters": YARN},
        {"rope_parameters": {**YARN, "beta_fast": 32.0, "attention_factor": 0.1 * math.log(4) + 1}},
        # Every layer is below the first one that slides.
        {"use_sliding_window": True, "sliding_window": 16, "max_window_layers": 3, "layer_types": None},
        {"use_sliding_window": True, "sliding_window": 512, "max_window_layers": 1, "layer_types": None},
    ],
)
def test_what_comes_to_the_same_is_converted(values: dict[str, object], qwen2_dir: Path, tmp_path: Path) -> None:
    configured(qwen2_dir, tmp_path / "m", **values).check()
    write(tmp_path / "m", tmp_path / "f16.gguf", "F16")
    assert mean_kl(tmp_path / "m", tmp_path / "f16.gguf") < 1e-4


def test_beyond_the_original_length_the_other_factors_count(phi4_mini_dir: Path, tmp_path: Path) -> None:
    values = {"original_max_position_embeddings": 2, "pad_token_id": 0}
    folder = configured(phi4_mini_dir, tmp_path / "m", **values).folder
    write(folder, tmp_path / "f16.gguf", "F16")
    # Attention is sharpened so much there that 16 bits show.
    assert mean_kl(folder, tmp_path / "f16.gguf") < 1e-3
    assert float((expected(folder)[2] - expected(phi4_mini_dir)[2]).abs().max()) > 0.1


@pytest.mark.parametrize(
    ("family", "values", "message"),
    [
        ("gemma2_dir", {"query_pre_attn_scalar": 100}, r"query_pre_attn_scalar 100 .* computes with 32 for 3 layers"),
        ("gemma2_dir", {"layer_types": ["full_attention"] * 3}, "lets every 2th layer look back over the whole"),
        ("gemma2_dir", {"attn_logit_softcapping": 0.0}, "attn_logit_softcapping 0.0 is not supported"),
        ("gemma3_dir", {"attn_logit_softcapping": 30.0}, "does not cap them in this family"),
        ("gemma3_dir", {"hidden_activation": "silu"}, "hidden_act 'silu' .* computes gelu"),
        ("gemma3_dir", {"use_bidirectional_attention": True}, "llama.cpp looks back only"),
        ("phi4_dir", {"sliding_window": 16}, "sliding_window 16 is not supported"),
        ("phi4_dir", {"hidden_act": "gelu"}, "hidden_act 'gelu' .* computes silu"),
    ],
)
def test_what_llama_cpp_computes_otherwise_in_a_family_is_named(
    family: str, values: dict[str, object], message: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message):
        configured(request.getfixturevalue(family), tmp_path / "m", **values).check()


@pytest.mark.parametrize(
    ("folder", "takes_whole_words", "name"),
    [("llama_dir", True, "llama-bpe"), ("llama_dir", False, "dbrx"), ("nemo_dir", False, "tekken")],
)
def test_words_that_merges_do_not_make_decide_the_pre_tokenizer(
    folder: str, takes_whole_words: bool, name: str, request: pytest.FixtureRequest
) -> None:
    definition = json.loads((request.getfixturevalue(folder) / "tokenizer.json").read_text())
    definition["model"]["ignore_merges"] = takes_whole_words
    assert pre_tokenizer_name(definition) == name
    definition["model"]["vocab"]["qqqq"] = 9999
    if name == "tekken":
        with pytest.raises(UserError, match="has 'qqqq', which its merges do not make, and ignore_merges false"):
            pre_tokenizer_name(definition)
    else:
        assert pre_tokenizer_name(definition) == name


@pytest.mark.parametrize("stated", [32, 128])
def test_the_context_length_is_that_of_the_scaled_positions(stated: int, qwen2_dir: Path, tmp_path: Path) -> None:
    values = {"rope_parameters": YARN, "max_position_embeddings": stated}
    write_gguf(configured(qwen2_dir, tmp_path / "m", **values), tmp_path / "f16.gguf", "F16", "test", 2)
    fields = gguf.GGUFReader(tmp_path / "f16.gguf").fields
    found = [fields[f"qwen2.{name}"].contents() for name in ("context_length", "rope.scaling.original_context_length")]
    assert found == [128, 32]


def test_more_positions_than_the_model_has_are_refused(qwen2_dir: Path) -> None:
    SourceModel(qwen2_dir, context_length=512).check()
    with pytest.raises(UserError, match="context_length 513 is more than the model's 512 positions"):
        SourceModel(qwen2_dir, context_length=513).check()


def test_up_to_its_window_a_sliding_model_is_the_same(qwen2_dir: Path, tmp_path: Path) -> None:
    values = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1, "layer_types": None}
    folder = configured(qwen2_dir, tmp_path / "m", **values).folder
    source = SourceModel(folder, context_length=64)
    source.check()
    write_gguf(source, tmp_path / "f16.gguf", "F16", "test", 2)
    assert gguf.GGUFReader(tmp_path / "f16.gguf").fields["qwen2.context_length"].contents() == 64
    assert mean_kl(folder, tmp_path / "f16.gguf") < 1e-4


@pytest.mark.parametrize(("value", "row"), [(1e5, 1e-5), (1.0, 1e-6)])
def test_what_float16_cannot_hold_stays_in_bfloat16(value: float, row: float, qwen2_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen2_dir, tmp_path / "m"))
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.mlp.down_proj.weight"][3, 5] = value
    tensors["model.layers.0.mlp.up_proj.weight"][5] *= row
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    written = write(folder, tmp_path / "f16.gguf", "F16")
    changed = {"blk.0.ffn_up.weight": "F16 -> BF16", "blk.0.ffn_down.weight": "F16 -> BF16"}
    assert written.fallbacks == (changed if value > 65504 else {"blk.0.ffn_up.weight": "F16 -> BF16"})
    assert mean_kl(folder, tmp_path / "f16.gguf") < 1e-4


def test_named_templates_are_kept(tiny_model_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": tokenizer.chat_template, "tool_use": "{{ tools }}", "rag": "{{ documents }}"}
    tokenizer.save_pretrained(folder)
    write(folder, tmp_path / "m.gguf", "F16")
    fields = gguf.GGUFReader(tmp_path / "m.gguf").fields
    assert fields["tokenizer.chat_template"].contents() == tokenizer.chat_template["default"]
    assert fields["tokenizer.chat_template.tool_use"].contents() == "{{ tools }}"
    assert fields["tokenizer.chat_templates"].contents() == ["rag", "tool_use"]


def test_more_embeddings_than_tokens_are_written_as_unused(tiny_model_dir: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    folder = Path(shutil.copytree(tiny_model_dir, tmp_path / "m"))
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    model.resize_token_embeddings(1600, mean_resizing=False)
    model.save_pretrained(folder)
    write(folder, tmp_path / "m.gguf", "F16")
    assert mean_kl(folder, tmp_path / "m.gguf") < 1e-4


@pytest.mark.parametrize("layout", ["language_model.model.", "model.language_model."])
def test_of_a_model_that_sees_the_text_part_is_written(layout: str, gemma3_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(gemma3_dir, tmp_path / "m"))
    text = {
        name.replace("model.", layout, 1): weight for name, weight in load_file(folder / "model.safetensors").items()
    }
    others = {
        name: torch.ones(4) for name in ("vision_tower.post_layernorm.weight", "multi_modal_projector.norm.weight")
    }
    save_file({**text, **others}, folder / "model.safetensors", {"format": "pt"})
    config = json.loads((folder / "config.json").read_text())
    whole = {"architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "text_config": config}
    (folder / "config.json").write_text(json.dumps(whole))
    write(folder, tmp_path / "seeing.gguf", "F16")
    write(gemma3_dir, tmp_path / "text.gguf", "F16")
    assert (tmp_path / "seeing.gguf").read_bytes() == (tmp_path / "text.gguf").read_bytes()


def test_weights_that_are_no_numbers_are_named(qwen2_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen2_dir, tmp_path / "m"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] = math.inf
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"model\.norm\.weight holds NaN or infinity"):
        write(folder, tmp_path / "m.gguf", "F16")


@pytest.mark.parametrize("template", ["{% for m in messages %}{{ m.content }", "{{ raise_exception('no') }}"])
def test_a_chat_template_that_runs_on_no_chat_is_named(template: str, qwen2_dir: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(qwen2_dir, tmp_path / "m"))
    (folder / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=r"the chat template in .* cannot be run"):
        check_vocabulary(SourceModel(folder))


def test_a_full_disk_is_called_so(qwen2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def cut_short(_writer: gguf.GGUFWriter, tensor: Array) -> None:
        # What NumPy says of it.
        raise OSError(f"{tensor.size} requested and 7 written")

    monkeypatch.setattr(gguf.GGUFWriter, "write_tensor_data", cut_short)
    with pytest.raises(OSError, match=r"No space left on device: .*m\.gguf"):
        write(qwen2_dir, tmp_path / "m.gguf", "F16")
