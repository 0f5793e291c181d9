"""Packed attention equals torch's attention sequence by sequence, gradients included."""

from itertools import pairwise

import pytest
import torch

from finemill.errors import UserError
from finemill.kernels.ops import attention, attention_cudnn, attention_fa4
from finemill.kernels.ops.attention import attention_backward, attention_forward, fitting_backend
from finemill.kernels.ops.division import CUDNN_LENGTH
from finemill.kernels.ops.packing import Sequences, length_classes

LENGTHS = [5, 1, 0, 9]


def inputs(
    heads: int, kv_heads: int, head_dim: int, device: str
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, Sequences]:
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, head_dim, generator=generator, dtype=torch.float64).to(device)

    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), Sequences(cu_seqlens, max(LENGTHS))


def torch_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, sequences: Sequences) -> torch.Tensor:
    parts = []
    bounds = sequences.cu_seqlens.tolist()
    for begin, end in pairwise(bounds):
        q_part, k_part, v_part = (t[begin:end].transpose(0, 1)[None] for t in (q, k, v))
        if end > begin:
            parts.append(
                torch.nn.functional.scaled_dot_product_attention(
                    q_part, k_part, v_part, is_causal=True, enable_gqa=True
                )[0].transpose(0, 1)
            )
    return torch.cat(parts)


@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (6, 2), (3, 1)])
def test_output_and_gradients_equal_torchs(heads: int, kv_heads: int, device: str) -> None:
    q, k, v, dout, sequences = inputs(heads, kv_heads, 8, device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch_attention(leaves[0], leaves[1], leaves[2], sequences)
    expected.backward(dout)
    wide = torch.full((q.shape[0], heads * 8 + 3), float("nan"), dtype=q.dtype, device=device)
    out = wide[:, : heads * 8].unflatten(1, (heads, 8))
    result, saved = attention_forward(q, k, v, sequences, 8**-0.5, out)
    torch.testing.assert_close(result, expected)
    assert wide[:, heads * 8 :].isnan().all()
    grads = attention_backward(dout, q, k, v, out, saved, sequences, 8**-0.5)
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad)


def test_a_token_does_not_see_other_sequences_or_later_tokens(device: str) -> None:
    q, k, v, _, sequences = inputs(2, 1, 8, device)
    before, _ = attention_forward(q, k, v, sequences, 1.0)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[4:], changed_v[4:] = 7.0, -7.0
    after, _ = attention_forward(q, changed_k, changed_v, sequences, 1.0)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4], after[4])


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> dict[str, bool]:
    """A card that only answers what is asked of it; returns what is installed."""
    installed = {"fa4": True, "cudnn": True}
    monkeypatch.delenv("FINEMILL_ATTENTION", raising=False)
    monkeypatch.setattr(attention, "capability", lambda device: (9, 0))
    monkeypatch.setattr(attention_cudnn, "available", lambda device: installed["cudnn"])
    monkeypatch.setattr(attention_fa4, "available", lambda device: installed["fa4"])
    return installed


def chosen(length: int, head_dim: int = 128, device: str = "cuda", dtype: torch.dtype = torch.bfloat16) -> str:
    return fitting_backend(torch.device(device), dtype, head_dim, length)


def test_the_length_decides_which_implementation_runs(hopper: dict[str, bool]) -> None:
    assert [chosen(length) for length in (1, 2, 2047, 2048)] == ["flash", "cudnn", "cudnn", "fa4"]
    assert [chosen(8192, head_dim) for head_dim in (64, 80, 256)] == ["fa4", "cudnn", "flash"]
    assert [chosen(131072, head_dim) for head_dim in (128, 80)] == ["fa4", "flash"]
    assert chosen(8192, device="cpu") == chosen(8192, dtype=torch.float32) == "plain"


def test_what_is_not_installed_is_done_without(hopper: dict[str, bool]) -> None:
    hopper["fa4"] = False
    assert [chosen(length) for length in (8192, CUDNN_LENGTH, CUDNN_LENGTH + 1)] == ["cudnn", "cudnn", "flash"]
    hopper["cudnn"] = False
    assert chosen(8192) == chosen(100) == "flash"
    hopper["fa4"] = True  # shorter sequences of the same batch have no implementation beside it
    assert chosen(8192) == "flash"


def test_an_implementation_can_be_asked_for(hopper: dict[str, bool], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in attention.BACKENDS:
        monkeypatch.setenv("FINEMILL_ATTENTION", name)
        assert chosen(100) == chosen(8192) == name
    monkeypatch.setenv("FINEMILL_ATTENTION", "triton")
    with pytest.raises(UserError, match="FINEMILL_ATTENTION is 'triton': allowed are fa4, cudnn, flash, plain"):
        chosen(100)


@pytest.mark.gpu
@pytest.mark.parametrize("workspace", [None, 1])  # all at once, and a key head of a sequence at a time
@pytest.mark.parametrize(
    "lengths", [[256] * 4, [300, 1, 77, 640], [1500, 640, 300, 299, 77, 77, 1], [5000, 4100, 0, 900, 20], [4096] * 2]
)
def test_the_fast_backends_agree_with_the_plain_one(
    lengths: list[int], workspace: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).int().cuda()
    uniform = (len(lengths), lengths[0]) if len(set(lengths)) == 1 else None
    sequences = Sequences(cu_seqlens, max(lengths), uniform, () if uniform else length_classes(lengths))
    shapes = ((8, 128), (2, 128), (2, 128), (8, 128))
    q, k, v, dout = (torch.randn(sum(lengths), *shape, device="cuda", dtype=torch.bfloat16) for shape in shapes)
    results = {}
    fast = ["flash", "cudnn", ""] + ["fa4"] * attention_fa4.available(cu_seqlens.device)
    for name in ("plain", *fast):
        monkeypatch.setenv("FINEMILL_ATTENTION", name)
        out, saved = attention_forward(q, k, v, sequences, 128**-0.5)
        results[name] = (out, *attention_backward(dout, q, k, v, out, saved, sequences, 128**-0.5, workspace))
        again = attention_backward(dout, q, k, v, out, saved, sequences, 128**-0.5, workspace)
        assert all(torch.equal(a, b) for a, b in zip(again, results[name][1:], strict=True))
    for name in fast:
        for got, plain in zip(results[name], results["plain"], strict=True):
            assert (got.double() - plain.double()).norm() < 0.01 * plain.double().norm()
