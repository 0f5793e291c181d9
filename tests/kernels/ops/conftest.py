"""Rows that the tests of experts' ops share."""

import pytest
import torch

from finemill.kernels.ops.expert_rows import ExpertRows, sort_by_expert


@pytest.fixture
def rows(device: str) -> ExpertRows:
    """37 tokens, two experts each: expert 3 of 5 without a token, expert 0 with most of them."""
    experts = torch.multinomial(torch.tensor([6.0, 1.0, 1.0, 0.0, 2.0]).expand(37, -1), 2)
    return sort_by_expert(experts.int().to(device), 5, 64 if device == "cuda" else 16)
