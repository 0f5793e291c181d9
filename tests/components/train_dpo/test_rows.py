import json
import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from finemill.artifacts.dataset import AnswerRow, LabelledRow, PreferenceRow, read_answers, read_held_out, read_labelled
from finemill.artifacts.splits import split_path
from finemill.artifacts.tables import write_rows
from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.components.train_dpo.rows import load_answers, load_pairs, split_pair, with_learned
from finemill.components.train_dpo.trainers import PairCollator
from finemill.errors import UserError
from finemill.models.base.resolve import BUILTIN_MODELS
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

PAIR = PreferenceRow(
    input_ids=[1, 2, 3, 4, 9],
    labels=[-100, -100, 3, 4, -100],
    rejected_input_ids=[1, 2, 7, 9],
    rejected_labels=[-100, -100, 7, -100],
)
KTO = TrainDPOConfig(loss_type="kto", per_device_train_batch_size=4, seed=0)
GOOD = AnswerRow(input_ids=[1, 3, 2, 4], labels=[-100, 3, -100, 4], desirable=True)
BAD = AnswerRow(
    input_ids=[1, 2, 5, 6],
    labels=[-100] * 4,
    rejected_input_ids=[1, 2, 5, 6],
    rejected_labels=[-100, -100, 5, 6],
    desirable=False,
)
PLAIN = PreferenceRow(input_ids=[1, 2], labels=[-100, 2])


def write_split(folder: Path, *rows: PreferenceRow) -> Path:
    write_rows(split_path(folder, "train"), PreferenceRow, rows)
    return folder


def test_a_pair_is_the_prompt_and_both_answers_without_what_the_template_writes_after(tmp_path: Path) -> None:
    (pair,) = load_pairs(write_split(tmp_path, PAIR), "train", max_length=8)
    assert pair == {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [7]}


def test_answers_begin_where_tokens_differ_if_one_is_joined_with_the_prompt() -> None:
    chosen = LabelledRow(input_ids=[1, 2, 3], labels=[-100, -100, 3])
    pair = split_pair(chosen, LabelledRow(input_ids=[1, 5, 6], labels=[-100, -100, 6]))
    assert pair == {"prompt_ids": [1], "chosen_ids": [2, 3], "rejected_ids": [5, 6]}


def test_what_is_left_out_or_cut_is_counted(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    long = PreferenceRow(
        input_ids=[1, 5, 6, 7],
        labels=[-100, -100, -100, 7],
        rejected_input_ids=[1, 5, 6, 8],
        rejected_labels=[-100, -100, -100, 8],
    )
    with caplog.at_level(logging.WARNING):
        pairs = load_pairs(write_split(tmp_path, PAIR, PLAIN, long), "train", max_length=3)
    assert list(pairs) == [{"prompt_ids": [1, 2], "chosen_ids": [3], "rejected_ids": [7]}]
    assert "1 rows without a rejected answer left out" in caplog.text
    assert "2 of 2 pairs cut to 3 tokens" in caplog.text
    assert "1 pairs without one of the answers dropped" in caplog.text


@pytest.mark.parametrize(
    ("row", "max_length", "message"),
    [
        (PLAIN, 8, "none of its 1 rows has a rejected answer.*give data-prep rows with prompt, chosen and rejected"),
        (PAIR, 2, "none of its 1 pairs has both answers within max_length 2"),
    ],
)
def test_without_pairs_the_error_says_what_to_do(
    row: PreferenceRow, max_length: int, message: str, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=message) as error:
        load_pairs(write_split(tmp_path, row), "train", max_length)
    assert "\n" not in str(error.value)


def test_tokens_are_those_of_the_tokenizer_s_own_template(preferences: Path, tiny_model_dir: Path) -> None:
    """What transformers gives for prompt and completion: nothing added before, between or after."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    rows = read_held_out(preferences, "train")
    pairs = list(load_pairs(preferences, "train", max_length=512))
    assert len(pairs) == len(rows) > 20
    for row, pair in zip(rows, pairs, strict=True):
        for answer, ids in ((row.completion, pair["chosen_ids"]), (row.rejected or "", pair["rejected_ids"])):
            text = row.prompt + answer
            assert pair["prompt_ids"] + ids == tokenizer(text, add_special_tokens=False)["input_ids"]
            assert ids[-1] == tokenizer.convert_tokens_to_ids("<|im_end|>")
        assert tokenizer.decode(pair["prompt_ids"]) == row.prompt


def test_for_kto_both_answers_stand_alone_beside_an_answer_of_another_row_of_their_batch(preferences: Path) -> None:
    pairs = load_pairs(preferences, "train", max_length=512)
    answers = load_answers(preferences, "train", 512, config=KTO)
    assert len(answers) == 2 * len(pairs)
    assert sum(answers["label"]) == len(pairs)
    good = {(tuple(pair["prompt_ids"]), tuple(pair["chosen_ids"])) for pair in pairs}
    assert good == {(tuple(row["prompt_ids"]), tuple(row["completion_ids"])) for row in answers if row["label"]}
    first = list(answers)[:4]
    assert [row["KL_completion_ids"] for row in first] == [first[index - 1]["completion_ids"] for index in range(4)]
    assert list(answers) != list(load_answers(preferences, "train", 512, config=KTO.model_copy(update={"seed": 1})))


def write_answers(folder: Path, *rows: AnswerRow) -> Path:
    write_rows(split_path(folder, "train"), AnswerRow, rows)
    return folder


def test_kto_takes_answers_that_are_labelled_beside_pairs_and_no_other_training_takes_bad_ones(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    pair = AnswerRow(**vars(PAIR))
    folder = write_answers(tmp_path, pair, GOOD, BAD, AnswerRow(**vars(PLAIN)))
    with caplog.at_level(logging.WARNING):
        answers = load_answers(folder, "train", 3, config=KTO)
    found = {(tuple(row["prompt_ids"]), tuple(row["completion_ids"]), row["label"]) for row in answers}
    assert found == {((1, 2), (3,), True), ((1, 2), (7,), False), ((1, 2), (5,), False)}
    for line in (
        "1 rows without a label or a rejected answer left out",
        "2 of 2 answers cut to 3 tokens",
        "1 rows without an answer dropped",
        "1 good answers count 0.5 times what 2 bad ones do",
        "undesirable_weight 0.5",
    ):
        assert line in caplog.text
    assert list(load_pairs(folder, "train", max_length=8)) == [
        {"prompt_ids": [1, 2], "chosen_ids": [3, 4], "rejected_ids": [7]}
    ]


def test_a_good_answer_is_the_last_one_of_its_conversation(tmp_path: Path) -> None:
    answers = load_answers(write_answers(tmp_path, GOOD, BAD), "train", 8, config=KTO)
    (good,) = (row for row in answers if row["label"])
    assert (good["prompt_ids"], good["completion_ids"]) == ([1, 3, 2], [4])


def test_rows_with_a_label_come_through_data_prep_and_chat_format(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"prompt": f"Is {number} even?", "completion": answer, "label": answer == ("no" if number % 2 else "yes")}
        for number in range(6)
        for answer in ("yes", "no")
    ]
    source = tmp_path / "rows.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    counts = {}
    for policy in ("drop", "keep"):
        config = {"sources": [{"uri": str(source)}], "test_size": 0, "validation_size": 0, "labelled_bad": policy}
        prepared = run_step("data-prep", store=tmp_path.as_uri(), inputs={}, config=config)
        inputs = {"rows": str(prepared.reference), "base_model": "builtin:tiny-qwen3"}
        formatted = run_step("chat-format", store=tmp_path.as_uri(), inputs=inputs, config={})
        dataset = fetch_artifact(formatted.reference)[0]
        labelled, _ = read_answers(dataset, "train")
        counts[policy] = sorted(is_good for _, is_good in labelled)
        assert len(read_held_out(dataset, "train")) == len((dataset / "chat.jsonl").read_text().splitlines()) == 6
        learned = read_labelled(dataset, "train").labels.to_pylist()
        assert sum(any(label != -100 for label in labels) for labels in learned) == 6
    assert counts == {"drop": [True] * 6, "keep": [False] * 6 + [True] * 6}
    tokenizer = AutoTokenizer.from_pretrained(BUILTIN_MODELS["builtin:tiny-qwen3"])
    found = {
        (tokenizer.decode(row["prompt_ids"] + row["completion_ids"]).split("user\n")[1][:10], row["label"])
        for row in load_answers(dataset, "train", 512, config=KTO)
    }
    assert found == {(f"Is {number} even?", label) for number in range(6) for label in (True, False)}


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([GOOD, GOOD], "all 2 answers are good ones, and loss_type 'kto' learns from both.*labelled_bad to 'keep'"),
        ([BAD], "all 1 answers are bad ones.*label good ones"),
        ([AnswerRow(**vars(PLAIN))], "no row has a label or a rejected answer within max_length"),
    ],
)
def test_answers_of_one_kind_are_refused_with_advice(rows: list[AnswerRow], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        load_answers(write_answers(tmp_path, *rows), "train", 8, config=KTO)


def test_what_a_tool_gave_back_is_not_learned() -> None:
    chosen = LabelledRow(input_ids=[1, 2, 3, 4, 5, 6], labels=[-100, -100, 3, -100, -100, 6])
    rejected = LabelledRow(input_ids=[1, 2, 7], labels=[-100, -100, 7])
    (pair,) = with_learned([(split_pair(chosen, rejected), (chosen, rejected))])
    assert pair["chosen_ids"] == [3, 4, 5, 6]
    assert (pair["chosen_learned"], pair["rejected_learned"]) == ([1, 0, 0, 1], [1])
    batch = PairCollator(pad_token_id=0)([{name: list(ids) for name, ids in pair.items()}])
    assert batch["completion_mask"].tolist() == [[0, 0, 1, 0, 0, 1], [0, 0, 1, 0, 0, 0]]


def test_pairs_of_which_all_is_learned_say_nothing_of_it() -> None:
    chosen = LabelledRow(input_ids=[1, 2, 3], labels=[-100, 2, 3])
    rejected = LabelledRow(input_ids=[1, 5], labels=[-100, 5])
    assert with_learned([(split_pair(chosen, rejected), (chosen, rejected))]) == [split_pair(chosen, rejected)]
