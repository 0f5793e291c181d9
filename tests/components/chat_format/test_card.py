import itertools
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from finemill.components.chat_format.card import histogram
from finemill.components.chat_format.config import ChatFormatConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

HOSTILE = "<script>alert(1)</script>"
CHATS = [
    [{"role": "user", "content": f"Fluss {n}? {HOSTILE}"}, {"role": "assistant", "content": f"Elbe {n}."}]
    for n in range(30)
]
ROWS: list[dict[str, Any]] = [
    *({"messages": chat, "note": "x"} for chat in CHATS),
    *({"prompt": f"\u4f60\u597d {n}", "completion": "\u597d\u7684"} for n in range(10)),
    {"prompt": "a", "completion": "<think>b"},
    {"prompt": "\u4f60\u597d 0", "completion": "\u597d\u7684"},
]


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A dataset of chats and Chinese answers, two of its rows left out."""
    folder = tmp_path_factory.mktemp("card")
    source = folder / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    sizes = {"test_size": 0, "validation_size": 0}
    prepared = run_step(
        "data-prep", store=folder.as_uri(), inputs={}, config={"sources": [{"uri": str(source)}], **sizes}
    )
    inputs = {"rows": str(prepared.reference), "base_model": "builtin:tiny-qwen3"}
    config = {"estimate": {"model": "qwen3-8b", "gpu": "h100", "global_batch_size": 4}}
    return fetch_artifact(run_step("chat-format", store=folder.as_uri(), inputs=inputs, config=config).reference)[0]


def facts_of(card: Path) -> dict[str, Any]:
    facts: dict[str, Any] = json.loads((card / "data_card.json").read_text())
    return facts


def test_a_source_is_counted_at_each_stage(card: Path) -> None:
    (source,) = facts_of(card)["sources"]
    assert (source["read"], source["left_out_by_data_prep"], source["rows_read"], source["rows"]) == (42, 2, 40, 40)
    assert source["unread_columns"] == {"note": 30}
    left_out = {(own["stage"], own["reason"]): own["rows"] for own in facts_of(card)["left_out"]}
    assert left_out == {("data-prep", "unclosed_thinking"): 1, ("data-prep", "duplicate"): 1}


def test_steps_and_hours_of_training_on_a_named_card_are_estimated(card: Path) -> None:
    training = facts_of(card)["training"]
    assert (training["model"], training["gpu"], training["steps_one_by_one"]) == ("qwen3-8b", "h100", 10)
    # One pack holds them all.
    assert training["steps_packed"] == 1
    assert 0 < training["hours_packed"] < 0.01
    assert 0 < training["hours_one_by_one"] < 0.01
    for page in ("data_card.html", "data_card.md"):
        assert re.search(r"QLoRA on qwen3-8b takes 1 steps and \d+ seconds packed", (card / page).read_text())
    with pytest.raises(UserError, match="gpu 'gtx' is not known: it is one of"):
        parse_config(ChatFormatConfig, {"estimate": {"model": "qwen3-8b", "gpu": "gtx"}}, "chat-format")


def test_what_the_text_says_are_paragraphs_of_their_own(card: Path) -> None:
    told = (card / "data_card.md").read_text().partition("Padding: ")[2].partition("Tokenizer")[0]
    paragraphs = told.strip().split("\n\n")
    assert paragraphs[0].endswith("the kernels' estimate.")
    assert all("\n" not in paragraph for paragraph in paragraphs)
    assert any(paragraph.startswith("Not read in ") and "note (30 rows)" in paragraph for paragraph in paragraphs)
    assert any(paragraph.startswith("Scripts: ") for paragraph in paragraphs)


def test_examples_are_shown_before_and_after_with_what_is_learned(card: Path) -> None:
    example = next(own for own in facts_of(card)["examples"] if own["shape"] == "messages")
    learned = [piece["text"] for piece in example["pieces"] if piece["learned"]]
    assert re.fullmatch(r"Elbe \d+\.<\|im_end\|>", learned[0])
    assert len(learned) == 1
    assert json.loads(example["raw"]) in ROWS
    assert {own["shape"] for own in facts_of(card)["examples"]} == {"messages", "prompt_completion"}


def test_scripts_are_told_apart(card: Path) -> None:
    scripts = facts_of(card)["scripts"]
    assert set(scripts) == {"Latin", "CJK"}
    assert scripts["Latin"] > scripts["CJK"] > 0


def test_the_page_needs_nothing_else_and_runs_no_row(card: Path) -> None:
    page = (card / "data_card.html").read_text()
    assert HOSTILE not in page
    assert "&lt;script&gt;alert(1)" in page
    assert not re.search(r"""(?:src|href)=|@import|url\(|https?://""", page)
    assert page.count("<mark>Elbe ") >= 10
    assert "prefers-color-scheme: dark" in page


def test_the_text_has_the_same_counts(card: Path) -> None:
    text = (card / "data_card.md").read_text()
    assert text.startswith("# Data card\n\n42 rows read, 40 training examples of ")
    assert "| data-prep |" in text
    assert "| duplicate | 1 |" in text


def test_bins_hold_every_length_once() -> None:
    lengths = [1, 15, 16, 17, 100, 4096]
    bins = histogram(np.array(lengths))
    assert sum(own["examples"] for own in bins) == len(lengths)
    assert all(low["to"] == high["from"] for low, high in itertools.pairwise(bins))
    assert histogram(np.array([], dtype=np.int64)) == []
