from collections.abc import Callable
from pathlib import Path

import pytest

from finemill.cli import main
from finemill.commands.run import with_pinned_base
from finemill.components.merge.config import MergeConfig
from finemill.config import StepConfig
from finemill.models.base.resolve import _resolve

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class OfPipeline(StepConfig):
    base_model: str


def test_name_of_a_hub_s_model_is_replaced_by_its_commit_for_all_steps(add_to_hub: Callable[..., Path]) -> None:
    add_to_hub(COMMIT)
    _resolve.cache_clear()
    assert with_pinned_base(OfPipeline(base_model="finemill/tiny")).base_model == f"hf://finemill/tiny@{COMMIT}"


def test_other_references_and_configurations_without_a_base_stay(tiny_model_dir: Path) -> None:
    for reference in ("builtin:tiny-qwen3", str(tiny_model_dir)):
        assert with_pinned_base(OfPipeline(base_model=reference)).base_model == reference
    assert with_pinned_base(MergeConfig()) == MergeConfig()


def test_a_wrong_flag_is_not_blamed_on_the_file_that_comes_with_the_pipeline(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["run", "finetune", "--train-qlora.lora-r", "x"]) == 2
    assert capsys.readouterr().err.startswith("finemill run: --train-qlora.lora-r: 'train_qlora.lora_r': Input should")
