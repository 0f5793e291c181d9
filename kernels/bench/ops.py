"""Time every op at the shapes of real models, against plain PyTorch and the card's own copy bandwidth.

    finemill bench kernels [OP ...] [--record FILE]

One `Case` per op and shape: how many bytes it has to move, the call, and the PyTorch code (or bitsandbytes) that it
replaces, both timed as CUDA graphs with a cold L2 cache; autograd's time includes its forward. resources.py compiles
the same cases without a GPU.
"""

import argparse
import sys
from collections.abc import Iterator
from typing import Any

import torch
import triton
from torch import Tensor

from finemill.errors import UserError
from finemill.kernels.bench.case import Call, Case, rand
from finemill.kernels.bench.expert_ops import expert_cases
from finemill.kernels.bench.runs import OpRun, Quantiles, add_record_argument, header, record_runs
from finemill.kernels.engine.adapters import GroupAdapter
from finemill.kernels.engine.host_memory import gather_rows, pin
from finemill.kernels.engine.projection import Projection
from finemill.kernels.ops.adamw import AdamWState, adamw_step, grad_norm
from finemill.kernels.ops.cross_entropy import cross_entropy_inplace
from finemill.kernels.ops.lora import LoRADropout, lora_backward_a, lora_backward_x, lora_project
from finemill.kernels.ops.nf4 import NF4Tensor, dequantize_nf4, dequantize_nf4_reference
from finemill.kernels.ops.qk_norm_rope import qk_norm_rope_backward, qk_norm_rope_forward, qk_norm_rope_reference
from finemill.kernels.ops.rms_norm import add_rms_norm_forward, rms_norm_backward, rms_norm_forward, rms_norm_reference
from finemill.kernels.ops.swiglu import swiglu_backward, swiglu_forward, swiglu_reference
from finemill.kernels.ops.swiglu_lora import swiglu_lora_backward

EPS = 1e-6


def _nf4(n: int, k: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        blocks = n * k // 64
        weight = NF4Tensor(
            packed=torch.randint(0, 256, (n * k // 2,), device=device, dtype=torch.uint8),
            absmax=torch.randint(0, 256, (blocks,), device=device, dtype=torch.uint8),
            codebook=rand(device, torch.float32, 16),
            nested_code=rand(device, torch.float32, 256),
            nested_absmax=rand(device, torch.float32, -(-blocks // 256)),
            offset=rand(device, torch.float32, 1),
            shape=(n, k),
            dtype=dtype,
        )
        out = torch.empty((n, k + 64), dtype=dtype, device=device)[:, :k]
        return lambda: dequantize_nf4(weight, out), _bitsandbytes_decode(weight)

    return Case("nf4", f"nf4 {n} x {k}", n * k * 2 + n * k // 2 + n * k // 64, build)


def _bitsandbytes_decode(weight: NF4Tensor) -> Call:
    if not weight.packed.is_cuda:
        return lambda: dequantize_nf4_reference(weight)
    from bitsandbytes.functional import QuantState, dequantize_4bit

    nested = QuantState(weight.nested_absmax, code=weight.nested_code, blocksize=256, dtype=torch.float32)
    state = QuantState(
        weight.absmax,
        shape=torch.Size(weight.shape),
        code=weight.codebook,
        blocksize=64,
        quant_type="nf4",
        dtype=weight.dtype,
        offset=weight.offset,
        state2=nested,
    )
    return lambda: dequantize_4bit(weight.packed[:, None], state)


def _rms_norm(tokens: int, width: int) -> Iterator[Case]:
    size = 2 * tokens * width

    def forward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, weight = rand(device, dtype, tokens, width), rand(device, dtype, width)
        return lambda: rms_norm_forward(x, weight, EPS), lambda: rms_norm_reference(x, weight, EPS, upcast=False)

    def add_forward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, delta, weight = (rand(device, dtype, *shape) for shape in ((tokens, width), (tokens, width), (width,)))
        return (
            lambda: add_rms_norm_forward(x, delta, weight, EPS),
            lambda: rms_norm_reference(x + delta, weight, EPS, upcast=False),
        )

    def backward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, dy, residual = (rand(device, dtype, tokens, width) for _ in range(3))
        weight, rstd = rand(device, dtype, width), rand(device, torch.float32, tokens)
        leaf = x.clone().requires_grad_()

        def eager() -> object:
            y = rms_norm_reference(leaf, weight, EPS, upcast=False)
            return torch.autograd.grad(y, leaf, dy)[0] + residual

        return lambda: rms_norm_backward(dy, x, weight, rstd, residual), eager

    yield Case("rms-norm", f"rms-norm {tokens} x {width}", 2 * size, forward)
    yield Case("rms-norm", f"add + rms-norm {tokens} x {width}", 4 * size, add_forward)
    yield Case("rms-norm", f"rms-norm backward {tokens} x {width}", 4 * size, backward)


def _qk_norm_rope(tokens: int, heads: int, kv_heads: int, width: int, norm: bool) -> Iterator[Case]:
    name = f"{'qk-norm + ' if norm else ''}rope"
    shape = f"{tokens} x {heads}/{kv_heads} x {width}"
    size = 2 * tokens * (heads + kv_heads) * width

    def inputs(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, list[Tensor | None], list[Tensor]]:
        qkv = rand(device, dtype, tokens, (heads + 2 * kv_heads) * width)
        weights = [rand(device, dtype, width) if norm else None for _ in range(2)]
        tables = [rand(device, torch.float32, tokens, width // 2) for _ in range(2)]
        return qkv, weights, [*tables, torch.arange(tokens, device=device)]

    def eager(qkv: Tensor, weights: list[Tensor | None], tables: list[Tensor]) -> tuple[Tensor, Tensor]:
        q, k, _ = qkv.view(tokens, -1, width).split((heads, kv_heads, kv_heads), dim=1)
        cos, sin = tables[0], tables[1]
        return (
            qk_norm_rope_reference(q, weights[0], cos, sin, EPS, upcast=False),
            qk_norm_rope_reference(k, weights[1], cos, sin, EPS, upcast=False),
        )

    def forward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        qkv, weights, tables = inputs(device, dtype)
        return (
            lambda: qk_norm_rope_forward(qkv, *weights, *tables, EPS, heads, kv_heads),  # type: ignore[arg-type, call-arg]
            lambda: eager(qkv, weights, tables),
        )

    def backward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        qkv, weights, tables = inputs(device, dtype)
        q, k, rstd = qk_norm_rope_forward(qkv, *weights, *tables, EPS, heads, kv_heads)  # type: ignore[arg-type, call-arg]
        dv, leaf = torch.zeros_like(k), qkv.clone().requires_grad_()

        def eager_backward() -> object:
            return torch.autograd.grad(eager(leaf, weights, tables), leaf, (q, k))

        return lambda: qk_norm_rope_backward(q, k, dv, qkv, *weights, *tables, rstd, heads, kv_heads), eager_backward  # type: ignore[arg-type, call-arg]

    yield Case("qk-norm-rope", f"{name} {shape}", 2 * size, forward)
    backward_bytes = (3 if norm else 2) * size + 4 * tokens * kv_heads * width
    yield Case("qk-norm-rope", f"{name} backward {shape}", backward_bytes, backward)


def _swiglu(tokens: int, width: int) -> Iterator[Case]:
    size = 2 * tokens * width

    def forward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        gate_up = rand(device, dtype, tokens, 2 * width)
        return lambda: swiglu_forward(gate_up), lambda: swiglu_reference(gate_up, upcast=False)

    def backward(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        gate_up, dh = rand(device, dtype, tokens, 2 * width), rand(device, dtype, tokens, width)
        out, h = torch.empty_like(gate_up), torch.empty_like(dh)
        leaf = gate_up.clone().requires_grad_()

        def eager() -> object:
            return torch.autograd.grad(swiglu_reference(leaf, upcast=False), leaf, dh)

        return lambda: swiglu_backward(dh, gate_up, out, h), eager

    yield Case("swiglu", f"swiglu {tokens} x {width}", 3 * size, forward)
    yield Case("swiglu", f"swiglu backward + h {tokens} x {width}", 6 * size, backward)


def _cross_entropy(tokens: int, vocabulary: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        logits = rand(device, dtype, tokens, vocabulary)
        labels = torch.randint(0, vocabulary, (tokens,), device=device)
        scale, leaf = torch.ones((), device=device), logits.clone().requires_grad_()

        def eager() -> object:
            return torch.autograd.grad(torch.nn.functional.cross_entropy(leaf.float(), labels, reduction="sum"), leaf)

        # Reading twice is what the shape forces (a row passes the registers and shared memory of a multiprocessor).
        return lambda: cross_entropy_inplace(logits, labels, scale), eager

    return Case("cross-entropy", f"cross-entropy {tokens} x {vocabulary}", 6 * tokens * vocabulary, build)


def _adamw(n: int, bits: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        param, grad = (rand(device, torch.float32, n) for _ in range(2))
        state = AdamWState.zeros(n, device, bits)
        step, lr, norm = (torch.ones((), device=device) for _ in range(3))
        leaf = torch.nn.Parameter(param.clone())
        leaf.grad = grad
        eager = torch.optim.AdamW([leaf], fused=device.type == "cuda", capturable=device.type == "cuda")
        return lambda: adamw_step(param, grad, state, step=step, lr=lr, grad_norm=norm, max_norm=1.0), eager.step

    # Parameter and both moments read and written, the gradient read.
    return Case("adamw", f"adamw {bits}-bit {n}", n * (12 + bits // 2), build)


def _grad_norm(n: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        grad = rand(device, torch.float32, n)
        return lambda: grad_norm(grad), lambda: torch.linalg.vector_norm(grad)

    return Case("adamw", f"gradient norm {n}", 4 * n, build)


def _projection(tokens: int, rows: tuple[int, ...], width: int, rank: int) -> Iterator[Case]:
    """Yield cases of a group of linear layers: adapters into the extended weight, the B's gradient, what reads dy."""
    out, ranks = sum(rows), len(rows) * rank

    def group(device: torch.device, dtype: torch.dtype) -> Projection:
        size = ranks * width, out * rank
        (a, grad_a), (b, grad_b) = (rand(device, torch.float32, 2, n) for n in size)
        adapter = GroupAdapter(
            a.view(-1, width), b.view(-1, rank), grad_a.view(-1, width), grad_b.view(-1, rank), 2.0, rows
        )
        weights: list[NF4Tensor | Tensor] = [rand(device, dtype, n, width) for n in rows]
        return Projection(weights, [None] * len(rows), adapter, dtype, device)

    def write(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layer = group(device, dtype)
        layer.cache_weight()
        return layer.refresh, None

    def add(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layer, product = group(device, dtype), rand(device, torch.float32, out, ranks)
        return lambda: layer.add_grad_b(product), None

    def outputs(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        layer = group(device, dtype)
        dy, xa = layer.extended_output(tokens), rand(device, dtype, tokens, ranks)
        dy.normal_()
        weight = layer.extended_weight()

        def apart() -> object:
            return torch.mm(dy[:, :out], weight[:out, width : width + ranks]), dy[:, :out].t() @ xa

        return lambda: layer.backward_output(dy, xa, weight), apart

    shape = f"{'|'.join(map(str, rows))} x {width}, rank {rank}"
    yield Case("projection", f"adapters into the weight {shape}", 6 * (ranks * width + out * rank), write)
    yield Case("projection", f"dB {shape}", 12 * out * rank, add)
    yield Case("lora-b", f"dy B and dB, {tokens} tokens, {shape}", 2 * tokens * (out + 2 * ranks), outputs)


def _host_embedding(tokens: int, width: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        table = pin(rand(torch.device("cpu"), dtype, 4096, width))
        ids = torch.randint(0, 4096, (tokens,), device=device)
        return lambda: gather_rows(table, ids), None

    return Case("host-memory", f"embedding on the host {tokens} x {width}", 4 * tokens * width, build)


def _lora(tokens: int, width: int, groups: int, rank: int) -> Iterator[Case]:
    ranks, p = groups * rank, 0.05
    shape = f"{tokens} x {width}, {groups} of rank {rank}"

    def tensors(device: torch.device, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, LoRADropout]:
        x, a, xa = (rand(device, dtype, *part) for part in ((tokens, width), (ranks, width), (tokens, ranks)))
        return x, a, xa, LoRADropout(p, torch.zeros(1, dtype=torch.int64, device=device))

    def eager_dropout(x: Tensor) -> Iterator[Tensor]:
        return (torch.nn.functional.dropout(x, p) for _ in range(groups))

    def project(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, a, xa, dropout = tensors(device, dtype)
        return (
            lambda: lora_project(x, a, xa, dropout=dropout, groups=groups),
            lambda: [part @ rows.t() for part, rows in zip(eager_dropout(x), a.chunk(groups), strict=True)],
        )

    def backward_a(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, a, dya, dropout = tensors(device, dtype)
        grad_a = torch.empty(a.shape, dtype=torch.float32, device=device)
        # PyTorch keeps the dropped-out inputs: that costs memory, not time.
        return lambda: lora_backward_a(dya, x, grad_a, dropout, groups), lambda: dya.t() @ x

    def backward_x(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        x, a, dya, dropout = tensors(device, dtype)
        return lambda: lora_backward_x(dya, a, x, dropout, groups), lambda: x.addmm_(dya, a)

    yield Case("lora", f"lora dropout(x) A^T {shape}", 2 * tokens * width, project)
    yield Case("lora", f"lora dA {shape}", 2 * tokens * width, backward_a)
    yield Case("lora", f"lora dx {shape}", 4 * tokens * width, backward_x)


def _swiglu_lora(tokens: int, width: int, rank: int) -> Case:
    def build(device: torch.device, dtype: torch.dtype) -> tuple[Call, Call | None]:
        gate_up, dh = rand(device, dtype, tokens, 2 * width + 64), rand(device, dtype, tokens, width)
        gates, dya = gate_up[:, : 2 * width], gate_up[:, 2 * width : 2 * width + 2 * rank]
        xa, dya_down = rand(device, dtype, tokens, 2 * rank), rand(device, dtype, tokens, rank)
        b = rand(device, dtype, 2 * width, 2 * rank)
        grad_a, grad_b = (rand(device, torch.float32, *shape) for shape in ((rank, width), (2 * width, rank)))

        def apart() -> object:
            swiglu_backward(dh, gates, out=gates, h_out=dh)
            return dya_down.t() @ dh, torch.mm(gates, b, out=dya), gates.t() @ xa

        return lambda: swiglu_lora_backward(dh, gates, xa, b, dya_down, dya, grad_a, grad_b, 2.0), apart

    size = 10 * tokens * width + 10 * tokens * rank + 32 * rank * width
    return Case("swiglu-lora", f"swiglu backward + lora {tokens} x {width}, rank {rank}", size, build)


CASES = [
    # Qwen3-8B, and Qwen3-0.6B where its width takes another path.
    _nf4(4096, 12288),
    _nf4(1024, 4096),
    _nf4(1024, 2848),  # blocks cross rows
    *_rms_norm(4096, 4096),
    *_rms_norm(16384, 1024),
    *_qk_norm_rope(4096, 32, 8, 128, norm=True),
    *_qk_norm_rope(4096, 32, 8, 64, norm=False),  # Llama-3.2-1B
    *_swiglu(4096, 12288),
    _swiglu_lora(4096, 12288, 16),
    _swiglu_lora(4096, 12288, 32),  # one kernel on Hopper only
    _swiglu_lora(4096, 2848, 16),  # columns that Hopper's kernel does not take
    _cross_entropy(2048, 151936),
    _adamw(43646976, 32),
    _adamw(43646976, 8),
    _grad_norm(43646976),
    *_lora(4096, 4096, 3, 16),
    *_lora(512, 1024, 2, 32),
    *_projection(4096, (4096, 1024, 1024), 4096, 16),
    *_projection(4096, (896,), 896, 32),  # Qwen2.5-0.5B: single tiles of columns
    _host_embedding(4096, 4096),
    *expert_cases(16384, 128, 8, 2048, 768, 16),  # Qwen3-30B-A3B
]


def copy_bandwidth(device: torch.device) -> float:
    """Return bytes per second read plus written by a copy of 1 GiB: the yardstick of every memory-bound op."""
    source = torch.empty(2**29, dtype=torch.bfloat16, device=device)
    target = torch.empty_like(source)
    return float(2 * 2**30 / (triton.testing.do_bench(lambda: target.copy_(source), return_mode="median") * 1e-3))


def _captured(call: Call) -> Call:
    """Return a call that replays what `call` launches as a CUDA graph: the GPU's time, without the host's."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        call()
    stream.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        call()
    return graph.replay


def measure(case: Case, device: torch.device, copy: float, head: dict[str, Any]) -> OpRun:
    """Time one case with a cold L2 cache.

    Args:
        case: what to time.
        device: the GPU.
        copy: bytes per second that a copy reads and writes.
        head: what every line of results says (`runs.header`).
    """
    torch.manual_seed(0)
    kernel, reference = case.build(device, torch.bfloat16)
    times = triton.testing.do_bench(_captured(kernel), quantiles=[0.2, 0.5, 0.8])
    low, median, high = (round(milliseconds * 1e3, 2) for milliseconds in times)
    eager = None if reference is None else triton.testing.do_bench(_captured(reference), return_mode="median")
    return OpRun(
        **head,
        kind="op",
        op=case.name,
        us=Quantiles(p20=low, p50=median, p80=high),
        bytes=case.bytes,
        reference_us=None if eager is None else round(eager * 1e3, 2),
        copy_tb_per_s=round(copy / 1e12, 3),
    )


def report_line(run: OpRun) -> str:
    """Lay one case out as a row of the report."""
    tb_per_s = run.bytes / run.us.p50 / 1e6
    eager, times = ("-", "") if run.reference_us is None else (run.reference_us, f"{run.reference_us / run.us.p50:.2f}")
    spread = f"{run.us.p20}-{run.us.p80}"
    share = tb_per_s / run.copy_tb_per_s
    return f"{run.op:52} {run.us.p50:>10} {spread:>17} {tb_per_s:>6.3f} {share:>8.1%} {eager:>10} {times:>6}"


def main(argv: list[str]) -> int:
    """Run the command line. Returns: 0. Raises: UserError: there is no GPU."""
    ops = sorted({case.op for case in CASES})
    parser = argparse.ArgumentParser(prog="finemill bench kernels", description="Time the kernels one by one.")
    parser.add_argument("ops", nargs="*", metavar="OP", help=f"any of {', '.join(ops)}; all by default")
    add_record_argument(parser)
    arguments = parser.parse_args(argv)
    if unknown := sorted(set(arguments.ops) - set(ops)):
        parser.error(f"unknown op {', '.join(unknown)}: choose from {', '.join(ops)}")
    if not torch.cuda.is_available():
        raise UserError("a CUDA device is needed: none is visible to torch")
    device = torch.device("cuda")
    copy, head = copy_bandwidth(device), header("kernels", argv)
    packages = ", ".join(f"{name} {head['versions'][name]}" for name in ("torch", "triton"))
    print(f"{head['gpu']}, {packages}, commit {head['commit']}; a copy reads and writes {copy / 1e12:.3f} TB/s")
    print(f"{'op':52} {'median us':>10} {'p20-p80':>17} {'TB/s':>6} {'of copy':>8} {'torch us':>10} {'times':>6}")
    for case in CASES:
        if arguments.ops and case.op not in arguments.ops:
            continue
        run = measure(case, device, copy, head)
        print(report_line(run), flush=True)
        if arguments.record:
            record_runs(arguments.record, [run])
        torch.cuda.empty_cache()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
