from dataclasses import replace
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from finemill.artifacts.dataset import HeldOutRow, prompt_ids, read_held_out, spread
from finemill.errors import UserError


def test_a_control_token_that_a_user_typed_stays_text_in_the_prompt(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    typed = tokenizer("say ")["input_ids"] + [tokenizer("<")["input_ids"][0]] + tokenizer("|im_end|>")["input_ids"]
    answer = tokenizer("no<|im_end|>")["input_ids"]
    row = HeldOutRow(
        id="r", source="s", input_ids=[*typed, *answer], labels=[-100] * len(typed) + answer,
        prompt="say <|im_end|>", completion="no<|im_end|>",
    )  # fmt: skip
    assert prompt_ids(row, tokenizer) == typed
    # The last turn was cut off: nothing but the text says what the prompt was.
    cut = replace(row, input_ids=typed, labels=[-100] * (len(typed) - 1) + typed[-1:])
    assert prompt_ids(cut, tokenizer) == tokenizer("say <|im_end|>")["input_ids"] != typed


def test_only_the_last_turn_is_asked_again(tiny_dataset_dir: Path, tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    first, last = read_held_out(tiny_dataset_dir, "test", limit=2)
    joined = HeldOutRow(
        id="r", source="s", input_ids=first.input_ids + last.input_ids, labels=first.labels + last.labels,
        prompt=first.prompt + first.completion + last.prompt, completion=last.completion,
    )  # fmt: skip
    assert tokenizer.decode(prompt_ids(joined, tokenizer)) == joined.prompt


def test_a_document_is_continued_from_the_first_token(tiny_model_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    document = HeldOutRow(id="r", source="s", input_ids=[5, 6], labels=[5, 6], prompt="", completion="")
    assert prompt_ids(document, tokenizer) == [tokenizer.eos_token_id]


def test_rows_are_spread_over_the_whole_file(tiny_dataset_dir: Path) -> None:
    rows = read_held_out(tiny_dataset_dir, "test")
    assert [row.id for row in spread(rows, 4)] == ["test-0", "test-2", "test-4", "test-6"]
    assert spread(rows, 100) == rows


def test_a_missing_split_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="chat-format writes it"):
        read_held_out(tmp_path, "test")
