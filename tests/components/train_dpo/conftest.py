"""A dataset of preferences as data-prep and chat-format write it, and the context a step gets."""

from collections.abc import Callable
from pathlib import Path

import pytest

from finemill.runtime.context import StepContext
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact
from tests.contexts import training_context
from tests.recorder import ListRecorder


@pytest.fixture(scope="session")
def tiny_model_dir(short_model_dir: Path) -> Path:
    return short_model_dir


@pytest.fixture(scope="session")
def preferences(tmp_path_factory: pytest.TempPathFactory) -> Path:
    store = tmp_path_factory.mktemp("preferences").as_uri()
    config = {"sources": [{"uri": "example:preferences", "max_rows": 60}], "test_size": 0.1, "validation_size": 0.2}
    rows = run_step("data-prep", store=store, inputs={}, config=config)
    inputs = {"rows": str(rows.reference), "base_model": "builtin:tiny-qwen3"}
    return fetch_artifact(run_step("chat-format", store=store, inputs=inputs, config={}).reference)[0]


@pytest.fixture
def make_context(folder_store: str) -> Callable[[], StepContext]:
    """A new context over the same checkpoint store each time."""

    def make() -> StepContext:
        return training_context(folder_store, ListRecorder(), step="train-dpo")

    return make
