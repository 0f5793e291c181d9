"""Routing and its gradient, both kinds of weights."""

import pytest
import torch

from finemill.kernels.ops.routing import route, route_backward_reference, route_reference


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "count"), [(19, 8, 2), (5, 60, 4), (9, 128, 8), (1, 3, 3)])
def test_experts_and_weights_are_those_of_a_softmax_and_the_largest(
    tokens: int, experts: int, count: int, normalize: bool, device: str
) -> None:
    logits = 3 * torch.randn(tokens, experts)
    logits[0] = torch.linspace(-80, 80, experts)  # all but one probability underflow
    chosen, weights = route(logits.to(device), count, normalize=normalize)
    expected, exact = route_reference(logits.double(), count, normalize=normalize)
    assert torch.equal(chosen.cpu(), expected)
    torch.testing.assert_close(weights.cpu(), exact.float(), rtol=1e-5, atol=1e-7)
    assert (chosen.dtype, weights.dtype) == (torch.int32, torch.float32)


def test_of_equal_logits_the_first_experts_are_taken(device: str) -> None:
    chosen, weights = route(torch.zeros(3, 7, device=device), 3, normalize=True)
    assert chosen.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3, device=device))


@pytest.mark.parametrize("normalize", [True, False])
def test_gradient_is_autograds(normalize: bool) -> None:
    logits = torch.randn(6, 9, dtype=torch.float64, requires_grad=True)
    experts, weights = route_reference(logits, 3, normalize=normalize)
    d_weights = torch.randn(6, 3, dtype=torch.float64)
    (expected,) = torch.autograd.grad(weights, logits, d_weights)
    ours = route_backward_reference(d_weights, logits.detach(), experts, weights.detach(), normalize=normalize)
    torch.testing.assert_close(ours, expected)


def test_more_experts_than_there_are_cannot_be_chosen(device: str) -> None:
    with pytest.raises(ValueError, match="5 experts per token of 4"):
        route(torch.zeros(2, 4, device=device), 5, normalize=True)
