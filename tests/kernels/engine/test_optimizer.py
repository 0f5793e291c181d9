"""Flat adapters stay the parameters they were; the flat optimizer steps like torch's with clipping."""

import weakref

import pytest
import torch
from torch import nn

from finemill.kernels.engine.adapters import FlatAdapters, LoraPair
from finemill.kernels.engine.optimizer import FlatAdamW


def make_pairs(device: str) -> list[LoraPair]:
    """Two adapters over one input of width 6, ranks 4 and 2, outputs 5 and 3."""

    def parameter(*shape: int) -> nn.Parameter:
        return nn.Parameter(torch.randn(shape, device=device))

    return [LoraPair(parameter(rank, 6), parameter(width, rank), 2.0) for rank, width in ((4, 5), (2, 3))]


def build(device: str) -> tuple[FlatAdapters, list[nn.Parameter]]:
    pairs = make_pairs(device)
    adapters = FlatAdapters(torch.device(device))
    adapters.reserve([pairs[0], None, pairs[1]], (5, 7, 3), 6)
    adapters.build()
    return adapters, [parameter for pair in pairs for parameter in (pair.a, pair.b)]


def test_parameters_keep_identity_and_values_and_share_the_flat_memory(device: str) -> None:
    pairs = make_pairs(device)
    before = [parameter.detach().clone() for pair in pairs for parameter in (pair.a, pair.b)]
    adapters = FlatAdapters(torch.device(device))
    ticket = adapters.reserve([pairs[0], None, pairs[1]], (5, 7, 3), 6)
    adapters.build()
    assert ticket is not None
    group = adapters.group(ticket)
    assert group.rank == 3 * 4
    assert group.b.shape == (15, 4)
    for parameter, old in zip(adapters.parameters, before, strict=True):
        assert torch.equal(parameter, old)
    adapters.master.mul_(2)
    for parameter, old in zip(adapters.parameters, before, strict=True):
        assert torch.equal(parameter, 2 * old)
    assert (group.a[4:8] == 0).all()  # the member without an adapter
    assert (group.a[10:] == 0).all()  # the missing ranks of the smaller one
    adapters.restore()
    adapters.master.zero_()
    for parameter, old in zip((p for pair in pairs for p in (pair.a, pair.b)), before, strict=True):
        assert torch.equal(parameter, 2 * old)


def test_adopted_parameters_leave_their_memory_and_come_back_in_their_dtype(device: str) -> None:
    pairs = make_pairs(device)
    pairs[0].a.data = pairs[0].a.data.bfloat16()
    old = [weakref.ref(parameter.untyped_storage()) for pair in pairs for parameter in (pair.a, pair.b)]
    adapters = FlatAdapters(torch.device(device))
    adapters.reserve([pairs[0], None, pairs[1]], (5, 7, 3), 6)
    adapters.build()
    assert all(storage() is None for storage in old)
    assert pairs[0].a.dtype == torch.float32
    adapters.restore()
    assert pairs[0].a.dtype == torch.bfloat16
    assert pairs[0].b.is_contiguous()
    assert pairs[1].b.is_contiguous()


def test_different_scalings_over_one_input_are_refused(device: str) -> None:
    left, right = make_pairs(device)
    with pytest.raises(ValueError, match="have scalings"):
        FlatAdapters(torch.device(device)).reserve([left, LoraPair(right.a, right.b, 3.0)], (5, 3), 6)


def test_steps_equal_clipping_and_adamw_of_torch(device: str) -> None:
    adapters, parameters = build(device)
    theirs = [nn.Parameter(parameter.detach().clone()) for parameter in parameters]
    ours = FlatAdamW(adapters, lr=1e-2, weight_decay=0.1, max_norm=0.5)
    expected = torch.optim.AdamW(theirs, lr=1e-2, weight_decay=0.1)
    for step in range(4):
        adapters.attach_grads()
        for parameter, other in zip(parameters, theirs, strict=True):
            other.grad = torch.randn_like(other)
            assert parameter.grad is not None
            parameter.grad.add_(other.grad)
        norm = nn.utils.clip_grad_norm_(theirs, 0.5)
        rate = 1e-2 / (step + 1)
        ours.param_groups[0]["lr"] = expected.param_groups[0]["lr"] = rate
        torch.testing.assert_close(ours.step()[0], norm)
        expected.step()
        assert (adapters.grad == 0).all()
    for parameter, other in zip(parameters, theirs, strict=True):
        torch.testing.assert_close(parameter, other, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("bits", [32, 8])
def test_a_saved_state_goes_on_as_if_nothing_happened(bits: int, device: str) -> None:
    def run(adapters: FlatAdapters, optimizer: FlatAdamW, grads: list[torch.Tensor]) -> None:
        for grad in grads:
            adapters.grad.copy_(grad)
            optimizer.step()

    adapters, _ = build(device)
    grads = [torch.randn_like(adapters.grad) for _ in range(4)]
    start = adapters.master.clone()
    optimizer = FlatAdamW(adapters, lr=1e-2, bits=bits)
    run(adapters, optimizer, grads)
    straight = adapters.master.clone()

    adapters.master.copy_(start)
    first = FlatAdamW(adapters, lr=1e-2, bits=bits)
    run(adapters, first, grads[:2])
    second = FlatAdamW(adapters, lr=1.0, bits=bits)
    second.load_state_dict(first.state_dict())
    run(adapters, second, grads[2:])
    assert torch.equal(adapters.master, straight)
    with pytest.raises(ValueError, match="another precision"):
        FlatAdamW(adapters, lr=1e-2, bits=40 - bits).load_state_dict(first.state_dict())
