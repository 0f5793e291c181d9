"""cuDNN's backward stays within its workspace."""

import pytest
import torch

from finemill.kernels.ops import attention, attention_cudnn
from finemill.kernels.ops.attention import attention_backward
from finemill.kernels.ops.attention_cudnn import _PlanKey
from finemill.kernels.ops.packing import LengthClass, Sequences

ONE_HEAD = 2 * 128**2
SUMS = 8 * 300 * 4 * 8  # dq in fp32, dk and dv of each query head


@pytest.mark.parametrize(
    ("workspace", "calls"),
    [
        (SUMS + 3 * 4 * ONE_HEAD, [(0, 4, 3)]),
        (SUMS + 3 * 2 * ONE_HEAD, [(0, 2, 3), (2, 2, 3)]),
        (SUMS + 2 * 2 * ONE_HEAD, [(0, 4, 1), (0, 2, 2), (2, 2, 2)]),
        (1, [(0, 2, 1), (2, 2, 1)] * 3),
    ],
)
def test_cudnn_takes_fewer_heads_then_fewer_sequences_where_its_workspace_is_short(
    workspace: int, calls: list[tuple[int, int, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    ran, starts = [], []

    def run(key: _PlanKey, part: Sequences, buffers: dict[str, torch.Tensor]) -> None:
        ran.append((int(buffers["q"][0, 0, 0]), key.heads, part.count))
        starts.append(int(part.cu_seqlens[0]))
        assert buffers["stats"].shape[:2] == (part.count, key.heads)

    monkeypatch.setattr(attention, "backend", lambda q, sequences: "cudnn")
    monkeypatch.setattr(attention_cudnn, "_run", run)
    sequences = Sequences(torch.tensor([0, 100, 200, 300]), 128, None, (LengthClass(0, 3, 128),))
    q, kv = torch.arange(4.0)[None, :, None].repeat(300, 1, 8), torch.zeros(300, 2, 8)
    attention_backward(q, q, kv, kv, q, (torch.zeros(3, 4, 128, 1),), sequences, 1.0, workspace)
    assert ran == calls
    assert starts == sorted(starts)
    assert starts[0] == 0
