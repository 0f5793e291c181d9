"""Importance of input channels: how much a rounding error in a weight's column would show in the output."""

# B rows, T tokens of a row, N = B T tokens, K experts of a token, E experts, H channels

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from numpy.typing import NDArray

from finemill.components.gguf_quantize.convert import Array, SourceModel, text_name
from finemill.models.stored_model import StoredModel
from finemill.models.streaming import batches, streamed

Hook = Callable[[Any, tuple[torch.Tensor, ...]], None]


@dataclass(frozen=True)
class Importance:
    """What the inputs of a tensor were on some rows: of a stack, for each expert, else of one.

    `sums` has shape (E, input width), the sum of each channel's squares, and `counts` shape (E,), the tokens; float64.
    """

    sums: NDArray[np.float64]
    counts: NDArray[np.float64]
    is_stack: bool

    @property
    def weights(self) -> Array:
        """Mean squares, float32, of shape (E, input width) for a stack, else (input width,).

        An expert that no token came to weighs all its channels alike.
        """
        means = np.where(self.counts[:, None] > 0, self.sums / np.maximum(self.counts, 1)[:, None], 1)
        return means.astype(np.float32) if self.is_stack else means[0].astype(np.float32)


@torch.inference_mode()
def channel_importance(
    stored: StoredModel, source: SourceModel, rows: Sequence[Sequence[int]]
) -> dict[str, Importance]:
    """The importance of every input channel of every linear layer and expert, by GGUF tensor name.

    The same statistic as llama.cpp's `llama-imatrix`: quantizers minimize the error weighted by it.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    found = _Sums(source, device)
    with ExitStack() as stack:
        for module_name, module in stored.model.named_modules():
            if isinstance(module, torch.nn.Linear):
                hook = found.of_linear(module_name, module)
            elif isinstance(getattr(module, "gate_up_proj", None), torch.nn.Parameter):
                hook = found.of_experts(module_name, module)
            else:
                continue
            if hook:
                stack.callback(module.register_forward_pre_hook(hook).remove)
        stack.enter_context(streamed(stored.model, stored, device))
        for batch in batches(rows, device):
            found.mask_BT = batch.mask
            stored.model(input_ids=batch.input_ids, use_cache=False)
    return found.importance()


class _Sums:
    """Sums of squares and numbers of tokens, by GGUF tensor name."""

    def __init__(self, source: SourceModel, device: torch.device) -> None:
        self._shapes = dict(source.shapes())
        self._names = source.names()
        if source.ties_embeddings:
            self._names |= {"lm_head.weight": "token_embd.weight"}
        self._device = device
        self._sums: dict[str, torch.Tensor] = {}
        self._counts: dict[str, torch.Tensor] = {}
        self.mask_BT = torch.empty(0)

    def of_linear(self, path: str, module: torch.nn.Linear) -> Hook | None:
        """What adds a layer's inputs up; None of a layer that the file does not hold."""
        name = self._names.get(text_name(f"{path}.weight"))
        if name is None:
            return None
        self._begin(name)

        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            # A shared expert gets its tokens without their rows.
            values = inputs[0].reshape(-1, module.in_features)[self.mask_BT.reshape(-1)]
            self._add(name, 0, values)

        return add

    def of_experts(self, path: str, module: Any) -> Hook:
        """What adds up the inputs of each of a layer's experts, and of their second matrices."""
        prefix = re.sub(r"^model\.layers\.(\d+)\..*", r"blk.\1.ffn_", path)
        gate, up, down = (f"{prefix}{part}_exps.weight" for part in ("gate", "up", "down"))
        for name in (gate, up, down):
            self._begin(name)

        def add(_module: Any, inputs: tuple[torch.Tensor, ...]) -> None:
            values_NH, chosen_NK = inputs[0].reshape(-1, inputs[0].shape[-1]), inputs[1]
            own_N = self.mask_BT.reshape(-1)
            for expert in sorted(set(chosen_NK[own_N].flatten().tolist())):
                own_NH = values_NH[own_N & (chosen_NK == expert).any(-1)]
                first, second = torch.nn.functional.linear(own_NH, module.gate_up_proj[expert]).chunk(2, dim=-1)
                self._add(gate, expert, own_NH)
                self._add(up, expert, own_NH)
                self._add(down, expert, module.act_fn(first) * second)

        return add

    def importance(self) -> dict[str, Importance]:
        """All of them."""
        return {
            name: Importance(sums.cpu().numpy(), self._counts[name].numpy(), is_stack=len(self._shapes[name]) == 3)
            for name, sums in self._sums.items()
        }

    def _begin(self, name: str) -> None:
        shape = self._shapes[name]
        num_experts = shape[0] if len(shape) == 3 else 1
        self._sums[name] = torch.zeros(num_experts, shape[-1], dtype=torch.float64, device=self._device)
        self._counts[name] = torch.zeros(num_experts, dtype=torch.float64)

    def _add(self, name: str, expert: int, values: torch.Tensor) -> None:
        self._sums[name][expert] += values.double().square().sum(0)
        self._counts[name][expert] += len(values)


def write_imatrix(
    path: Path, importance: Mapping[str, Importance], rows: Sequence[Sequence[int]], dataset: str
) -> None:
    """Write the importance of channels as llama.cpp keeps it, for `llama-quantize --imatrix`.

    Args:
        rows: what it was computed on.
        dataset: a name for them.
    """
    writer = gguf.GGUFWriter(path, "imatrix")
    writer.add_type("imatrix")
    writer.add_array("imatrix.datasets", [dataset])
    writer.add_uint32("imatrix.chunk_count", len(rows))
    writer.add_uint32("imatrix.chunk_size", max(len(row) for row in rows))
    for name, found in importance.items():
        # Sums and numbers of tokens, so that files of several data sets can be added up.
        writer.add_tensor(f"{name}.in_sum2", found.sums.astype(np.float32))
        writer.add_tensor(f"{name}.counts", found.counts.astype(np.float32)[:, None])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
