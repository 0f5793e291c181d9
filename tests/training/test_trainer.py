import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from finemill.errors import TemporaryError
from finemill.models.base.resolve import _resolve, resolve_base_model
from finemill.runtime.context import Unheard
from finemill.training.config import LoRATrainingConfig
from finemill.training.inputs import TrainingInputs
from finemill.training.trainer import run_training
from tests.contexts import training_context

LONG_AGO = 1_700_000_000


def test_training_ends_before_its_first_step_on_a_base_that_is_not_what_was_remembered(
    tiny_model_dir: Path, folder_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = Path(shutil.copytree(tiny_model_dir, tmp_path / "base"))
    weights = base / "model.safetensors"
    monkeypatch.setattr("finemill.storage.file_digests.REMEMBERED_BYTES", weights.stat().st_size)
    os.utime(weights, (LONG_AGO, LONG_AGO))
    resolve_base_model(str(base))
    with weights.open("r+b") as file:
        file.write(bytes(8))
    os.utime(weights, (LONG_AGO, LONG_AGO))
    _resolve.cache_clear()
    context = training_context(folder_store, Unheard(), base=str(base))
    loaded: list[Path] = []

    def build(scratch: Path, config: LoRATrainingConfig) -> Any:
        loaded.append(base)
        return object()

    inputs = TrainingInputs(base, tmp_path, object(), torch.device("cpu"))
    with pytest.raises(TemporaryError, match=r"model\.safetensors has changed without another size or time"):
        run_training(build, inputs, tmp_path / "output", LoRATrainingConfig(), context)
    assert loaded
