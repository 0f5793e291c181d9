"""`finemill bench export`: a model of a published shape with random weights, merged with an adapter, here and by PEFT,
and quantized, here and by llama.cpp's own quantizer: `llama-quantize` on the PATH, or a shared library of llama.cpp.

Each in a process of its own, so that the peak of host memory is its alone; seconds are said per part. The step also
compares what it wrote with base and adapter; PEFT's `merge_and_unload`, in the base's own type, does not.
"""

import argparse
import json
import multiprocessing
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

import torch

from finemill.commands import libllama_quantize
from finemill.commands.parser import CommandParser, count
from finemill.errors import StepError
from finemill.kernels.planning.model_shapes import SHAPES, ModelShape
from finemill.models.cores import available_cores
from finemill.models.write_weights import total_bytes, write_model
from finemill.storage.space import require_space

_TOKENIZER = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")
_RANK = 16
_TYPES: tuple[Literal["F16"], Literal["Q8_0"], Literal["Q4_K_M"]] = ("F16", "Q8_0", "Q4_K_M")


@dataclass
class Export:
    """What a program took; `peak_gib` is resident host memory, files that are mapped included."""

    program: str
    what: str
    shape: str
    size_gb: float
    wall_s: float
    peak_gib: float
    parts_s: dict[str, float] = field(default_factory=dict)


class _Clock:
    """A recorder that notes when each part began."""

    def __init__(self) -> None:
        self.began: list[tuple[str, float]] = []

    def log_metrics(self, metrics: Mapping[str, float], step: int) -> None:
        """Not asked for here."""

    def log_progress(self, text: str) -> None:
        """A part begins."""
        self.began.append((text, time.perf_counter()))

    def parts(self) -> dict[str, float]:
        """Seconds of each part, the last one until this call."""
        ends = [*self.began, ("", time.perf_counter())]
        return {text: end - start for (text, start), (_, end) in pairwise(ends)}


def main(argv: list[str]) -> int:
    """Measure and print. Returns: the exit code."""
    parser = CommandParser(prog="finemill bench export", description=__doc__.splitlines()[0])
    parser.add_argument("--shape", default="qwen3-8b", choices=sorted(SHAPES))
    parser.add_argument("--folder", type=Path, help="disk that is measured; needs room for two models. Default: TMPDIR")
    parser.add_argument("--threads", type=count, help="CPU threads of torch. Default: its own choice")
    parser.add_argument("--alone", action="store_true", help="without PEFT, which holds the whole model in memory")
    parser.add_argument(
        "--libllama", type=Path, metavar="FILE", help="libllama*.so to quantize with where no llama-quantize is on the "
        "PATH: @node-llama-cpp/linux-x64 on npm has one, and llama-cpp-py-sync on PyPI",
    )  # fmt: skip
    parser.add_argument("--json", action="store_true", help="an object per program instead of lines")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="finemill-bench-", dir=args.folder) as folder:
        base, adapter = Path(folder) / "base", Path(folder) / "adapter"
        size = write_random_base(base, SHAPES[args.shape])
        write_random_adapter(adapter, SHAPES[args.shape], base)
        for program, merge in {"finemill": _merge, "PEFT": _merge_by_peft}.items():
            if program == "finemill" or not args.alone:
                merged = Path(folder) / "merged"
                wall_s, peak_gib, parts = _measure(merge, base, adapter, merged, args.threads)
                shutil.rmtree(merged)
                made = Export(program, "merge", args.shape, size / 1e9, wall_s, peak_gib, parts)
                _print(made, as_json=args.json)
        _quantize(base, Path(folder), args)
    return 0


def _quantize(base: Path, folder: Path, args: argparse.Namespace) -> None:
    """All of `_TYPES` from the safetensors files here, and one by one from our F16 file in llama.cpp."""
    written, threads = folder / "gguf", args.threads or available_cores()
    wall_s, peak_gib, parts = _measure(partial(_write_gguf, threads), base, base, written, args.threads)
    made = Export("finemill", "GGUF", args.shape, _size_gb(written), wall_s, peak_gib, parts)
    _print(made, as_json=args.json)
    if (tool := _llama_cpp(args.libllama)) and not args.alone:
        output = folder / "llama.cpp"
        output.mkdir()
        peak_gib, parts = _quantize_by_llama_cpp(tool, threads, written / f"{_TYPES[0]}.gguf", output)
        made = Export("llama.cpp", "GGUF", args.shape, _size_gb(output), sum(parts.values()), peak_gib, parts)
        _print(made, as_json=args.json)


def _llama_cpp(library: Path | None) -> list[str]:
    """The command of llama.cpp's quantizer; empty where there is none."""
    if library:
        return [sys.executable, "-m", libllama_quantize.__name__, str(library)]
    tool = shutil.which("llama-quantize")
    return [tool] if tool else []


def _size_gb(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.iterdir()) / 1e9


def _print(export: Export, *, as_json: bool) -> None:
    if as_json:
        print(json.dumps(asdict(export)), flush=True)
        return
    print(
        f"{export.program}, {export.what}, {export.shape}: {export.size_gb:.1f} GB in {export.wall_s:.1f} s, peak "
        f"{export.peak_gib:.2f} GiB"
    )
    for part, seconds in export.parts_s.items():
        print(f"{seconds:8.1f} s  {part}", flush=True)


def write_random_base(folder: Path, shape: ModelShape) -> int:
    """A model folder of `shape` in bfloat16, random weights, with the shipped tokenizer. Returns: bytes of weights."""
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    folder.mkdir(parents=True)
    config = AutoConfig.for_model(
        **shape.config(), dtype="bfloat16", pad_token_id=None, bos_token_id=None, eos_token_id=0
    )
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    model.tie_weights()
    config.architectures = [type(model).__name__]
    config.save_pretrained(folder)
    from finemill.models.base.resolve import resolve_base_model

    source = resolve_base_model("builtin:tiny-qwen3").path
    for name in _TOKENIZER:
        shutil.copyfile(source / name, folder / name)
    shapes = {
        name: (tuple(parameter.shape), torch.bfloat16)
        for name, parameter in model.named_parameters(remove_duplicate=True)
    }
    require_space(folder, 4 * total_bytes(shapes), "a base model, the merged one, and GGUF files twice")
    write_model(folder, shapes, _random({name: size for name, (size, _) in shapes.items()}), "4GB")
    return total_bytes(shapes)


def write_random_adapter(folder: Path, shape: ModelShape, base: Path) -> None:
    """LoRA on all seven matrices of each layer, of the size that training leaves."""
    from peft import LoraConfig
    from safetensors.torch import save_file

    queries, keys = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    widths = {
        "self_attn.q_proj": (queries, shape.hidden), "self_attn.k_proj": (keys, shape.hidden),
        "self_attn.v_proj": (keys, shape.hidden), "self_attn.o_proj": (shape.hidden, queries),
        "mlp.gate_proj": (shape.intermediate, shape.hidden), "mlp.up_proj": (shape.intermediate, shape.hidden),
        "mlp.down_proj": (shape.hidden, shape.intermediate),
    }  # fmt: skip
    targets = sorted(name.split(".")[1] for name in widths)
    LoraConfig(
        r=_RANK, lora_alpha=_RANK, target_modules=targets, task_type="CAUSAL_LM", base_model_name_or_path=str(base)
    ).save_pretrained(folder)
    shapes = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in widths.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            shapes[f"{prefix}.lora_A.weight"] = (_RANK, columns)
            shapes[f"{prefix}.lora_B.weight"] = (rows, _RANK)
    save_file(dict(_random(shapes)), folder / "adapter_model.safetensors", metadata={"format": "pt"})


def _random(shapes: Mapping[str, tuple[int, ...]]) -> Iterator[tuple[str, torch.Tensor]]:
    """Drawn once and taken from there: numbers of which no two tensors have the same would take longer than merging."""
    drawn = torch.randn(1 << 22, generator=torch.Generator().manual_seed(0), dtype=torch.float32).bfloat16()
    for number, (name, size) in enumerate(shapes.items()):
        if len(size) == 1:
            yield name, torch.ones(size, dtype=torch.bfloat16)
            continue
        count = size[0] * size[1]
        values = drawn.roll(number).repeat(-(-count // len(drawn)))[:count].view(size)
        yield name, values * size[1] ** -0.5 if "lora" not in name else values * 0.02


def _measure(
    merge: Callable[[Path, Path, Path], dict[str, float]], base: Path, adapter: Path, merged: Path, threads: int | None
) -> tuple[float, float, dict[str, float]]:
    """Seconds, GiB at most, and seconds by part."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report, args=(merge, base, adapter, merged, threads, sender))
    process.start()
    # Of a process that ends without a word, the other end is closed.
    sender.close()
    try:
        parts, peak_gib = receiver.recv()
    except EOFError:
        raise StepError("bench export: the merge failed; its own message stands above") from None
    process.join()
    return sum(parts.values()), peak_gib, parts


def _report(
    merge: Callable[[Path, Path, Path], dict[str, float]],
    base: Path,
    adapter: Path,
    merged: Path,
    threads: int | None,
    sender: Any,
) -> None:
    if threads:
        torch.set_num_threads(threads)
    parts = merge(base, adapter, merged)
    sender.send((parts, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20))


def _merge(base: Path, adapter: Path, merged: Path) -> dict[str, float]:
    from finemill.artifacts.manifest import Producer
    from finemill.components.merge.config import MergeConfig
    from finemill.components.merge.step import run
    from finemill.runtime.context import Checkpoints, StepContext

    clock = _Clock()
    store = merged.parent.as_uri()
    context = StepContext(
        store=store,
        key="bench",
        references={"base_model": str(base), "adapter": str(adapter)},
        manifests={},
        checkpoints=Checkpoints(f"{store}/checkpoints", Producer(step="merge", version="0", code="bench")),
        recorder=clock,
    )
    clock.log_progress("opening base and adapter")
    run(base_model=base, adapter=adapter, output_dir=merged, config=MergeConfig(force=True), context=context)
    return clock.parts()


def _merge_by_peft(base: Path, adapter: Path, merged: Path) -> dict[str, float]:
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    clock = _Clock()
    clock.log_progress("loading base and adapter")
    tuned = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype="auto"), adapter)
    clock.log_progress("merge_and_unload")
    model: Any = tuned.merge_and_unload()
    clock.log_progress("save_pretrained")
    model.save_pretrained(merged)
    return clock.parts()


def _write_gguf(threads: int, base: Path, _adapter: Path, output: Path) -> dict[str, float]:
    from finemill.components.gguf_quantize.convert import SourceModel
    from finemill.components.gguf_quantize.write import Target, write_ggufs

    clock = _Clock()
    output.mkdir()
    clock.log_progress(f"writing {', '.join(_TYPES)}")
    targets = [Target(output / f"{type_}.gguf", type_) for type_ in _TYPES]
    write_ggufs(SourceModel(base), targets, "random", threads)
    return clock.parts()


def _quantize_by_llama_cpp(tool: list[str], threads: int, source: Path, output: Path) -> tuple[float, dict[str, float]]:
    """GiB at most, and seconds by type. Raises: StepError: the program fails."""
    clock, peak = _Clock(), 0
    for type_ in _TYPES[1:]:
        clock.log_progress(f"llama-quantize to {type_}")
        command = [*tool, str(source), str(output / f"{type_}.gguf"), type_, str(threads)]
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            raise StepError(f"bench export: {' '.join(command)} ends with {process.returncode}")
        peak = max(peak, usage.ru_maxrss)
    return peak / 2**20, clock.parts()
