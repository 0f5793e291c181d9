"""Which adapters can be left out of some rows of a batch."""

import pytest

from finemill.models.adapter import AdapterConfig, more_than_lora
from finemill.models.adapter_rows import can_switch_rows


@pytest.mark.parametrize(
    ("settings", "switches", "setting"),
    [
        ({}, True, None),
        ({"bias": "none", "lora_bias": False}, True, None),
        ({"bias": "all"}, False, "bias"),
        ({"bias": "lora_only"}, False, "bias"),
        ({"modules_to_save": ["norm"]}, False, "modules_to_save"),
        ({"use_dora": True}, False, "use_dora"),
        ({"trainable_token_indices": [3]}, False, "trainable_token_indices"),
    ],
)
def test_only_plain_lora_is_left_out_of_rows_and_served_beside_a_base(
    settings: dict[str, object], switches: bool, setting: str | None
) -> None:
    config = AdapterConfig.model_validate({"peft_type": "LORA", **settings})
    assert can_switch_rows(config) is switches
    assert more_than_lora(config) == setting
