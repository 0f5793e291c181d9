"""Types per tensor that cost the least accuracy at a size: measured errors, then a choice under a budget."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from gguf import GGML_QUANT_SIZES
from gguf import GGMLQuantizationType as Type
from numpy.typing import NDArray

from finemill.components.gguf_quantize.config import Quantization
from finemill.components.gguf_quantize.convert import Array, SourceModel
from finemill.components.gguf_quantize.ggml import dequantize, quantize, row_bytes
from finemill.components.gguf_quantize.sensitivity import Use
from finemill.components.gguf_quantize.write import mixture_of

# What llama.cpp decodes fast and another does not beat at its size.
_CANDIDATES = (
    Type.Q3_K, Type.IQ4_XS, Type.IQ4_NL, Type.Q4_K, Type.Q5_K, Type.Q5_0, Type.Q5_1,
    Type.Q6_K, Type.Q8_0,
)  # fmt: skip
# Values of a tensor that are rounded to find its error.
_SAMPLED_VALUES = 1 << 18


@dataclass(frozen=True)
class Option:
    """A tensor in one type: its bytes, and the KL divergence that its rounding costs, in nats per token."""

    type: Type
    num_bytes: int
    error: float


def measure_options(
    source: SourceModel, uses: Mapping[str, Sequence[Use]], imatrix: Mapping[str, Array], num_threads: int
) -> dict[str, list[Option]]:
    """Each type that a tensor's row length allows, with its measured error, for every matrix in `uses`.

    Args:
        uses: the places where the model reads a matrix, by GGUF name.
        imatrix: importance of each column, as the written tensor is rounded with it.
    """
    return {name: _options(values, uses[name], imatrix.get(name), num_threads) for name, values in source.tensors(uses)}


def _options(values: Array, uses: Sequence[Use], imatrix: Array | None, num_threads: int) -> list[Option]:
    num_rows, length = values.shape
    importance = np.sum([use.importance(num_rows) for use in uses], axis=0)
    picked, counts = _sample(importance, max(1, _SAMPLED_VALUES // length))
    part = np.ascontiguousarray(values[picked])
    found = []
    for type_ in _CANDIDATES:
        if length % GGML_QUANT_SIZES[type_][0]:
            continue
        rounded = dequantize(quantize(part, type_, num_threads, imatrix), type_, length, num_threads)
        error = sum(use.divergence(rounded - part, picked, counts) for use in uses)
        found.append(Option(type_, num_rows * row_bytes(type_, length), error))
    return found


def choose_types(
    source: SourceModel, options: Mapping[str, Sequence[Option]], quantization: Quantization
) -> dict[str, Type]:
    """The types of all matrices in `options` that together are no larger than in the mixture of that size."""
    mixture = mixture_of(source, quantization, has_imatrix=True)
    # What the mixture leaves in 32 bits, as a router, is no matrix to save on.
    open_ones = {name: of for name, of in options.items() if mixture[name].type != Type.F32}
    budget = sum(
        shape[0] * row_bytes(mixture[name].type, shape[1]) for name, shape in source.shapes() if name in open_ones
    )
    return choose(open_ones, budget)


def _sample(importance: Array, count: int) -> tuple[NDArray[np.int64], Array]:
    """Rows that stand for all, those that matter more often: their indices, and how many each one stands for."""
    if len(importance) <= count:
        return np.arange(len(importance)), np.ones(len(importance), np.float32)
    chance = importance / importance.sum() + 1 / len(importance)
    steps = np.cumsum(chance) * count / chance.sum()
    picked = np.unique(np.searchsorted(steps, np.arange(count) + 0.5))
    return picked, (chance.sum() / (chance[picked] * count)).clip(min=1).astype(np.float32)


def choose(choices: Mapping[str, Sequence[Option]], budget: int) -> dict[str, Type]:
    """One type per tensor with the smallest total error whose bytes fit `budget`.

    Every tensor starts at its smallest type; what lowers the error most per byte is bought first. Only types on the
    lower convex hull of a tensor's (bytes, error) are ever bought, so that the order is right (Lagrange).
    """
    hulls = {name: _hull(of) for name, of in choices.items()}
    left = budget - sum(hull[0].num_bytes for hull in hulls.values())
    chosen = {name: hull[0].type for name, hull in hulls.items()}
    steps = sorted(
        (
            ((old.error - new.error) / (new.num_bytes - old.num_bytes), name, new.num_bytes - old.num_bytes, new.type)
            for name, hull in hulls.items()
            for old, new in pairwise(hull)
        ),
        key=lambda step: -step[0],
    )
    full: set[str] = set()
    for _, name, cost, type_ in steps:
        if name in full or cost > left:
            full.add(name)
            continue
        left -= cost
        chosen[name] = type_
    return chosen


def _hull(of: Sequence[Option]) -> list[Option]:
    """The options that no mixture of two others beats, from small to large."""
    hull: list[Option] = []
    for option in sorted(of, key=lambda option: (option.num_bytes, option.error)):
        if hull and option.error >= hull[-1].error:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) <= _slope(hull[-1], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(old: Option, new: Option) -> float:
    return (old.error - new.error) / (new.num_bytes - old.num_bytes)
