import pytest
import yaml

from finemill.artifacts.manifest import Producer
from finemill.components.train_qlora.config import TrainQLoRAConfig
from finemill.config import parse_config
from finemill.errors import UserError
from finemill.runtime.run import _output_key


def output_key(**values: object) -> str:
    return _output_key(Producer(step="train-qlora", version="0", code="c"), TrainQLoRAConfig(**values), {}, {})


def test_how_it_is_checkpointed_does_not_change_where_output_and_checkpoints_are() -> None:
    assert output_key(resume="must", save_steps=3, save_total_limit=9) == output_key()
    assert output_key(seed=1) != output_key()


@pytest.mark.parametrize(("written", "read"), [("on", "on"), ("off", "off"), ("'off'", "off"), ("auto", "auto")])
def test_kernels_are_on_and_off_in_yaml_too(written: str, read: str) -> None:
    assert parse_config(TrainQLoRAConfig, yaml.safe_load(f"kernels: {written}"), "file").kernels == read


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"lora_rank": 8}, "unknown key 'lora_rank' .*lora_r"),
        ({"lora_r": 0}, "'lora_r': .*greater than 0"),
        ({"packing": True, "train_sampling_strategy": "group_by_length"}, "use 'random' or turn packing off"),
        ({"optim": "adamw"}, "'optim': .*'adamw_torch'"),
        ({"lr_scheduler_type": "constant", "warmup_steps": 5}, "no effect .* or use 'constant_with_warmup'"),
        ({"lr_scheduler_type": "cosine_with_restarts"}, "needs lr_num_cycles"),
        ({"lr_num_cycles": 3}, "lr_num_cycles 3 has no effect with lr_scheduler_type 'linear'"),
        ({"load_in_4bit": False, "bnb_4bit_quant_type": "fp4"}, "bnb_4bit_quant_type 'fp4' has no effect"),
        ({"load_in_4bit": False, "bnb_4bit_use_double_quant": False}, "has no effect on a base of 16 bits"),
        ({"kernels": "on", "gradient_checkpointing": False}, "gradient_checkpointing False has no effect"),
        ({"kernels": "on", "use_dora": True}, "kernels 'on' cannot train this, as use_dora is on"),
        ({"kernels": "on", "method": "full"}, "kernels 'on' cannot train this, as method is 'full'"),
        ({"kernels": "on", "load_in_8bit": True}, "as load_in_8bit is on, .* use kernels 'auto' or 'off'"),
        ({"kernels": "on", "bnb_4bit_quant_type": "fp4"}, "as bnb_4bit_quant_type is 'fp4'"),
        ({"kernels": "on", "modules_to_save": ["norm"]}, "as modules_to_save are trained"),
        ({"kernels": "on", "neftune_noise_alpha": 5}, "as neftune_noise_alpha is set"),
        ({"strategy": "shard", "train_router": True}, "strategy 'shard' cannot train this, as train_router is on"),
        ({"max_steps": 10, "num_train_epochs": 3}, "num_train_epochs 3.0 has no effect beside max_steps"),
        ({"max_length": 1}, "'max_length': .*greater than 1"),
        ({"target_modules": []}, "target_modules is empty"),
        (
            {"target_modules": "q_proj"},
            r"'q_proj' is none of all-linear, .*write the names of layers as a list, \[q_proj",
        ),
        ({"target_modules": ["mlp", "q_proj"]}, "'mlp' stands for layers by itself"),
        ({"report_to": "wandb"}, "'report_to': Input should be a list"),
        ({"target_modules": ["q_proj", "lm_head"]}, "TRL's losses would pass by"),
    ],
)
def test_a_wrong_value_is_refused_in_one_line(values: dict[str, object], message: str) -> None:
    with pytest.raises(UserError, match=message) as error:
        parse_config(TrainQLoRAConfig, values, "train-qlora")
    assert "\n" not in str(error.value)
