"""The benchmark's command line, and its cases as far as they run without a GPU."""

import pytest
import torch

from finemill.errors import UserError
from finemill.kernels.bench.case import Case
from finemill.kernels.bench.ops import CASES, main


def test_without_a_gpu_it_says_so_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match="a CUDA device is needed: none is visible to torch"):
        main([])


def test_an_unknown_op_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["rms-nrom"])
    known = (
        "adamw, combine-experts, cross-entropy, expert-lora, expert-rows, grouped-gemm, host-memory, lora, lora-b, "
        "nf4, nf4-stack, projection, qk-norm-rope, rms-norm, routing, swiglu, swiglu-experts, swiglu-lora"
    )
    assert f"choose from {known}" in capsys.readouterr().err


def test_cases_have_names_of_their_own_and_move_bytes() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
    assert all(case.bytes > 0 for case in CASES)


@pytest.mark.gpu
@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_every_case_runs_kernel_and_reference(case: Case) -> None:
    kernel, reference = case.build(torch.device("cuda"), torch.bfloat16)
    kernel()
    if reference is not None:
        reference()
    torch.cuda.synchronize()
