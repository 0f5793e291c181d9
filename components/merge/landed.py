"""Whether the written files hold what the adapter says: every tensor read back, and of a stack every expert."""

import math
from dataclasses import dataclass

import torch

from finemill.artifacts.model import LandedTensor
from finemill.components.merge.merged import MergedModel
from finemill.errors import StepError
from finemill.models.stored_model import StoredModel
from finemill.models.weights import DTYPES

# Of the written change: products summed in another order round to another neighbour now and then.
_TOLERANCE = 0.02
_FLOAT32_STEP = 2.0**-20


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
    triples = zip(merged.base_parts(name), merged.expected_parts(name), written.parts(name), strict=True)
    parts = [_compare(*triple, dtype) for triple in triples]
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
    meant: float
    found: float
    lost: float
    along: float


def _compare(base: torch.Tensor, expected: torch.Tensor, found: torch.Tensor, dtype: torch.dtype) -> _Part:
    if found.shape != expected.shape:
        return _Part(holds=False, meant=float(expected.norm()), found=float(found.norm()), lost=math.inf, along=0.0)
    rounded = expected.to(dtype).float()
    if base.shape != expected.shape:
        # New tokens: nothing to subtract.
        base = expected
    holds = torch.equal(rounded, found)
    if not holds:
        allowed = _TOLERANCE * float((rounded - base).norm()) + _FLOAT32_STEP * float(expected.norm())
        holds = float((found - rounded).norm()) <= allowed
    meant, change = (expected - base).flatten(), (found - base).flatten()
    return _Part(
        holds=holds,
        meant=float(meant.norm()),
        found=float(change.norm()),
        lost=float((change - meant).norm()),
        along=float(meant @ change),
    )
