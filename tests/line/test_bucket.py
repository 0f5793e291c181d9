"""The whole line in a bucket."""

import os
from pathlib import Path

import pytest

from tests.line.commands import LINE, SHORT, finemill

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200)]


def test_line_runs_on_s3(s3_store: str, tmp_path: Path) -> None:
    import boto3

    variables = {key: value for key, value in os.environ.items() if key.startswith("AWS_")}
    command = ["run", "finetune", "--store", s3_store, *SHORT]
    result = finemill(*command, cwd=tmp_path, FINEMILL_CACHE=str(tmp_path / "cache"), **variables)
    assert result.returncode == 0, result.stdout + result.stderr
    bucket, _, prefix = s3_store.removeprefix("s3://").partition("/")
    pages = boto3.client("s3").get_paginator("list_objects_v2").paginate(Bucket=bucket, Prefix=prefix)
    keys = [item["Key"].removeprefix(f"{prefix}/") for page in pages for item in page["Contents"]]
    assert {key.split("/")[0] for key in keys if key.endswith("/manifest.json")} >= set(LINE)
    # Nothing of a bucket's artifacts lies in the working folder: only the cache holds copies.
    left = {path.relative_to(tmp_path).parts[0] for path in tmp_path.rglob("*") if path.is_file()}
    assert left <= {"cache", "mlflow.db", "mlflow.db.lock", "mlflow-artifacts", "finemill-logs"}
    assert not list(tmp_path.glob("mlflow-artifacts/**/*.safetensors"))
