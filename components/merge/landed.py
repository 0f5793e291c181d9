"""Whether the written files hold what the adapter says: every tensor read back, and of a stack every expert."""

import math
from dataclasses import dataclass

import torch

from finemill.artifacts.model import LandedTensor
from finemill.components.merge.merged import ExpectedPart, MergedModel
from finemill.errors import StepError
from finemill.models.stored_model import StoredModel
from finemill.models.weights import DTYPES

# Of the written change: products summed in another order round to another neighbour now and then.
_TOLERANCE = 0.02
_FLOAT32_STEP = 2.0**-20
# What fits a core's cache: whole, an embedding would be in memory several times.
_VALUES_AT_ONCE = 1 << 19


@torch.inference_mode()
def check_written(written: StoredModel, merged: MergedModel) -> list[LandedTensor]:
    """Compare every written parameter with the base's and with the change that the adapter's own factors mean.

    Args:
        written: the files.
        merged: base and adapter, opened anew: nothing of it has been written. It is used up.
    Returns: what came of each change.
    Raises: StepError: a tensor, or one expert of a stack, is not what base and adapter make of it.
    """
    return [tensor for name in written.group_of if (tensor := _check(name, written, merged)).meant]


def _check(name: str, written: StoredModel, merged: MergedModel) -> LandedTensor:
    dtype = DTYPES[written.tensors[next(iter(written.group_of[name].keys))].dtype]
    pairs = zip(merged.expected_parts(name), written.parts(name, widen=False), strict=True)
    parts = [_compare(*pair, dtype) for pair in pairs]
    for number, part in enumerate(parts):
        if not part.holds:
            which = f"{name}, expert {number}," if len(parts) > 1 else name
            if name not in merged.changed:
                raise StepError(f"merge: {which} was changed on the way to the disk, and not by the adapter")
            raise StepError(
                f"merge: {which} is not written as base and adapter: a change of norm {part.meant:.3g} was meant, and "
                f"one of {part.found:.3g} is there, {part.lost:.3g} from it"
            )
    meant = math.hypot(*(part.meant for part in parts))
    return LandedTensor(
        name=name,
        meant=meant,
        lost=math.hypot(*(part.lost for part in parts)),
        share=sum(part.along for part in parts) / meant**2 if meant else 1.0,
        experts=tuple(part.meant for part in parts) if len(parts) > 1 else (),
    )


@dataclass(frozen=True)
class _Part:
    """One expert, or a whole tensor.

    `meant` and `found` are norms of the change, `along` their product, `lost` the norm of their difference.
    """

    holds: bool
    meant: float = 0.0
    found: float = 0.0
    lost: float = 0.0
    along: float = 0.0


def _compare(expected: ExpectedPart, found: torch.Tensor, dtype: torch.dtype) -> _Part:
    if found.shape != expected.shape:
        return _Part(holds=False, lost=math.inf)
    if expected.is_base and torch.equal(expected.base.to(dtype), found):
        return _Part(holds=True)
    # Of new tokens nothing is subtracted.
    has_base = expected.base.shape == expected.shape
    meant = change = lost = along = off = size = 0.0
    step = max(1, _VALUES_AT_ONCE // max(1, math.prod(found.shape[1:])))
    for first in range(0, len(found), step):
        rows = slice(first, first + step)
        wanted, own = expected.rows(rows), found[rows].float()
        base = expected.base[rows].float() if has_base else wanted
        meant_rows, found_rows = wanted - base, own - base
        meant += _square(meant_rows)
        change += _square(found_rows)
        along += _product(meant_rows, found_rows)
        lost += _square(found_rows - meant_rows)
        off += _square(own - wanted.to(dtype).float())
        size += _square(wanted)
    # Also of a file with NaN.
    holds = off <= (_TOLERANCE * math.sqrt(change) + _FLOAT32_STEP * math.sqrt(size)) ** 2
    return _Part(holds, math.sqrt(meant), math.sqrt(change), math.sqrt(lost), along)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten() @ other.flatten())


def _square(values: torch.Tensor) -> float:
    return _product(values, values)
