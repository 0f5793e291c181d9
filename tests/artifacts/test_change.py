from pathlib import Path

import pytest

from finemill.artifacts.change import Change, read_change, write_change
from finemill.errors import UserError


def test_a_change_survives_its_file(tmp_path: Path) -> None:
    record = Change(registered_model_name="math", newest_version=None, trained_on=None, dataset="0" * 64, changed=True)
    write_change(tmp_path, record)
    assert read_change(tmp_path) == record


def test_a_missing_change_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"change\.json not found: detect-change writes it"):
        read_change(tmp_path)
