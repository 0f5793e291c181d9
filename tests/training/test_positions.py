import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from finemill.errors import UserError
from finemill.training.positions import check_positions, position_limit


def base(folder: Path, tiny_model_dir: Path, **changes: Any) -> Path:
    """The tiny model's configuration, of 1024 positions, with changes."""
    config = json.loads((tiny_model_dir / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(config))
    shutil.copy(tiny_model_dir / "tokenizer.json", folder)
    return folder


def test_a_row_longer_than_the_model_has_positions_is_refused(tiny_model_dir: Path) -> None:
    check_positions(tiny_model_dir, 1024, 2048)
    with pytest.raises(UserError, match=r"1025 tokens, .* positions for 1024: set max_length \(now 2048\)") as error:
        check_positions(tiny_model_dir, 1025, 2048)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("changes", "limit"),
    [
        ({"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 1024}}, 4096),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0}}, 2048),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}}, 2048),
        ({"max_position_embeddings": 32}, 32),
    ],
)
def test_positions_count_those_of_the_scaling(
    changes: dict[str, Any], limit: int, tmp_path: Path, tiny_model_dir: Path
) -> None:
    assert position_limit(base(tmp_path, tiny_model_dir, **changes)) == limit
