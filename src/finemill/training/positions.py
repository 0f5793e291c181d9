"""How long a sequence the base model was made for."""

import math
from pathlib import Path
from typing import Any

from transformers import AutoConfig

from finemill.errors import UserError
from finemill.models.rope import RopeScaling, position_limit, scale_config, scaled_parameters


def base_config(base_model: Path, scaling: RopeScaling | None) -> Any:
    """transformers' configuration of the base in a folder, with the positions that are asked for.

    Raises: UserError: as `scaled_parameters`.
    """
    config = AutoConfig.from_pretrained(base_model, local_files_only=True, trust_remote_code=False)
    if scaling is not None:
        scale_config(config, scaled_parameters(config, scaling))
    return config


def check_positions(base_model: Path, longest: int, max_length: int, scaling: RopeScaling | None = None) -> None:
    """Compare the longest row with the positions of the model in `base_model`.

    Args:
        base_model: folder with its config.json.
        longest: tokens of the longest row, after the cut to `max_length`.
        max_length: as configured.
        scaling: of the positions, if one is asked for.
    Raises: UserError: the row is longer. The model would train on positions that it cannot tell apart.
    """
    limit = position_limit(base_config(base_model, scaling))
    if limit is None or longest <= limit:
        return
    factor = math.ceil(longest / limit * (scaling.factor if scaling else 1))
    kind = scaling.rope_type if scaling else "yarn"
    raise UserError(
        f"a row has {longest} tokens, and the base model has positions for {limit}: set max_length (now {max_length}) "
        f"to at most {limit}, or rope_scaling to {{rope_type: {kind}, factor: {factor}}}"
    )
