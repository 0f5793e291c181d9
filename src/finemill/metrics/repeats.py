"""What several answers to the same question say together."""

from collections.abc import Sequence
from math import comb

from finemill.metrics.maths import equal_answers


def pass_at_k(num_samples: int, num_right: int, k: int) -> float:
    """The chance that at least one of `k` of the samples, drawn without replacement, is right.

    Unbiased, unlike the rate of "any of the first k" (Chen et al., 2021, Evaluating large language models trained on
    code).
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"k is {k}: allowed is 1 to {num_samples}, the number of samples")
    return 1.0 - comb(num_samples - num_right, k) / comb(num_samples, k)


def majority(answers: Sequence[str | None]) -> str | None:
    """The answer that most of the samples give, equal values counted together; of a tie the one that came first.

    None where no sample gives one: what was cut or left out has no vote.
    """
    groups: list[list[str]] = []
    for answer in answers:
        if answer is None:
            continue
        group = next((group for group in groups if group[0] == answer or equal_answers(group[0], answer)), None)
        if group is None:
            groups.append([answer])
        else:
            group.append(answer)
    return max(groups, key=len)[0] if groups else None
