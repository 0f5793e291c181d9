"""Slots: the sequences that attention plans and CUDA graphs are made for, by length class, and what fits into them.

A graph's attention takes a fixed number of sequences of each length class (packing.length_classes). Any batch whose
longest sequence fits the first slot, the next longest the second and so on can run in it; what stays empty costs
little. So what was made for one batch serves most batches of a data set, and padding no sequence to the longest of all
keeps the gradient of the scores (sequences x length^2) small.
"""

from collections.abc import Sequence
from itertools import zip_longest

from finemill.kernels.ops.packing import Classes, LengthClass, length_classes, round_count

SLACK = 3
"""A batch may run in slots with up to this many times its scores; one that would waste more is worth its own graph.

Kernels skip most of what is empty: with half as many graphs as at 2, attention takes 4 to 6 % longer (bench/levers.md).
"""


def choose_slots(lengths: Sequence[int], known: Sequence[Classes]) -> Classes:
    """Choose slots for a batch: the tightest known ones that take it; else the tightest new ones that also take what
    some known ones do; else its own.

    Args:
        lengths: tokens of each sequence, longest first.
        known: slots that batches of this size have.
    """
    own = round_counts(length_classes(lengths))
    limit = SLACK * scores(own)
    takers = [slots for slots in known if takes(slots, lengths) and scores(slots) <= limit]
    wider = [slots for slots in (_union(own, other) for other in known) if scores(slots) <= limit]
    return min(takers or wider or [own], key=scores)


def takes(slots: Classes, lengths: Sequence[int]) -> bool:
    """Whether every sequence fits into the slot in its place."""
    return len(lengths) <= slots[-1].end and all(
        max(lengths[slot.first : slot.end], default=0) <= slot.bound for slot in slots
    )


def scores(slots: Classes) -> int:
    """Elements of a query head's scores, empty slots included."""
    return sum(slot.size * slot.bound**2 for slot in slots)


def round_counts(classes: Classes) -> Classes:
    """Raise the number of slots of each class to one that attention has kernels for."""
    rounded: list[LengthClass] = []
    for run in classes:
        first = rounded[-1].end if rounded else 0
        rounded.append(LengthClass(first, first + round_count(run.size), run.bound))
    return tuple(rounded)


def _union(left: Classes, right: Classes) -> Classes:
    """The tightest slots that take what either does."""
    bounds = [[slot.bound for slot in slots for _ in range(slot.size)] for slots in (left, right)]
    return round_counts(length_classes([*map(max, zip_longest(*bounds, fillvalue=0))]))
