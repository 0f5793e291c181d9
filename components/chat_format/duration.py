"""In how many steps and hours a named model trains on the examples, on a named card: the kernels' own plan."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from finemill.components.chat_format.config import ChatFormatConfig
from finemill.components.chat_format.packing import num_packs_of_all
from finemill.kernels.planning.from_config import workload_of_config
from finemill.kernels.planning.model_shapes import MIXTURES, SHAPES
from finemill.kernels.planning.planner import plan_step
from finemill.kernels.planning.rates import RATES

_RANK = 16


def training_time(lengths: NDArray[np.integer[Any]], config: ChatFormatConfig) -> dict[str, Any]:
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

    def seconds(sequences: int, row: int) -> float:
        tokens = min(asked.global_batch_size, sequences) * row
        work = workload_of_config(model, rank=_RANK, quantized=True, tokens=tokens, row=row)
        return plan_step(work, int(asked.memory_gb * 2**30), rates=RATES[asked.gpu], allow_stream=True).seconds

    examples, packs = len(lengths), num_packs_of_all(lengths, room)
    tokens, per_step = int(lengths.sum()), asked.global_batch_size
    return asked.model_dump() | steps_and_hours(examples, packs, tokens, seconds, sequences_per_step=per_step)


def steps_and_hours(
    examples: int,
    packs: int,
    tokens: int,
    seconds: Callable[[int, int], float],
    *,
    sequences_per_step: int,
    epochs: int = 1,
) -> dict[str, float]:
    """Steps and hours of training, with the examples in packs and one by one.

    Args:
        tokens: of all examples.
        seconds: of a step, by the number of sequences in all and the tokens of one.
    """
    found: dict[str, float] = {}
    for name, sequences in (("packed", packs), ("one_by_one", examples)):
        steps = epochs * math.ceil(sequences / sequences_per_step)
        found[f"steps_{name}"] = steps
        found[f"hours_{name}"] = float(f"{steps * seconds(sequences, math.ceil(tokens / sequences)) / 3600:.3g}")
    return found
