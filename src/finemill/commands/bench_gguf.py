"""`finemill bench gguf`: what each GGUF type costs a model, and what dynamic types cost at the same sizes.

Every matrix is rounded by llama.cpp's own code with the importance matrix of the training rows, decoded again, and the
model that this makes is compared with the unrounded one at every position of held-out rows, in float32.
"""

import argparse
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from gguf import GGMLQuantizationType as Type
from pydantic import TypeAdapter, ValidationError

from finemill.artifacts.dataset import read_held_out, spread
from finemill.commands.parser import CommandParser, count
from finemill.commands.plot import plot, stack
from finemill.components.gguf_quantize.config import DYNAMIC, Quantization, size_of
from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.dynamic import choose_types, measure_options
from finemill.components.gguf_quantize.ggml import dequantize, quantize, row_bytes
from finemill.components.gguf_quantize.imatrix import channel_importance
from finemill.components.gguf_quantize.sensitivity import uses
from finemill.components.gguf_quantize.write import mixture_of
from finemill.errors import UserError
from finemill.models.base.resolve import resolve_base_model
from finemill.models.causal_lm import load_causal_lm
from finemill.models.cores import available_cores
from finemill.models.stored_model import StoredModel
from finemill.models.token_rows import check_token_ids
from finemill.storage.store import artifact_folder

_TYPES = ("Q3_K_M", "IQ4_XS", "Q4_K_S", "Q4_K_M", "Q5_K_M", "Q6_K")


@dataclass(frozen=True)
class Cost:
    """What a type costs: KL in nats per token, mean and 99.9th percentile over `positions`; `mb` of all tensors."""

    quantization: Quantization
    mb: float
    kl: float
    kl_p999: float
    perplexity: float
    top1_agreement: float
    positions: int


def main(argv: list[str]) -> int:
    """Measure and print. Returns: the exit code."""
    parser = CommandParser(prog="finemill bench gguf", description=(__doc__ or "").splitlines()[0])
    parser.add_argument(
        "--model", default="builtin:tiny-qwen3", help="an unquantized model (default: the built-in one)"
    )
    parser.add_argument(
        "--dataset",
        required=True,
        help="chat-format's output, a folder or reference: errors are measured on train rows, KL on test rows",
    )
    parser.add_argument("--quantizations", nargs="+", default=[*_TYPES, *(f"{DYNAMIC}{name}" for name in _TYPES)])
    parser.add_argument("--imatrix-rows", type=count, default=64, help="training rows (default: 64)")
    parser.add_argument("--rows", type=count, default=128, help="held-out rows (default: 128)")
    parser.add_argument("--plot", type=Path, help="an SVG of KL and perplexity against size")
    parser.add_argument("--json", action="store_true", help="an object per type instead of a table")
    args = parser.parse_args(argv)
    try:
        names = TypeAdapter(list[Quantization]).validate_python(args.quantizations)
    except ValidationError as error:
        raise UserError(f"bench gguf: {error.errors()[0]['input']!r} is no quantization of gguf-quantize") from None
    costs = []
    for cost in _costs(args, names):
        costs.append(cost)
        print(json.dumps(asdict(cost)) if args.json else _line(cost), flush=True)
    if args.plot:
        series = {
            "dynamic": [cost for cost in costs if cost.quantization.startswith(DYNAMIC)],
            "uniform": [cost for cost in costs if not cost.quantization.startswith(DYNAMIC)],
        }
        args.plot.write_text(_picture(series), encoding="utf-8")
    return 0


def _picture(series: Mapping[str, Sequence[Cost]]) -> str:
    """KL divergence and perplexity against size."""
    of_kl = {name: [(cost.mb, cost.kl, size_of(cost.quantization)) for cost in found] for name, found in series.items()}
    of_perplexity = {
        name: [(cost.mb, cost.perplexity, size_of(cost.quantization)) for cost in found]
        for name, found in series.items()
    }
    return stack([plot(of_kl, x="MB", y="KL, nats per token"), plot(of_perplexity, x="MB", y="perplexity")])


def _line(cost: Cost) -> str:
    return (
        f"| {cost.quantization} | {cost.mb:.4g} | {cost.kl:.5f} | {cost.kl_p999:.4f} | {cost.perplexity:.4f} | "
        f"{cost.top1_agreement:.2%} | {cost.positions} |"
    )


def _costs(args: argparse.Namespace, names: Sequence[Quantization]) -> Iterator[Cost]:
    dataset = artifact_folder(args.dataset, "dataset", "chat-format")
    train = [row.input_ids for row in spread(read_held_out(dataset, "train"), args.imatrix_rows)]
    test = [row.input_ids for row in spread(read_held_out(dataset, "test"), args.rows)]
    model = resolve_base_model(args.model).path
    stored, source = StoredModel(model), SourceModel(model)
    source.check()
    check_token_ids([*train, *test], source.num_tokens, args.dataset)
    if source.num_experts:
        raise UserError(f"bench gguf: {args.model} is a mixture of experts, whose stacks are not measured here")
    imatrix = {name: found.weights for name, found in channel_importance(stored, source, train).items()}
    options = measure_options(source, uses(stored, source, train), imatrix, available_cores())
    comparison = _Comparison(model, source, imatrix, test)
    for name in names:
        types = {tensor: chosen.type for tensor, chosen in mixture_of(source, name, has_imatrix=True).items()}
        if name.startswith(DYNAMIC):
            types |= choose_types(source, options, name)
        yield comparison.cost(name, types)


class _Comparison:
    """The model twice: as it is, and rounded in place of it."""

    def __init__(
        self, folder: Path, source: SourceModel, imatrix: Mapping[str, Array], rows: Sequence[Sequence[int]]
    ) -> None:
        self._device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self._model = load_causal_lm(folder, dtype=torch.float32).to(self._device)
        self._rounded = load_causal_lm(folder, dtype=torch.float32).to(self._device)
        self._source = source
        self._imatrix = imatrix
        self._rows = rows

    @torch.inference_mode()
    def cost(self, name: Quantization, types: Mapping[str, Type]) -> Cost:
        """What it costs to round each tensor to its type."""
        size = 0
        for key, tensor in self._source.names().items():
            parameter = self._model.get_parameter(key)
            rows = parameter.shape[0] if parameter.dim() == 2 else 1
            size += rows * row_bytes(types[tensor], parameter.shape[-1])
            if parameter.dim() == 2:
                values = self._round(parameter, types[tensor], self._imatrix.get(tensor))
                self._rounded.get_parameter(key).copy_(values)
        divergences, losses, agrees = [], [], []
        for row in self._rows:
            ids = torch.tensor([row], device=self._device)
            log_p_TV, log_q_TV = (model(ids).logits[0].log_softmax(-1) for model in (self._model, self._rounded))
            divergences.append((log_p_TV.exp() * (log_p_TV - log_q_TV)).double().sum(-1))
            losses.append(-log_q_TV[:-1].gather(-1, ids[0, 1:, None]))
            agrees.append((log_p_TV.argmax(-1) == log_q_TV.argmax(-1)).double())
        kl = torch.cat(divergences).cpu()
        return Cost(
            quantization=name,
            mb=size / 1e6,
            kl=float(kl.mean()),
            kl_p999=float(kl.sort().values[math.ceil(0.999 * len(kl)) - 1]),
            perplexity=float(torch.cat(losses).mean().exp()),
            top1_agreement=float(torch.cat(agrees).mean()),
            positions=len(kl),
        )

    def _round(self, parameter: torch.Tensor, type_: Type, weights: Array | None) -> Any:
        """Rows are rounded by themselves, so that their order in the file does not matter."""
        if type_ == Type.F32:
            return parameter
        values = parameter.cpu().numpy()
        encoded = quantize(values, type_, available_cores(), weights)
        return torch.from_numpy(dequantize(encoded, type_, values.shape[-1], available_cores()))
