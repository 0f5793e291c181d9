"""A planner on a machine without torch counts with the functions that kernels launch by."""

import subprocess
import sys

from finemill.kernels.ops.division import cdiv, divisors, rank_block, split_evenly


def test_planning_imports_neither_torch_nor_triton() -> None:
    script = "import sys, finemill.training.memory; sys.exit(bool({'torch', 'triton'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_a_split_covers_every_token_once() -> None:
    for tokens in (1, 64, 1000, 16384):
        work = split_evenly(tokens, 64, 4096, 256, 264)
        assert work.columns == 256
        assert (work.chunks - 1) * work.tokens < tokens <= work.chunks * work.tokens


def test_whole_numbers() -> None:
    assert [cdiv(number, 4) for number in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert divisors(12) == [1, 2, 3, 4, 6, 12]
    assert [rank_block(rank) for rank in (1, 16, 17, 32, 64)] == [16, 16, 32, 32, 64]
