"""A real MLflow on SQLite, and small artifacts as the steps before `register` write them."""

import itertools
import json
import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from finemill.components.artifacts import Producer, Reference
from finemill.components.context import new_manifest
from finemill.components.storage.store import open_store


@pytest.fixture(scope="session")
def empty_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An MLflow database without any run: made once, because making its tables takes a second."""
    from mlflow import MlflowClient

    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(f"sqlite:///{path}").search_experiments()
    return path


@pytest.fixture
def tracking_uri(empty_database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The URI of an empty MLflow database of the test's own, set as `MLFLOW_TRACKING_URI`."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")
    uri = f"sqlite:///{tmp_path / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    return uri


Publish = Callable[..., str]


@pytest.fixture
def publish(folder_store: str) -> Publish:
    """Publish files as an artifact: `publish(kind, files, parents, config, metrics)`; in `folder_store` by default."""

    number = itertools.count()

    def publish(
        kind: str,
        files: Mapping[str, str | bytes | pa.Table],
        parents: Mapping[str, str] | None = None,
        config: Mapping[str, object] | None = None,
        metrics: Mapping[str, float] | None = None,
        store: str = folder_store,
    ) -> str:
        uri = f"{store}/{kind}/{next(number):04d}"
        staging = open_store(uri).staging_folder(uri)
        for name, content in files.items():
            if isinstance(content, pa.Table):
                pq.write_table(content, staging / name)
            else:
                (staging / name).write_bytes(content.encode() if isinstance(content, str) else content)
        made_by = Producer(step=kind, version="0.1.0", code="0" * 16, git_sha="c0ffee")
        manifest = new_manifest(kind, staging, made_by, parents=parents, config=config, metrics=metrics)
        return str(Reference(uri, open_store(uri).publish(staging, uri, manifest).digest))

    return publish


@pytest.fixture
def trained(publish: Publish, folder_store: str) -> Callable[..., dict[str, str]]:
    """References of an adapter, its merged model, GGUF files and evaluation.

    `trained(name, right=90, loss=0.5, rows=100, dataset="first")`: `right` of the rows answered exactly, mean `loss`;
    the base answers 10 and has a loss of 2. Rows and their difficulty are the same for every model.
    """

    def trained(
        name: str,
        *,
        right: int = 90,
        loss: float = 0.5,
        rows: int = 100,
        dataset: str = "first",
        store: str = folder_store,
    ) -> dict[str, str]:
        put = partial(publish, store=store)
        data = f"file:///data/{dataset}@sha256:{dataset.encode().hex():0<64.64}"
        adapter = put("adapter", {"adapter_config.json": name}, {"base_model": "builtin:tiny-qwen3", "dataset": data})
        model = put("model", {"config.json": name}, {"base_model": "builtin:tiny-qwen3", "adapter": adapter})
        gguf = put("gguf", {"gguf.json": name}, {"model": model, "dataset": data})
        samples = pa.Table.from_pylist(
            [*_rows("base", rows, right=10, loss=2.0), *_rows("tuned", rows, right=right, loss=loss)]
        )
        metrics = {
            "eval/base/exact_match": 10 / rows,
            "eval/tuned/exact_match": right / rows,
            "eval/base/loss": _mean_loss(samples, "base"),
            "eval/tuned/loss": _mean_loss(samples, "tuned"),
            "eval/base/perplexity": 7.4,
            "eval/tuned/perplexity": 1.6,
        }
        evaluation = put(
            "evaluation",
            {"samples.parquet": samples, "metrics.json": json.dumps(metrics), "report.md": f"# {name}"},
            {"dataset": data, "base_model": "builtin:tiny-qwen3", "adapter": adapter},
            config={"seed": 0},
            metrics=metrics,
        )
        return {"adapter": adapter, "model": model, "gguf": gguf, "evaluation": evaluation}

    return trained


def _rows(model: str, count: int, *, right: int, loss: float) -> list[dict[str, Any]]:
    random = np.random.default_rng(7)
    hardness, tokens = random.uniform(0.5, 1.5, count), random.integers(5, 50, count)
    own = np.random.default_rng(right).normal(0, 0.02, count)
    return [
        {
            "id": f"{index:016x}",
            "model": model,
            "prompt": f"What is {index}?",
            "completion": "",
            "exact_match": 1.0 if index < right else 0.0,
            "loss": float(loss * hardness[index] + own[index]),
            "num_tokens": int(tokens[index]),
        }
        for index in range(count)
    ]


def _mean_loss(samples: pa.Table, model: str) -> float:
    rows = [row for row in samples.to_pylist() if row["model"] == model]
    return float(np.average([row["loss"] for row in rows], weights=[row["num_tokens"] for row in rows]))
