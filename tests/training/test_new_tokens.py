from typing import Any

import pytest

from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.errors import UserError
from finemill.training.new_tokens import with_new_tokens


def test_new_tokens_are_trained_beside_the_kernels_on_copies() -> None:
    config = TrainQLoRAConfig(gradient_checkpointing=False)
    assert with_new_tokens(config, 0) is config
    assert with_new_tokens(config, 2) == config.model_copy(update={"kernels": "off", "strategy": "ddp"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernels": "on"}, "kernels 'on', and the data set has 3 new tokens"),
        ({"strategy": "zero3"}, "strategy 'zero3' cuts or divides the embeddings, and of the 3 new tokens"),
        ({"context_parallel": 2}, "context_parallel 2 trains adapters alone, and the data set has 3 new tokens"),
    ],
)
def test_settings_that_train_no_rows_of_embeddings_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        with_new_tokens(TrainQLoRAConfig(**settings), 3)
