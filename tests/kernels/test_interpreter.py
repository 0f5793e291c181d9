"""The op tests again, with the kernels themselves: in Triton's interpreter, which needs a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from finemill.kernels.ops.launch import INTERPRETED

LAYERS = (
    "test_rank_stabilized_scaling_and_partial_targets",
    "test_loss_and_every_gradient_equal_transformers_and_peft[qwen3]",
    "test_experts_without_adapters_stay_frozen",
)
OPS = (
    "adamw",
    "combine_experts",
    "cross_entropy",
    "expert_lora",
    "expert_rows",
    "grouped_gemm",
    "lora",
    "nf4",
    "nf4_stack",
    "qk_norm_rope",
    "rms_norm",
    "routing",
    "swiglu",
    "swiglu_experts",
    "swiglu_lora",
)


@pytest.mark.skipif(INTERPRETED, reason="already in the interpreter")
@pytest.mark.skipif(torch.cuda.is_available(), reason="the op tests run the kernels on the GPU")
@pytest.mark.timeout(600)
def test_kernels_pass_their_tests_in_the_interpreter() -> None:
    files = [str(Path(__file__).with_name("ops") / f"test_{op}.py") for op in OPS]
    # The kernels between the ops: whole layers.
    files += [str(Path(__file__).with_name("test_accelerate.py")) + f"::{test}" for test in LAYERS]
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *files]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-4000:] + result.stderr[-2000:]
