"""What only a GPU can show: matrices beyond 2^31 elements, CUDA graphs, what allocations take, runs that repeat."""

from collections.abc import Callable

import pytest
import torch

from finemill.kernels.ops.adamw import AdamWState, adamw_step, grad_norm
from finemill.kernels.ops.cross_entropy import cross_entropy_inplace
from finemill.kernels.ops.lora import LoRADropout, lora_backward_a, lora_project
from finemill.kernels.ops.nf4 import NF4Tensor, dequantize_nf4
from finemill.kernels.ops.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward
from finemill.kernels.ops.rms_norm import rms_norm_backward, rms_norm_forward
from finemill.kernels.ops.swiglu import swiglu_backward, swiglu_forward
from finemill.kernels.ops.swiglu_lora import swiglu_lora_backward
from finemill.kernels.planning.workload import block_bytes

pytestmark = pytest.mark.gpu
WIDTH = 8192
ROWS = 2**31 // WIDTH + 5


@pytest.fixture
def huge() -> torch.Tensor:
    """A matrix of more than 2^31 elements whose last rows differ from all others."""
    matrix = torch.zeros(ROWS, WIDTH, dtype=torch.bfloat16, device="cuda")
    matrix[-3:] = torch.randn(3, WIDTH).to("cuda", torch.bfloat16)
    return matrix


def test_norm_reaches_rows_beyond_32_bit_offsets(huge: torch.Tensor) -> None:
    weight = torch.randn(WIDTH, device="cuda").bfloat16()
    y, rstd = rms_norm_forward(huge, weight, 1e-6)
    assert torch.equal(y[-3:], rms_norm_forward(huge[-3:].clone(), weight, 1e-6)[0])
    dx = rms_norm_backward(y, huge, weight, rstd, out=y)
    assert torch.isfinite(dx[-3:]).all()
    assert (dx[-3:] != 0).any(dim=1).all()


def test_swiglu_reaches_rows_beyond_32_bit_offsets(huge: torch.Tensor) -> None:
    expected = swiglu_forward(huge[-3:].clone())
    assert torch.equal(swiglu_forward(huge)[-3:], expected)
    dh = torch.ones(ROWS, WIDTH // 2, dtype=torch.bfloat16, device="cuda")
    grad = swiglu_backward(dh[-3:], huge[-3:].clone())
    assert torch.equal(swiglu_backward(dh, huge, out=huge)[-3:], grad)


def test_swiglu_with_lora_reaches_rows_beyond_32_bit_offsets(huge: torch.Tensor) -> None:
    def run(gate_up: torch.Tensor) -> list[torch.Tensor]:
        tokens, width = gate_up.shape[0], WIDTH // 2
        dh = torch.ones(tokens, width, dtype=torch.bfloat16, device="cuda")
        xa, dya = torch.ones(2, tokens, 32, dtype=torch.bfloat16, device="cuda")
        b = torch.ones(WIDTH, 32, dtype=torch.bfloat16, device="cuda")
        grad_a, grad_b = torch.zeros(16, width, device="cuda"), torch.zeros(WIDTH, 16, device="cuda")
        swiglu_lora_backward(dh, gate_up, xa, b, xa[:, :16], dya, grad_a, grad_b, 1.0)
        return [gate_up[-3:].clone(), dya[-3:]]

    expected = run(huge[-3:].clone())
    for last, alone in zip(run(huge), expected, strict=True):
        assert torch.equal(last, alone)


def test_rope_reaches_rows_beyond_32_bit_offsets(huge: torch.Tensor) -> None:
    n, k, d = 32, 16, 128
    cos, sin = torch.rand(2, 16, d // 2, device="cuda")
    weight, positions = torch.rand(d, device="cuda").bfloat16(), torch.arange(ROWS, device="cuda") % 16
    q, _, rstd = qk_norm_rope_forward(huge, weight, weight, cos, sin, positions, 1e-6, n, k)
    last = huge[-3:].clone()
    expected_q, expected_k, last_rstd = qk_norm_rope_forward(last, weight, weight, cos, sin, positions[-3:], 1e-6, n, k)
    assert torch.equal(q[-3:], expected_q)
    tables = (weight, weight, cos, sin)
    grad = qk_norm_rope_backward(
        expected_q, expected_k, expected_k, last, *tables, positions[-3:], last_rstd, n, k
    )  # fmt: skip
    dk = torch.zeros(ROWS, k, d, dtype=torch.bfloat16, device="cuda")
    dk[-3:] = expected_k
    assert torch.equal(qk_norm_rope_backward(q, dk, dk, huge, *tables, positions, rstd, n, k, out=huge)[-3:], grad)


def test_cross_entropy_reaches_rows_beyond_32_bit_offsets(huge: torch.Tensor) -> None:
    labels = torch.randint(0, WIDTH, (ROWS,), device="cuda")
    last = huge[-3:].clone()
    expected = cross_entropy_inplace(last, labels[-3:])
    assert torch.equal(cross_entropy_inplace(huge, labels)[-3:], expected)
    assert torch.equal(huge[-3:], last)


def test_nf4_reaches_elements_beyond_32_bit_offsets() -> None:
    blocks = ROWS * WIDTH // 64
    weight = NF4Tensor(
        packed=torch.randint(0, 256, (ROWS * WIDTH // 2,), dtype=torch.uint8, device="cuda"),
        absmax=torch.rand(blocks, device="cuda"),
        codebook=torch.linspace(-1, 1, 16, device="cuda"),
        nested_code=None,
        nested_absmax=None,
        offset=None,
        shape=(ROWS, WIDTH),
        dtype=torch.bfloat16,
    )
    last = NF4Tensor(
        weight.packed[-WIDTH:].clone(), weight.absmax[-WIDTH // 32 :].clone(), weight.codebook, None, None, None,
        (2, WIDTH), torch.bfloat16,
    )  # fmt: skip
    assert torch.equal(dequantize_nf4(weight)[-2:], dequantize_nf4(last))


@pytest.mark.parametrize(
    "size",
    [
        *(1000, (3 << 20) + 5, (10 << 20) - 512),  # cut off a block to 512 bytes
        7 << 21,  # whole pages
        *((12 << 20) - (3 << 19), (48 << 20) + 4096, (100 << 20) + 1000),  # a rest of more than 1 MiB
    ],
)
def test_a_tensor_takes_what_the_planner_counts(size: int) -> None:
    before = torch.cuda.memory_stats()["allocated_bytes.all.current"]
    with torch.cuda.use_mem_pool(torch.cuda.MemPool()):  # of its own: no block that another test left is used again
        tensor = torch.empty(size, dtype=torch.uint8, device="cuda")
        taken = torch.cuda.memory_stats()["allocated_bytes.all.current"] - before
        del tensor
    assert taken == block_bytes(size)


def test_an_optimizer_step_replays_from_a_graph_with_new_scalars() -> None:
    n = 5000
    grad = torch.randn(n, device="cuda")
    step, lr = torch.zeros(1, device="cuda"), torch.full((1,), 1e-2, device="cuda")
    runs = []
    for captured in (False, True):
        param, state = torch.ones(n, device="cuda"), AdamWState.zeros(n, "cuda", bits=8)
        norm = torch.empty((), device="cuda")

        def update(param: torch.Tensor = param, state: AdamWState = state, norm: torch.Tensor = norm) -> None:
            step.add_(1)
            grad_norm(grad, norm)
            adamw_step(param, grad, state, step=step, lr=lr, grad_norm=norm, max_norm=1.0, weight_decay=0.1)

        run: Callable[[], None] = update
        step.zero_()
        lr.fill_(1e-2)
        update()  # compiles
        if captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                update()
            run = graph.replay
        for rate in (1e-2, 1e-3):
            lr.fill_(rate)
            run()
        runs.append(param)
    assert torch.equal(runs[0], runs[1])


def test_split_sums_and_dropout_repeat_bit_for_bit() -> None:
    torch.manual_seed(0)
    x, a = torch.randn(4096, 1024, device="cuda").bfloat16(), torch.randn(16, 1024, device="cuda").bfloat16()
    spec = LoRADropout(0.1, torch.tensor([7], device="cuda"))

    def all_outputs() -> list[torch.Tensor]:
        xa, grad_a = lora_project(x, a, dropout=spec), torch.empty(16, 1024, device="cuda")
        lora_backward_a(xa, x, grad_a, spec)
        return [xa, grad_a, grad_norm(grad_a.flatten())]

    for first, second in zip(all_outputs(), all_outputs(), strict=True):
        assert torch.equal(first, second)
