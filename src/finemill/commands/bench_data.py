"""`finemill bench data`: raw rows to token ids and labels, beside the usual way of the same rows on the same machine.

The usual way is what TRL's SFT trainer does with `assistant_only_loss`: `datasets.map` in several processes, over
`apply_chat_template` with assistant masks, then labels, then the longest length. Both are whole processes, their start
included; CPU time counts all their processes, which is what a machine that others use, too, leaves comparable.
"""

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from finemill.commands.parser import CommandParser, count
from finemill.errors import UserError

_MODEL = "builtin:tiny-qwen3"
_MAX_LENGTH = 2048


@dataclass(frozen=True)
class Cost:
    """What a way of preparing rows took; `peak_mb` is the largest of its processes."""

    rows: int
    wall_s: float
    cpu_s: float
    peak_mb: float

    @property
    def rows_per_cpu_s(self) -> float:
        """Rows per second of CPU time."""
        return self.rows / self.cpu_s


def main(argv: list[str]) -> int:
    """Measure and print. Returns: the exit code."""
    parser = CommandParser(prog="finemill bench data", description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=count, default=10_000, help="rows of example data, thinking and chats 3 to 1")
    parser.add_argument("--data", type=Path, help="JSONL file with `messages` to take instead")
    parser.add_argument("--base-model", default=_MODEL, help="folder or builtin: model, for its tokenizer and template")
    parser.add_argument("--num-proc", type=count, default=2, help="processes of either way")
    parser.add_argument("--json", action="store_true", help="an object per way instead of a table")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="finemill-bench-") as folder:
        rows = args.data or write_chats(Path(folder) / "rows.jsonl", args.rows)
        with rows.open("rb") as file:
            num_rows = sum(1 for line in file if line.strip())
        costs = {
            "finemill data-prep + chat-format": _cost(num_rows, *_steps(rows, folder, args.base_model, args.num_proc)),
            "datasets.map + apply_chat_template": _cost(num_rows, _plain(rows, folder, args.base_model, args.num_proc)),
        }
    _print(costs, as_json=args.json)
    return 0


def write_chats(path: Path, num_rows: int) -> Path:
    """Example rows as `messages`, thinking in the content: a file that both ways read."""
    from finemill.rows.examples.generate import write_example_data
    from finemill.rows.shapes import detect_shape, to_conversation

    with tempfile.TemporaryDirectory() as folder, path.open("w", encoding="utf-8") as file:
        for name, share in (("reasoning", 0.75), ("chat", 0.25)):
            lines = write_example_data(name, Path(folder), 0, 1000).read_text(encoding="utf-8").splitlines()
            rows = [json.loads(line) for line in lines]
            chats = [to_conversation(row, str(detect_shape(row))).messages for row in rows]
            for number in range(round(num_rows * share)):
                # Numbered, so that no row repeats another.
                first, *rest = chats[number % len(chats)]
                numbered = {**first, "content": f"{number}. {first['content']}"}
                file.write(json.dumps({"messages": [numbered, *rest]}, ensure_ascii=False) + "\n")
    return path


def _steps(rows: Path, folder: str, base_model: str, num_proc: int) -> list[list[str]]:
    store = ["--store", f"{folder}/store"]
    finemill = [sys.executable, "-m", "finemill"]
    sources = json.dumps([{"uri": str(rows)}])
    sizes = ["--test-size", "0", "--validation-size", "0"]
    return [
        [*finemill, "data-prep", *store, "--sources", sources, *sizes],
        [*finemill, "chat-format", *store, "--rows", "", "--base-model", base_model, "--num-proc", str(num_proc)],
    ]


def _plain(rows: Path, folder: str, base_model: str, num_proc: int) -> list[str]:
    return [sys.executable, "-m", __name__, str(rows), f"{folder}/plain", base_model, str(num_proc)]


def _cost(rows: int, *commands: list[str]) -> Cost:
    """Run commands one after the other, each with what the one before printed as its `--rows`."""
    before, start, printed = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter(), ""
    for command in commands:
        filled = [printed if part == "" else part for part in command]
        done = subprocess.run(filled, capture_output=True, text=True, env=_environment())
        if done.returncode:
            raise UserError(f"{' '.join(command[2:5])} ended with {done.returncode}: {done.stderr.strip()[-500:]}")
        printed = done.stdout.strip()
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Cost(rows, time.perf_counter() - start, cpu_s, after.ru_maxrss / 1024)


def _environment() -> dict[str, str]:
    return {**os.environ, "TOKENIZERS_PARALLELISM": "false", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1"}


def _print(costs: dict[str, Cost], *, as_json: bool) -> None:
    if as_json:
        print(json.dumps({name: asdict(cost) for name, cost in costs.items()}, indent=2))
        return
    print("| way | rows | wall s | CPU s | rows per CPU s | largest process, MB |")
    print("| --- | ---: | ---: | ---: | ---: | ---: |")
    for name, cost in costs.items():
        print(
            f"| {name} | {cost.rows} | {cost.wall_s:.1f} | {cost.cpu_s:.1f} | {cost.rows_per_cpu_s:.0f} "
            f"| {cost.peak_mb:.0f} |"
        )
    ours, plain = costs.values()
    print(f"\n{plain.cpu_s / ours.cpu_s:.1f} times per CPU second, {plain.wall_s / ours.wall_s:.1f} times in wall time")


def prepare_plainly(rows: str, folder: str, base_model: str, num_proc: str) -> None:
    """What TRL's SFT trainer does with `messages` before it trains on the assistant's turns alone."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl.chat_template_utils import get_training_chat_template

    from finemill.models.base.resolve import resolve_base_model

    tokenizer = AutoTokenizer.from_pretrained(resolve_base_model(base_model).path)
    template = get_training_chat_template(tokenizer)
    processes = int(num_proc)
    dataset = load_dataset("json", data_files=rows, split="train", cache_dir=f"{folder}/cache")

    def tokenize(example: dict[str, Any]) -> dict[str, Any]:
        tokens = tokenizer.apply_chat_template(
            example["messages"], chat_template=template, return_dict=True, return_assistant_tokens_mask=True
        )
        return {key: tokens[key] for key in ("input_ids", "assistant_masks")}

    def label(example: dict[str, Any]) -> dict[str, Any]:
        pairs = zip(example["input_ids"], example["assistant_masks"], strict=True)
        return {"labels": [token if learned else -100 for token, learned in pairs]}

    def cut(example: dict[str, Any]) -> dict[str, Any]:
        return {key: example[key][:_MAX_LENGTH] for key in ("input_ids", "labels")}

    dataset = dataset.map(tokenize, num_proc=processes, remove_columns="messages")
    dataset = dataset.map(label, num_proc=processes, remove_columns="assistant_masks")
    dataset.map(cut, num_proc=processes).to_parquet(f"{folder}/train.parquet")


if __name__ == "__main__":
    prepare_plainly(*sys.argv[1:])
