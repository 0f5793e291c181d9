"""The benchmark's command line, and its cases as far as they run without a GPU."""

import pytest
import torch

from finemill.kernels.bench.ops import CASES, main


@pytest.mark.skipif(torch.cuda.is_available(), reason="tells what happens without a GPU")
def test_without_a_gpu_it_says_so_in_a_line_and_exits_2(capsys):
    assert main([]) == 2
    assert capsys.readouterr().err == "finemill bench kernels needs a CUDA device: none is visible to torch\n"


def test_an_unknown_op_is_refused_with_the_known_ones(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["rms-nrom"])
    known = (
        "adamw, cross-entropy, host-memory, lora, lora-b, nf4, projection, qk-norm-rope, rms-norm, swiglu, swiglu-lora"
    )
    assert f"choose from {known}" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_move_bytes():
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.bytes > 0 for case in CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs_kernel_and_reference(case):
    kernel, reference = case.build(torch.device("cuda"), torch.bfloat16)
    kernel()
    if reference is not None:
        reference()
    torch.cuda.synchronize()
