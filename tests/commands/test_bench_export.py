import ctypes
import json
import multiprocessing
import os
from pathlib import Path
from typing import Any

import pytest

from finemill.commands import libllama_quantize
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


def test_llama_cpps_library_is_asked_for_the_type_with_its_own_defaults_for_the_rest(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[bytes, bytes, int, int, bytes]] = []

    class Function:
        def __init__(self, name: str) -> None:
            self.name = name

        def __call__(self, *args: Any) -> Any:
            if self.name.endswith("default_params"):
                return libllama_quantize._Params(0, 8, tuple(range(252)) * 2)
            if self.name.endswith("quantize"):
                params = args[2]._obj
                asked.append((args[0], args[1], params.threads, params.type, bytes(params.others)[:3]))
            return 0

    class Library:
        def __init__(self, path: str) -> None:
            self.path = path

        def __getattr__(self, name: str) -> Function:
            function = self.__dict__[name] = Function(name)
            return function

    monkeypatch.setattr(ctypes, "CDLL", Library)
    assert libllama_quantize.main("libllama.so", "f16.gguf", "q4.gguf", "Q4_K_M", "3") == 0
    assert asked == [(b"f16.gguf", b"q4.gguf", 3, 15, b"\0\1\2")]
