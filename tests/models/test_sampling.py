from pathlib import Path
from typing import Any

import pytest

from finemill.models.sampling import GREEDY, Sampling, read_generation_defaults, read_model_type, recommended_sampling


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe", "qwen3moe"])
def test_qwen3_has_one_sampling_with_thinking_and_another_without(family: str) -> None:
    assert recommended_sampling(family, {}, thinking=True) == Sampling(0.6, 0.95, 20, 0.0)
    assert recommended_sampling(family, {"do_sample": True, "temperature": 0.6}, thinking=False) == Sampling(
        0.7, 0.8, 20, 0.0
    )


@pytest.mark.parametrize(
    ("defaults", "expected"),
    [
        ({}, GREEDY),
        ({"do_sample": False, "temperature": 3.0}, GREEDY),
        ({"do_sample": True, "temperature": 0.2, "top_p": 0.9}, Sampling(0.2, 0.9, 50)),
        ({"do_sample": True, "min_p": 0.1}, Sampling(1.0, 1.0, 50, 0.1)),
        ({"do_sample": True, "temperature": None, "top_p": "0.9", "top_k": -1}, Sampling(1.0, 1.0, 50)),
    ],
)
def test_other_families_take_what_their_file_says(defaults: dict[str, Any], expected: Sampling) -> None:
    assert recommended_sampling("llama", defaults, thinking=True) == expected


def test_a_model_that_says_it_is_greedy_is_asked_so(tiny_model_dir: Path) -> None:
    assert read_model_type(tiny_model_dir) == "qwen3"
    defaults = read_generation_defaults(tiny_model_dir)
    assert recommended_sampling("qwen3", defaults, thinking=True) == GREEDY
