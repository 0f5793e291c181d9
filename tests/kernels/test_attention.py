"""Packed attention equals torch's attention sequence by sequence, gradients included."""

from itertools import pairwise

import pytest
import torch

from finemill.kernels import attention_fa4
from finemill.kernels.attention import attention_backward, attention_forward
from finemill.kernels.packing import Sequences, length_classes

LENGTHS = [5, 1, 0, 9]


def inputs(heads: int, kv_heads: int, head_dim: int, device: str):
    generator = torch.Generator().manual_seed(0)
    tokens = sum(LENGTHS)

    def draw(count: int) -> torch.Tensor:
        return torch.randn(tokens, count, head_dim, generator=generator, dtype=torch.float64).to(device)

    cu_seqlens = torch.tensor([0, *LENGTHS]).cumsum(0).int().to(device)
    return draw(heads), draw(kv_heads), draw(kv_heads), draw(heads), Sequences(cu_seqlens, max(LENGTHS))


def torch_attention(q, k, v, sequences):
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
def test_output_and_gradients_equal_torchs(heads, kv_heads, device):
    q, k, v, dout, sequences = inputs(heads, kv_heads, 8, device)
    leaves = [t.clone().requires_grad_() for t in (q, k, v)]
    expected = torch_attention(*leaves, sequences)
    expected.backward(dout)
    wide = torch.full((q.shape[0], heads * 8 + 3), float("nan"), dtype=q.dtype, device=device)
    out = wide[:, : heads * 8].unflatten(1, (heads, 8))
    result, saved = attention_forward(q, k, v, sequences, 8**-0.5, out)
    torch.testing.assert_close(result, expected)
    assert wide[:, heads * 8 :].isnan().all()
    grads = attention_backward(dout, q, k, v, out, saved, sequences, 8**-0.5)
    for grad, leaf in zip(grads, leaves, strict=True):
        torch.testing.assert_close(grad, leaf.grad)


def test_a_token_does_not_see_other_sequences_or_later_tokens(device):
    q, k, v, _, sequences = inputs(2, 1, 8, device)
    before, _ = attention_forward(q, k, v, sequences, 1.0)
    changed_k, changed_v = k.clone(), v.clone()
    changed_k[4:], changed_v[4:] = 7.0, -7.0
    after, _ = attention_forward(q, changed_k, changed_v, sequences, 1.0)
    assert torch.equal(before[:4], after[:4])
    assert not torch.equal(before[4], after[4])


@pytest.mark.gpu
@pytest.mark.parametrize(
    "lengths", [[256] * 4, [300, 1, 77, 640], [1500, 640, 300, 299, 77, 77, 1], [5000, 4100, 0, 900, 20], [4096] * 2]
)
def test_the_fast_backends_agree_with_the_plain_one(lengths, monkeypatch):
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
        results[name] = (out, *attention_backward(dout, q, k, v, out, saved, sequences, 128**-0.5))
        again = attention_backward(dout, q, k, v, out, saved, sequences, 128**-0.5)
        assert all(torch.equal(a, b) for a, b in zip(again, results[name][1:], strict=True))
    for name in fast:
        for got, plain in zip(results[name], results["plain"], strict=True):
            assert (got.double() - plain.double()).norm() < 0.01 * plain.double().norm()
