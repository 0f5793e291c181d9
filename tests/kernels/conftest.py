"""The op tests run three ways: plain PyTorch (CPU), Triton's interpreter (TRITON_INTERPRET=1), kernels (CUDA)."""

from collections.abc import Callable, Iterator

import pytest
import torch

from finemill.kernels.ops.launch import INTERPRETED
from finemill.kernels.ops.packing import IGNORE_INDEX, PackedBatch, pack_sequences

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"

# The interpreter truncates where a GPU rounds to bfloat16 (seen in Triton 3.9): no bfloat16 tolerance holds there.
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU"))


@pytest.fixture
def device() -> str:
    return DEVICE


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    chosen: torch.dtype = request.param
    return chosen


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch: pytest.MonkeyPatch) -> None:
    """Fill what `torch.empty` hands out with NaN (largest value for integers), so that unwritten output shows."""

    def poison(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def poisoned(*args: object, **kwargs: object) -> torch.Tensor:
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point():
                return tensor.fill_(float("nan"))
            return tensor.fill_(torch.iinfo(tensor.dtype).max) if tensor.dtype != torch.bool else tensor

        return poisoned

    monkeypatch.setattr(torch, "empty", poison(torch.empty))
    monkeypatch.setattr(torch, "empty_like", poison(torch.empty_like))


@pytest.fixture(autouse=True)
def seeded() -> Iterator[None]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield


def _assert_as_accurate(ours: torch.Tensor, eager: torch.Tensor, exact: torch.Tensor, tiny: float = 1e-6) -> None:
    assert ours.shape == exact.shape
    assert torch.isfinite(ours).all(), "not finite, or never written"
    scale = exact.abs().max().item()
    ours, eager = ours.double() - exact, eager.double() - exact
    errors = {
        "max": (ours.abs().max(), eager.abs().max()),
        "rms": (ours.square().mean().sqrt(), eager.square().mean().sqrt()),
    }
    for name, (error, yardstick) in errors.items():
        assert error <= 1.1 * yardstick + tiny * scale, f"{name} error {error:.3g}, eager's {yardstick:.3g}"


@pytest.fixture
def assert_as_accurate() -> Callable[..., None]:
    """`check(ours, eager, exact)`: error against fp64 at most 1.1 times that of eager code in the same dtype."""
    return _assert_as_accurate


@pytest.fixture
def pitched() -> Callable[[torch.Tensor], torch.Tensor]:
    """Copy a matrix into the first columns of a wider NaN matrix: same values, row stride larger than the width."""

    def copy(tensor: torch.Tensor, pad: int = 64) -> torch.Tensor:
        wide = torch.full((tensor.shape[0], tensor.shape[1] + pad), float("nan"), dtype=tensor.dtype).to(tensor.device)
        view = wide[:, : tensor.shape[1]]
        view.copy_(tensor)
        return view

    return copy


@pytest.fixture
def ragged() -> PackedBatch:
    """Three sequences on the CPU, each with two tokens that are not learned."""
    generator = torch.Generator().manual_seed(0)
    pairs = []
    for length in (7, 3, 12):
        ids = torch.randint(1, 50, (length,), generator=generator)
        pairs.append((ids, torch.where(torch.arange(length) < 2, IGNORE_INDEX, ids)))
    return pack_sequences(pairs)
