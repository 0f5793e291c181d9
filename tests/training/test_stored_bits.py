"""A base that is quantized on the disk is trained on as it is, or refused in a line."""

from typing import Any

import pytest

from finemill.errors import UserError
from finemill.training.config import LoRATrainingConfig
from finemill.training.stored_bits import check_stored_bits

NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}


@pytest.mark.parametrize(
    ("stored", "settings", "message"),
    [
        ({"quant_method": "gptq", "bits": 4}, {}, "is stored quantized by gptq, .* pass the unquantized model"),
        ({"quant_method": "mxfp4"}, {"load_in_4bit": False}, "quantized by mxfp4"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, {"load_in_8bit": True}, r"quantized by LLM\.int8"),
        ({}, {"load_in_4bit": False}, ""),
        (NF4, {"load_in_4bit": False}, "stored in 4 bits, and 16 bits cannot be had of it"),
        (NF4, {"bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' has no effect .* stored with 'nf4'"),
        (NF4, {"bnb_4bit_use_double_quant": False}, "bnb_4bit_use_double_quant False has no effect"),
        (NF4 | {"bnb_4bit_use_double_quant": False}, {}, ""),
        (NF4 | {"bnb_4bit_use_double_quant": False}, {"bnb_4bit_use_double_quant": False}, ""),
    ],
)
def test_what_the_stored_bits_do_not_give_is_one_line(
    stored: dict[str, Any], settings: dict[str, Any], message: str
) -> None:
    model, config = {"quantization_config": stored} if stored else {}, LoRATrainingConfig(**settings)
    if not message:
        check_stored_bits(model, config, "folder")
        return
    with pytest.raises(UserError, match=message):
        check_stored_bits(model, config, "folder")
