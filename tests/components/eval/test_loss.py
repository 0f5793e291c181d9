import math
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from finemill.artifacts.dataset import HeldOutRow
from finemill.components.eval.loss import assistant_losses


@dataclass
class Config:
    vocab_size: int = 4


class FixedLogits:
    """Predicts token t + 1 after token t with logit 1, all others 0, whatever came before."""

    device = torch.device("cpu")
    config = Config()

    def __call__(self, input_ids: torch.Tensor) -> Any:
        @dataclass
        class Output:
            logits: torch.Tensor

        return Output(torch.nn.functional.one_hot((input_ids + 1) % 4, 4).float())


def held_out(input_ids: list[int], labels: list[int]) -> HeldOutRow:
    return HeldOutRow(id="r", source="s", input_ids=input_ids, labels=labels, prompt="", completion="")


def test_loss_is_over_labelled_tokens_only() -> None:
    hit, miss = math.log(math.e + 3) - 1, math.log(math.e + 3)
    rows = [
        held_out([0, 1, 2], [-100, 1, 2]),
        held_out([0, 1, 3, 0, 1], [-100, -100, 3, 0, -100]),
        held_out([2, 3], [-100, -100]),
    ]
    (first, second, third) = assistant_losses(FixedLogits(), rows)
    assert first == (pytest.approx(2 * hit), 2)
    assert second == (pytest.approx(miss + hit), 2)
    assert third == (0.0, 0)


def test_a_label_on_the_first_token_counts_for_nothing() -> None:
    assert assistant_losses(FixedLogits(), [held_out([0, 1], [0, 1])])[0][1] == 1
