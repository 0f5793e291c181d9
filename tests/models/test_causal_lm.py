from pathlib import Path

import pytest
from transformers.utils import logging

from finemill.errors import UserError
from finemill.models.causal_lm import load_causal_lm


def test_a_failed_load_leaves_transformers_bars_as_they_were(tmp_path: Path) -> None:
    assert logging.is_progress_bar_enabled()
    with pytest.raises(UserError, match="model_type"):
        load_causal_lm(tmp_path)
    assert logging.is_progress_bar_enabled()
