"""What every kernel costs a multiprocessor, compiled for seven generations of cards on a machine without any.

    python -m finemill.kernels.bench.resources            print registers and shared memory of every case in bench.py
    python -m finemill.kernels.bench.resources --check    exit 1 on a spill, too much shared memory, or a changed table
    python -m finemill.kernels.bench.resources --write    update resources.json for the installed Triton

The ops run on meta tensors while a driver that only compiles stands in for the GPU's; what they would launch becomes
machine code, which the cuobjdump in Triton's wheel reads. Stack or local memory means spilled registers.
"""

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from finemill.kernels.bench.case import Case
from finemill.kernels.bench.ops import CASES

TABLE = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"

# Dynamic shared memory a block may ask for, in bytes: CUDA C++ Programming Guide, compute capabilities.
SHARED_LIMIT = {75: 64 << 10, 80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# Triton has no tensor-core product below this; these ops run through cuBLAS there (lora.py).
MMA_CAPABILITY = 80
MMA_OPS = ("expert-lora", "grouped-gemm", "lora", "lora-b", "swiglu-lora")

Usage = dict[str, dict[str, list[int]]]
"""case / kernel -> capability -> [registers per thread, bytes of shared memory, bytes of stack]."""


class CompileOnlyDriver:
    """Triton's view of a card that is not there."""

    def __init__(self, capability: int) -> None:
        self.capability = capability

    def get_current_target(self) -> GPUTarget:
        """Name the architecture to compile for."""
        return GPUTarget("cuda", self.capability, 32)

    def get_current_device(self) -> int:
        """Key of Triton's cache of compiled kernels: one per architecture."""
        return self.capability

    def get_current_stream(self, device: int) -> int:
        """Nothing is ever launched on it."""
        return 0


def compiled_kernels(case: Case, capability: int) -> dict[str, Any]:
    """Compile what one case launches. Returns: kernel name -> Triton's compiled kernel."""
    driver.set_active(CompileOnlyDriver(capability))
    compiled: dict[str, Any] = {}
    launch = JITFunction.run

    def compile_only(self: Any, *args: Any, **kwargs: Any) -> Any:
        kernel = launch(self, *args, **{**kwargs, "warmup": True})
        earlier = sum(name.split(" #")[0] == self.__name__ for name in compiled)
        compiled[f"{self.__name__} #{earlier + 1}" if earlier else self.__name__] = kernel
        return kernel

    JITFunction.run = compile_only
    try:
        # Turing has no bfloat16.
        run, _ = case.build(torch.device("meta"), torch.float16 if capability < 80 else torch.bfloat16)
        compiled.clear()
        run()
    finally:
        JITFunction.run = launch
    return compiled


def usage_of(kernel: Any) -> list[int]:
    """Return [registers per thread, bytes of shared memory, bytes of stack and local memory] of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(kernel.asm["cubin"])
        cubin.flush()
        report = subprocess.run(
            [CUOBJDUMP, "--dump-resource-usage", cubin.name], capture_output=True, text=True, check=True
        ).stdout
    counts = {name: int(value) for name, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    return [counts["REG"], int(kernel.metadata.shared), counts["STACK"] + counts["LOCAL"]]


def measure(cases: list[Case]) -> Usage:
    """Compile all cases for all architectures; takes about a minute on one core, less with Triton's cache."""
    table: Usage = {}
    for case in cases:
        for capability in SHARED_LIMIT:
            if case.op in MMA_OPS and capability < MMA_CAPABILITY:
                continue
            for name, kernel in compiled_kernels(case, capability).items():
                table.setdefault(f"{case.name} / {name}", {})[str(capability)] = usage_of(kernel)
    return table


def broken_limits(table: Usage) -> list[str]:
    """Return a line per kernel and architecture that spills or asks for more shared memory than a block can get."""
    lines = []
    for name, per_card in table.items():
        for capability, (_, shared, stack) in per_card.items():
            if stack:
                lines.append(f"sm_{capability} {name}: spills, {stack} bytes of stack")
            if shared > (limit := SHARED_LIMIT[int(capability)]):
                lines.append(f"sm_{capability} {name}: {shared} bytes of shared memory, the card has {limit}")
    return lines


def differences(expected: Usage, found: Usage) -> list[str]:
    """Return a line per entry that is new, gone or changed."""
    return [
        f"{name}: {expected.get(name, 'absent')} in resources.json, {found.get(name, 'absent')} compiled"
        for name in sorted(expected.keys() | found.keys())
        if expected.get(name) != found.get(name)
    ]


def _dump(tables: dict[str, Usage]) -> str:
    """JSON with one line per kernel, so that a diff shows which kernel changed."""
    blocks = []
    for version, table in sorted(tables.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(table[name])}" for name in sorted(table))
        blocks.append(f" {json.dumps(version)}: {{\n{lines}\n }}")
    return "{\n" + ",\n".join(blocks) + "\n}\n"


def main(argv: list[str] | None = None) -> int:
    """Run the command line. Returns: 0, or 1 where a check fails."""
    parser = argparse.ArgumentParser(prog="python -m finemill.kernels.bench.resources", description=__doc__)
    parser.add_argument("--check", action="store_true", help="exit 1 on spills, shared memory, or a changed table")
    parser.add_argument("--write", action="store_true", help="update resources.json for the installed Triton")
    arguments = parser.parse_args(argv)
    if os.environ.get("TRITON_INTERPRET") == "1":
        parser.error("unset TRITON_INTERPRET: interpreted kernels cannot be compiled")
    version = ".".join(triton.__version__.split(".")[:2])
    found = measure(CASES)
    for line in (problems := broken_limits(found)):
        print(line)
    tables: dict[str, Usage] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    if arguments.write:
        TABLE.write_text(_dump({**tables, version: found}))
    elif not arguments.check:
        print(_dump({version: found}), end="")
    elif version in tables:
        changed = differences(tables[version], found)
        problems += changed
        print("\n".join(changed))
        if changed:
            print("if intended: python -m finemill.kernels.bench.resources --write")
    else:
        print(f"resources.json has no table for Triton {version}: limits were checked, numbers were not")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
