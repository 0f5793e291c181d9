"""No process holds more of a base than its share and one layer until it is cut into shards."""

import ctypes
import gc
import os
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.distributed import fsdp
from transformers import AutoModelForCausalLM, DeepseekV3Config, Qwen3Config

from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.training.config import LoRATrainingConfig
from finemill.training.hollow_base import filled_as_cut, load_hollow
from finemill.training.quantized_base import load_base
from tests.two_processes import free_port, run_in_two

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(torch.cuda.is_available(), reason="measures host memory"),
]
CPU = torch.device("cpu")
DEEPSPEED = pytest.mark.skipif(not find_spec("deepspeed"), reason="no DeepSpeed")
WIDE = Qwen3Config(
    hidden_size=512,
    intermediate_size=2048,
    num_hidden_layers=12,
    num_attention_heads=8,
    num_key_value_heads=8,
    head_dim=64,
    vocab_size=128,
    tie_word_embeddings=True,
)


@pytest.fixture(scope="module")
def wide_base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model of 200 MB in float32, nearly all of it in its twelve layers."""
    folder = tmp_path_factory.mktemp("wide")
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(WIDE)
    model.to_empty(device="cpu")
    for parameter in model.parameters():
        torch.nn.init.constant_(parameter, 0.01)
    model.save_pretrained(folder)
    return folder


def test_a_correction_of_a_routers_choice_stays_float32(tmp_path: Path) -> None:
    config = DeepseekV3Config(
        hidden_size=32, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=1, first_k_dense_replace=0,
        num_attention_heads=2, num_key_value_heads=2, q_lora_rank=8, kv_lora_rank=8, qk_rope_head_dim=8, v_head_dim=8,
        qk_nope_head_dim=8, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1, vocab_size=64,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    name = "model.layers.0.mlp.gate.e_score_correction_bias"
    bias = torch.tensor([0.1, -0.2, 0.3, 1.0])
    model.get_submodule(name.rpartition(".")[0])._buffers["e_score_correction_bias"] = bias
    model.save_pretrained(tmp_path)
    hollow = load_hollow(tmp_path, config, torch.bfloat16, None)
    assert torch.equal(hollow.get_buffer(name), bias)


def memory(name: str) -> int:
    """Bytes of this process's memory, or their peak since `forget_peak`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith(f"{name}:")).split()[1])


def forget_peak() -> None:
    Path("/proc/self/clear_refs").write_text("5")


def cut_as(rank: int, port: int, strategy: str, base: Path, folder: Path) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group("gloo")
    # Between blocks as small as these the heap would keep holes; those of a real layer go back to the system.
    ctypes.CDLL(None).mallopt(-3, 2**16)  # M_MMAP_THRESHOLD
    for bits in (16, 4):
        config = LoRATrainingConfig.model_validate({"strategy": strategy, "load_in_4bit": bits == 4})
        cut(BUILTIN_MODELS["builtin:tiny-qwen3"], config)  # what is imported is not counted
        forget_peak()
        before = memory("VmRSS")
        cut(base, config)
        (folder / f"{bits}-{rank}").write_text(str(memory("VmHWM") - before))
        gc.collect()
    torch.distributed.destroy_process_group()


def cut(base: Path, config: LoRATrainingConfig) -> None:
    """Load a base with small adapters, and cut it."""
    model: Any = get_peft_model(load_base(base, config, CPU), LoraConfig(r=4, target_modules="all-linear"))
    plugin = SimpleNamespace(zero_stage=3, deepspeed_config={"zero_optimization": {"stage": 3}})
    trainer: Any = SimpleNamespace(
        model=model,
        args=SimpleNamespace(device=CPU, bf16=False, fp16=False),
        is_deepspeed_enabled=config.strategy == "zero3",
        accelerator=SimpleNamespace(deepspeed_plugin=plugin),
    )
    with filled_as_cut(trainer):
        if config.strategy == "fsdp2":
            for layer in model.get_base_model().model.layers:
                fsdp.fully_shard(layer)
            fsdp.fully_shard(model)


@pytest.mark.parametrize("strategy", ["fsdp2", pytest.param("zero3", marks=DEEPSPEED)])
def test_a_process_holds_its_share_and_one_layer(strategy: str, wide_base: Path, tmp_path: Path) -> None:
    run_in_two(cut_as, free_port(), strategy, wide_base, tmp_path)
    whole = sum(file.stat().st_size for file in wide_base.glob("*.safetensors"))
    for bits, share in {16: whole / 2, 4: whole / 7 / 2}.items():
        peaks = [int((tmp_path / f"{bits}-{rank}").read_text()) for rank in (0, 1)]
        assert max(peaks) < share + 2 * whole / WIDE.num_hidden_layers, bits
