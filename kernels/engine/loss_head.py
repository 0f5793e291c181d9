"""Final norm, LM head and cross-entropy over the labelled tokens only, without a (tokens x vocabulary) tensor.

    s = x + delta, n = rms_norm(s), z = n Wh^T, loss = sum_t cross_entropy(z[t], y[t])        labelled rows t only
    dn = dz Wh,  ds = rms_norm_backward(dn)                                      0 for rows without a label

Labelled rows are gathered, then walked in chunks: one GEMM writes a chunk's logits, the cross-entropy kernel turns them
into their gradient in place, a second GEMM turns that into dn in the memory of n. The head is frozen, so the gradient
is made in the forward and nothing of size V survives a chunk. Chunks have at least 512 rows where memory allows: the
head's arithmetic intensity equals the chunk length.

Shapes: x, delta (T, H); Wh (V, H); labels (T,); loss a scalar. Rounding as in transformers: logits in the compute
dtype, softmax in fp32, gradient of the logits in the compute dtype.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from finemill.kernels.ops.cross_entropy import cross_entropy_inplace
from finemill.kernels.ops.packing import PackedBatch
from finemill.kernels.ops.rms_norm import add_rms_norm_forward, rms_norm_backward

GATHER_BELOW = 7 / 8
"""Share of labelled tokens from which gathering them costs more than scoring the few others for nothing."""

# T tokens, M labelled tokens, H model width, V vocabulary


@dataclass
class HeadResult:
    """Sums over the labelled tokens, each a scalar fp32 tensor on the device, and the gradient of the residual stream.

    `grad` is (T, H + pad) with the gradient in its first H columns, None without `pad`. `by_row` has the terms of the
    sums, of the rows that were scored: (3, M), or (4, M) with each row's mean logit.
    """

    loss: Tensor
    entropy: Tensor
    correct: Tensor
    num_labels: int
    grad: Tensor | None
    by_row: Tensor
    rows: Tensor | None
    """(M,) tokens that `by_row` is of; None for all of them."""

    def by_token(self, tokens: int) -> Tensor:
        """Return `by_row` as (3 or 4, T), 0 for tokens that were not scored."""
        if self.rows is None:
            return self.by_row
        spread = self.by_row.new_zeros((len(self.by_row), tokens))
        return spread.index_copy_(1, self.rows, self.by_row)


def loss_head(
    x: Tensor,
    delta: Tensor,
    norm_weight: Tensor,
    eps: float,
    head_weight: Tensor,
    batch: PackedBatch,
    scale: Tensor | float,
    *,
    chunk: int,
    pad: int | None,
    mean_head: Tensor | None = None,
) -> HeadResult:
    """Compute the summed loss, and the gradient of `scale` times it.

    Args:
        x: (T, H) residual stream.
        delta: (T, H) last layer's output, still to be added; overwritten.
        norm_weight: (H,) of the final norm.
        eps: of the final norm.
        head_weight: (V, H).
        batch: labels and the rows that have one.
        scale: 1 / number of labelled tokens in the whole step, as a rule.
        chunk: rows of logits held at a time.
        pad: spare columns of the gradient; None computes no gradient.
        mean_head: (H, 1), mean of the head's rows, where mean logits are asked for.
    """
    rows = batch.loss_rows
    if rows is not None and rows.numel() >= GATHER_BELOW * x.shape[0]:
        rows = None
    labels = batch.labels if rows is None else batch.labels[rows]
    if rows is not None:
        x, delta = x.index_select(0, rows), delta.index_select(0, rows)
    total, normed, rstd = add_rms_norm_forward(x, delta, norm_weight, eps, sum_out=delta)
    num_rows, vocabulary = total.shape[0], head_weight.shape[0]
    terms = torch.zeros((3 if mean_head is None else 4, num_rows), dtype=torch.float32, device=x.device)
    if mean_head is not None:
        terms[3] = torch.mm(normed, mean_head).flatten()
    logits = block = torch.empty((min(chunk, num_rows), vocabulary), dtype=x.dtype, device=x.device)
    for begin in range(0, num_rows, chunk):
        part = slice(begin, min(begin + chunk, num_rows))
        block = logits[: part.stop - begin]
        torch.mm(normed[part], head_weight.t(), out=block)
        terms[0, part] = cross_entropy_inplace(
            block, labels[part], scale, grad=pad is not None, entropy_out=terms[1, part], correct_out=terms[2, part]
        )
        if pad is not None:
            torch.mm(block, head_weight, out=normed[part])
    del logits, block
    loss, entropy, correct = terms[:3].sum(dim=1)
    grad = None
    if pad is not None:
        grad = _scatter_grad(normed, total, norm_weight, rstd, rows, batch.num_tokens, pad)
    return HeadResult(loss, entropy, correct, num_rows, grad, terms, rows)


def _scatter_grad(
    grad_normed: Tensor, total: Tensor, norm_weight: Tensor, rstd: Tensor, rows: Tensor | None, tokens: int, pad: int
) -> Tensor:
    """Differentiate the norm and put the rows back to their tokens. Returns: (T, H + pad)."""
    width = total.shape[1]
    if rows is None:
        grad = torch.empty((tokens, width + pad), dtype=total.dtype, device=total.device)
        rms_norm_backward(grad_normed, total, norm_weight, rstd, out=grad[:, :width])
        return grad
    compact = rms_norm_backward(grad_normed, total, norm_weight, rstd)
    grad = torch.zeros((tokens, width + pad), dtype=total.dtype, device=total.device)
    grad[:, :width].index_copy_(0, rows, compact)
    return grad
