import pytest

from finemill.components.train_dpo.config import TrainDPOConfig
from finemill.config import parse_config
from finemill.errors import UserError


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"packing": True}, "unknown key 'packing'"),
        ({"loss_type": "best"}, "'loss_type': .*'sigmoid'"),
        (
            {"label_smoothing": 0.1},
            "acts with loss_type robust or exo_pair or aot or aot_unpaired only, not with 'sigmoid'",
        ),
        ({"loss_type": "robust", "label_smoothing": 0.5}, "'label_smoothing': .*less than 0.5"),
        ({"loss_type": "orpo", "sft_weight": 1.0}, "sft_weight 1.0 has no effect with loss_type 'orpo'"),
        ({"loss_type": "orpo", "precompute_ref_log_probs": True}, "precompute_ref_log_probs True has no effect"),
        ({"loss_type": "kto"}, "compares the rows of a forward pass: set per_device_train_batch_size to 2 or more"),
        ({"desirable_weight": 2.0}, "desirable_weight 2.0 has no effect with loss_type 'sigmoid': .* use 'kto'"),
        (
            {"method": "full", "rope_scaling": {"rope_type": "yarn", "factor": 2}},
            "rope_scaling gives the model other positions than the reference, .* set precompute_ref_log_probs",
        ),
        ({"loss_type": "exo_pair"}, "needs a label_smoothing above 0"),
        ({"target_modules": ["q_proj", "lm_head"]}, "TRL's losses would pass by"),
        ({"target_modules": []}, "target_modules is empty"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_config(TrainDPOConfig, values, "train-dpo")
    assert "\n" not in str(error.value)
