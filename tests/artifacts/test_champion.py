from pathlib import Path

import pytest

from finemill.artifacts.champion import Champion, read_champion, write_champion
from finemill.errors import UserError


def test_a_champion_survives_its_file(tmp_path: Path) -> None:
    record = Champion(registered_model_name="math", champion=3, evaluation="file:///e@sha256:0")
    write_champion(tmp_path, record)
    assert read_champion(tmp_path) == record


def test_a_missing_champion_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"champion\.json not found: score-champion writes it"):
        read_champion(tmp_path)
