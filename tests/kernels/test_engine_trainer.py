import logging

import pytest
import torch

from finemill.kernels.engine_trainer import budget_bytes

GIB = 2**30


@pytest.mark.parametrize(
    ("memory_gb", "expected", "said"), [(None, 0.95 * 20 * GIB, ""), (7.0, 7 * GIB, ""), (40.0, 20 * GIB, "20.00 GiB")]
)
def test_a_plan_gets_what_is_allowed_as_far_as_the_card_has_it(
    memory_gb: float | None,
    expected: float,
    said: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (14 * GIB, 24 * GIB))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 6 * GIB)
    with caplog.at_level(logging.WARNING):
        assert budget_bytes(torch.device("cuda"), memory_gb) == int(expected)
    assert bool(said) == bool(caplog.records)
    assert said in caplog.text
