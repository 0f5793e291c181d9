"""The whole line on a mixture of experts, from rows to a promoted version and a GGUF file, in a bucket."""

import os
import re
from pathlib import Path

import pytest

from finemill.artifacts.gguf import read_gguf_record
from finemill.artifacts.model import read_merge
from tests.line.commands import LINE, SHORT, finemill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def copy_records(bucket: str, prefix: str, folder: Path) -> None:
    """Copy the JSON files of each artifact."""
    import boto3

    client = boto3.client("s3")
    for page in client.get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix):
        for key in (item["Key"] for item in page["Contents"] if item["Key"].endswith(".json")):
            path = folder / key.removeprefix(f"{prefix}/")
            path.parent.mkdir(parents=True, exist_ok=True)
            client.download_file(bucket, key, str(path))


def test_every_expert_is_trained_merged_and_exported(s3_store: str, tiny_mixture_dir: Path, tmp_path: Path) -> None:
    rows = ["--data-prep.sources", '[{uri: "example:reasoning", max_rows: 40}]']
    few = [*rows, "--eval.max-rows", "6", "--eval.max-new-tokens", "8", "--gguf-quantize.verify-rows", "0"]
    command = ["run", "finetune", "--store", s3_store, "--base-model", str(tiny_mixture_dir), *SHORT, *few]
    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    work, copies = tmp_path / "work", tmp_path / "copies"
    work.mkdir()
    result = finemill(*command, cwd=work, FINEMILL_CACHE=str(work / "cache"), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.findall(r"^\[\d/8\] (\S+) +done", result.stderr, re.MULTILINE) == LINE
    assert re.search(r"^registry .*version 1.*@champion", result.stdout, re.MULTILINE)
    # Nothing of a bucket's artifacts lies in the working folder: only the cache holds copies.
    left = {path.relative_to(work).parts[0] for path in work.rglob("*") if path.is_file()}
    assert left <= {"cache", "mlflow.db", "mlflow.db.lock", "mlflow-artifacts", "finemill-logs"}
    assert not list(work.glob("mlflow-artifacts/**/*.safetensors"))
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    copy_records(bucket, prefix, copies)
    assert {path.parent.parent.name for path in copies.glob("*/*/manifest.json")} >= set(LINE)
    (merged,), (exported,) = copies.glob("merge/*/*/merge.json"), copies.glob("gguf-quantize/*/*/gguf.json")
    record = read_merge(merged.parent)
    assert record
    changes = {tensor.name: tensor.experts for tensor in record.tensors if tensor.experts}
    assert len(changes) == 4
    assert all(len(experts) == 4 and min(experts) > 0 for experts in changes.values())
    file = read_gguf_record(exported.parent).files["Q8_0"]
    assert 0 < file.metrics["max_tensor_error"] < 0.01
    assert file.metrics["kl"] < 0.02
