"""The layers that stay in 16 bits are those whose errors the model minds."""

from pathlib import Path

import pytest

from finemill.models.nf4.layers import LinearGroup, choose_kept, quantized_layers, skip_modules
from finemill.models.stored_model import StoredModel


def group(name: str, error: float, extra_bytes: int) -> LinearGroup:
    return LinearGroup((name,), name, error, extra_bytes)


@pytest.mark.parametrize(
    ("extra_bytes", "kept"), [(0, ""), (10, "b"), (29, "b"), (30, "bc"), (40, "ba"), (60, "bac"), (99, "bac")]
)
def test_what_saves_most_error_per_byte_stays_as_long_as_it_fits(extra_bytes: int, kept: str) -> None:
    groups = [group("a", 6.0, 30), group("b", 4.0, 10), group("c", 2.0, 20), group("d", 0.0, 1)]
    assert "".join(one.names[0] for one in choose_kept(groups, extra_bytes)) == kept


def test_skipped_layers_have_the_names_of_transformers_and_of_servers(short_model_dir: Path) -> None:
    stored = StoredModel(short_model_dir)
    assert len(quantized_layers(stored)) == 14
    attention = "model.layers.1.self_attn"
    fused = LinearGroup(tuple(f"{attention}.{name}_proj" for name in "qkv"), f"{attention}.qkv_proj", 1.0, 1)
    assert skip_modules(stored, [fused, group("model.layers.0.mlp.down_proj", 1.0, 1)]) == [
        "lm_head",
        "model.layers.0.mlp.down_proj",
        *(f"{attention}.{name}_proj" for name in ("k", "q", "qkv", "v")),
    ]
