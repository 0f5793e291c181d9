"""Real preferences through data-prep, chat-format and train-dpo."""

from pathlib import Path

import pyarrow.parquet as pq

from finemill.components.train_dpo.rows import load_pairs
from finemill.runtime.run import run_step
from finemill.storage.store import fetch_artifact

FILE = Path(__file__).parents[2] / "data" / "dpo.json"
BASE = "builtin:tiny-qwen3"


def test_a_real_set_is_trained_on(folder_store: str) -> None:
    sources = {"sources": [{"uri": str(FILE)}], "test_size": 0, "validation_size": 0}
    rows = run_step("data-prep", store=folder_store, inputs={}, config=sources)
    formatted = {"rows": str(rows.reference), "base_model": BASE}
    dataset = run_step("chat-format", store=folder_store, inputs=formatted, config={"max_length": None})
    folder = fetch_artifact(dataset.reference)[0]
    assert len(load_pairs(folder, "train", 100_000)) == pq.read_metadata(folder / "train.parquet").num_rows == 10
    config = {"max_steps": 3, "gradient_accumulation_steps": 1, "max_length": 512, "logging_steps": 1}
    inputs = {"dataset": str(dataset.reference), "base_model": BASE}
    adapter = run_step("train-dpo", store=folder_store, inputs=inputs, config=config)
    assert adapter.manifest.kind == "adapter"
    assert adapter.manifest.metrics["train/num_steps"] == 3
