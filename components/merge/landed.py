"""The files, and whether they hold what the adapter says: every tensor read back, and of a stack every expert."""

import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch

from finemill.artifacts.model import LandedTensor
from finemill.components.merge.merged import MergedModel, Part, slices
from finemill.errors import StepError
from finemill.models.stored_model import Group, StoredModel
from finemill.models.write_weights import Shapes, WeightFiles

# Of the written change: products summed in another order round to another neighbour now and then.
_TOLERANCE = 0.02
_FLOAT32_STEP = 2.0**-20


def write_checked(
    merged: MergedModel, expected: MergedModel, folder: Path, shapes: Shapes, max_shard_size: str
) -> list[LandedTensor]:
    """Write the merged model, and compare what the files hold of every parameter with base and adapter.

    That is done right after it was written, from the file's own bytes, for many parameters at once.

    Args:
        merged: what is written.
        expected: base and adapter, opened anew. Both are used up.
    Returns: what came of each change, in the order of the files.
    Raises: StepError: a tensor, or one expert of a stack, is not what base and adapter make of it.
    """
    threads = torch.get_num_threads()
    with WeightFiles(folder, shapes, max_shard_size) as files:
        written = StoredModel(folder)

        @torch.inference_mode()
        def write(job: Sequence[Group]) -> list[LandedTensor]:
            for group in job:
                for key, first_row, values in merged.pieces(group):
                    files.write(key, values, first_row)
            for group in job:
                merged.forget(group)
            landed = [_check(name, written, expected) for group in job for name in group.names]
            for group in job:
                expected.forget(group)
            return landed

        jobs = merged.jobs()
        by_rows = [job for job in jobs if all(map(merged.takes_rows, job))]
        # What needs whole matrices is done one by one, by all threads together.
        landed = [tensor for job in jobs if job not in by_rows for tensor in write(job)]
        torch.set_num_threads(1)
        try:
            with ThreadPoolExecutor(threads) as pool:
                landed += [tensor for tensors in pool.map(write, by_rows) for tensor in tensors]
        finally:
            torch.set_num_threads(threads)
    if missed := written.group_of.keys() - {tensor.name for tensor in landed}:
        raise StepError(f"merge: {min(missed)} is in the written files, and nothing was to be written there")
    order = {name: number for number, name in enumerate(written.group_of)}
    return sorted((tensor for tensor in landed if tensor.meant), key=lambda tensor: order[tensor.name])


def _check(name: str, written: StoredModel, merged: MergedModel) -> LandedTensor:
    dtype = written.tensors[next(iter(written.group_of[name].keys))].torch_dtype
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


def _compare(expected: Part, found: torch.Tensor, dtype: torch.dtype) -> _Part:
    if found.shape != expected.shape:
        return _Part(holds=False, lost=math.inf)
    if expected.is_base and torch.equal(expected.base.to(dtype), found):
        return _Part(holds=True)
    meant = along = lost = off = size = 0.0
    for rows in slices(found.shape):
        wanted, change = expected.changed_rows(rows)
        missed = found[rows].float() - wanted
        meant += _square(change)
        along += _product(change, missed)
        lost += _square(missed)
        size += _square(wanted)
        if not torch.equal(rounded := wanted.to(dtype), found[rows]):
            off += _square(found[rows].float() - rounded.float())
    # What is found is what was meant and what was lost.
    norm = math.sqrt(max(meant + 2 * along + lost, 0.0))
    # Also of a file with NaN.
    holds = off <= (_TOLERANCE * norm + _FLOAT32_STEP * math.sqrt(size)) ** 2
    return _Part(holds, math.sqrt(meant), norm, math.sqrt(lost), meant + along)


def _product(one: torch.Tensor, other: torch.Tensor) -> float:
    return float(one.flatten() @ other.flatten())


def _square(values: torch.Tensor) -> float:
    return _product(values, values)
