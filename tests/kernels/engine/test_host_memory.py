"""Host memory for the device's copies: exact sizes, huge pages, not shared with child processes."""

import re
from pathlib import Path

import pytest
import torch

from finemill.kernels.engine import host_memory
from finemill.kernels.engine.host_memory import free_host_bytes, pin, pinned_bytes

SMAPS = Path("/proc/self/smaps")


@pytest.mark.parametrize("size", [0, 1, 3 << 20])
def test_it_has_exactly_the_bytes_asked_for(size: int) -> None:
    memory = pinned_bytes(size)
    assert memory.dtype == torch.uint8
    assert memory.numel() == size
    assert (memory.fill_(7) == 7).all()


def test_a_process_counts_on_its_part_of_what_the_container_leaves(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host_memory, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text("max\n")
    free = free_host_bytes()
    assert free > 0
    (tmp_path / "memory.max").write_text("3000\n")
    (tmp_path / "memory.current").write_text("2500\n")
    (tmp_path / "memory.stat").write_text("anon 1000\ninactive_file 1200\nactive_file 300\n")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert free_host_bytes() == 900


def test_a_pinned_copy_is_the_tensor() -> None:
    table = torch.randn(5, 3).bfloat16()
    assert torch.equal(pin(table), table)


@pytest.mark.skipif(not SMAPS.is_file(), reason="needs Linux")
def test_its_pages_are_huge_and_child_processes_do_not_have_them() -> None:
    memory = pinned_bytes(8 << 20)
    mappings = re.findall(r"^([0-9a-f]+)-([0-9a-f]+) .*?^VmFlags: (.*?)$", SMAPS.read_text(), re.MULTILINE | re.DOTALL)
    (flags,) = [f.split() for begin, end, f in mappings if int(begin, 16) <= memory.data_ptr() < int(end, 16)]
    assert "dc" in flags  # not copied by fork
    if Path("/sys/kernel/mm/transparent_hugepage").is_dir():
        assert "hg" in flags
