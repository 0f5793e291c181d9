from pathlib import Path

import pytest

from finemill.errors import UserError
from finemill.models.rope import RopeScaling
from finemill.training.positions import base_config, check_positions


def test_a_row_longer_than_the_model_has_positions_is_refused(tiny_model_dir: Path) -> None:
    check_positions(tiny_model_dir, 1024, 2048)
    with pytest.raises(UserError, match=r"1025 tokens, .* positions for 1024: set max_length \(now 2048\)") as error:
        check_positions(tiny_model_dir, 1025, 2048)
    assert "\n" not in str(error.value)


def test_the_scaling_that_would_do_is_named(tiny_model_dir: Path) -> None:
    with pytest.raises(UserError, match=r"or rope_scaling to \{rope_type: yarn, factor: 4\}"):
        check_positions(tiny_model_dir, 3500, 8192)
    doubled = RopeScaling(rope_type="linear", factor=2.0)
    check_positions(tiny_model_dir, 2048, 8192, doubled)
    with pytest.raises(UserError, match=r"positions for 2048: .* or rope_scaling to \{rope_type: linear, factor: 4\}"):
        check_positions(tiny_model_dir, 3500, 8192, doubled)
    assert base_config(tiny_model_dir, doubled).rope_parameters["factor"] == 2.0
