"""Cases of the ops that a mixture of experts adds, for ops.py."""

from collections.abc import Iterator

import torch
from torch import Tensor

from finemill.kernels.bench.case import Call, Case, rand
from finemill.kernels.ops.combine_experts import combine_experts
from finemill.kernels.ops.division import choose_block
from finemill.kernels.ops.expert_lora import expert_gradient, gather_project, project
from finemill.kernels.ops.expert_rows import ExpertRows, sort_by_expert
from finemill.kernels.ops.grouped_gemm import grouped_gemm
from finemill.kernels.ops.nf4_stack import NF4Stack, dequantize_nf4_stack
from finemill.kernels.ops.routing import route
from finemill.kernels.ops.swiglu_experts import swiglu_experts_backward

# T tokens, E experts, k per token, H model width, I feed-forward width of one expert, r rank


def expert_cases(t: int, e: int, k: int, h: int, i: int, r: int) -> Iterator[Case]:
    """Yield every op at one model's shape, with random routing."""
    pairs, shape = t * k, f"{t} x {k} of {e}"

    def rows(device: torch.device) -> ExpertRows:
        experts = torch.rand(t, e, device=device).topk(k).indices.int()
        return sort_by_expert(experts, e, choose_block(t, k, e))

    def routing(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        logits = rand(device, torch.float32, t, e)
        return lambda: route(logits, k, normalize=True), lambda: logits.softmax(dim=-1).topk(k)

    def sorting(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        experts = torch.rand(t, e, device=device).topk(k).indices.int()
        return lambda: sort_by_expert(experts, e, choose_block(t, k, e)), None

    def decode(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        stack, out = random_stack(device, dtype, 2 * e, i, h), torch.empty((2 * e, i, h), dtype=dtype, device=device)
        return lambda: dequantize_nf4_stack(stack, out), None

    def product(n: int, width: int, *, transposed: bool) -> Case:
        def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
            layout = rows(device)
            weight, low = rand(device, dtype, e, n, width), rand(device, dtype, layout.num_rows, r)
            factor = rand(device, dtype, e, r, width) if transposed else rand(device, dtype, e, n, r)
            x = rand(device, dtype, layout.num_rows, n if transposed else width)
            out = torch.empty((layout.num_rows, width if transposed else n), dtype=dtype, device=device)
            dense = weight if transposed else weight.transpose(1, 2)
            return (
                lambda: grouped_gemm(x, weight, layout, out, low, factor, transposed=transposed),
                (lambda: torch._grouped_mm(x, dense, offs=layout.starts[1:]))
                if hasattr(torch, "_grouped_mm")
                else None,
            )

        size = 2 * (e * n * width + pairs * (n + width + r) + e * r * (n + width))
        direction = "transposed " if transposed else ""
        return Case("grouped-gemm", f"grouped gemm {direction}{shape}, {n} x {width}, rank {r}", size, build)

    def gather(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layout, x, factor = rows(device), rand(device, dtype, t, h), rand(device, dtype, e, r, h)
        out, low = _rows_of(layout, x, h), _rows_of(layout, x, r)
        return lambda: gather_project(x, factor, layout, out, low), lambda: x[layout.row_pair.clamp(min=0) // k]

    def low_rank(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layout, factor = rows(device), rand(device, dtype, e, 2 * i, r)
        x, low = rand(device, dtype, layout.num_rows, 2 * i), rand(device, dtype, layout.num_rows, r)
        return lambda: project(x, factor, layout, low, transposed=True), None

    def gradient(strided: bool) -> Case:
        def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
            layout = rows(device)
            x, low = rand(device, dtype, layout.num_rows, h), rand(device, dtype, layout.num_rows, r)
            grad = (
                rand(device, torch.float32, h, r, e).permute(2, 1, 0)
                if strided
                else rand(device, torch.float32, e, r, h)
            )
            return lambda: expert_gradient(low, x, layout, grad, 2.0), None

        name = "dB" if strided else "dA"
        return Case(
            "expert-lora", f"experts' {name} {shape}, {h}, rank {r}", 2 * pairs * (h + r) + 8 * e * r * h, build
        )

    def combine(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layout = rows(device)
        y, weights, out = (
            rand(device, dtype, layout.num_rows, h),
            rand(device, torch.float32, t, k),
            rand(device, dtype, t, h),
        )
        return lambda: combine_experts(y, layout, out, weights), None

    def swiglu(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layout = rows(device)
        dh, gate_up = rand(device, dtype, layout.num_rows, i), rand(device, dtype, layout.num_rows, 2 * i)
        weights = rand(device, torch.float32, layout.num_rows)
        return lambda: swiglu_experts_backward(dh, gate_up, layout, weights), None

    yield Case("routing", f"routing {shape}", 4 * t * (e + 2 * k), routing)
    yield Case("expert-rows", f"sort by expert {shape}", 12 * pairs, sorting)
    yield Case("nf4-stack", f"nf4 {2 * e} x {i} x {h}", 2 * e * i * h * 161 // 64, decode)
    yield product(2 * i, h, transposed=False)
    yield product(h, i, transposed=False)
    yield product(h, i, transposed=True)
    yield product(2 * i, h, transposed=True)
    yield Case("expert-lora", f"gather and x A^T {shape}, {h}, rank {r}", 2 * (t * h + pairs * (h + r)), gather)
    yield Case("expert-lora", f"dy B {shape}, {2 * i}, rank {r}", 2 * pairs * (2 * i + r), low_rank)
    yield gradient(strided=False)
    yield gradient(strided=True)
    yield Case("combine-experts", f"combine experts {shape}, {h}", 2 * (pairs + t) * h, combine)
    yield Case("swiglu-experts", f"experts' swiglu backward {shape}, {i}", 12 * pairs * i, swiglu)


def random_stack(device: torch.device, dtype: torch.dtype, count: int, n: int, k: int) -> NF4Stack:
    """Codes and scales that no matrix was quantized to."""
    blocks = n * k // 64

    def draw(*shape: int) -> Tensor:
        return torch.randint(0, 256, shape, device=device, dtype=torch.uint8)

    return NF4Stack(
        packed=draw(count, n * k // 2),
        absmax=draw(count, blocks),
        codebook=rand(device, torch.float32, 16),
        nested_code=rand(device, torch.float32, 256),
        nested_absmax=rand(device, torch.float32, count, -(-blocks // 256)),
        offset=rand(device, torch.float32, count),
        shape=(count, n, k),
        dtype=dtype,
    )


def _rows_of(layout: ExpertRows, like: Tensor, width: int) -> Tensor:
    return torch.empty((layout.num_rows, width), dtype=like.dtype, device=like.device)
