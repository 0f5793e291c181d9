"""In how many steps and hours a named model trains on the examples, on a named card: the kernels' own plan."""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.packing import PACKED_ROWS, num_packs
from finemill.kernels.planning.from_config import workload_of_config
from finemill.kernels.planning.model_shapes import MIXTURES, SHAPES
from finemill.kernels.planning.planner import plan_step
from finemill.kernels.planning.rates import RATES

_RANK = 16


def training_time(lengths: NDArray[np.int64], config: ChatFormatConfig) -> dict[str, Any]:
    """Steps and hours of one epoch, with the examples in packs of the longest length and one by one.

    Args:
        lengths: tokens of each training example, at least one.
        config: the step's, with an estimate.
    Raises: NoPlanError: a step does not fit the memory.
    """
    asked = config.estimate
    assert asked is not None
    model = SHAPES[asked.model].config() if asked.model in SHAPES else MIXTURES[asked.model]
    room = max(config.max_length or 0, int(lengths.max()))
    counted = lengths[:PACKED_ROWS].tolist()
    packs = math.ceil(num_packs(counted, room) * len(lengths) / len(counted))
    found: dict[str, Any] = asked.model_dump()
    for name, sequences in (("packed", packs), ("one_by_one", len(lengths))):
        row = math.ceil(int(lengths.sum()) / sequences)
        tokens = min(asked.global_batch_size, sequences) * row
        work = workload_of_config(model, rank=_RANK, quantized=True, tokens=tokens, row=row)
        plan = plan_step(work, int(asked.memory_gb * 2**30), rates=RATES[asked.gpu], allow_stream=True)
        steps = math.ceil(sequences / asked.global_batch_size)
        found[f"steps_{name}"] = steps
        found[f"hours_{name}"] = float(f"{steps * plan.seconds / 3600:.3g}")
    return found
