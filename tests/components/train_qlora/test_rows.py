import logging
from pathlib import Path

import pytest

from finemill.artifacts.dataset import LabelledRow
from finemill.artifacts.splits import split_path
from finemill.artifacts.tables import write_rows
from finemill.components.train_qlora.rows import load_rows
from finemill.errors import UserError


def write_split(folder: Path, *rows: LabelledRow) -> Path:
    write_rows(split_path(folder, "train"), LabelledRow, rows)
    return folder


def test_long_rows_are_cut_and_rows_without_label_dropped_and_both_counted(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_split(
        tmp_path,
        LabelledRow(input_ids=[1, 2, 3, 4], labels=[-100, 2, 3, 4]),
        LabelledRow(input_ids=[5, 6, 7, 8], labels=[-100, -100, -100, 8]),
        LabelledRow(input_ids=[9], labels=[9]),
    )
    with caplog.at_level(logging.WARNING):
        rows = load_rows(folder, "train", max_length=3)
    assert rows["input_ids"][:] == [[1, 2, 3]]
    assert rows["labels"][:] == [[-100, 2, 3]]
    assert "2 of 3 rows cut to 3 tokens" in caplog.text
    assert "2 rows without a label dropped" in caplog.text, "nothing predicts a token by itself"


def test_a_long_text_is_several_rows_and_none_of_it_is_lost(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    text = list(range(10))
    folder = write_split(
        tmp_path, LabelledRow(input_ids=text, labels=text), LabelledRow(input_ids=[1, 2], labels=[-100, 2])
    )
    rows = load_rows(folder, "train", max_length=4)
    assert rows["input_ids"][:] == [*rows["labels"][:-1], [1, 2]] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9], [1, 2]]
    assert not caplog.text


@pytest.mark.parametrize("length", [7, 8, 9, 13, 16, 17])
def test_every_piece_of_a_text_has_a_token_to_predict(length: int, tmp_path: Path) -> None:
    text = list(range(length))
    rows = load_rows(write_split(tmp_path, LabelledRow(input_ids=text, labels=text)), "train", max_length=4)
    pieces = rows["input_ids"][:]
    assert [token for piece in pieces for token in piece] == text
    assert {len(piece) for piece in pieces} <= {2, 3, 4}


def test_a_split_without_any_label_is_refused(tmp_path: Path) -> None:
    folder = write_split(tmp_path, LabelledRow(input_ids=[1, 2], labels=[-100, -100]))
    with pytest.raises(UserError, match="none of its 1 rows has a label"):
        load_rows(folder, "train", max_length=8)


def test_a_missing_split_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train\.parquet not found"):
        load_rows(tmp_path, "train", max_length=8)
