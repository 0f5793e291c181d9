"""How long a sequence the base model was made for."""

from pathlib import Path

from transformers import AutoConfig

from finemill.errors import UserError


def check_positions(base_model: Path, longest: int, max_length: int) -> None:
    """Compare the longest row with the positions of the model in `base_model`.

    Args:
        base_model: folder with its config.json.
        longest: tokens of the longest row, after the cut to `max_length`.
        max_length: as configured.
    Raises: UserError: the row is longer. The model would train on positions that it cannot tell apart.
    """
    limit = position_limit(base_model)
    if limit is not None and longest > limit:
        raise UserError(
            f"a row has {longest} tokens, and the base model has positions for {limit}: set max_length (now "
            f"{max_length}) to at most {limit}, or give a base whose config.json scales them (rope_scaling: yarn)"
        )


def position_limit(base_model: Path) -> int | None:
    """Positions that a model has, those of its rope scaling included; None where any number goes."""
    config = AutoConfig.from_pretrained(base_model, local_files_only=True, trust_remote_code=False).get_text_config()
    limit: int | None = getattr(config, "max_position_embeddings", None)
    scaling = getattr(config, "rope_parameters", None) or {}
    # With these config.json keeps the positions of before; with llama3 and longrope they are the scaled ones.
    if limit is None or scaling.get("rope_type") not in ("linear", "dynamic", "yarn"):
        return limit
    return max(limit, int(scaling["factor"] * (scaling.get("original_max_position_embeddings") or limit)))
