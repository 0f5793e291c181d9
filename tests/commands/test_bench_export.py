import json
import multiprocessing
import os
from pathlib import Path

import pytest

from finemill.commands.bench import execute


@pytest.mark.filterwarnings("ignore:.*use of fork")
def test_merge_and_files_are_measured_part_by_part_beside_others_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    tools, folder = tmp_path / "tools", tmp_path / "disk"
    for made in (tools, folder):
        made.mkdir()
    # In the place of llama.cpp's: a file of the source's size.
    (tools / "llama-quantize").write_text('#!/bin/sh\ncp "$1" "$2"\n')
    (tools / "llama-quantize").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}:{os.environ['PATH']}")
    # With the libraries that are loaded here, and one thread, which waits for none of its parent's.
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr("multiprocessing.get_context", lambda _method: fork)
    arguments = ["export", "--shape", "qwen3-tiny", "--folder", str(folder), "--threads", "1", "--json"]
    assert execute("bench", arguments) == 0
    results = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [(result["what"], result["program"]) for result in results] == [
        ("merge", "finemill"),
        ("merge", "PEFT"),
        ("GGUF", "finemill"),
        ("GGUF", "llama.cpp"),
    ]
    assert list(results[-1]["parts_s"]) == ["llama-quantize to Q8_0", "llama-quantize to Q4_K_M"]
    for result in results:
        assert result["shape"] == "qwen3-tiny"
        assert 0 < result["size_gb"] < 0.1
        assert sum(result["parts_s"].values()) == pytest.approx(result["wall_s"])
        assert result["peak_gib"] > 0
    assert not list(folder.iterdir())
