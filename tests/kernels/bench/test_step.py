"""The step benchmark runs on a CPU, on checkpoints that transformers reads, and reports what it promises."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from finemill.kernels.bench import data as bench_data
from finemill.kernels.bench import loss as bench_loss
from finemill.kernels.bench import step as bench_step
from finemill.kernels.bench.data import ensure_checkpoint, real_rows, start_adapters
from finemill.kernels.bench.runs import StepRun, read_runs
from finemill.kernels.engine.load import LoraSettings, Rotary, load_model
from finemill.kernels.engine.nf4_quantize import dynamic_codebook, nf4_codebook
from finemill.kernels.engine.plan import Plan
from finemill.kernels.ops.packing import pack_rows
from finemill.kernels.planning.planner import NoPlanError

CPU = torch.device("cpu")


@pytest.fixture
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    return ensure_checkpoint("qwen3-tiny", 1, CPU)


def test_the_record_holds_losses_norms_speed_and_the_plan(checkpoint: Path, tmp_path: Path) -> None:
    arguments = "--shape qwen3-tiny --layers 1 --seq 16 --bs 1 --accum 2 --quant bf16 --device cpu --steps 3 --warmup 1"
    assert bench_step.main([*arguments.split(), "--json", str(tmp_path / "r.json")]) == 0
    record = json.loads((tmp_path / "r.json").read_text())
    assert record["tokens_per_step"] == 32
    assert record["tokens_per_s"] > 0
    assert len(record["losses"]) == len(record["grad_norms"]) == 3
    assert {"peak_alloc_gb", "first_step_s", "start_to_first_step_s", "predicted_peak_gb", "plan"} <= set(record)


def test_a_run_is_appended_to_the_file_of_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_data, "FOLDERS", (tmp_path / "models",))
    arguments = "--shape qwen3-tiny --seq 16 --bs 1 --accum 2 --quant bf16 --device cpu --steps 4 --warmup 1"
    file = tmp_path / "runs.jsonl"
    for _ in range(2):
        assert bench_step.main([*arguments.split(), "--record", str(file)]) == 0
    run, again = (run for run in read_runs(file) if isinstance(run, StepRun))
    assert (run.kind, run.shape, run.rows, run.quant) == ("step", "qwen3-tiny", 2, "bf16")
    assert run.command == f"finemill bench step {arguments}"
    assert run.tokens_per_step == 32
    assert run.step_s is not None
    assert (run.step_s.p20 or 0) <= run.step_s.p50 <= (run.step_s.p80 or 0)
    assert run.plan is not None
    assert len(run.plan.plan({}).levels) == 2
    assert run.versions["torch"]
    assert again.losses == run.losses


def test_what_cannot_run_is_said_in_a_line(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NoPlanError, match=r"no plan fits 0\.00 GiB: the leanest needs "):
        bench_step.main("--shape qwen3-tiny --layers 1 --device cpu --memory-gb 0.001".split())
    with pytest.raises(SystemExit, match="2"):
        bench_step.main("--shape qwen3-tiny --layers 1 --device cpu --trainer".split())
    assert "--trainer is timed on a GPU" in capsys.readouterr().err.splitlines()[-1]
    with pytest.raises(SystemExit, match="2"):
        bench_step.main("--shape qwen3-tiny --layers 1 --device cpu --record runs.jsonl".split())
    assert "--record keeps what whole models did" in capsys.readouterr().err.splitlines()[-1]


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
@pytest.mark.parametrize("program", [bench_step.main, bench_loss.main], ids=["step", "loss"])
def test_without_a_gpu_it_says_so_and_exits_2(
    program: Callable[[list[str]], int], capsys: pytest.CaptureFixture[str]
) -> None:
    rows = "--rows rows.jsonl" if program is bench_loss.main else ""
    with pytest.raises(SystemExit, match="2"):
        program(f"--shape qwen3-tiny {rows}".split())
    assert "no CUDA device is visible to torch" in capsys.readouterr().err.splitlines()[-1]


def test_a_checkpoint_is_found_again_and_read_by_transformers(checkpoint: Path) -> None:
    assert ensure_checkpoint("qwen3-tiny", 1, CPU) == checkpoint
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer("t5 t7").input_ids == [5, 7]


def test_the_loader_gives_the_loss_of_transformers(checkpoint: Path) -> None:
    settings = LoraSettings(rank=4, alpha=8.0)
    model, parameters = load_model(checkpoint, device=CPU, dtype=torch.float32, quantize=False, lora=settings)
    model.apply_plan(Plan.everything(1))
    ids = torch.randint(0, 4000, (2, 24), generator=torch.Generator().manual_seed(0))
    reference = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    expected = reference(input_ids=ids, labels=ids).loss
    # B starts at zero, so the adapters change nothing yet.
    loss = model.loss_and_grad(pack_rows(ids, ids), 1.0).loss / (2 * 23)
    torch.testing.assert_close(loss, expected.detach(), rtol=1e-4, atol=1e-4)
    start_adapters(parameters)
    assert all(parameter.abs().sum() > 0 for parameter in parameters.values())


def test_codebooks_are_those_of_bitsandbytes() -> None:
    functional = pytest.importorskip("bitsandbytes").functional
    assert torch.equal(dynamic_codebook(CPU), functional.create_dynamic_map())
    assert torch.equal(nf4_codebook(CPU), functional.get_4bit_type("nf4", device="cpu"))


def test_llama3_frequencies_equal_transformers() -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    scaling = {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    config = LlamaConfig(hidden_size=256, num_attention_heads=4, head_dim=64, rope_parameters=scaling)
    positions = torch.arange(64)[None]
    ours = Rotary({"rope_parameters": scaling}, 64, CPU)(torch.empty(1), positions)
    theirs = LlamaRotaryEmbedding(config)(torch.empty(1), positions)
    for mine, reference in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, reference, rtol=1e-5, atol=1e-5)


def test_row_lengths_follow_the_texts(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text('{"a": "' + "x" * 380 + '"}\n{"a": "", "b": ["' + "y" * 38 + '"]}\n')
    assert [len(row) for row in real_rows([file], 2, 100, 64)] == [64, 26]
