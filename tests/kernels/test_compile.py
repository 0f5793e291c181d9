"""Every kernel compiles for seven generations of cards, without spills, within their shared memory, as recorded."""

import json
import os
import re
import subprocess
import sys

import pytest

from finemill.kernels.bench.resources import TABLE, broken_limits, differences


@pytest.mark.timeout(600)
def test_every_kernel_compiles_within_the_limits_of_every_card() -> None:
    # In a process of its own: a kernel decorated under TRITON_INTERPRET cannot be compiled.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "finemill.kernels.bench.resources", "--check"]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_kernel_is_in_the_table() -> None:
    kernels = {
        name
        for file in TABLE.parents[1].rglob("*.py")
        for name in re.findall(r"^@(?:triton|gluon).jit\ndef (_\w+_kernel)\(", file.read_text(), re.MULTILINE)
    }
    for version, table in json.loads(TABLE.read_text()).items():
        assert {entry.split(" / ")[1].split(" #")[0] for entry in table} == kernels, version


def test_spills_and_shared_memory_above_the_limit_are_reported() -> None:
    table = {"op / kernel": {"90": [64, 230000, 0], "120": [64, 110000, 0], "80": [255, 1024, 8]}}
    assert broken_limits(table) == [
        "sm_120 op / kernel: 110000 bytes of shared memory, the card has 101376",
        "sm_80 op / kernel: spills, 8 bytes of stack",
    ]


def test_changed_new_and_missing_entries_are_reported() -> None:
    before = {"a": {"90": [1, 2, 0]}, "b": {"90": [1, 2, 0]}}
    after = {"a": {"90": [1, 3, 0]}, "c": {"90": [1, 2, 0]}}
    changed = differences(before, after)
    assert [line.split(":")[0] for line in changed] == ["a", "b", "c"]
    assert differences(before, before) == []
