import os
import signal
from contextlib import closing
from pathlib import Path

import pytest

from finemill.artifacts.rows import PreparedRow, rows_writer
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.formatter import load_formatter
from finemill.components.chat_format.workers import FormatWork, format_rows
from finemill.errors import TemporaryError, UserError
from finemill.models.base.resolve import BUILTIN_MODELS

BASE = BUILTIN_MODELS["builtin:tiny-qwen3"]


ROW = '{"prompt": "Count to %d.", "completion": "1 to %d"}'


def work(folder: Path, number: int, config: ChatFormatConfig) -> FormatWork:
    """Batches of ten rows, written to a folder."""
    with rows_writer(folder, "train") as writer:
        writer.write(
            [
                PreparedRow(
                    id=str(place),
                    source="a",
                    number=place,
                    shape="prompt_completion",
                    row=ROW.replace("%d", str(place)),
                )
                for place in range(10 * number)
            ]
        )
    return FormatWork(folder, "train", 10, BASE, config)


@pytest.mark.parametrize("num_proc", [2, 3])
def test_any_number_of_processes_gives_the_batches_of_one_in_their_order(num_proc: int, tmp_path: Path) -> None:
    config = ChatFormatConfig(system_prompt="Be brief.")
    formatter = load_formatter(BASE, config)

    rows = work(tmp_path, 5, config)

    def formatted(processes: int) -> list[tuple[object, ...]]:
        found = format_rows(rows, formatter, num_proc=processes)
        return [(batch.examples, batch.rejected, batch.counts.summary()) for batch in found]

    assert formatted(num_proc) == formatted(1)
    assert len(formatted(1)) == 5


def test_a_users_mistake_in_another_process_is_one_here(tmp_path: Path) -> None:
    config = ChatFormatConfig(chat_template_path="missing.jinja")
    formatter = load_formatter(BASE, ChatFormatConfig())
    found = format_rows(work(tmp_path, 2, config), formatter, num_proc=2)
    with pytest.raises(UserError, match=r"missing\.jinja"):
        list(found)


def test_a_process_that_is_killed_is_a_temporary_error(tmp_path: Path) -> None:
    config = ChatFormatConfig()
    formatter = load_formatter(BASE, config)
    found = format_rows(work(tmp_path, 6, config), formatter, num_proc=2)
    with closing(found):
        next(found)
        children = [int(child) for child in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split()]
        for child in children:
            if b"import serve" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)
        with pytest.raises(TemporaryError, match="a process that works on rows was killed"):
            list(found)
