"""A matrix in 16 bits acts as one in float32, whatever is done with it."""

from collections.abc import Callable

import pytest
import torch
from torch.nn import functional

from finemill.models import widened
from finemill.models.widened import Widened

STORED = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
INPUTS = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
BIAS = torch.arange(6.0)


@pytest.mark.parametrize(
    "use",
    [
        lambda weight: functional.linear(INPUTS, weight),
        lambda weight: functional.linear(INPUTS, weight, BIAS),
        lambda weight: functional.linear(INPUTS[0, 0], weight),
        lambda weight: functional.embedding(torch.tensor([[5, 0], [3, 3]]), weight),
        lambda weight: INPUTS @ weight.T,
        lambda weight: weight.norm(dim=1) + weight.data.sum(),
        lambda weight: weight.index_copy(0, torch.tensor([1]), torch.ones(1, 4)),
        lambda weight: INPUTS.to(weight.dtype) * weight[0],
        lambda weight: torch.tensor([*weight.shape, weight.size(0), weight.numel(), len(weight), weight.ndim]),
        lambda weight: torch.stack([weight, weight]),
    ],
)
def test_it_is_computed_with_as_if_it_were_float32(
    use: Callable[[torch.Tensor], torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(widened, "_VALUES_AT_ONCE", 8)
    expected, found = use(STORED.float()), use(STORED.as_subclass(Widened))
    assert type(found) is torch.Tensor
    assert found.dtype == expected.dtype
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
