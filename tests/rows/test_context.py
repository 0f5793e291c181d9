from typing import Any

import pytest

from finemill.rows.context import text_beside
from finemill.rows.reader import Reader


@pytest.mark.parametrize(
    ("found", "text"),
    [
        ([{"title": "Mail", "text": "A letter."}, {"text": "B wrote it."}], "Mail\nA letter.\n\nB wrote it."),
        ({"title": ["Mail", "B"], "sentences": [["A ", "letter."], ["B."]]}, "Mail\nA letter.\n\nB\nB."),
        ({"contexts": ["A letter.", "B."], "labels": ["x"]}, "A letter.\n\nB."),
    ],
)
@pytest.mark.parametrize("column", ["context", "passages"])
def test_passages_may_have_titles_and_columns(found: Any, text: str, column: str) -> None:
    row = Reader({column: found})
    assert (text_beside(row, ["context"]), row.unread) == (text, [])


@pytest.mark.parametrize("found", [[1, 2], {"url": ["x"]}, [{"id": 1}], [{"role": "user", "content": "Hi"}]])
def test_what_was_found_in_another_form_is_named_as_not_read(found: Any) -> None:
    row = Reader({"documents": found})
    assert (text_beside(row, ["context"]), row.unread) == ("", ["documents"])
