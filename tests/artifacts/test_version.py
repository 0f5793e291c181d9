from pathlib import Path

import pytest

from finemill.artifacts.version import VersionRecord, read_version, write_version
from finemill.errors import UserError


def test_a_version_survives_its_file(tmp_path: Path) -> None:
    record = VersionRecord(
        registered_model_name="math",
        version=3,
        alias="challenger",
        registry="sqlite:///mlflow.db",
        run_id=None,
        source="file:///m",
        digest="0" * 64,
        artifacts={"model": "file:///m@sha256:0"},
    )
    write_version(tmp_path, record)
    assert read_version(tmp_path) == record


def test_a_missing_version_says_who_writes_it(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"version\.json not found: register writes it"):
        read_version(tmp_path)
