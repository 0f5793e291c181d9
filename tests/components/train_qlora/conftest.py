"""A tokenized dataset of two dozen rows, and the context a step gets."""

from collections.abc import Callable
from pathlib import Path
from random import Random

import pytest

from finemill.artifacts.dataset import IGNORE_INDEX, LabelledRow
from finemill.artifacts.splits import Split, split_path
from finemill.artifacts.tables import write_rows
from finemill.rows.examples.reasoning import reasoning_problem
from finemill.runtime.context import StepContext
from tests.contexts import training_context
from tests.recorder import ListRecorder


@pytest.fixture(scope="session")
def base_model(short_model_dir: Path) -> Path:
    return short_model_dir


@pytest.fixture(scope="session")
def dataset(base_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The columns of a dataset that training reads."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base_model)
    folder = tmp_path_factory.mktemp("dataset")
    rng = Random(0)
    counts: dict[Split, int] = {"train": 24, "validation": 4}
    for split, count in counts.items():
        rows = []
        for row in (reasoning_problem(rng).row() for _ in range(count)):
            user = {"role": "user", "content": row["problem"]}
            assistant = {"role": "assistant", "content": row["generated_solution"]}
            prompt = tokenizer.apply_chat_template([user], add_generation_prompt=True)["input_ids"]
            input_ids = tokenizer.apply_chat_template([user, assistant])["input_ids"]
            labels = [IGNORE_INDEX] * len(prompt) + input_ids[len(prompt) :]
            rows.append(LabelledRow(input_ids=input_ids, labels=labels))
        write_rows(split_path(folder, split), LabelledRow, rows)
    return folder


@pytest.fixture
def make_context(folder_store: str) -> Callable[[], StepContext]:
    """A new context over the same checkpoint store each time."""

    def make() -> StepContext:
        return training_context(folder_store, ListRecorder())

    return make
