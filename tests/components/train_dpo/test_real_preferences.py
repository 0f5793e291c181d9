"""A real set of preferences through data-prep, chat-format and train-dpo; skipped where it is not at hand."""

from pathlib import Path

import pyarrow.parquet as pq
import pytest

from finemill.components.train_dpo.rows import load_pairs
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

FILE = Path(__file__).parents[4] / "shared" / "data" / "dpo_en_demo.json"
BASE = "builtin:tiny-qwen3"


@pytest.mark.skipif(not FILE.is_file(), reason="needs the real data sets in ../shared/data")
def test_a_real_set_is_trained_on(folder_store: str) -> None:
    rows = run_step("data-prep", store=folder_store, inputs={}, config={"sources": [{"uri": str(FILE)}]})
    formatted = {"rows": str(rows.reference), "base_model": BASE}
    dataset = run_step("chat-format", store=folder_store, inputs=formatted, config={"max_length": None})
    folder = fetch_artifact(dataset.reference)[0]
    assert len(load_pairs(folder, "train", 100_000)) == pq.read_metadata(folder / "train.parquet").num_rows > 200
    config = {"max_steps": 3, "gradient_accumulation_steps": 1, "max_length": 512, "logging_steps": 1}
    inputs = {"dataset": str(dataset.reference), "base_model": BASE}
    adapter = run_step("train-dpo", store=folder_store, inputs=inputs, config=config)
    assert adapter.manifest.kind == "adapter"
    assert adapter.manifest.metrics["train/num_steps"] == 3
